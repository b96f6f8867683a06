"""Every rule against torch and ``torch.func.jvp``: see `cases` for the calls and `truth` for the measure."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, C, Call, Case, R
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from truth import TOLERANCE, floats, relative, torch_jvp, units

from tangentfast.dual import Dual, Pass, make_dual, name_of, running
from tangentfast.inplace import FORMS
from tangentfast.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecated spellings (upsample, ger) are rules too

Function = Callable[..., Any]
WRITES = set(FORMS.values())
DIFFERENTIABLE = ("linear", "rule", "fused", "composite")


def of_kind(*kinds: str) -> list[Function]:
    return [f for f, r in RULES.items() if r.kind in kinds and f not in WRITES]


def room(function: Function) -> str:
    """Where torch keeps a function: names are not unique."""
    for place in (torch, Tensor, F, torch.special, torch._C._nn):
        if getattr(place, getattr(function, "__name__", ""), None) is function:
            return place.__name__
    return type(function).__name__


def calls() -> Iterable[Any]:
    for function in of_kind(*DIFFERENTIABLE):
        for case in CASES.get(name_of(function), []):
            if case.applies(function):
                yield pytest.param(function, case, id=f"{room(function)}.{name_of(function)}({case})")


def test_every_rule_has_cases() -> None:
    tested = {p.values[0] for p in calls()}
    missing = [f"{room(f)}.{name_of(f)}" for f in of_kind(*DIFFERENTIABLE) if f not in tested]
    assert missing == []
    assert set(CASES) <= {name_of(f) for f in RULES}


def directions(call: Call, active: Sequence[int], seed: int = 0) -> list[Tensor | None]:
    """A random tangent for each leaf of `call` that is in `active`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        if i in active
        else None
        for i, x in enumerate(tree_flatten(call)[0])
    ]


def tangentfast_jvp(
    function: Function, call: Call, rows: Sequence[Sequence[Tensor | None]]
) -> tuple[Any, list[Any]]:
    """(y, [dy_1 … dy_K]) by the rules, without a single fallback."""
    leaves, spec = tree_flatten(call)
    pass_ = Pass(len(rows))
    duals = [
        make_dual(x.view_as(x), [row[i] for row in rows], pass_)
        if any(row[i] is not None for row in rows)
        else x
        for i, x in enumerate(leaves)
    ]
    args, kwargs = tree_unflatten(duals, spec)
    torch.manual_seed(0)
    with running(pass_):
        out, shape = tree_flatten(function(*args, **kwargs))
    assert not pass_.fallbacks
    primals = [y.primal if type(y) is Dual else y for y in out]
    assert not any(isinstance(y, Dual) for y in primals)

    def tangent(y: Any, k: int) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if type(y) is Dual and y.tangents[k] is not None:
            return y.tangents[k]
        return torch.zeros_like(y.primal if type(y) is Dual else y)

    dys = [tree_unflatten([tangent(y, k) for y in out], shape) for k in range(len(rows))]
    for y, dy in zip(floats(primals), floats(dys[0]), strict=True):
        assert (dy.shape, dy.dtype, dy.requires_grad) == (y.shape, y.dtype, False)
    return tree_unflatten(primals, shape), dys


def torch_by_double_backward(
    function: Function, call: Call, row: Sequence[Tensor | None]
) -> tuple[Any, Any]:
    """J v as the derivative by u of ⟨v, Jᵀ u⟩: where torch has no forward derivative."""
    leaves, spec = tree_flatten(call)
    active = [i for i, v in enumerate(row) if v is not None]
    for i in active:
        leaves[i] = leaves[i].detach().requires_grad_()
    args, kwargs = tree_unflatten(leaves, spec)
    y = function(*args, **kwargs)
    u = torch.zeros_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, [leaves[i] for i in active], u, create_graph=True)
    inner = sum((g * row[i]).sum() for g, i in zip(grads, active, strict=True))
    return y.detach(), torch.autograd.grad(inner, u)[0]


def reference(function: Function, call: Call, row: Sequence[Tensor | None]) -> tuple[Any, Any]:
    """(y, dy) by torch alone, random functions drawing what they draw above."""

    def seeded(args: Any, kwargs: Any) -> Any:
        torch.manual_seed(0)
        return function(*args, **kwargs)

    try:
        return torch_jvp(seeded, call, row)
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error):
            raise
        return torch_by_double_backward(function, call, row)


def in_dtype(dtype: torch.dtype, tree: Any, instead_of: torch.dtype) -> Any:
    """The tensors of one dtype in another."""
    leaves, spec = tree_flatten(tree)
    moved = [x.to(dtype) if isinstance(x, Tensor) and x.dtype == instead_of else x for x in leaves]
    return tree_unflatten(moved, spec)


def agree(got: Any, want: Any) -> None:
    """Floats to rounding; dtypes, whole numbers and everything else exactly."""
    for a, b in zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=True):
        if not isinstance(a, Tensor):
            assert a == b
        elif a.is_floating_point():
            assert a.dtype == b.dtype
            assert units(a, b) <= TOLERANCE[torch.float64]
        else:
            assert torch.equal(a, b)


def check_tangent(function: Function, case: Case) -> None:
    """y and dy, for all arguments and for each alone, contiguous and not."""
    for strided in (False, True) if case.strided else (False,):
        call, active = case.build(torch.float64, strided)
        for chosen in [active] if len(active) == 1 else [active, *([i] for i in active)]:
            row = directions(call, chosen)
            y, (dy,) = tangentfast_jvp(function, call, [row])
            want, dwant = reference(function, call, row)
            agree(y, want)
            assert units(dy, dwant) <= TOLERANCE[torch.float64]


def check_linear(function: Function, case: Case) -> None:
    """K tangents in one pass are what each is alone; the tangent of a sum is the sum of the tangents."""
    call, active = case.build(torch.float64)
    v, w = directions(call, active, 1), directions(call, active[:1], 2)
    both = [
        None if a is None else 2 * a if b is None else 2 * a - 3 * b
        for a, b in zip(v, w, strict=True)
    ]
    _, (dv, dw, dboth) = tangentfast_jvp(function, call, [v, w, both])
    for row, dy in ((v, dv), (w, dw)):
        assert units(dy, tangentfast_jvp(function, call, [row])[1][0]) <= 1
    for a, b, c in zip(floats(dv), floats(dw), floats(dboth), strict=True):
        size = float(a.nan_to_num().norm() + b.nan_to_num().norm())
        assert relative(c, 2 * a - 3 * b, size) <= 32 * torch.finfo(c.dtype).eps


def check_adjoint(function: Function, case: Case) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩ by backward through y, which keeps its ordinary graph."""
    call, active = case.build(torch.float64)
    leaves, spec = tree_flatten(call)
    leaves = [x.requires_grad_() if i in active else x for i, x in enumerate(leaves)]
    row = directions(call, active)
    y, (dy,) = tangentfast_jvp(function, tree_unflatten(leaves, spec), [row])
    pairs = [(a, b) for a, b in zip(floats(y), floats(dy), strict=True) if a.requires_grad]
    if not pairs:
        assert not any(float(b.norm()) for b in floats(dy))
        return
    us = [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a, _ in pairs]
    torch.autograd.backward([a for a, _ in pairs], us)
    left = torch.cat([(b * u).double().flatten() for (_, b), u in zip(pairs, us, strict=True)])
    right = torch.cat([(leaves[i].grad * row[i]).flatten() for i in active if leaves[i].grad is not None])
    eps = max(torch.finfo(b.dtype).eps for _, b in pairs)
    size = float(left.abs().sum() + right.abs().sum())
    assert abs(float(left.sum() - right.sum())) <= 32 * eps * size


def check(function: Function, case: Case) -> None:
    check_tangent(function, case)
    check_linear(function, case)
    if case.adjoint:
        check_adjoint(function, case)


@pytest.mark.parametrize(("function", "case"), calls())
def test_rule(function: Function, case: Case) -> None:
    if case.cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(function, case)


@pytest.mark.parametrize(("function", "case"), calls())
def test_float32(function: Function, case: Case) -> None:
    """Float32 against the float64 truth of the same numbers."""
    if case.cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    call, active = case.build(torch.float32)
    call = in_dtype(torch.float32, call, torch.float64)  # constants follow
    row = directions(call, active)
    y, (dy,) = tangentfast_jvp(function, call, [row])
    exact = in_dtype(torch.float64, call, torch.float32)
    want, dwant = reference(function, exact, in_dtype(torch.float64, row, torch.float32))
    assert units(y, want) <= TOLERANCE[torch.float32]
    assert units(dy, dwant) <= TOLERANCE[torch.float32]


SIXTEEN_BIT = ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "gelu", "linear",
               "scaled_dot_product_attention")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("function", "case"), [p for p in calls() if name_of(p.values[0]) in SIXTEEN_BIT]
)
def test_sixteen_bit(function: Function, case: Case, dtype: torch.dtype) -> None:
    """No farther from the float64 truth than 1.25 × ``torch.func.jvp``, and one rounding."""
    call, active = case.build(dtype)
    call = in_dtype(dtype, call, torch.float64)
    row = directions(call, active)
    _, (dy,) = tangentfast_jvp(function, call, [row])
    _, theirs = reference(function, call, row)
    exact = in_dtype(torch.float64, call, dtype)
    _, truth = reference(function, exact, in_dtype(torch.float64, row, dtype))
    assert units(dy, truth, dtype) <= 1.25 * units(theirs, truth, dtype) + 1


# --- writes in place, as functions of their arguments


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
        x = torch.arange(12.0, dtype=torch.float64).view(3, 4)
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
    "copy_ from float32": (on_new(lambda x, y: x.copy_(y.float().double())), C(R(3, 4))),
    "fill_": (on_clone(Tensor.fill_), C(R(3, 4), 2.0)),
    "fill_ a tensor": (on_clone(Tensor.fill_), C(R(3, 4), R())),
    "fill_ a row": (on_clone(lambda x, v: x[1].fill_(v)), C(R(3, 4), R())),
    "zero_": (on_clone(Tensor.zero_), C(R(3, 4))),
    "zero_ a row": (on_clone(lambda x: x[1].zero_()), C(R(3, 4))),
    "normal_ a row": (on_clone(lambda x: x[1].normal_()), C(R(3, 4))),
    "uniform_": (on_clone(Tensor.uniform_), C(R(3, 4))),
    "add_": (on_clone(Tensor.add_), C(R(3, 4), R(4))),
    "add_ alpha": (on_clone(lambda x, y: x.add_(y, alpha=2)), C(R(3, 4), R(4))),
    "add_ into a constant": (on_new(Tensor.add_), C(R(4))),
    "+= -= *= /= **=": (
        on_clone(lambda x, y: ((x.__iadd__(y)).__isub__(2 * y).__imul__(y).__idiv__(y), x.pow_(2))),
        C(R(3, 4), R(4, low=1, high=2)),
    ),
    "mul_ by itself": (on_clone(lambda x: x.mul_(x)), C(R(3, 4))),
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


def test_every_form_of_write_is_covered() -> None:
    """The functional forms of `inplace.FORMS` are reached through the writes above."""
    names = " ".join(WRITING)
    reached = {form for name, form in FORMS.items() if name.strip("_") in names}
    assert {f for f in WRITES if f in RULES and f.__module__ == "tangentfast.inplace"} <= reached


def has_inplace(function: Function) -> bool:
    try:
        return "inplace" in inspect.signature(function).parameters
    except ValueError:  # builtins
        return False


INPLACE = [f for f in of_kind(*DIFFERENTIABLE) if RULES[f].inplace >= 0 and has_inplace(f)]


@pytest.mark.parametrize("function", INPLACE, ids=name_of)
def test_inplace_argument(function: Function) -> None:
    call = on_clone(lambda x: function(x, inplace=True))
    check(call, C(*CASES[name_of(function)][0].args[:1]))


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
