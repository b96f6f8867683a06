"""Functions that move numbers about without changing them, and writes in functional form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.rules.registry import (
    Inexact,
    Jvp,
    filled,
    jointly,
    jointly_linear,
    linear_in_first,
    rule,
    terms,
    write,
    zero,
)

# Linear in the first argument, everything else a constant: the function is its own JVP.
linear_in_first(
    *("reshape", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "contiguous"),
    *("permute", "transpose", "swapaxes", "swapdims", "t", "adjoint", "moveaxis", "movedim"),
    *("positive", "real", "clone", "conj", "resolve_conj", "resolve_neg"),
    *("expand", "broadcast_to", "repeat", "tile", "repeat_interleave", "roll", "flip"),
    *("fliplr", "flipud", "rot90", "narrow", "select", "split", "split_with_sizes", "chunk"),
    *("tensor_split", "hsplit", "vsplit", "dsplit", "unfold", "fold", "diagonal", "diag"),
    *("diag_embed", "tril", "triu", "index_select", "gather", "take", "take_along_dim"),
    *("masked_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("to", "float", "double", "half", "bfloat16", "cpu", "cuda", "type", "pin_memory"),
    *("sum", "mean", "cumsum", "trace", "neg", "negative"),
    *("max_unpool1d", "max_unpool2d", "max_unpool3d"),
    *("interpolate", "upsample", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    Tensor.__getitem__,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real")),
)


@rule(Tensor.view, complex=True)
def view(x: Tensor, *shape: Any) -> tuple[Tensor, Jvp] | None:
    if isinstance(shape[0], torch.dtype):  # the same bits read as other numbers
        return None
    y = x.view(*shape)
    return y, lambda dx: dx.reshape(y.shape)  # a tangent may have other strides


# Linear in several arguments together.
jointly_linear("tensors dim=0", (0,), "cat", "concat", "concatenate", "stack")
jointly_linear("tensors", (0,), "hstack", "vstack", "dstack")
jointly_linear("condition input other", (1, 2), torch.where)
jointly_linear("self condition other", (0, 2), Tensor.where)
jointly_linear("input mask value", (0, 2), "masked_fill")
jointly_linear("input dim index src", (0, 3), "scatter", "scatter_add", "index_copy")
jointly_linear("input dim index source", (0, 3), "index_add")
jointly_linear("input dim index value", (0, 3), "index_fill")
jointly_linear("input indices values", (0, 2), "index_put")
jointly_linear("input mask source", (0, 2), "masked_scatter")
jointly_linear("input src dim index", (0, 1), "select_scatter")
jointly_linear("input src dim=0 start=None end=None step=1", (0, 1), "slice_scatter")
jointly_linear("input src offset=0 dim1=0 dim2=1", (0, 1), "diagonal_scatter")


@rule("view_as", "expand_as", "reshape_as", "type_as", complex=True, itself=True)
def shaped_like(function: Callable[..., Any], x: Tensor, other: Tensor) -> tuple[Tensor, Jvp, Jvp]:
    """It takes shape or dtype, and nothing else, from `other`."""
    return function(x, other), lambda dx: function(dx, other), zero


@jointly(
    *(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, torch.broadcast_tensors),
    complex=True,
    itself=True,
)
def one_by_one(function: Callable[..., Any], *tensors: Tensor) -> tuple[Any, Jvp] | None:
    """Each of several tensors, or the only one, in another shape."""
    if not isinstance(tensors[0], Tensor):  # a list of them
        return None

    def jvp(*row: Tensor | None) -> Any:
        dys = function(*map(filled, row, tensors))
        if isinstance(dys, Tensor):
            return dys
        return [None if dx is None else dy for dx, dy in zip(row, dys, strict=True)]

    return function(*tensors), jvp


@rule("pad", "constant_pad_nd", complex=True)
def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> tuple[Tensor, Jvp] | None:
    if not isinstance(mode, str):  # constant_pad_nd(input, pad, value)
        mode, value = "constant", mode
    if isinstance(value, complex):
        return None  # which F.pad does not take
    return F.pad(input, pad, mode, value), lambda dx: F.pad(dx, pad, mode)


@rule("as_strided", "as_strided_copy", complex=True, itself=True)
def as_strided(
    function: Callable[..., Any],
    input: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> tuple[Tensor, Jvp]:
    start = 0 if storage_offset is None else storage_offset - input.storage_offset()
    dense = _span(input.shape, input.stride()) == input.numel()
    if not dense or start < 0 or start + _span(size, stride) > input.numel():
        raise Inexact("it reads memory outside of its argument; index that instead.")

    def jvp(dx: Tensor) -> Tensor:
        memory = torch.empty_strided(input.shape, input.stride(), dtype=dx.dtype, device=dx.device)
        return memory.copy_(dx).as_strided(size, stride, start)

    return function(input, size, stride, storage_offset), jvp


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many numbers lie between the first and the last of a view, these included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


@jointly("as_strided_scatter", complex=True)
def as_strided_scatter(
    input: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> tuple[Tensor, Jvp] | None:
    if not input.is_contiguous():
        return None

    def jvp(dx: Tensor | None, dsrc: Tensor | None, *_: None) -> Tensor:
        dx, dsrc = filled(dx, input).contiguous(), filled(dsrc, src)
        return torch.as_strided_scatter(dx, dsrc, size, stride, storage_offset)

    return torch.as_strided_scatter(input, src, size, stride, storage_offset), jvp


# Writes in place that have no functional form in torch.


@write("__setitem__")
def assign(x: Tensor, index: Any, value: Any) -> Jvp:
    def jvp(dx: Tensor | None, _: Any, dvalue: Tensor | None) -> Tensor:
        dy = filled(dx, x).clone()
        dy[index] = 0 if dvalue is None else dvalue.to(x.dtype)
        return dy

    return jvp


@write("copy_")
def overwrite(x: Tensor, src: Tensor, non_blocking: bool = False) -> Jvp:
    return terms(zero, lambda dsrc: dsrc.to(x.device, x.dtype).expand(x.shape))


@write("fill_")
def fill(x: Tensor, value: Any) -> Jvp:
    return terms(zero, lambda dvalue: dvalue.to(x.dtype).expand(x.shape))


@write(
    *("zero_", "uniform_", "normal_", "bernoulli_", "random_"),
    *("exponential_", "geometric_", "cauchy_", "log_normal_"),
)
def forget(x: Tensor, *args: Any, **options: Any) -> Jvp:
    """What is written has no derivative, whatever the options (``generator=``) of a random fill."""
    return lambda *_: None
