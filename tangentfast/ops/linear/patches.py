"""A convolution whose patches do not overlap (patch embedding) is a linear layer on patches.

torch's own convolution is slower there in its weight gradient, and in 16 bits altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.linear.op import LinearTangent, linear_jvp

# A patch of fewer numbers is not worth its copy.
SMALLEST = 512


def is_patches(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether `patches_jvp` should compute this convolution: judged by shapes and device alone."""
    size = tuple(weight.shape[2:])

    def each(option: Any) -> tuple[Any, ...]:
        return tuple(option) if isinstance(option, (tuple, list)) else (option,) * len(size)

    return (
        x.device.type == "cpu"
        and x.dim() == weight.dim()
        and x.numel() > 0
        and weight[0].numel() >= SMALLEST
        and each(stride) == size
        and set(each(padding)) <= {0, "valid"}
        and set(each(dilation)) == {1}
        and groups == 1
        and all(s >= p for s, p in zip(x.shape[2:], size, strict=True))
    )


def patches_jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None, tangents: Sequence[LinearTangent | None],
    *, narrow: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The convolution of x [N, C, *image] by weight [E, C, *patch], stride and patch being equal.

    Args, returns: as in `linear_jvp`; y and every dy are [N, E, *grid].
    """
    size = weight.shape[2:]

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else _patches(t, size)

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.flatten(1)

    with torch.no_grad():
        flattened = [t and LinearTangent(rows(t.dx), flat(t.dweight), t.dbias) for t in tangents]
    y, dys = linear_jvp(_patches(x, size), weight.flatten(1), bias, flattened, narrow=narrow)
    with torch.no_grad():
        images = [None if dy is None else _image(dy.expand(y.shape)) for dy in dys]
    return _image(y), images


def _patches(x: Tensor, size: Sequence[int]) -> Tensor:
    """[N, C, H, W] as [N, H / h, W / w, C h w]; a last patch that is not whole is left out."""
    grid = [s // p for s, p in zip(x.shape[2:], size, strict=True)]
    split = list(x.shape[:2])
    for i, (g, p) in enumerate(zip(grid, size, strict=True)):
        x = x.narrow(2 + i, 0, g * p)
        split += [g, p]
    order = (0, *range(2, x.dim() * 2 - 2, 2), 1, *range(3, x.dim() * 2 - 2, 2))
    return x.reshape(split).permute(order).reshape(x.shape[0], *grid, -1)


def _image(y: Tensor) -> Tensor:
    """[N, *grid, E] as [N, E, *grid], laid out as torch's convolution does."""
    return y.movedim(-1, 1).contiguous()
