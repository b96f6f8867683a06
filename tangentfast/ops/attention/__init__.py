"""Scaled-dot-product attention with tangents, and its operands as slices of one tensor."""

from tangentfast.ops.attention.op import AttentionTangent, attention_jvp
from tangentfast.ops.attention.packed import unbind

__all__ = ["AttentionTangent", "attention_jvp", "unbind"]
