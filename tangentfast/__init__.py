"""tangentfast: task arithmetic in the tangent space of large networks.

``linearize`` a model around its pre-trained weights, fine-tune τ with an ordinary backward,
``merge_`` many task vectors in one pass over memory, and take ``jvp`` along one or many directions.
"""

from tangentfast.info import info
from tangentfast.jvp import jvp
from tangentfast.linearize import LinearizedModel, linearize
from tangentfast.merge import gram, merge_
from tangentfast.select import train_only
from tangentfast.task_vector import TaskVector

__all__ = [
    "LinearizedModel",
    "TaskVector",
    "gram",
    "info",
    "jvp",
    "linearize",
    "merge_",
    "train_only",
]
