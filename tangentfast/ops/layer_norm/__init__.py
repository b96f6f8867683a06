"""Layer norm and RMS norm with K tangents: y and every dy of one normalisation.

Only the plain-torch reference is here so far; kernels join it behind the same signature.
"""

from tangentfast.ops.layer_norm.reference import layer_norm_jvp, rms_norm_jvp

__all__ = ["layer_norm_jvp", "rms_norm_jvp"]
