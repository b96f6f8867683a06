"""Attention: torch's fused function, and the multi-head function around it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.attention import attention_jvp
from tangentfast.rules.registry import RULES, Rule, fused


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
    rows = [row and tuple(row[:4]) for row in tangents]
    return attention_jvp(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, rows
    )


def _own_body(function: Any) -> Callable[..., Any]:
    """A Python function of torch, run on dual numbers as it stands.

    Its first lines hand tensor subclasses back to the dispatcher; here they must not, once, so the
    name they ask is bound to "no" for this body. What it calls is dispatched as ever.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


_multi_head = F.multi_head_attention_forward
RULES[_multi_head] = Rule(_own_body(_multi_head), _multi_head, "composite")
