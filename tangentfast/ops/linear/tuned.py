"""Linear layers on a GPU: the Triton kernel or torch's products, whichever was measured faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.activation.reference import KINDS
from tangentfast.ops.fastest import Fastest

Results = tuple[Tensor, list[Tensor], Tensor | None]

# Multiplications of one product. Below, the launch is what takes time, and torch launches faster.
SMALLEST = 1 << 28

fastest = Fastest()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    rows: Sequence[Any],
    forced: bool = False,
) -> Results:
    """y, every dy, and z = x Wᵀ + b if there is an activation, without a graph.

    Args:
        x: [M, D]; weight [E, D]; bias [E] or None; residual [M, E] or None; kind: the activation.
        rows: (dx, dweight, dbias, dresidual), each like its primal or None.
        forced: to have the Triton kernel even where torch's products are faster.
    """
    if not forced and (x.device.type != "cuda" or x.shape[0] * weight.numel() < SMALLEST):
        return _torch(x, weight, bias, residual, kind, rows)
    kernel = import_module("tangentfast.ops.linear.triton")
    ways: list[Callable[[], Results]] = [
        lambda tile=tile: _triton(x, weight, bias, residual, kind, rows, tile)  # type: ignore[misc]
        for tile in kernel.tiles(x, epilogue=bool(kind) or residual is not None)
    ]
    if not forced:
        ways.insert(0, lambda: _torch(x, weight, bias, residual, kind, rows))
    if x.device.type != "cuda":  # Triton's interpreter
        return ways[0]()
    # Batches of nearly one size share a measurement: the last one of an epoch is shorter.
    size = (x.shape[0].bit_length(), *weight.shape)
    pattern = tuple(tuple(t is None for t in row) for row in rows)
    given = (bias is None, residual is None, kind, forced, torch.backends.cuda.matmul.allow_tf32)
    return ways[fastest((x.device, x.dtype, size, pattern, given), ways)]()


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: str,
    rows: Sequence[Any], tile: int,
) -> Results:  # fmt: skip
    columns = ([row[i] for row in rows] for i in range(4))
    y, *dys = torch.ops.tangentfast.linear_jvp_triton.default(
        x, weight, bias, residual, *columns, kind, bool(kind), tile
    )
    return y, dys[: len(rows)], dys[-1] if kind else None


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: str,
    rows: Sequence[Any],
) -> Results:  # fmt: skip
    z = F.linear(x, weight, bias)
    f, slope_times = KINDS.get(kind, (None, None))
    y = z if f is None else f(z)
    dys = []
    for dx, dweight, dbias, dresidual in rows:
        if dx is None and dweight is None:
            dy = torch.zeros_like(z) if dbias is None else dbias.expand_as(z)
        else:
            dy = F.linear(x if dx is None else dx, dweight if dx is None else weight, dbias)
            if dx is not None and dweight is not None:
                dy.addmm_(x, dweight.t())
        dy = dy if slope_times is None else slope_times(dy, z)
        dys.append(dy if dresidual is None else dy + dresidual)
    return y if residual is None else y + residual, dys, z if kind else None
