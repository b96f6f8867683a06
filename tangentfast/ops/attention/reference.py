"""Scaled-dot-product attention with K tangents, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dq: Sequence[Tensor | None],
    dk: Sequence[Tensor | None],
    dv: Sequence[Tensor | None],
    dmask: Sequence[Tensor | None],
    dropout: float = 0.0,
    gqa: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """o = P v with P = softmax(S), S = scale q kᵀ + mask, and

        dS = scale (dq kᵀ + q dkᵀ) + dmask,   dP = P ∘ (dS - rowsum(P ∘ dS)),   do = dP v + P dv.

    Args:
        q: [..., H, T, D]; k: [..., Hk, S, D]; v: [..., Hk, S, Dv]; Hk = H unless `gqa`.
        mask: boolean (True: attend) or added to S; broadcast to [..., H, T, S]; or None.
        causal, scale, gqa: as in ``torch.nn.functional.scaled_dot_product_attention``.
        dq, dk, dv, dmask: K of each, shaped like its primal; of each K one is not None.
        dropout: probability of dropping an entry of P; the mask is drawn as torch draws it.

    Returns:
        o [..., H, T, Dv], with its ordinary graph, and K tangents of o, without one. P is held in
        memory while this function runs; its softmax is computed in float32 for 16-bit inputs.
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
        dos = []
        for a, b, c, m in zip(dq, dk, dv, dmask, strict=True):
            ds = None
            if a is not None:
                ds = (a.to(o.dtype) * scale) @ keys.mT
            if b is not None:
                term = (q * scale) @ _heads(b.to(o.dtype), q, gqa).mT
                ds = term if ds is None else ds.add_(term)
            if m is not None:
                ds = m.expand(p.shape).to(p.dtype) if ds is None else ds + m
            do = None
            if ds is not None:
                dp = torch.ops.aten._softmax_backward_data(ds.to(p.dtype), p, -1, p.dtype)
                do = (dp if keep is None else dp * keep) @ values
            if c is not None:
                term = dropped @ _heads(c.to(o.dtype), q, gqa)
                do = term if do is None else do.add_(term)
            dos.append(do)
    return o, dos  # type: ignore[return-value]


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, H, T, D] of a packed [N, T, 3, H, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


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
