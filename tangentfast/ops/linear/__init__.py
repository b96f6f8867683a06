"""Linear layers with tangents, and the convolutions that are such layers on patches."""

from tangentfast.ops.linear.op import LinearTangent, linear_jvp
from tangentfast.ops.linear.patches import is_patches, patches_jvp

__all__ = ["LinearTangent", "is_patches", "linear_jvp", "patches_jvp"]
