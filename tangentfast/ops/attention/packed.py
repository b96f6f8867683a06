"""Queries, keys and values that are slices of one tensor, and gradients that are slices of one.

A projection gives [N, T, 3, H, D]; attention reads the three as they lie there, writes their
gradients into one tensor of that layout, and the backward of the slicing takes it as it is, where
torch fills a tensor of zeros for each slice, or stacks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.contract import plain


def is_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v [N, H, T, D] lie as the slices of a [N, T, 3, H, D] or [T, N, 3, H, D]."""
    heads, depth = q.shape[1], q.shape[3]
    return bool(
        q.shape == k.shape == v.shape
        and q.stride() == k.stride() == v.stride()
        and q.stride()[1::2] == (depth, 1)
        and k.storage_offset() - q.storage_offset() == heads * depth
        and v.storage_offset() - k.storage_offset() == heads * depth
    )


def unbind(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """``x.unbind(dim)``, whose backward copies nothing if the gradients are slices of one."""
    if torch.is_grad_enabled() and x.requires_grad and not plain(x):
        slices: tuple[Tensor, ...] = _Unbind.apply(x, dim)
        return slices
    return x.unbind(dim)


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The slices."""
        ctx.dim = dim
        return x.unbind(dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The tensor that the gradients are slices of; a stack where there is none."""
        whole = None if torch.is_grad_enabled() else _whole(grads)
        if whole is None:
            return torch.stack(grads, ctx.dim), None
        return whole.movedim(0, ctx.dim), None


def _whole(slices: tuple[Tensor, ...]) -> Tensor | None:
    """The tensor whose slices along a first dimension these are, in their order; or None."""
    first = slices[0]
    if plain(*slices) or len(slices) == 1:
        return None
    start = first.storage_offset()
    step = slices[1].storage_offset() - start
    memory, stride = first.untyped_storage().data_ptr(), first.stride()
    for i, s in enumerate(slices):
        if (
            s.untyped_storage().data_ptr() != memory
            or s.storage_offset() != start + i * step
            or s.stride() != stride
            or s.is_neg()
            or s.is_conj()
        ):
            return None
    return first.as_strided((len(slices), *first.shape), (step, *stride)) if step > 0 else None
