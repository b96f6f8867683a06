"""The outputs of the attention ops, allocated: all of a fake kernel, and what Triton fills."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(q: Tensor) -> torch.dtype:
    """The precision of masks and of the log-sum-exp."""
    return torch.promote_types(q.dtype, torch.float32)


def jvp_outputs(
    q: Tensor, v: Tensor, count: int, primal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, its log-sum-exp (both empty unless `primal`), and `count` tangents of o."""
    n, h, t, _ = q.shape
    dos = [_heads_inside(q, v.shape[-1]) for _ in range(count)]
    if not primal:
        return q.new_empty(0), q.new_empty(0, dtype=wide(q)), dos
    lse = q.new_empty(n, t, h, dtype=wide(q)).transpose(1, 2)
    return _heads_inside(q, v.shape[-1]), lse, dos


def backward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return tuple(_heads_inside(x, x.shape[-1]) for x in (q, k, v))  # type: ignore[return-value]


def _heads_inside(like: Tensor, columns: int) -> Tensor:
    """[N, H, rows, columns], as csrc/attention/cpu.cpp lays it out."""
    n, h, t, _ = like.shape
    if like.stride(0) < like.stride(2) and n > 1:
        return like.new_empty(t, n, h, columns).permute(1, 2, 0, 3)
    return like.new_empty(n, t, h, columns).transpose(1, 2)
