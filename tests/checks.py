"""How a rule is checked: its tangents, their linearity, the adjoint identity, no fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Call, Case, Table
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from truth import TOLERANCE, floats, rounding, torch_jvp, units

from tangentfast.dual import Dual, make_dual, name_of
from tangentfast.passes import Pass, running
from tangentfast.rules import RULES

Function = Callable[..., Any]
DIFFERENTIABLE = ("linear", "rule", "fused", "composite")


def of_kind(*kinds: str) -> list[Function]:
    return [f for f, r in RULES.items() if r.kind in kinds]


def room(function: Function) -> str:
    """Where torch keeps a function: names are not unique."""
    for place in (torch, Tensor, F, torch.special, torch._C._nn):
        if getattr(place, getattr(function, "__name__", ""), None) is function:
            return place.__name__
    return type(function).__name__


def calls(table: Table, *kinds: str) -> Iterable[Any]:
    """(function, case) for every function of these kinds and every case of its name."""
    for function in of_kind(*kinds):
        for case in table.get(name_of(function), []):
            if case.applies(function):
                name = f"{room(function)}.{name_of(function)}"
                old = pytest.mark.skipif(torch.__version__ < case.since, reason="an error of torch")
                yield pytest.param(function, case, id=f"{name}({case})", marks=old)


def check_complete(table: Table, functions: Iterable[Function], *kinds: str) -> None:
    """Every function has a case, and every name in the table is that of a function."""
    tested = {p.values[0] for p in calls(table, *kinds)}
    assert [f"{room(f)}.{name_of(f)}" for f in functions if f not in tested] == []
    assert set(table) <= {name_of(f) for f in of_kind(*kinds)}


def directions(call: Call, active: Sequence[int], seed: int = 0) -> list[Tensor | None]:
    """A random tangent for each leaf of `call` that is in `active`."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: Tensor) -> Tensor:
        dtype = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device, x.dtype)

    return [random(x) if i in active else None for i, x in enumerate(tree_flatten(call)[0])]


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
        if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
            return y
        if type(y) is Dual and y.tangents[k] is not None:
            return y.tangents[k]
        return torch.zeros_like(y.primal if type(y) is Dual else y)

    dys = [tree_unflatten([tangent(y, k) for y in out], shape) for k in range(len(rows))]
    for y, dy in zip(floats(primals), floats(dys[0]), strict=True):
        assert (dy.shape, dy.dtype, dy.requires_grad) == (y.shape, y.dtype, False)
    return tree_unflatten(primals, shape), dys


def torch_by_rows(function: Function, call: Call, row: Sequence[Tensor | None]) -> tuple[Any, Any]:
    """J v by one row of J after the other, from backward: where torch has no forward derivative."""
    leaves, spec = tree_flatten(call)
    active = [i for i, v in enumerate(row) if v is not None]
    for i in active:
        leaves[i] = leaves[i].detach().requires_grad_()
    args, kwargs = tree_unflatten(leaves, spec)
    y = function(*args, **kwargs)
    dy = torch.zeros_like(y)
    for k, entry in enumerate(y.flatten()):
        grads = torch.autograd.grad(
            entry, [leaves[i] for i in active], retain_graph=True, materialize_grads=True
        )
        products = [(g * row[i]).sum() for g, i in zip(grads, active, strict=True)]
        dy.view(-1)[k] = sum(products)
    return y.detach(), dy


def reference(function: Function, call: Call, row: Sequence[Tensor | None]) -> tuple[Any, Any]:
    """(y, dy) by torch alone, random functions drawing what they draw above."""

    def seeded(args: Any, kwargs: Any) -> Any:
        torch.manual_seed(0)
        return function(*args, **kwargs)

    try:
        return torch_jvp(seeded, call, row)
    except (NotImplementedError, RuntimeError) as error:
        # no forward derivative; that of torch._weight_norm over all dimensions is broken
        if "forward AD" not in str(error) and "forward gradient" not in str(error):
            raise
        return torch_by_rows(function, call, row)


def in_dtype(dtype: torch.dtype, tree: Any, instead_of: torch.dtype) -> Any:
    """The tensors of one dtype in another."""
    leaves, spec = tree_flatten(tree)
    kinds = {instead_of: dtype, instead_of.to_complex(): dtype.to_complex()}
    moved = [x.to(kinds.get(x.dtype, x.dtype)) if isinstance(x, Tensor) else x for x in leaves]
    return tree_unflatten(moved, spec)


def agree(got: Any, want: Any, limit: float = TOLERANCE[torch.float64]) -> None:
    """Floats to `limit` roundings; dtypes, whole numbers and everything else exactly."""
    for a, b in zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=True):
        if not isinstance(a, Tensor):
            assert a == b
        elif a.is_floating_point() or a.is_complex():
            assert a.dtype == b.dtype
            assert units(a, b) <= limit
        else:
            assert torch.equal(a, b)


def terms(call: Call) -> int:
    """No sum of a call has more terms than its largest tensor has numbers."""
    return max((x.numel() for x in tree_flatten(call)[0] if isinstance(x, Tensor)), default=1)


def each_alone(row: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """A row for every tangent of `row`, without the others: their JVPs add up to that of `row`."""
    return [
        [v if i == k else None for i, v in enumerate(row)]
        for k in range(len(row))
        if row[k] is not None
    ]


def contributions(function: Function, call: Call, row: Sequence[Tensor | None]) -> list[Any]:
    """The summands of dy: each argument's, by torch."""
    return [reference(function, call, part)[1] for part in each_alone(row)]


def check_tangent(function: Function, case: Case) -> None:
    """y and dy, for all arguments, contiguous and not, and for each alone."""
    call, active = case.build(case.dtype)
    row, limit = directions(call, active), rounding(terms(call))
    parts = contributions(function, call, row)
    for part, dwant in zip(each_alone(row), parts, strict=True):
        _, (dy,) = tangentfast_jvp(function, call, [part])
        assert units(dy, dwant) <= limit
    for strided in (False, True) if case.strided else (False,):
        call, _ = case.build(case.dtype, strided)
        y, (dy,) = tangentfast_jvp(function, call, [row])
        want, dwant = reference(function, call, row)
        agree(y, want, limit)
        assert units(dy, dwant, summands=parts) <= limit


def check_linear(function: Function, case: Case) -> None:
    """K tangents in one pass are what each is alone, and that of a sum is the sum."""
    call, active = case.build(case.dtype)
    v, w = directions(call, active, 1), directions(call, active[:1], 2)
    limit = rounding(terms(call))
    both = [
        None if a is None else 2 * a if b is None else 2 * a - 3 * b
        for a, b in zip(v, w, strict=True)
    ]
    _, (dv, dw, dboth) = tangentfast_jvp(function, call, [v, w, both])
    _, (*alone, dw_alone) = tangentfast_jvp(function, call, [*each_alone(v), w])
    assert units(dw, dw_alone) <= limit
    assert units(dv, tangentfast_jvp(function, call, [v])[1][0], summands=alone) <= limit
    want = [2 * a - 3 * b for a, b in zip(floats(dv), floats(dw), strict=True)]
    parts = [*([2 * x for x in floats(part)] for part in alone), [3 * x for x in floats(dw)]]
    assert units(floats(dboth), want, summands=parts) <= limit


def check_adjoint(function: Function, case: Case) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩ by backward through y, which keeps its ordinary graph."""
    call, active = case.build(case.dtype)
    leaves, spec = tree_flatten(call)
    leaves = [x.requires_grad_() if i in active else x for i, x in enumerate(leaves)]
    row = directions(call, active)
    y, (dy, *parts) = tangentfast_jvp(
        function, tree_unflatten(leaves, spec), [row, *each_alone(row)]
    )
    pairs = [(a, b) for a, b in zip(floats(y), floats(dy), strict=True) if a.requires_grad]
    if not pairs:
        assert not any(float(b.norm()) for b in floats(dy))
        return
    us = [torch.randn(a.shape, dtype=torch.float64).to(a.device, a.dtype) for a, _ in pairs]
    torch.autograd.backward([a for a, _ in pairs], us)
    left = sum(float((b * u).double().sum()) for (_, b), u in zip(pairs, us, strict=True))
    right = torch.cat(
        [
            (g * v).flatten()
            for i in active
            if leaves[i].grad is not None
            for g, v in zip(floats(leaves[i].grad), floats(row[i]), strict=True)
        ]
    )
    size = float(right.abs().sum())
    for part in parts:
        moved = [b for a, b in zip(floats(y), floats(part), strict=True) if a.requires_grad]
        size += sum(float((b * u).abs().sum()) for b, u in zip(moved, us, strict=True))
    eps = max(torch.finfo(b.dtype).eps for _, b in pairs)
    assert abs(left - float(right.sum())) <= rounding(terms(call)) * eps * size


def check(function: Function, case: Case) -> None:
    check_tangent(function, case)
    check_linear(function, case)
    if case.adjoint:
        check_adjoint(function, case)
