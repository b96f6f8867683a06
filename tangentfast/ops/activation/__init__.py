"""Activations with tangents."""

from tangentfast.ops.activation.op import activation_jvp

__all__ = ["activation_jvp"]
