"""Functions that need no derivative: metadata, results that are constants, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from tangentfast.rules.registry import constant, forbidden, metadata

# Properties are listed by name: one that a newer torch adds may lead to a tensor's numbers, and has
# no rule until somebody has looked. T, mT, H, mH, real and imag are in shape.py and complex.py.
GETTERS = [
    *("device", "dtype", "shape", "ndim", "layout", "name", "names", "nbytes", "itemsize"),
    *("is_cpu", "is_cuda", "is_ipu", "is_maia", "is_meta", "is_mkldnn", "is_mps", "is_mtia"),
    *("is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_vulkan", "is_xla", "is_xpu"),
    *("is_leaf", "requires_grad", "retains_grad", "output_nr", "grad", "grad_dtype", "grad_fn"),
    *("_base", "_grad", "_grad_fn", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("_has_symbolic_sizes_strides", "volatile"),
]
SETTERS = ["requires_grad", "grad", "_grad", "_backward_hooks", "_post_accumulate_grad_hooks"]
metadata(*(getattr(Tensor, name).__get__ for name in GETTERS if hasattr(Tensor, name)))
metadata(*(getattr(Tensor, name).__set__ for name in SETTERS if hasattr(Tensor, name)))
metadata(
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_set_to"),
    *("is_conj", "is_neg", "is_inference", "is_pinned", "is_shared", "is_distributed"),
    *("is_coalesced", "get_device", "data_ptr", "untyped_storage", "dim_order", "sym_size"),
    *("sym_stride", "sym_numel", "result_type", "can_cast", "has_names", "__len__", "__repr__"),
    *("__format__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    *("requires_grad_", "is_storage", "is_tensor", "broadcast_shapes"),
    *("__dlpack_device__", "ndim"),
)
constant(
    *("detach", "eq", "ne", "lt", "le", "gt", "ge", "equal", "greater", "less", "greater_equal"),
    *("less_equal", "not_equal", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "isclose"),
    *("allclose", "logical_not", "logical_and", "logical_or", "logical_xor", "any", "all"),
    *("argmax", "argmin", "argsort", "nonzero", "count_nonzero", "searchsorted", "bucketize"),
    *("floor", "ceil", "round", "trunc", "fix", "sign", "signbit", "heaviside"),
    *("floor_divide", "__floordiv__", "__rfloordiv__"),
    *("int", "long", "short", "bool", "byte", "char"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("randint_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    *("new_empty_strided", "bernoulli", "multinomial"),
    Tensor.data.__get__,  # type: ignore[attr-defined]
)
constant("sgn", complex=False)  # of a complex number x / |x|, which turns

_no_number = (
    "a Python number has no tangent, so that what is computed from it would be wrong without a "
    "word. Keep it a tensor (torch.where instead of if), or detach() it where it should be a "
    "constant."
)
forbidden(
    _no_number,
    *("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"),
    *("__complex__", "__contains__", "is_nonzero"),
)
forbidden(
    "it leads past the tangent to the tensor's memory; ask the primal, by detach().",
    Tensor._cdata.__get__,  # type: ignore[attr-defined]
    Tensor.__cuda_array_interface__.__get__,
)
forbidden(
    "assigning .data replaces the memory behind the tangent's back; use copy_() or a new tensor.",
    Tensor.data.__set__,  # type: ignore[attr-defined]
)
forbidden(
    "a tensor that carries a tangent cannot be pickled; detach() it first.",
    "__reduce_ex__",
)
forbidden(
    "a backward inside the forward would not see the tangents; call it on the model's outputs, or "
    "apply torch.func.jvp to the original function, which composes with torch.func.grad.",
    "backward",
    torch.autograd.grad,
    torch.autograd.backward,
)
