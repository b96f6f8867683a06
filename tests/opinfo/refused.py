"""What is not computed: operations that tangentfast refuses, and those that torch itself cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Refused(NamedTuple):
    """Which forms of an operation are refused (for some arguments at least), and why."""

    reason: str
    forms: tuple[str, ...] = ("function",)


SINCE = "2.11"  # torch's backward of distances can be differentiated since then
SHAPE = "changes what a tensor is, not what it holds"
GAUGE = "singular vectors of complex matrices have no derivative: their phase is arbitrary"
HERMITIAN = "torch's backward of it is inexact where a complex diagonal is not real"
BOTH = ("function", "method")
REFUSED: dict[str, Refused] = {
    "addbmm": Refused("torch grows the target", ("inplace_",)),
    "as_strided": Refused(SHAPE, ("inplace_",)),
    "as_strided_partial_views": Refused(
        "reads memory outside of its argument", ("function", "method", "inplace_")
    ),
    "squeeze": Refused(SHAPE, ("inplace_",)),
    "squeeze_multiple": Refused(SHAPE, ("inplace_",)),
    "t": Refused(SHAPE, ("inplace_",)),
    "transpose": Refused(SHAPE, ("inplace_", "swapdims.inplace_", "swapaxes.inplace_")),
    "unsqueeze": Refused(SHAPE, ("inplace_",)),
    "nn_functional_batch_norm": Refused("moves its running statistics"),
    "nn_functional_instance_norm": Refused("moves its running statistics"),
    "normal": Refused("torch has no derivative of it where mean and deviation differ in shape"),
    "_segment_reduce_lengths": Refused("a prototype that torch can differentiate once"),
    "_segment_reduce_offsets": Refused("a prototype that torch can differentiate once"),
    "to_sparse": Refused("sparse tensors carry no tangent", ("function", "method")),
    "nn_functional_linear_cross_entropy_chunked_none": Refused("torch's backward of it raises"),
    "linalg_eig": Refused(GAUGE),
    "linalg_eigh": Refused(GAUGE),
    "linalg_svd": Refused(GAUGE),
    "svd": Refused(GAUGE, BOTH),
    "svd_lowrank": Refused(GAUGE),
    "pca_lowrank": Refused(GAUGE),
    "linalg_cholesky": Refused(HERMITIAN),
    "linalg_cholesky_ex": Refused(HERMITIAN),
    "triangular_solve": Refused("torch's backward of it is inexact for complex numbers", BOTH),
    "logcumsumexp": Refused("torch's derivative of it is NaN for large complex numbers", BOTH),
}

if torch.__version__ < SINCE:
    NOT_TWICE = "torch can differentiate it once"
    REFUSED |= dict.fromkeys(("cdist", "nn_functional_pdist"), Refused(NOT_TWICE))

# Operations that torch itself cannot differentiate on a CPU, or not compare.
UNTESTED = {
    "torch_ops_aten__scaled_dot_product_flash_attention_for_cpu": "a kernel of another operation",
    "chalf": "torch cannot divide complex numbers of 16-bit parts",
    "sparse_sampled_addmm": "needs sparse arguments",
    "sparse_mm_reduce": "needs sparse arguments",
}
