"""Scaled-dot-product attention with tangents."""

from tangentfast.ops.attention.op import AttentionTangent, attention_jvp, packed_attention_jvp

__all__ = ["AttentionTangent", "attention_jvp", "packed_attention_jvp"]
