"""Directional derivatives by torch alone, none of them taken at its word.

Three ways to the same number: ``torch.func.jvp``, torch's backward (the adjoint identity, or row by
row), and central finite differences. Two that agree are the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from truth import differentiable_kernels

Function = Callable[..., Any]
CLOSE_UNITS = 2e6  # between two exact derivatives, in roundings of the coarsest dtype
COARSE = 1e-5  # between an exact derivative and finite differences
STEP = 1e-6


def numbers(tree: Any) -> list[Tensor]:
    """The floating and complex tensors of any structure."""
    return [
        t
        for t in tree_leaves(tree)
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    ]


def close(tensors: Sequence[Tensor]) -> float:
    """How far apart two exact derivatives of these dtypes may be."""
    return CLOSE_UNITS * max((torch.finfo(t.dtype).eps for t in tensors), default=2.0**-52)


def directions(xs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in xs]


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error in norm of any tensor; infinite where NaNs or shapes differ."""
    if len(got) != len(want):
        return float("inf")
    return max((_distance(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def _distance(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = (
        torch.view_as_real(t.detach().resolve_conj().resolve_neg())
        if t.is_complex()
        else t.detach()
        for t in (got, want)
    )
    got, want = got.double(), want.double()
    odd = ~want.isfinite()
    if not torch.equal(got[odd].nan_to_num(7.0), want[odd].nan_to_num(7.0)):
        return float("inf")
    error = torch.where(odd, 0, got - want).norm().item()
    size = torch.where(odd, 0, want).norm().item()
    return error / max(size, 1.0) if error == error else float("inf")


def by_forward(f: Function, xs: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """J v by ``torch.func.jvp``."""
    with differentiable_kernels():
        return list(torch.func.jvp(lambda *x: tuple(numbers(f(*x))), tuple(xs), tuple(vs))[1])


def by_rows(f: Function, xs: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """J v by one row of J after the other, from torch's backward."""
    xs = [x.detach().requires_grad_() for x in xs]
    ys = numbers(f(*xs))
    dys = [torch.zeros_like(y) for y in ys]
    for y, dy in zip(ys, dys, strict=True):
        for i, entry in enumerate(y.flatten() if y.requires_grad else []):
            for u in (1, 1j) if y.is_complex() else (1,):
                ws = torch.autograd.grad(
                    entry, xs, torch.full_like(entry, u), retain_graph=True, materialize_grads=True
                )
                dy.view(-1)[i] += u * sum(dot(w, v) for w, v in zip(ws, vs, strict=True))
    return dys


def by_differences(
    f: Function, xs: Sequence[Tensor], vs: Sequence[Tensor], h: float = STEP
) -> list[Tensor]:
    """J v by central finite differences."""
    with torch.no_grad():
        up = numbers(f(*(x + h * v for x, v in zip(xs, vs, strict=True))))
        down = numbers(f(*(x - h * v for x, v in zip(xs, vs, strict=True))))
    return [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product."""
    return (a.conj() * b).sum().real if a.is_complex() or b.is_complex() else (a * b).sum()


def is_adjoint(
    f: Function, xs: Sequence[Tensor], vs: Sequence[Tensor], dys: Sequence[Tensor]
) -> bool:
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩, Jᵀ by torch's backward."""
    xs = [x.detach().requires_grad_() for x in xs]
    ys = numbers(f(*xs))
    us = directions(ys, 2)
    depending = [i for i, y in enumerate(ys) if y.requires_grad]
    left = [dot(us[i], dys[i]) for i in depending]
    if not depending:
        return not any(bool(dy.any()) for dy in dys)
    grads = torch.autograd.grad(
        [ys[i] for i in depending], xs, [us[i] for i in depending], allow_unused=True
    )
    right = [dot(g, v) for g, v in zip(grads, vs, strict=True) if g is not None]
    size = sum(float(dy.nan_to_num().norm() * u.norm()) for dy, u in zip(dys, us, strict=True))
    gap = abs(float(sum(left) - sum(right)))
    return gap <= close(ys) * max(size, 1.0) or gap != gap


def derivative(
    f: Function, xs: Sequence[Tensor], vs: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """(J v, how close another must come to it)."""
    try:
        dys = by_forward(f, xs, vs)
    except RuntimeError:  # NotImplementedError is one
        try:
            dys = by_rows(f, xs, vs)
        except RuntimeError:
            return by_differences(f, xs, vs), COARSE
    tolerance = close([*xs, *dys])
    if tolerance > COARSE:
        return dys, tolerance  # too coarse for finite differences
    try:
        if is_adjoint(f, xs, vs, dys):
            return dys, tolerance
    except RuntimeError:
        pass  # no backward of its own
    return by_differences(f, xs, vs), COARSE
