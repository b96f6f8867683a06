"""PyTorch's own operation database: every operation equals torch, or is refused by name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from derivatives import close, derivative, directions, distance, numbers
from refused import REFUSED, UNTESTED
from samples import Form, Function, forms, operations, samples
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

import tangentfast

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = 8
DTYPES = (torch.float64, torch.complex128)
CALLS = [
    pytest.param(op, dtype, form, id=f"{op.formatted_name}-{form.name}-{str(dtype)[6:]}")
    for dtype in DTYPES
    for op in operations(dtype)
    if op.formatted_name not in UNTESTED
    for form in forms(op)
]


@lru_cache(maxsize=1)  # the forms of an operation follow each other
def known(op: OpInfo, dtype: torch.dtype) -> list[tuple[Any, list[Tensor], list[Tensor], float]]:
    """Samples, the directions to go, the derivatives and how close to come."""
    found = []
    for sample in samples(op, dtype, SAMPLES):
        vs = directions(sample.inputs)
        f = sample.function(forms(op)[0])
        found.append((sample, vs, *derivative(f, sample.inputs, vs)))
    return found


def value(f: Function, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """What torch computes; None for a call that has no such form, or none with a derivative."""
    try:
        return numbers(f(*(x.detach().requires_grad_() for x in inputs)))
    except (RuntimeError, TypeError):
        return None


@pytest.mark.parametrize(("op", "dtype", "form"), CALLS)
def test_operation(op: OpInfo, dtype: torch.dtype, form: Form) -> None:
    """Value and tangent are torch's, with a graph and without."""
    refusal = REFUSED.get(op.formatted_name)
    expected = refusal is not None and form.name in refusal.forms
    refused = tested = 0
    for sample, vs, dy, tolerance in known(op, dtype):
        f = sample.function(form)
        y = value(f, sample.inputs)
        if y is None or [t.shape for t in y] != [t.shape for t in dy]:
            assert form.name != "function"
            continue
        for recording in (True, False):
            tested += 1
            try:
                with torch.set_grad_enabled(recording):
                    got, dgot = tangentfast.jvp(f, sample.inputs, tangents=tuple(vs))
            except (RuntimeError, NotImplementedError) as error:
                if not expected:
                    raise
                assert op.name.split(".")[-1].strip("_") in str(error)  # noqa: PT017
                refused += 1
                continue
            assert distance(numbers(got), y) <= close(y)
            assert distance(numbers(dgot), dy) <= tolerance
    if not tested:
        pytest.skip("no sample of this form")
