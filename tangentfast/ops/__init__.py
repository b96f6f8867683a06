"""The numerical ops: one folder each, with a plain-torch reference and the kernels that match it.

Ops take tensors and numbers only; they know nothing of models, names or duals. `backend` decides
which implementation runs.
"""

from tangentfast.ops import activation, attention, layer_norm, linear, merge
from tangentfast.ops.contract import OPS

__all__ = ["OPS", "activation", "attention", "layer_norm", "linear", "merge"]
