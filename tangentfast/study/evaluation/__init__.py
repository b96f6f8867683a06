"""What task vectors do once they are trained: addition, negation, disentanglement, geometry.

`Mixtures` gives the features of θ0 + Σ c_t τ_t, or of f(x; θ0) + J Σ c_t τ_t, for many c in few
passes; the experiments on top take plain arguments and return plain dicts, ready for JSON.
"""

from tangentfast.study.evaluation.accuracy import accuracies, predictions
from tangentfast.study.evaluation.addition import addition
from tangentfast.study.evaluation.disentanglement import disentanglement
from tangentfast.study.evaluation.geometry import cosine, gram
from tangentfast.study.evaluation.mixtures import Mixtures, Request
from tangentfast.study.evaluation.negation import negation
from tangentfast.study.evaluation.subsets import subsets

__all__ = [
    "Mixtures",
    "Request",
    "accuracies",
    "addition",
    "cosine",
    "disentanglement",
    "gram",
    "negation",
    "predictions",
    "subsets",
]
