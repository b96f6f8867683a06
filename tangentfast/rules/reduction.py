"""Reductions, softmax, and selections by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.rules.registry import Jvp, rule

aten = torch.ops.aten


def _softmax(
    function: Callable[..., Any], input: Tensor, dim: int | None, *rest: Any
) -> tuple[Tensor, Jvp] | None:
    """The Jacobian diag(y) - y yᵀ is symmetric: torch's backward kernel is the JVP."""
    if dim is None:
        return None
    y = function(input, dim=dim, dtype=rest[-1])
    return y, lambda dx: aten._softmax_backward_data(dx.to(y.dtype), y, dim, y.dtype)


def _log_softmax(
    function: Callable[..., Any], input: Tensor, dim: int | None, *rest: Any
) -> tuple[Tensor, Jvp] | None:
    if dim is None:
        return None
    y = function(input, dim=dim, dtype=rest[-1])

    def jvp(dx: Tensor) -> Tensor:
        dx = dx.to(y.dtype)
        return dx - (dx * y.exp()).sum(dim, keepdim=True)

    return y, jvp


for _name, _forward in {"softmax": _softmax, "log_softmax": _log_softmax}.items():
    rule(_name, parameters="input dim=None dtype=None", itself=True)(_forward)
    _functional = getattr(F, _name)
    rule(_functional, parameters="input dim=None _stacklevel=3 dtype=None", itself=True)(_forward)


@rule("logsumexp")
def logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> tuple[Tensor, Jvp]:
    y = torch.logsumexp(input, dim, keepdim=True)

    def jvp(dx: Tensor) -> Tensor:
        dy = (dx * (input - y).exp()).sum(dim, keepdim=True)
        return dy if keepdim else dy.squeeze(dim)

    return (y if keepdim else y.squeeze(dim)), jvp


def _entries(y: Any, dim: int, keepdim: bool) -> tuple[Any, Jvp]:
    """(values, indices) of entries of x along dim; indices have no tangent."""

    def jvp(dx: Tensor) -> list[Tensor | None]:
        index = y[1] if keepdim else y[1].unsqueeze(dim)
        dy = torch.gather(dx, dim, index)
        return [dy if keepdim else dy.squeeze(dim), None]

    return y, jvp


@rule("topk")
def topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Any, Jvp]:
    return _entries(torch.topk(input, k, dim, largest, sorted), dim, True)


@rule("sort")
def sort(input: Tensor, dim: int = -1, descending: bool = False) -> tuple[Any, Jvp]:
    return _entries(torch.sort(input, dim, descending), dim, True)


@rule("max", "min", itself=True)
def extreme(
    function: Callable[..., Any], input: Tensor, dim: Any = None, keepdim: bool = False
) -> tuple[Any, Jvp] | None:
    if isinstance(dim, Tensor):  # max(x, other)
        return None
    if dim is not None:
        return _entries(function(input, dim, keepdim), dim, keepdim)
    y = function(input)

    def jvp(dx: Tensor) -> Tensor:
        chosen = (input == y).to(dx.dtype)
        return (dx * chosen).sum() / chosen.sum()

    return y, jvp


def _max_pool(name: str, with_indices: Callable[..., Any], spatial: int) -> None:
    @rule(name)
    def max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> tuple[Tensor, Jvp] | None:
        if return_indices:
            return None
        y, chosen = with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)

        def jvp(dx: Tensor) -> Tensor:
            picked = dx.flatten(-spatial).gather(-1, chosen.flatten(-spatial))
            return picked.view(y.shape)

        return y, jvp


_max_pool("max_pool1d", F.max_pool1d_with_indices, 1)
_max_pool("max_pool2d", F.max_pool2d_with_indices, 2)
_max_pool("max_pool3d", F.max_pool3d_with_indices, 3)


@rule("amax", "amin", itself=True)
def shared_extreme(
    function: Callable[..., Any], input: Tensor, dim: Any = (), keepdim: bool = False
) -> tuple[Tensor, Jvp]:
    """Ties share the tangent, as they share the gradient."""
    y = function(input, dim, keepdim=True)

    def jvp(dx: Tensor) -> Tensor:
        chosen = (input == y).to(dx.dtype)
        dims = dim if dim != () else tuple(range(input.dim()))
        dy = (dx * chosen).sum(dims, keepdim=True) / chosen.sum(dims, keepdim=True)
        return dy if keepdim else dy.view(function(input, dim).shape)

    return function(input, dim, keepdim=keepdim), jvp


@rule("var")
def var(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Jvp]:
    if isinstance(dim, bool):  # var(input, unbiased)
        dim, unbiased = None, dim
    dims = tuple(range(input.dim())) if dim is None else dim
    y = torch.var(input, dims, correction=int(unbiased), keepdim=keepdim)

    def jvp(dx: Tensor) -> Tensor:
        centred = input - input.mean(dims, keepdim=True)
        count = centred.numel() // max(y.numel(), 1)
        return (dx * centred).sum(dims, keepdim=keepdim) * 2 / max(count - int(unbiased), 0)

    return y, jvp


@rule("std")
def std(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Jvp]:
    variance, slope = var(input, dim, unbiased, keepdim)
    y = variance.sqrt()
    # at a spread of zero 0, as autograd has it
    return y, lambda dx: torch.where(y == 0, 0, slope(dx) / (2 * y))


def _two_norm(input: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, Jvp]:
    dims = tuple(range(input.dim())) if dim is None else dim
    y = torch.linalg.vector_norm(input, 2, dims, keepdim=keepdim)

    def jvp(dx: Tensor) -> Tensor:
        inner = (dx * input).sum(dims, keepdim=keepdim)
        return torch.where(y == 0, 0, inner / y)  # the subgradient 0 that autograd takes

    return y, jvp


@rule(torch.norm, Tensor.norm)
def norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False
) -> tuple[Tensor, Jvp] | None:
    if p not in ("fro", 2, None):
        return None
    return _two_norm(input, dim, keepdim)


@rule(torch.linalg.vector_norm, torch.linalg.norm)
def vector_norm(
    x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False
) -> tuple[Tensor, Jvp] | None:
    matrix = x.dim() == 2 if dim is None else isinstance(dim, Sequence) and len(dim) == 2
    if ord not in (2, None) or (matrix and ord is not None):
        return None
    return _two_norm(x, dim, keepdim)


@rule(F.normalize)
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Jvp] | None:
    if p != 2:
        return None
    length = torch.linalg.vector_norm(input, 2, dim, keepdim=True)
    y = input / length.clamp_min(eps)

    def jvp(dx: Tensor) -> Tensor:
        scaled = dx / length.clamp_min(eps)
        along = (scaled * y).sum(dim, keepdim=True)
        return scaled - torch.where(length < eps, 0, along) * y

    return y, jvp
