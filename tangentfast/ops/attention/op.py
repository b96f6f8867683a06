"""Scaled-dot-product attention with K tangents: o and every do of one softmax.

The kernels never hold a [T, S] matrix of a head: the forward saves its log-sum-exp, from which the
backward computes the softmax again (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022,
arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.attention import reference
from tangentfast.ops.attention.packed import is_packed
from tangentfast.ops.contract import (
    KERNEL_DTYPES,
    YES,
    Op,
    Provider,
    Reason,
    columns,
    define,
    define_triton,
    in_places,
    plain,
    with_vjp,
)  # fmt: skip

# Wider heads spill too many registers (tests/ops/test_triton_compiled.py counts them).
TRITON_WIDTH = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


class AttentionTangent(NamedTuple):
    """Of the tensors of attention; None is zero."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dmask: Tensor | None = None


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    tangents: Sequence[AttentionTangent | None],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """o = softmax(scale q kᵀ + mask) v and K tangents of it.

    Args:
        q: [..., H, T, D]; k: [..., Hk, S, D]; v: [..., Hk, S, Dv]; Hk = H unless `gqa`.
        mask: boolean (True: attend) or added to the scores; broadcast to [..., H, T, S]; or None.
        dropout, causal, scale, gqa: as in ``torch.nn.functional.scaled_dot_product_attention``.
        tangents: K of them, each tensor shaped like its primal.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None (see `ops.backend`).

    Returns:
        o [..., H, T, Dv], with its ordinary graph, and K tangents of o, without one.
    """
    provider = ATTENTION.reference
    if not _irregular(q, k, v, mask, dropout, gqa):
        provider = ATTENTION.provider(q.device, backend, q, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq, dk, dv, dmask = columns(tangents, 4)
    if provider is ATTENTION.reference:
        o, dos = provider.run(q, k, v, mask, dropout, causal, scale, gqa, dq, dk, dv, dmask)
        return o, in_places(tangents, dos)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    scores = (*q.shape[:-1], k.shape[-2])
    added = None if mask is None else _four(_added(mask, q).expand(scores))
    rows = (
        *([None if t is None else _four(t.to(q.dtype)) for t in column] for column in (dq, dk, dv)),
        [None if t is None else _four(t.to(wide(q)).expand(scores)) for t in dmask],
    )
    run = partial(_run, provider.run, q, k, v, added, causal, scale, rows)
    if mask is not None and mask.requires_grad:  # to which the kernel's backward gives none
        o = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        with torch.no_grad():
            dos = run((), primal=False)[1] if dq else []
    else:
        o, dos = with_vjp(run, partial(_vjp, backend, causal, scale), q, k, v)
    return o, in_places(tangents, dos)


def _irregular(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, gqa: bool
) -> Reason:
    """Why nothing but the reference takes this call."""
    if dropout:
        return "dropout draws its mask as torch does"
    if not 2 < q.dim() == k.dim() == v.dim() or not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        return "batch dimensions that differ, or no heads"
    if k.shape[-3:-1] != v.shape[-3:-1] or not (gqa or q.shape[-3] == k.shape[-3]):
        return "heads that are broadcast"
    if 0 in (q.numel(), k.numel(), v.numel()):
        return "nothing to compute"
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype, torch.float32):
            return f"a mask of {mask.dtype}"
        if mask.dim() > q.dim():
            return "a mask of more dimensions than q"
    return plain(q, k, v, mask)


def wide(q: Tensor) -> torch.dtype:
    """The precision of masks and of the log-sum-exp."""
    return torch.promote_types(q.dtype, torch.float32)


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """The mask as a summand in the kernel's own precision, not yet broadcast."""
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=wide(q)).masked_fill_(~mask, -math.inf)
    return mask.to(wide(q))


def _four(t: Tensor) -> Tensor:
    """[..., H, T, D] as [N, H, T, D]."""
    return t if t.dim() == 4 else t.reshape(-1, *t.shape[-3:])


def _run(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
    scale: float, rows: Sequence[list[Tensor | None]], needs: Sequence[bool], primal: bool = True,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:  # fmt: skip
    o, lse, dos = kernel(*map(_four, (q, k, v)), mask, causal, scale, *rows, primal)
    if q.dim() != 4:
        shape = (*q.shape[:-1], v.shape[-1])
        o, dos = o.reshape(shape) if primal else o, [do.reshape(shape) for do in dos]
    return o, dos, (q, k, v, o, lse, mask)


def _vjp(
    backend: str | None, causal: bool, scale: float, needs: Sequence[bool], grad: Tensor, q: Tensor,
    k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    """Gradients of q, k and v: of slices of one tensor, slices of one."""
    operands = [_four(t) for t in (grad, q, k, v, o)]
    provider = BACKWARD.reference  # for a second derivative
    if not torch.is_grad_enabled():
        provider = BACKWARD.provider(q.device, backend, q, v)
    grads = provider.run(*operands, lse, mask, causal, scale, is_packed(*operands[1:4]))
    grads = grads if len(grads) == 3 else grads[0].unbind(0)
    return [t.reshape(x.shape) for t, x in zip(grads, (q, k, v), strict=True)]


def heads_inside(like: Tensor, columns: int, count: int = 1) -> Tensor:
    """`count` empty [N, H, rows, columns] on top of each other, as csrc/attention/cpu.cpp lays
    them out: the heads of all beside each other, batch and rows in the order of `like`.
    """
    n, h, t, _ = like.shape
    if like.stride(0) < like.stride(2) and n > 1:
        return like.new_empty(t, n, count, h, columns).permute(2, 1, 3, 0, 4)
    return like.new_empty(n, t, count, h, columns).permute(2, 0, 3, 1, 4)


def jvp_outputs(
    q: Tensor, v: Tensor, count: int, primal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, its log-sum-exp (both empty unless `primal`), and `count` tangents of o."""
    n, h, t, _ = q.shape
    dos = [heads_inside(q, v.shape[-1])[0] for _ in range(count)]
    if not primal:
        return q.new_empty(0), q.new_empty(0, dtype=wide(q)), dos
    lse = q.new_empty(n, t, h, dtype=wide(q)).transpose(1, 2)
    return heads_inside(q, v.shape[-1])[0], lse, dos


def backward_outputs(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> list[Tensor]:
    """Gradients of q, k and v; if `packed`, in one [3, N, H, T, D]."""
    if packed:
        return [heads_inside(q, q.shape[-1], 3)]
    return [heads_inside(x, x.shape[-1])[0] for x in (q, k, v)]


def _fake_jvp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dq: list[Tensor | None], dk: Any, dv: Any, dmask: Any, primal: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return jvp_outputs(q, v, len(dq), primal)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float, packed: bool,
) -> list[Tensor]:  # fmt: skip
    return backward_outputs(q, k, v, packed)


# q [N, H, T, D], k [N, Hk, S, D], v [N, Hk, S, Dv], mask added to [N, H, T, S]. Returns
# o [N, H, T, Dv], its log-sum-exp [N, H, T] (both empty unless `primal`), and K tangents of o.
JVP = (
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "Tensor?[] dq, Tensor?[] dk, Tensor?[] dv, Tensor?[] dmask, bool primal) "
    "-> (Tensor o, Tensor lse, Tensor[] do)"
)
# Gradients of q, k and v from that of o, with o and lse as attention_jvp gave them. packed: in one
# [3, N, H, T, D], in memory [N, T, 3, H, D] as one projection gives it, or [T, N, 3, H, D].
VJP = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? mask, bool causal, float scale, bool packed) -> Tensor[]"
)
_TRITON = "tangentfast.ops.attention.triton"


def _takes(q: Tensor, v: Tensor) -> Reason:
    return YES if q.dtype in KERNEL_DTYPES else f"no kernel computes in {q.dtype}"


def _takes_triton(q: Tensor, v: Tensor) -> Reason:
    width, widest = max(q.shape[-1], v.shape[-1]), TRITON_WIDTH.get(q.dtype, 0)
    return YES if width <= widest else f"heads of {width} in {q.dtype}, at most {widest} fit"


def _table(schema: str, fake: Callable[..., Any], fallback: Callable[..., Any]) -> Op:
    name = schema.partition("(")[0]
    return Op(
        name,
        Provider("triton", define_triton(schema, _TRITON, fake), _takes_triton, name,
                 unasked=("cuda",)),
        Provider("native", define(schema, fake), _takes, name, unasked=("cpu",)),
        Provider("reference", fallback),
    )  # fmt: skip


ATTENTION = _table(JVP, _fake_jvp, reference.attention_jvp)
BACKWARD = _table(VJP, _fake_backward, reference.attention_backward)
