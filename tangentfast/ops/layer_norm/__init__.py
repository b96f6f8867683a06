"""Layer norm and RMS norm with tangents."""

from tangentfast.ops.layer_norm.op import NormTangent, layer_norm_jvp, rms_norm_jvp

__all__ = ["NormTangent", "layer_norm_jvp", "rms_norm_jvp"]
