"""Scaled-dot-product attention with tangents."""

from tangentfast.ops.attention.op import AttentionTangent, attention_jvp, packed_attention_jvp
from tangentfast.ops.attention.unbind import unbind_packed

__all__ = ["AttentionTangent", "attention_jvp", "packed_attention_jvp", "unbind_packed"]
