"""Writes in place and operators, as people write them, against ``torch.func.jvp``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, C, Case, R
from checks import DIFFERENTIABLE, Function, check, of_kind, tangentfast_jvp
from torch import Tensor

from tangentfast.dual import name_of
from tangentfast.rules import RULES
from tangentfast.rules.registry import WRITES


def on_clone(write: Callable[..., Any]) -> Function:
    """The function of (x, ...) that writes to a copy of x and returns it."""

    def call(x: Tensor, *rest: Any) -> Tensor:
        x = x.clone()
        write(x, *rest)
        return x

    return call


def on_new(write: Callable[..., Any]) -> Function:
    """The function of (...) that writes to a tensor without a tangent and returns it."""

    def call(*rest: Any) -> Tensor:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).clone()
        write(x, *rest)
        return x

    return call


def assign_to(index: Any) -> Callable[[Tensor, Any], None]:
    return lambda x, value: x.__setitem__(index, value)


def through_view(x: Tensor, y: Tensor) -> None:
    row = x[1]
    row.mul_(y)
    x[:, 1:].add_(row[1:])


COLUMNS = (slice(None), slice(1, 3))
rows_picked = torch.tensor([2, 0])
half = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
WRITING: dict[str, tuple[Function, Case]] = {
    "setitem int": (on_clone(assign_to(0)), C(R(3, 4), R(4))),
    "setitem slice": (on_clone(assign_to(COLUMNS)), C(R(3, 4), R(3, 2))),
    "setitem number": (on_clone(assign_to(COLUMNS)), C(R(3, 4), 2.0)),
    "setitem indices": (on_clone(assign_to(rows_picked)), C(R(3, 4), R(2, 4))),
    "setitem mask": (on_clone(assign_to(half)), C(R(3, 4), R())),
    "setitem ellipsis": (on_clone(assign_to(...)), C(R(3, 4), R(4))),
    "setitem into a constant": (on_new(assign_to(0)), C(R(4))),
    "copy_": (on_clone(Tensor.copy_), C(R(3, 4), R(4))),
    "copy_ a constant": (on_clone(Tensor.copy_), C(R(3, 4), torch.ones(3, 4))),
    "copy_ into a constant": (on_new(Tensor.copy_), C(R(3, 4))),
    "fill_": (on_clone(Tensor.fill_), C(R(3, 4), 2.0)),
    "fill_ a tensor": (on_clone(Tensor.fill_), C(R(3, 4), R())),
    "fill_ a row": (on_clone(lambda x, v: x[1].fill_(v)), C(R(3, 4), R())),
    "zero_": (on_clone(Tensor.zero_), C(R(3, 4))),
    "zero_ a row": (on_clone(lambda x: x[1].zero_()), C(R(3, 4))),
    "normal_ a row": (on_clone(lambda x: x[1].normal_()), C(R(3, 4))),
    "uniform_": (on_clone(Tensor.uniform_), C(R(3, 4))),
    "bernoulli_ a row, generator": (
        on_clone(lambda x: x[1].bernoulli_(0.5, generator=torch.Generator().manual_seed(1))),
        C(R(3, 4)),
    ),
    "add_": (on_clone(Tensor.add_), C(R(3, 4), R(4))),
    "add_ alpha": (on_clone(lambda x, y: x.add_(y, alpha=2)), C(R(3, 4), R(4))),
    "add_ into a constant": (on_new(Tensor.add_), C(R(4))),
    "+= -= *= /= **=": (
        on_clone(lambda x, y: ((x.__iadd__(y)).__isub__(2 * y).__imul__(y).__idiv__(y), x.pow_(2))),
        C(R(3, 4), R(4, low=1, high=2)),
    ),
    "masked_fill_": (on_clone(Tensor.masked_fill_), C(R(3, 4), half, R())),
    "clamp_": (on_clone(Tensor.clamp_), C(R(3, 4), -0.5, 0.5)),
    "index_put_": (on_clone(Tensor.index_put_), C(R(3, 4), (rows_picked,), R(2, 4))),
    "index_add_": (on_clone(Tensor.index_add_), C(R(3, 4), 0, rows_picked, R(2, 4))),
    "index_copy_": (on_clone(Tensor.index_copy_), C(R(3, 4), 0, rows_picked, R(2, 4))),
    "scatter_": (on_clone(Tensor.scatter_), C(R(3, 4), 1, rows_picked.view(1, 2), R(1, 2))),
    "scatter_add_": (on_clone(Tensor.scatter_add_), C(R(3, 4), 1, rows_picked.view(1, 2), R(1, 2))),
    "addcmul_": (on_clone(Tensor.addcmul_), C(R(3, 4), R(4), R(3, 1))),
    "lerp_": (on_clone(Tensor.lerp_), C(R(3, 4), R(3, 4), 0.3)),
    "exp_": (on_clone(torch.exp_), C(R(3, 4))),
    "relu_": (on_clone(F.relu_), C(R(3, 4))),
    "through views": (on_clone(through_view), C(R(3, 4), R(4))),
    "through views, a constant": (on_new(through_view), C(R(4))),
    "through transposition": (on_clone(lambda x, y: x.t().sub_(y)), C(R(3, 4), R(4, 1))),
}


@pytest.mark.parametrize("name", WRITING)
def test_write(name: str) -> None:
    function, case = WRITING[name]
    check(function, case)


def test_multiplied_by_itself_in_place() -> None:
    """d(x·x) = 2 x dx; ``torch.func.jvp`` reads the tangent that it has already overwritten."""
    x, dx = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 0.5])
    y, (dy,) = tangentfast_jvp(on_clone(lambda x: x.mul_(x)), ((x,), {}), [[dx]])
    assert torch.equal(y, x * x)
    assert torch.equal(dy, 2 * x * dx)


def test_every_form_of_write_is_covered() -> None:
    """The rules in `WRITES` are reached through the writes above."""
    names = " ".join(WRITING)
    reached = {rule for name, rule in WRITES.items() if name.strip("_") in names}
    assert set(WRITES.values()) == reached


def has_inplace(function: Function) -> bool:
    try:
        return "inplace" in inspect.signature(function).parameters
    except ValueError:  # builtins
        return False


INPLACE = [f for f in of_kind(*DIFFERENTIABLE) if RULES[f].inplace >= 0 and has_inplace(f)]


@pytest.mark.parametrize("function", INPLACE, ids=name_of)
def test_inplace_argument(function: Function) -> None:
    call = on_clone(lambda x, *options: function(x, *options, inplace=True))
    check(call, C(*CASES[name_of(function)][0].args))


# --- operators, as people write them

OPERATORS: dict[str, tuple[Function, Case]] = {
    "x + y": (lambda x, y: x + y, C(R(3, 4), R(4))),
    "2 + x": (lambda x: 2 + x, C(R(3))),
    "x - y": (lambda x, y: x - y, C(R(3, 4), R(4))),
    "2 - x": (lambda x: 2 - x, C(R(3))),
    "x * y": (lambda x, y: x * y, C(R(3, 4), R(4))),
    "2 * x": (lambda x: 2 * x, C(R(3))),
    "x / y": (lambda x, y: x / y, C(R(3, 4), R(4, low=1, high=2))),
    "2 / x": (lambda x: 2 / x, C(R(3, low=1, high=2))),
    "x ** 2": (lambda x: x**2, C(R(3))),
    "2 ** x": (lambda x: 2**x, C(R(3))),
    "x ** y": (lambda x, y: x**y, C(R(3, low=1, high=2), R(3))),
    "x @ y": (lambda x, y: x @ y, C(R(3, 4), R(4))),
    "constant @ x": (lambda x: torch.ones(2, 3, dtype=x.dtype) @ x, C(R(3, 4))),
    "constant - x": (lambda x: torch.ones(3, dtype=x.dtype) - x, C(R(3))),
    "constant / x": (lambda x: torch.ones(3, dtype=x.dtype) / x, C(R(3, low=1, high=2))),
    "-x": (lambda x: -x, C(R(3))),
    "+x": (lambda x: +x, C(R(3))),
    "abs(x)": (lambda x: abs(x), C(R(3))),
    "a, b = x": (lambda x: [a * b for a, b in [x]], C(R(2, 3))),
    "for row in x": (lambda x: [row * i for i, row in enumerate(x)], C(R(2, 3))),
    "x.T.mT": (lambda x: x.T.mT * x, C(R(3, 3))),
    "a, b = torch.max(x, 0)": (lambda x: torch.max(x, 0).values * x, C(R(3, 4))),
    "torch.max_pool2d by module": (torch.nn.MaxPool2d(3, 2, 1), C(R(1, 2, 5, 5))),
    "type by name": (lambda x: x * len(x.type()), C(R(3))),
    "torch.softmax(input=x, dim=0)": (lambda x: torch.softmax(input=x, dim=0), C(R(3, 4))),
    "torch.sum(input=x, dim=0)": (lambda x: torch.sum(input=x, dim=0), C(R(3, 4))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    function, case = OPERATORS[name]
    check(function, case)
