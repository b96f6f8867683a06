"""Functions that move numbers about without changing them, and writes in functional form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.inplace import FORMS
from tangentfast.rules.registry import (
    RULES,
    Inexact,
    Jvp,
    Rule,
    evaluate,
    functions,
    linear_in_first,
    rule,
)

# Linear in the first argument, everything else a constant: the function is its own JVP.
linear_in_first(
    *("reshape", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "contiguous"),
    *("permute", "transpose", "swapaxes", "swapdims", "t", "adjoint", "moveaxis", "movedim"),
    *("positive", "real", "clone", "conj", "resolve_conj", "resolve_neg"),
    *("expand", "broadcast_to", "repeat", "tile", "repeat_interleave", "roll", "flip"),
    *("fliplr", "flipud", "rot90", "narrow", "select", "split", "split_with_sizes", "chunk"),
    *("tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "unfold", "fold", "diagonal", "diag"),
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
    return y, lambda dx, *_: dx.reshape(y.shape)  # a tangent may have other strides


def _shaped_like(function: Callable[..., Any]) -> None:
    """f(x, other) takes shape or dtype, and nothing else, from `other`."""

    @rule(function, complex=True)
    def like(x: Tensor, other: Tensor) -> tuple[Tensor, Jvp]:
        return function(x, other), lambda dx, _: None if dx is None else function(dx, other)


for _function in functions("view_as", "expand_as", "reshape_as", "type_as"):
    _shaped_like(_function)


def _joined(function: Callable[..., Any]) -> None:
    """Linear in a list of tensors; a missing tangent is a zero that takes no memory."""

    @rule(function, complex=True)
    def join(tensors: Sequence[Tensor], dim: int | None = None) -> tuple[Tensor, Jvp]:
        options = {} if dim is None else {"dim": dim}

        def jvp(dtensors: Sequence[Tensor | None], _: None = None) -> Tensor:
            filled = [
                x.new_zeros(()).expand(x.shape) if dx is None else dx
                for x, dx in zip(tensors, dtensors, strict=True)
            ]
            return function(filled, **options)

        return function(tensors, **options), jvp


for _function in functions("cat", "concat", "concatenate", "stack"):
    _joined(_function)
for _function in functions("hstack", "vstack", "dstack"):
    _joined(_function)


@rule("broadcast_tensors", complex=True)
def broadcast_tensors(*tensors: Tensor) -> tuple[Any, Jvp]:
    ys = torch.broadcast_tensors(*tensors)
    shape = ys[0].shape
    return ys, lambda *d: [None if dx is None else dx.expand(shape) for dx in d]


def _at_least(function: Callable[..., Any]) -> None:
    @rule(function, complex=True)
    def at_least(*tensors: Tensor) -> tuple[Any, Jvp]:
        def jvp(*d: Tensor | None) -> Any:
            ys = [None if dx is None else function(dx) for dx in d]
            return ys if isinstance(y, (tuple, list)) else ys[0]

        y = function(*tensors)
        return y, jvp


for _function in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d):
    _at_least(_function)


@rule("pad", "constant_pad_nd", complex=True)
def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> tuple[Tensor, Jvp] | None:
    if not isinstance(mode, str):  # constant_pad_nd(input, pad, value)
        mode, value = "constant", mode
    if isinstance(value, complex):
        return None  # which F.pad does not take
    return F.pad(input, pad, mode, value), lambda dx, *_: F.pad(dx, pad, mode)


@rule("where", complex=True)
def where(condition: Tensor, input: Any = None, other: Any = None) -> tuple[Tensor, Jvp]:
    def jvp(_: None, dx: Tensor | None, dother: Tensor | None) -> Tensor:
        zero = (dx if dother is None else dother).new_zeros(())  # type: ignore[union-attr]
        return torch.where(
            condition, zero if dx is None else dx, zero if dother is None else dother
        )

    return torch.where(condition, input, other), jvp


@rule(Tensor.where, complex=True)
def where_method(self: Tensor, condition: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = where(condition, self, other)
    return y, lambda dx, _, dother: jvp(None, dx, dother)


@rule("masked_fill", complex=True)
def masked_fill(input: Tensor, mask: Tensor, value: Any) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, _: None, dvalue: Tensor | None) -> Tensor:
        if dx is None:
            dx = torch.zeros_like(input)
        return dx.masked_fill(mask, 0 if dvalue is None else dvalue)

    return torch.masked_fill(input, mask, value), jvp


def _zeros(dx: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if dx is None else dx


def _jointly_linear(
    names: Sequence[str], parameters: str, source: int, defaults: tuple[Any, ...] = ()
) -> None:
    """Linear in the tensor written to (the first) and in the one at `source`, together."""
    for function in functions(*names):

        def apply(
            args: Sequence[Any], dargs: Any, f: Callable[..., Any] = function
        ) -> tuple[Any, list[Any]]:
            x, src = args[0], args[source]

            def jvp(*d: Any) -> Tensor:
                out = list(args)
                out[0] = _zeros(d[0], x)
                out[source] = _zeros(d[source], src) if isinstance(src, Tensor) else 0
                return f(*out)

            return f(*args), evaluate(jvp, dargs)

        RULES[function] = Rule(apply, None, "rule", complex=True)
        RULES[function].parameters = tuple(parameters.split())
        RULES[function].defaults = defaults and (None, None, *defaults)


_jointly_linear(["scatter", "scatter_add", "index_copy"], "input dim index src", 3)
_jointly_linear(["index_add"], "input dim index source", 3)
_jointly_linear(["index_fill"], "input dim index value", 3)
_jointly_linear(["index_put"], "input indices values", 2)
_jointly_linear(["masked_scatter"], "input mask source", 2)
_jointly_linear(["select_scatter"], "input src dim index", 1)
_jointly_linear(["slice_scatter"], "input src dim start end step", 1, (0, None, None, 1))
_jointly_linear(["diagonal_scatter"], "input src offset dim1 dim2", 1, (0, 0, 1))


def _as_strided(function: Callable[..., Any]) -> None:
    @rule(function, complex=True)
    def as_strided(
        input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
    ) -> tuple[Tensor, Jvp]:
        start = 0 if storage_offset is None else storage_offset - input.storage_offset()
        dense = _span(input.shape, input.stride()) == input.numel()
        if not dense or start < 0 or start + _span(size, stride) > input.numel():
            raise Inexact("it reads memory outside of its argument; index that instead.")

        def jvp(dx: Tensor, *_: None) -> Tensor:
            memory = torch.empty_strided(
                input.shape, input.stride(), dtype=dx.dtype, device=dx.device
            )
            return memory.copy_(dx).as_strided(size, stride, start)

        return function(input, size, stride, storage_offset), jvp


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many numbers lie between the first and the last of a view, these included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


for _function in functions("as_strided", "as_strided_copy"):
    _as_strided(_function)


@rule("as_strided_scatter", complex=True)
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
        dx, dsrc = _zeros(dx, input).contiguous(), _zeros(dsrc, src)
        return torch.as_strided_scatter(dx, dsrc, size, stride, storage_offset)

    return torch.as_strided_scatter(input, src, size, stride, storage_offset), jvp


# The functional forms of writes are called for their tangents; their y is what was there,
# unaliased.


@rule(FORMS["__setitem__"], complex=True)
def assign(x: Tensor, index: Any, value: Any) -> tuple[Tensor, Jvp]:
    def written(into: Tensor, values: Any) -> Tensor:
        into = into.clone()
        into[index] = values
        return into

    def jvp(dx: Tensor | None, _: Any, dvalue: Tensor | None) -> Tensor:
        return written(_zeros(dx, x), 0 if dvalue is None else dvalue.to(x.dtype))

    return x.detach(), jvp


@rule(FORMS["copy_"], complex=True)
def overwrite(x: Tensor, src: Tensor, non_blocking: bool = False) -> tuple[Tensor, Jvp]:
    def jvp(_: Tensor | None, dsrc: Tensor | None, __: None) -> Tensor | None:
        return None if dsrc is None else dsrc.to(x.device, x.dtype).expand(x.shape)

    return x.detach(), jvp


@rule(FORMS["fill_"], complex=True)
def fill(x: Tensor, value: Any) -> tuple[Tensor, Jvp]:
    return (
        x.detach(),
        lambda _, dvalue: None if dvalue is None else dvalue.to(x.dtype).expand(x.shape),
    )


@rule(FORMS["zero_"], complex=True)
def forget(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Jvp]:
    """What is written has no derivative, whatever the options (``generator=``) of a random fill."""
    return x.detach(), lambda *_: None
