"""The names of the regimes whose training steps are compared."""

ORDINARY, ATTENTION = "ordinary", "ordinary, attention"
PUBLISHED, COMPILED = "torch.func.jvp", "torch.func.jvp, compiled"
OURS, OURS_ATTENTION = "tangentfast, all", "tangentfast, attention"
OURS_NARROW = "tangentfast, all, bfloat16 tangents"
