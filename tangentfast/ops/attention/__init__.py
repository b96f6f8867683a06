"""Scaled-dot-product attention with K tangents: o from torch's fused kernel, each do beside it.

Only the plain-torch reference is here so far; kernels join it behind the same signature.
"""

from tangentfast.ops.attention.reference import attention_jvp

__all__ = ["attention_jvp"]
