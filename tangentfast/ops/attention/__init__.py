"""Scaled-dot-product attention with K tangents: o and every do of one softmax.

The kernels never hold a [T, S] matrix of a head: the forward saves its log-sum-exp, from which the
backward computes the softmax again (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022,
arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangentfast.ops._old import choose, load_native, ordinary, register_triton
from tangentfast.ops.attention import reference
from tangentfast.ops.attention.outputs import backward_outputs, jvp_outputs, wide
from tangentfast.ops.attention.reference import Row

__all__ = ["attention_jvp"]

# Wider heads spill too many registers (tests/ops/test_attention_compiled.py counts them).
TRITON_WIDTH = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """o = softmax(scale q kᵀ + mask) v and K tangents of it.

    Args:
        q: [..., H, T, D]; k: [..., Hk, S, D]; v: [..., Hk, S, Dv]; Hk = H unless `gqa`.
        mask: boolean (True: attend) or added to the scores; broadcast to [..., H, T, S]; or None.
        dropout, causal, scale, gqa: as in ``torch.nn.functional.scaled_dot_product_attention``.
        tangents: K rows (dq, dk, dv, dmask), each shaped like its primal or None; a row may be
            None.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None (see
            `tangentfast.ops.backend`). Dropout, empty tensors and operands whose batch dimensions
            differ run on the reference; with Triton also float64, heads wider than 256 (float32:
            128), and calls without a tangent, for which torch's attention is made.

    Returns:
        o [..., H, T, Dv], with its ordinary graph, and K tangents of o, without one.
    """
    chosen = "reference"
    if dropout == 0 and _regular(q, k, v, mask, gqa):
        chosen = choose("attention_jvp", q.device, backend)
        if chosen == "triton" and not _for_triton(q, v, tangents):
            chosen = "reference"
    if chosen == "reference":
        return reference.attention_jvp(q, k, v, mask, dropout, causal, scale, gqa, tangents)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    added = None if mask is None else _added(mask, q)
    rows = [_row(row, q, k, v) for row in tangents]
    if mask is not None and mask.requires_grad:  # to which the kernel's backward gives none
        o = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        if all(row is None for row in rows):
            return o, [None] * len(rows)
        with torch.no_grad():
            dos = _launch(chosen, q, k, v, added, causal, scale, rows, primal=False)[2]
    else:
        o, *dos = _Attention.apply(chosen, q, k, v, added, causal, scale, rows)
    return o, [None if row is None else do for row, do in zip(rows, dos, strict=True)]


def _regular(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> bool:
    """Whether the operands are what the kernel was written for, judged by shape and type."""
    heads = q.shape[-3:-2] if q.dim() > 2 else None
    return (
        2 < q.dim() == k.dim() == v.dim()
        and q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
        and (gqa or heads == k.shape[-3:-2])
        and k.shape[-3:-1] == v.shape[-3:-1]
        and 0 not in (q.numel(), k.numel(), v.numel())
        and (mask is None or mask.dtype in (torch.bool, q.dtype, torch.float32))
        and (mask is None or mask.dim() <= q.dim())
        and ordinary(q, k, v, mask)
    )


def _for_triton(q: Tensor, v: Tensor, tangents: Sequence[Row]) -> bool:
    return max(q.shape[-1], v.shape[-1]) <= TRITON_WIDTH.get(q.dtype, 0) and any(
        row is not None for row in tangents
    )


def _op(name: str, backend: str) -> Any:
    return getattr(torch.ops.tangentfast, f"{name}_triton" if backend == "triton" else name)


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """The mask as a summand in the kernel's own precision, not yet broadcast."""
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=wide(q)).masked_fill_(~mask, -math.inf)
    return mask.to(wide(q))


def _row(row: Row, q: Tensor, k: Tensor, v: Tensor) -> Row:
    if row is None:
        return None
    dq, dk, dv, dmask = row
    operands = [None if t is None else t.to(x.dtype) for t, x in ((dq, q), (dk, k), (dv, v))]
    return (*operands, None if dmask is None else dmask.to(wide(q)))  # type: ignore[return-value]


def _four(t: Tensor) -> Tensor:
    """[..., H, T, D] as [N, H, T, D]."""
    return t if t.dim() == 4 else t.reshape(-1, *t.shape[-3:])


def _launch(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    rows: Sequence[Row],
    primal: bool = True,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op, on the shapes of its schema; its outputs in those of `attention_jvp`."""
    scores = (*q.shape[:-1], k.shape[-2])

    def column(i: int) -> list[Tensor | None]:
        found = [None if row is None else row[i] for row in rows]
        if i == 3:
            return [None if t is None else _four(t.expand(scores)) for t in found]
        return [None if t is None else _four(t) for t in found]

    o, lse, dos = _op("attention_jvp", backend)(
        *map(_four, (q, k, v)),
        None if mask is None else _four(mask.expand(scores)),
        causal, scale, *map(column, range(4)), primal,
    )  # fmt: skip
    shape = (*q.shape[:-1], v.shape[-1])
    if q.dim() != 4:
        o, dos = o.reshape(shape) if primal else o, [do.reshape(shape) for do in dos]
    return o, lse, dos


class _Attention(torch.autograd.Function):
    """o and its gradients by the kernels; the tangents have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        rows: Sequence[Row],
    ) -> tuple[Tensor, ...]:
        """(o, *dos)."""
        o, lse, dos = _launch(backend, q, k, v, mask, causal, scale, rows)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.backend, ctx.mask, ctx.causal, ctx.scale = backend, mask, causal, scale
        ctx.mark_non_differentiable(*dos)
        ctx.set_materialize_grads(False)
        return (o, *dos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        if grad is None:
            return (None,) * 8
        q, k, v, o, lse = ctx.saved_tensors
        mask = ctx.mask
        if mask is not None:
            mask = _four(mask.expand(*q.shape[:-1], k.shape[-2]))
        grads = _op("attention_backward", ctx.backend)(
            *map(_four, (grad, q, k, v, o)), lse, mask, ctx.causal, ctx.scale
        )
        return (
            None,
            *(t.reshape(x.shape) for t, x in zip(grads, (q, k, v), strict=True)),
            None, None, None, None,
        )  # fmt: skip


def _fake_jvp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dq: list[Tensor | None], dk: Any, dv: Any, dmask: Any, primal: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return jvp_outputs(q, v, len(dq), primal)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward_outputs(q, k, v)


# The Triton kernels have ops of their own, with the schemas of csrc/schema.cpp: they must work
# without the extension, and beside it on any device (Triton's interpreter runs them on the CPU).
TRITON_OPS = {
    "attention_jvp": "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "Tensor?[] dq, Tensor?[] dk, Tensor?[] dv, Tensor?[] dmask, bool primal) "
    "-> (Tensor o, Tensor lse, Tensor[] do)",
    "attention_backward": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? mask, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
}


def _register(fakes: dict[str, Any]) -> None:
    """Shapes without data, for torch.compile and opcheck; and the ops in Triton."""
    for name, fake in fakes.items():
        if load_native()[0] is not None:
            torch.library.register_fake(f"tangentfast::{name}", fake)
        register_triton(name, TRITON_OPS[name], "tangentfast.ops.attention.triton", fake)


_register({"attention_jvp": _fake_jvp, "attention_backward": _fake_backward})
