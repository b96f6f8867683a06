"""Scaled-dot-product attention with tangents, and its operands as slices of one tensor."""

from tangentfast.ops.attention.op import AttentionTangent, attention_jvp

__all__ = ["AttentionTangent", "attention_jvp"]
