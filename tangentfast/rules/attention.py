"""Attention: torch's fused function, and the multi-head function around it."""

from __future__ import annotations

import inspect
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast import _torch
from tangentfast.ops.attention import AttentionTangent, attention_jvp, packed
from tangentfast.rules.registry import Jvp, composite, fused, rule


@fused(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    tangents: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, list[Any]]:
    rows = [row and AttentionTangent(*row[:4]) for row in tangents]
    return attention_jvp(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, rows
    )


@rule("unbind", complex=True)
def unbind(input: Tensor, dim: int = 0) -> tuple[tuple[Tensor, ...], Jvp]:
    return packed.unbind(input, dim), lambda dx: dx.unbind(dim)


_torch_multi_head = F.multi_head_attention_forward
_NAMES = tuple(inspect.signature(_torch_multi_head).parameters)


@composite(_torch_multi_head)
@wraps(_torch_multi_head, assigned=())  # its signature alone
def multi_head_attention_forward(*args: Any) -> tuple[Tensor, Tensor | None]:
    """torch's own body, but self-attention without weights reads q, k and v where they lie.

    x [T, N, E] is often [N, T, E] in memory, which the projections then work on. They give
    [N, T, 3, H, D], of which attention takes the slices; torch's body lays them apart, to
    [3, T, N, E], and back again in the backward.
    """
    call = SimpleNamespace(**dict(zip(_NAMES, args, strict=True)))
    if not _packs(call):
        return _torch.multi_head_attention_forward(*args)
    x = call.query if call.query.dim() == 3 else call.query.unsqueeze(1)
    mask, causal = _mask(call, *x.shape[:2])
    batch_first = x.stride(0) < x.stride(1)
    rows = x.transpose(0, 1) if batch_first else x
    qkv = F.linear(rows, call.in_proj_weight, call.in_proj_bias)
    heads = qkv.unflatten(-1, (3, call.num_heads, -1))
    order = (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)
    q, k, v = heads.permute(*order).unbind(0)
    dropout = call.dropout_p if call.training else 0.0
    o = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    o = o.transpose(1, 2) if batch_first else o.permute(2, 0, 1, 3)
    y = F.linear(o.flatten(2), call.out_proj_weight, call.out_proj_bias)
    y = y.transpose(0, 1) if batch_first else y
    return (y if call.query.dim() == 3 else y.squeeze(1)), None


def _packs(call: Any) -> bool:
    """Whether a call is self-attention by one projection, that asks for no weights, and that
    torch's body would not refuse.
    """
    x, heads = call.query, call.num_heads
    others = (call.bias_k, call.bias_v, call.static_k, call.static_v)
    if (
        not (x is call.key and x is call.value)
        or call.need_weights
        or call.use_separate_proj_weight
        or call.add_zero_attn
        or any(t is not None for t in others)
        or x.dim() not in (2, 3)
        or x.numel() == 0
        or x.shape[-1] != call.embed_dim_to_check
        or x.shape[-1] % heads
        or call.in_proj_weight.shape != (3 * x.shape[-1], x.shape[-1])
        or (call.is_causal and call.attn_mask is None)
    ):
        return False
    queries, batch = x.shape[0], x.shape[1] if x.dim() == 3 else 1
    padding, mask = call.key_padding_mask, call.attn_mask
    return (
        padding is None or (_masks(padding) and padding.shape == (*x.shape[1:-1], queries))
    ) and (
        mask is None
        or (_masks(mask) and mask.shape in ((queries, queries), (batch * heads, queries, queries)))
    )


def _masks(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _mask(call: Any, queries: int, batch: int) -> tuple[Tensor | None, bool]:
    """What is added to the scores [N, H, T, T], and whether to attend to the past alone."""
    padding, mask = call.key_padding_mask, call.attn_mask
    if call.is_causal and padding is None:  # torch takes the mask's word for it
        return None, True
    padding, mask = (None if t is None else _added(t, call.query.dtype) for t in (padding, mask))
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, call.num_heads, queries, queries)
    if padding is not None:
        padding = padding.view(batch, 1, 1, queries)
        mask = padding if mask is None else mask + padding
    return mask, False


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of multi-head attention, where True hides, as a summand."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
