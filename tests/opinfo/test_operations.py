"""PyTorch's own operation database: every operation equals torch, or is refused by name."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from derivatives import by_differences, close, derivative, directions, distance, numbers
from refused import REFUSED, SINCE, UNTESTED
from samples import Form, Function, Sample, constants, forms, operations, samples
from torch import Tensor

import tangentfast

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = 8
DTYPES = {"float64": torch.float64, "complex128": torch.complex128}
OPERATIONS = {
    (op.formatted_name, kind): op for kind, dtype in DTYPES.items() for op in operations(dtype)
}
CALLS = [
    pytest.param(name, kind, form, id=f"{name}-{form.name}-{kind}")
    for (name, kind), op in OPERATIONS.items()
    if name not in UNTESTED
    for form in forms(op)
]
Known = tuple[Sample, tuple[Tensor | None, ...], list[Tensor], float]


@lru_cache(maxsize=1)  # the forms of an operation follow each other
def known(name: str, kind: str) -> list[Known]:
    """Samples, a tangent for each input, the derivative along them, and how close to come."""
    op = OPERATIONS[name, kind]
    found: list[Known] = []
    for sample in samples(op, DTYPES[kind], SAMPLES):
        vs = directions(sample.inputs)
        f = sample.function(forms(op)[0])
        found.append((sample, tuple(vs), *derivative(f, sample.inputs, vs)))
        if len(vs) == 1 or len(found) > 1:
            continue
        for i in range(len(vs)):  # of the first sample, each input alone that changes anything
            alone = [v if j == i else torch.zeros_like(v) for j, v in enumerate(vs)]
            dy, tolerance = derivative(f, sample.inputs, alone)
            if any(bool(t.any()) for t in dy):
                given = tuple(v if j == i else None for j, v in enumerate(vs))
                found.append((sample, given, dy, tolerance))
    return found


def value(f: Function, inputs: tuple[Tensor, ...], form: Form) -> list[Tensor] | None:
    """What torch computes; None for arguments that this form does not take."""
    if form.name == "function":
        return numbers(f(*inputs))
    try:
        return numbers(f(*(x.detach().requires_grad_() for x in inputs)))
    except (RuntimeError, TypeError):
        return None


def refusals(name: str, kind: str, form: Form) -> tuple[int, int]:
    """How many calls in this form there are, and how many are refused; the others are torch's."""
    tried = refused = 0
    for sample, vs, dy, tolerance in known(name, kind):
        f = sample.function(form)
        y = value(f, sample.inputs, form)
        if y is None or [(t.shape, t.dtype) for t in y] != [(t.shape, t.dtype) for t in dy]:
            continue  # in place an operation cannot change shape or dtype
        for recording in (True, False):
            tried += 1
            try:
                with torch.set_grad_enabled(recording):
                    got, dgot = tangentfast.jvp(f, sample.inputs, tangents=vs)
            except RuntimeError as error:
                listed = name in REFUSED and form.name in REFUSED[name].forms
                if not listed or not any(word in str(error) for word in words(name, kind, form)):
                    raise
                refused += 1
                continue
            assert distance(numbers(got), y) <= close(y)
            assert distance(numbers(dgot), dy) <= tolerance
    return tried, refused


def words(name: str, kind: str, form: Form) -> list[str]:
    """What an error calls the operation."""
    alias, _, _ = form.name.rpartition(".")
    return [n.split(".")[-1].strip("_") for n in (OPERATIONS[name, kind].name, alias) if n]


@pytest.mark.parametrize(("name", "kind", "form"), CALLS)
def test_operation(name: str, kind: str, form: Form) -> None:
    """Value and tangent are torch's, with a graph and without."""
    tried, _ = refusals(name, kind, form)
    if not tried:
        pytest.skip("no sample of this form has a derivative")


def strided(sample: Sample, inner: Function) -> tuple[Function, tuple[Tensor, ...]]:
    """The call on tensors with gaps in memory."""
    return (
        lambda *xs: inner(*(x[..., 1] for x in xs)),
        tuple(torch.stack([torch.zeros_like(x), x], -1) for x in sample.inputs),
    )


def expanded(sample: Sample, inner: Function) -> tuple[Function, tuple[Tensor, ...]]:
    """The call with tangents that are one number in memory."""
    return (
        lambda *xs: inner(*(x + y for x, y in zip(xs, sample.inputs, strict=True))),
        tuple(x.new_zeros(()) for x in sample.inputs),
    )


@pytest.mark.parametrize("name", [n for n, kind in OPERATIONS if kind == "float64"])
def test_layout(name: str) -> None:
    """However inputs and tangents lie in memory, value and tangent are torch's."""
    op = OPERATIONS[name, "float64"]
    if name in UNTESTED or (name in REFUSED and "function" in REFUSED[name].forms):
        pytest.skip("not computed")
    for sample in samples(op, torch.float64, 2):
        for layout in (strided, expanded):
            f, inputs = layout(sample, sample.function(forms(op)[0]))
            try:
                y = numbers(f(*inputs))
            except RuntimeError:
                continue  # a view that these strides do not allow
            vs = tuple(directions(inputs))
            dy, tolerance = derivative(f, inputs, vs)
            try:
                got, dgot = tangentfast.jvp(f, inputs, tangents=vs)
            except RuntimeError as error:
                if "reads memory outside of its argument" not in str(error):
                    raise
                continue
            assert distance(numbers(got), y) <= close(y)
            assert distance(numbers(dgot), dy) <= tolerance


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Every entry of the list is refused; what no longer is leaves it."""
    if not any((name, kind) in OPERATIONS for kind in DTYPES):
        pytest.skip("this torch does not know it")
    count = dict.fromkeys(REFUSED[name].forms, 0)
    for kind in DTYPES:
        for form in forms(OPERATIONS[name, kind]) if (name, kind) in OPERATIONS else []:
            if form.name in count:
                count[form.name] += refusals(name, kind, form)[1]
    assert all(count.values())


def test_few_are_refused() -> None:
    assert len(REFUSED) <= (25 if torch.__version__ >= SINCE else 27)


@pytest.mark.parametrize("sample", constants(torch.float64), ids=lambda s: s.op.formatted_name)
def test_without_derivative(sample: Sample) -> None:
    """What torch has no backward of is refused, or right; most of it is constant."""
    f = sample.function(forms(sample.op)[0])
    vs = directions(sample.inputs)
    for recording in (True, False):
        try:
            with torch.set_grad_enabled(recording):
                _, dgot = tangentfast.jvp(f, sample.inputs, tangents=tuple(vs))
        except RuntimeError:
            continue
        true = by_differences(f, sample.inputs, vs)
        for dy, slope in zip(numbers(dgot), true, strict=True):
            assert not ((dy - slope).abs() > 1e-4 * (1 + slope.abs())).any()
