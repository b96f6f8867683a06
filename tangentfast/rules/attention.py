"""Attention: torch's fused function, and the multi-head function around it."""

from __future__ import annotations

import inspect
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tangentfast import _torch
from tangentfast.ops.attention import (
    AttentionTangent,
    attention_jvp,
    packed_attention_jvp,
    unbind_packed,
)
from tangentfast.ops.linear import LinearTangent, linear_jvp
from tangentfast.passes import narrow_tangents
from tangentfast.rules.autocast import autocast_dtype, narrow
from tangentfast.rules.registry import composite, fused


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


@fused("unbind", complex=True)
def unbind(rows: Any, input: Tensor, dim: int = 0) -> tuple[Any, list[Any]]:
    """Queries, keys and values of one product come so: q, k, v = qkv.unbind(0)."""
    packed = dim == 0 and input.dim() == 5 and len(input) == 3 and not input.is_complex()
    ys = unbind_packed(input) if packed else input.unbind(dim)
    return ys, [row and row[0].unbind(dim) for row in rows]


def self_attention(
    query: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``F.multi_head_attention_forward`` of one tensor with itself, without dropout and weights:
    what an encoder has in each of its blocks.

    Args:
        query: [T, N, E], in either order of memory, or [T, E].
        in_proj_weight, in_proj_bias: [3 E, E] and [3 E], of queries, keys and values.
        out_proj_weight, out_proj_bias: [F, E] and [F].
        num_heads: H, a divisor of E.
        key_padding_mask: [N, T] or [T], boolean (True: hide) or added to the scores.
        attn_mask: [T, T] or [N H, T, T], boolean (True: hide) or added to the scores.
        is_causal: that attn_mask is the causal one.

    Returns:
        [T, N, F] or [T, F], in the order of memory that query has.
    """
    tensors = (query, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    rest = (num_heads, key_padding_mask, attn_mask, is_causal)
    if has_torch_function(tensors):
        y: Tensor = handle_torch_function(self_attention, tensors, *tensors, *rest)
        return y
    return F.multi_head_attention_forward(
        query, query, query, query.shape[-1], num_heads, in_proj_weight, in_proj_bias, None, None,
        False, 0.0, out_proj_weight, out_proj_bias, key_padding_mask=key_padding_mask,
        need_weights=False, attn_mask=attn_mask, is_causal=is_causal,
    )[0]  # fmt: skip


@fused(self_attention)
def _self_attention(
    tangents: Any,
    query: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, list[Any]]:
    """Two products and attention between them, on views: nothing is copied in either direction."""
    primals = (query, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    masks = (key_padding_mask, attn_mask, is_causal)
    dtype = autocast_dtype(query)
    if dtype is not None:
        tangents = [row and [narrow(t, dtype) for t in row] for row in tangents]
        primals = tuple(narrow(x, dtype) for x in primals)
        with torch.autocast(query.device.type, enabled=False):
            result: tuple[Tensor, list[Any]] = _self_attention(
                tangents, *primals, num_heads, *masks
            )
            return result
    x = query if query.dim() == 3 else query.unsqueeze(1)  # [T, N, E]
    batch_first = x.stride(0) < x.stride(1)

    def rows_of(t: Tensor) -> Tensor:
        """[T, N, E] in the order of memory, that no product has to copy it; and back."""
        return t.transpose(0, 1) if batch_first else t

    def packed(t: Tensor) -> Tensor:
        """[N, T, 3, H, D]."""
        t = t.expand(proj.shape).unflatten(-1, (3, num_heads, -1))  # a dbias alone is [3 E]
        return t if batch_first else t.transpose(0, 1)

    def joined(o: Tensor) -> Tensor:
        """The rows of [N, H, T, D]."""
        return (o.transpose(1, 2) if batch_first else o.permute(2, 0, 1, 3)).flatten(-2)

    narrowed = narrow_tangents()
    rows: list[Any] = [
        row and LinearTangent(None if row[0] is None else rows_of(row[0].view(x.shape)), *row[1:3])
        for row in tangents
    ]
    proj, dproj = linear_jvp(rows_of(x), in_proj_weight, in_proj_bias, rows, narrow=narrowed)
    qkv = packed(proj)
    mask, causal = _mask(qkv, key_padding_mask, attn_mask, is_causal)
    dqkv = [None if t is None else packed(t) for t in dproj]
    o, dos = packed_attention_jvp(qkv, mask, causal, dqkv)
    rows = [
        row and LinearTangent(None if do is None else joined(do), *row[3:5])
        for row, do in zip(tangents, dos, strict=True)
    ]
    y, dys = linear_jvp(joined(o), out_proj_weight, out_proj_bias, rows, narrow=narrowed)
    shape = (*query.shape[:-1], y.shape[-1])
    results = [None if dy is None else rows_of(dy.expand(y.shape)).reshape(shape) for dy in dys]
    return rows_of(y).reshape(shape), results


def _mask(
    qkv: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, bool]:
    """The mask of the scores [N, H, T, T] in the sense of `attention_jvp`, and whether they are
    causal, as torch decides.
    """
    if is_causal and key_padding_mask is None:
        return None, True
    n, t, _, h, _ = qkv.shape
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.reshape(-1, h if attn_mask.dim() == 3 else 1, t, t))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(n, 1, 1, t))
    if not masks:
        return None, False
    mask = masks[0] + masks[-1] if len(masks) == 2 else masks[0]  # of one type
    return ~mask if mask.dtype == torch.bool else mask, False


_PARAMETERS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


@composite(F.multi_head_attention_forward)
@wraps(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any) -> tuple[Any, Any]:
    """`self_attention` where it is that, and torch's own body on dual numbers where it is not."""
    call = SimpleNamespace(**dict(zip(_PARAMETERS, args, strict=True)))
    if not _is_self_attention(call):
        y: tuple[Any, Any] = _torch.multi_head_attention_forward(*args)
        return y
    return self_attention(
        call.query, call.in_proj_weight, call.in_proj_bias, call.out_proj_weight,
        call.out_proj_bias, call.num_heads, call.key_padding_mask, call.attn_mask, call.is_causal,
    ), None  # fmt: skip


def _is_self_attention(call: Any) -> bool:
    """Judged by the arguments alone; what torch refuses is left to its body."""
    x, heads = call.query, call.num_heads
    extra = (call.bias_k, call.bias_v, call.static_k, call.static_v)
    if (
        not x is call.key is call.value
        or call.need_weights
        or (call.training and call.dropout_p > 0)
        or any(t is not None for t in extra)
        or call.add_zero_attn
        or call.use_separate_proj_weight
        or call.in_proj_weight is None
        or not x.is_floating_point()
        or x.dim() not in (2, 3)
        or x.numel() == 0
    ):
        return False
    t, n, e = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
    padding, mask = call.key_padding_mask, call.attn_mask
    masks = [m for m in (padding, mask) if m is not None]
    return (
        e == call.embed_dim_to_check
        and e % heads == 0
        and call.in_proj_weight.shape == (3 * e, e)
        and (padding is None or padding.shape == ((n, t) if x.dim() == 3 else (t,)))
        and (mask is not None or not call.is_causal)
        and (mask is None or mask.shape in ((t, t), (n * heads, t, t)))
        and all(type(m) is Tensor and not m.requires_grad for m in masks)
        and all(m.dtype in (torch.bool, torch.float32, x.dtype) for m in masks)
        and len({m.dtype for m in masks}) < 2
    )
