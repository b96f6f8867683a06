"""Products: linear layers, matrix products, convolutions, einsum, embeddings.

Each is linear in every one of its tensors, so the tangent is the sum over the tensors of the
function with that tensor replaced by its tangent (the product rule); nothing else is to be derived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.linear import LinearTangent, is_patches, linear_jvp, patches_jvp
from tangentfast.passes import narrow_tangents
from tangentfast.rules.autocast import autocast_dtype, narrow
from tangentfast.rules.registry import Inexact, Jvp, add, evaluate, fused, jointly, rule


def product_rule(f: Callable[..., Tensor], tensors: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Σ_i f(tensors with the i-th replaced by its tangent), accumulated in one buffer."""
    total = None
    for i, tangent in enumerate(tangents[: len(tensors)]):
        if tangent is not None:
            term = f(*tensors[:i], tangent, *tensors[i + 1 :])
            total = term if total is None else total.add_(term)
    return total


def product(f: Callable[..., Tensor], *tensors: Any) -> tuple[Tensor, Jvp]:
    """A function linear in each of its tensors, which are the first arguments of a rule."""
    return f(*tensors), lambda *row: product_rule(f, tensors, row)


# The products that autocast computes in 16 bits on every device; of outer or kron it does not.
NARROWED = ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm")


@jointly(*NARROWED, complex=True, itself=True)
def narrowed(function: Callable[..., Any], input: Tensor, other: Tensor) -> tuple[Tensor, Jvp]:
    return product(function, *(narrow(x, autocast_dtype(x)) for x in (input, other)))


@jointly("mv", "dot", "vdot", "inner", "outer", "ger", "kron", complex=True, itself=True)
def bilinear_product(
    function: Callable[..., Any], input: Tensor, other: Tensor
) -> tuple[Tensor, Jvp]:
    return product(function, input, other)


@fused("linear", complex=True)
def linear(
    tangents: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, list[Any]]:
    dtype = autocast_dtype(input)
    if dtype is None:
        rows = [row and LinearTangent(*row) for row in tangents]
        return linear_jvp(input, weight, bias, rows, narrow=narrow_tangents())
    rows = [row and LinearTangent(*(narrow(t, dtype) for t in row)) for row in tangents]
    input, weight, bias = (narrow(x, dtype) for x in (input, weight, bias))
    with torch.autocast(input.device.type, enabled=False):
        return linear_jvp(input, weight, bias, rows)


@jointly("bilinear")
def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Jvp]:
    def jvp(*row: Any) -> Any:
        return add(product_rule(F.bilinear, (input1, input2, weight), row), row[3])

    return F.bilinear(input1, input2, weight, bias), jvp


def _added_product(name: str, product: Callable[..., Any], parameters: str) -> None:
    """beta * input + alpha * product(a, b): addmm and its kin."""

    @jointly(name, complex=True, parameters=f"input {parameters} beta=1 alpha=1", itself=True)
    def added(
        function: Callable[..., Any], input: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any
    ) -> tuple[Tensor, Jvp]:
        def jvp(dinput: Any, da: Any, db: Any, *_: None) -> Any:
            dy = product_rule(product, (a, b), (da, db))
            dy = dy if dy is None or alpha == 1 else alpha * dy
            return add(dy, dinput if dinput is None or beta == 1 else beta * dinput)

        return function(input, a, b, beta=beta, alpha=alpha), jvp


_added_product("addmm", torch.mm, "mat1 mat2")
_added_product("addmv", torch.mv, "mat vec")
_added_product("addr", torch.outer, "vec1 vec2")
_added_product("baddbmm", torch.bmm, "batch1 batch2")
_added_product("addbmm", lambda a, b: torch.bmm(a, b).sum(0), "batch1 batch2")


@jointly("einsum", complex=True)
def einsum(equation: Any, *operands: Any) -> tuple[Tensor, Jvp]:
    tensors = operands[0] if isinstance(operands[0], (tuple, list)) else operands
    y, jvp = product(lambda *ts: torch.einsum(equation, *ts), *tensors)
    return y, lambda _, *row: jvp(*(row if tensors is operands else row[0]))


@jointly("tensordot", complex=True)
def tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> tuple[Tensor, Jvp]:
    return product(lambda a, b: torch.tensordot(a, b, dims), a, b)


def _convolution(
    function: Callable[..., Any], x: Tensor, w: Tensor, b: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Jvp]:
    def convolved(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return function(x, w, b, *options)

    def jvp(dx: Any, dw: Any, db: Any, *_: None) -> Any:
        if dw is not None and db is not None:  # the bias costs no pass of its own
            dy = convolved(x, dw, db)
            return dy if dx is None else dy.add_(convolved(dx, w))
        dy = product_rule(convolved, (x, w), (dx, dw))
        return add(dy, None if db is None else db.view(-1, *[1] * (w.dim() - 2)))

    return convolved(x, w, b), jvp


@fused("conv1d", "conv2d", "conv3d", complex=True, itself=True)
def conv(
    function: Any, tangents: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> tuple[Tensor, list[Any]]:  # fmt: skip
    options = (stride, padding, dilation, groups)
    weight = narrow(weight, autocast_dtype(weight))
    if is_patches(input, weight, *options):
        rows = [row and LinearTangent(*row[:3]) for row in tangents]
        return patches_jvp(input, weight, bias, rows, narrow=narrow_tangents())
    y, jvp = _convolution(function, input, weight, bias, options)
    return y, evaluate(jvp, tangents)


@jointly("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", complex=True, itself=True)
def conv_transpose(
    function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Tensor, Jvp]:  # fmt: skip
    options = (stride, padding, output_padding, groups, dilation)
    return _convolution(function, input, weight, bias, options)


@rule(F.embedding, complex=True)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, None, Jvp]:
    if max_norm is not None:
        raise Inexact("max_norm rewrites the weight in place; unset max_norm.")
    if scale_grad_by_freq:
        raise Inexact("scale_grad_by_freq has a backward that is not its derivative; unset it.")
    y = F.embedding(input, weight, padding_idx, sparse=sparse)
    return y, None, lambda dweight: F.embedding(input, dweight)


@jointly(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Jvp]:
    if max_norm is not None:
        raise Inexact("max_norm rewrites the weight in place; unset max_norm.")
    if scale_grad_by_freq:
        raise Inexact("scale_grad_by_freq has a backward that is not its derivative; unset it.")

    def bags(weight: Tensor, scales: Tensor | None) -> Tensor:
        return F.embedding_bag(
            input, weight, offsets, mode=mode, sparse=sparse, per_sample_weights=scales,
            include_last_offset=include_last_offset, padding_idx=padding_idx,
        )  # fmt: skip

    def largest(dweight: Tensor) -> Tensor:
        """The tangents of the rows that were chosen in each bag, 0 where it is empty."""
        flat = input.flatten()
        starts: Any = offsets
        if input.dim() == 2:
            starts = torch.arange(0, flat.numel(), input.shape[1], device=input.device)
        options = (False, 2, sparse, None, include_last_offset, padding_idx)
        _, _, sizes, chosen = torch.embedding_bag(weight, flat, starts, *options)
        return torch.where(sizes[:, None] == 0, 0, dweight.gather(0, chosen.clamp_min(0)))

    def jvp(*row: Any) -> Any:
        if mode == "max":
            return largest(row[1])
        return product_rule(bags, (weight, per_sample_weights), (row[1], row[8]))

    return bags(weight, per_sample_weights), jvp


def _as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`, which the grouped kernels are particular about."""
    if x.stride() == like.stride():
        return x
    return torch.empty_strided(x.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


@jointly("_grouped_mm", "grouped_mm", itself=True)
def grouped_mm(
    function: Callable[..., Any],
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Jvp] | None:
    """Each group of rows by a matrix of its own: the experts of a mixture."""
    if bias is not None:
        return None  # torch has an argument for it and no kernel

    def grouped(a: Tensor, b: Tensor) -> Tensor:
        a, b = _as_laid_out(a, mat_a), _as_laid_out(b, mat_b)
        return function(a, b, offs=offs, out_dtype=out_dtype)

    return product(grouped, mat_a, mat_b)
