"""Scaled-dot-product attention with K tangents: o and every do of one softmax.

The kernels never hold a [T, S] matrix of a head: the forward saves its log-sum-exp, from which the
backward computes the softmax again (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022,
arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangentfast.ops.attention import reference
from tangentfast.ops.attention.unbind import together
from tangentfast.ops.contract import (
    Op,
    Provider,
    Reason,
    columns,
    define,
    define_triton,
    in_places,
    kernel_dtypes,
    plain,
    with_vjp,
)  # fmt: skip

# Wider heads spill too many registers (tests/ops/test_triton_compiled.py counts them).
TRITON_WIDTH = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


class AttentionTangent(NamedTuple):
    """Of attention's tensors; None is zero."""

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
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None (see `ops.backend`). Dropout,
            empty tensors and operands whose batch dimensions differ run on the reference; with
            Triton also float64, and heads wider than 256 (float32: 128).

    Returns:
        o [..., H, T, Dv], with its ordinary graph, and K tangents of o, without one.
    """
    return _attention((q, k, v), mask, dropout, causal, scale, gqa, tangents, backend)


def packed_attention_jvp(
    qkv: Tensor,
    mask: Tensor | None,
    causal: bool,
    tangents: Sequence[Tensor | None],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """`attention_jvp` of the three parts of one tensor, whose gradient is written in one piece.

    Args:
        qkv: [N, T, 3, H, D], in any order of memory in which D is contiguous.
        mask, causal, backend: as there.
        tangents: K of qkv, or None.

    Returns:
        o [N, H, T, D], whose memory is [N, T, H, D] (or [T, N, H, D] where that of qkv is so), and
        K tangents of o.
    """
    rows = [None if t is None else AttentionTangent(*reference.parts(t)) for t in tangents]
    return _attention((qkv,), mask, 0.0, causal, None, False, rows, backend)


def _attention(
    primals: tuple[Tensor, ...], mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None, gqa: bool, tangents: Sequence[AttentionTangent | None],
    backend: str | None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Of q, k and v, or of a packed qkv."""
    q, k, v = _operands(primals)
    provider = ATTENTION.provider(q.device, backend, q, k, v, mask, dropout, gqa)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    tangents = [t if t and any(d is not None for d in t) else None for t in tangents]
    given = columns(tangents, 4)
    dos: Sequence[Tensor]
    if provider is ATTENTION.reference:
        dq, dk, dv, dmask = given
        o, dos = reference.attention_jvp(
            q, k, v, mask, causal, scale, dq, dk, dv, dmask, dropout, gqa
        )
        return o, in_places(tangents, dos)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        primals = tuple(t.to(dtype) for t in primals)
    if mask is not None and mask.requires_grad:  # to which the kernel's backward gives none
        q, k, v = _operands(primals)
        o = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        if not given[0]:
            return o, [None] * len(tangents)
        with torch.no_grad():
            dos = _run(provider, primals, mask.detach(), causal, scale, given, False, ())[1]
    else:
        o, dos = with_vjp(
            partial(_run, provider, primals, mask, causal, scale, given, True),
            partial(_vjp, provider, causal, scale),
            *primals,
        )
    return o, in_places(tangents, dos)


def _irregular(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, gqa: bool
) -> Reason:
    """Why nothing but torch's own functions takes this call."""
    if dropout:
        return "dropout draws a mask"
    batch, (heads, shared) = q.shape[:-3], (x.shape[-3:-2] for x in (q, k))
    if (
        not 2 < q.dim() == k.dim() == v.dim()
        or not batch == k.shape[:-3] == v.shape[:-3]
        or not (gqa or heads == shared)
        or k.shape[-3:-1] != v.shape[-3:-1]
        or 0 in (q.numel(), k.numel(), v.numel())
    ):
        return "operands that are broadcast, empty or without heads"
    if mask is not None and (
        mask.dtype not in (torch.bool, q.dtype, torch.float32) or mask.dim() > q.dim()
    ):
        return f"a mask of {mask.dtype} with {mask.dim()} dimensions"
    return kernel_dtypes(q) or plain(q, k, v, mask)


def _not_in_triton(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Reason:
    width = max(q.shape[-1], v.shape[-1])
    if width > TRITON_WIDTH.get(q.dtype, 0):
        return f"no Triton kernel for heads of {width} in {q.dtype}"
    return _irregular(q, k, v, *rest)


def _operands(primals: Sequence[Tensor]) -> Sequence[Tensor]:
    """q, k and v."""
    return primals if len(primals) == 3 else reference.parts(primals[0])


def _added(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a summand in the kernel's own precision, [N, H, T, S]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=wide(q)).masked_fill_(~mask, -math.inf)
    return _four(mask.to(wide(q)).expand(*q.shape[:-1], k.shape[-2]))


def _four(t: Tensor) -> Tensor:
    """[..., H, T, D] as [N, H, T, D]."""
    return t if t.dim() == 4 else t.reshape(-1, *t.shape[-3:])


def _run(
    provider: Provider, primals: Sequence[Tensor], mask: Tensor | None, causal: bool, scale: float,
    given: Sequence[Sequence[Tensor | None]], primal: bool, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Sequence[Tensor | None]]:  # fmt: skip
    """On the shapes of the schema; the results in those of the call."""
    q, k, v = _operands(primals)
    added = _added(mask, q, k)
    operands = [
        [None if t is None else _four(t.to(x.dtype)) for t in column]
        for x, column in zip((q, k, v), given, strict=False)
    ]
    dmask = [_added(t, q, k) for t in given[3]]
    o, lse, dos = provider.run(
        *map(_four, (q, k, v)), added, causal, scale, *operands, dmask, primal
    )
    if q.dim() != 4:
        shape = (*q.shape[:-1], v.shape[-1])
        o, dos = o.reshape(shape) if primal else o, [do.reshape(shape) for do in dos]
    return o, dos, (*primals, o, lse, added)


@once_differentiable
def _vjp(
    provider: Provider, causal: bool, scale: float, needs: Sequence[bool], grad: Tensor,
    *saved: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of the primals."""
    *primals, o, lse, mask = saved
    q, k, v = _operands(primals)
    backward = attention_backward_triton if provider.backend == "triton" else attention_backward
    # Parts of one tensor get parts of one gradient, which needs no copy where they part.
    shared = len(primals) == 3 and q.dim() == 4 and together(primals) is not None
    packed = len(primals) == 1 or shared
    grads = backward(*map(_four, (grad, q, k, v, o)), lse, mask, causal, scale, packed)
    grads = reference.parts(grads[0]) if shared else grads
    return tuple(g.reshape(x.shape) for g, x in zip(grads, primals, strict=True))


def wide(q: Tensor) -> torch.dtype:
    """The precision of masks and of the log-sum-exp."""
    return torch.promote_types(q.dtype, torch.float32)


def _heads_inside(like: Tensor, *columns: int) -> Tensor:
    """[N, rows, *columns, D], as csrc/attention/cpu.cpp lays it out: heads beside each other, and
    batch and rows in the order of `like` [N, H, rows, ...].
    """
    n, _, t, _ = like.shape
    if like.stride(0) < like.stride(2) and n > 1:
        return like.new_empty(t, n, *columns).transpose(0, 1)
    return like.new_empty(n, t, *columns)


def jvp_outputs(
    q: Tensor, v: Tensor, count: int, primal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, its log-sum-exp (both empty unless `primal`), and `count` tangents of o; without data."""
    n, h, t, _ = q.shape
    o, *dos = (_heads_inside(q, h, v.shape[-1]).transpose(1, 2) for _ in range(1 + count))
    if not primal:
        return q.new_empty(0), q.new_empty(0, dtype=wide(q)), dos
    return o, q.new_empty(n, t, h, dtype=wide(q)).transpose(1, 2), dos


def backward_outputs(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> list[Tensor]:
    """Gradients of q, k and v, or one [N, T, 3, H, D] of all; without data."""
    if packed:
        return [_heads_inside(q, 3, q.shape[1], q.shape[3])]
    return [_heads_inside(x, x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]


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


# q [N, H, T, D], k [N, Hk, S, D], v [N, Hk, S, Dv], mask added to [N, H, T, S]; K tangents. Returns
# o [N, H, T, Dv], its log-sum-exp [N, H, T] (both empty unless `primal`), and K tangents of o.
JVP = (
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "Tensor?[] dq, Tensor?[] dk, Tensor?[] dv, Tensor?[] dmask, bool primal) "
    "-> (Tensor o, Tensor lse, Tensor[] do)"
)
# Gradients of q, k and v from that of o, with o and lse as attention_jvp gave them; or, of three
# operands of one shape, one packed gradient [N, T, 3, H, D].
BACKWARD = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? mask, bool causal, float scale, bool packed) -> Tensor[]"
)
TRITON = "tangentfast.ops.attention.triton"
attention_backward = define(BACKWARD, _fake_backward)
attention_backward_triton = define_triton(BACKWARD, TRITON, _fake_backward)
ATTENTION = Op(
    "attention_jvp",
    Provider("native", define(JVP, _fake_jvp), _irregular, "attention_jvp", unasked=("cpu",)),
    Provider(
        "triton", define_triton(JVP, TRITON, _fake_jvp), _not_in_triton, "attention_jvp",
        unasked=("cuda",),
    ),
    Provider("reference", reference.attention_jvp),
)  # fmt: skip
