"""Scaled-dot-product attention with K tangents, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float, gqa: bool, dq: Sequence[Tensor | None], dk: Sequence[Tensor | None],
    dv: Sequence[Tensor | None], dmask: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """o = P v with P = softmax(S), S = scale q kᵀ + mask, and

        dS = scale (dq kᵀ + q dkᵀ) + dmask,   dP = P ∘ (dS - rowsum(P ∘ dS)),   do = dP v + P dv.

    Shapes as `ops.attention.attention_jvp` has them. P is held in memory while this function runs;
    its softmax is computed in float32 for 16-bit inputs. Dropout draws its mask as torch does.
    """
    if dropout > 0:
        weights = _probabilities(q, k, mask, causal, scale, gqa)
        keep = F.dropout(torch.ones_like(weights), dropout)
        o = (weights * keep) @ _heads(v, q, gqa)
    else:
        keep = None
        o = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    if not dq:
        return o, []
    with torch.no_grad():
        q, k, v = (t.to(o.dtype) for t in (q, k, v))  # autocast
        p = _probabilities(q, k, mask, causal, scale, gqa)
        dropped = p if keep is None else p * keep
        keys, values = _heads(k, q, gqa), _heads(v, q, gqa)
        dos: list[Tensor] = []
        for tq, tk, tv, tmask in zip(dq, dk, dv, dmask, strict=True):
            ds = None
            if tq is not None:
                ds = (tq.to(o.dtype) * scale) @ keys.mT
            if tk is not None:
                term = (q * scale) @ _heads(tk.to(o.dtype), q, gqa).mT
                ds = term if ds is None else ds.add_(term)
            if tmask is not None:
                ds = tmask.expand(p.shape).to(p.dtype) if ds is None else ds + tmask
            do = None
            if ds is not None:
                dp = torch.ops.aten._softmax_backward_data(ds.to(p.dtype), p, -1, p.dtype)
                do = (dp if keep is None else dp * keep) @ values
            if tv is not None:
                term = dropped @ _heads(tv.to(o.dtype), q, gqa)
                do = term if do is None else do.add_(term)
            dos.append(torch.zeros_like(o) if do is None else do)
    return o, dos


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor | None,
    causal: bool, scale: float, packed: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of o, by functions that have a derivative themselves:

        dv = Pᵀ grad,   dS = P ∘ (dP - rowsum(P ∘ dP)) with dP = grad vᵀ,   dq = scale dS k,
        dk = scale dSᵀ q.

    Shapes as the schema of the op has them.
    """
    p = _probabilities(q, k, mask, causal, scale, gqa=True)
    dp = grad @ _heads(v, q, gqa=True).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    dk, dv = (x.unflatten(1, groups).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    grads = [ds @ _heads(k, q, gqa=True), dk, dv]
    return [torch.stack(grads)] if packed else grads


def _heads(t: Tensor, q: Tensor, gqa: bool) -> Tensor:
    """Grouped key or value heads [..., Hk, S, D], repeated to the H heads of q."""
    return t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if gqa else t


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, gqa: bool
) -> Tensor:
    """softmax(scale q kᵀ + mask) [..., H, T, S]; a row that attends to nothing is zero."""
    s = (q * scale) @ _heads(k, q, gqa).mT
    dtype = s.dtype
    s = s.to(torch.promote_types(dtype, torch.float32))
    if causal:
        visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~visible, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    return torch.ops.aten._safe_softmax(s, -1).to(dtype)
