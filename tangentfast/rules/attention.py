"""Attention: torch's fused function, and the multi-head function around it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tangentfast import _torch
from tangentfast.ops.attention import attention_jvp
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
    rows = [row and tuple(row[:4]) for row in tangents]
    return attention_jvp(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, rows
    )


composite(F.multi_head_attention_forward)(_torch.multi_head_attention_forward)
