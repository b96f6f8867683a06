"""Every rule against ``torch.func.jvp``: `cases` has the calls, `checks` what is asked of them."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from checks import (
    DIFFERENTIABLE,
    Function,
    calls,
    check,
    check_complete,
    contributions,
    directions,
    in_dtype,
    of_kind,
    reference,
    tangentfast_jvp,
    terms,
)
from truth import rounding, units

from tangentfast.dual import name_of

# Deprecated spellings (upsample, ger) have rules too.
pytestmark = pytest.mark.filterwarnings("ignore")
CALLS = list(calls(CASES, *DIFFERENTIABLE))
# One function of each name: torch.exp and Tensor.exp differ in nothing that a dtype could change.
ONCE = list({(name_of(p.values[0]), id(p.values[1])): p for p in CALLS}.values())


def test_every_rule_has_cases() -> None:
    check_complete(CASES, of_kind(*DIFFERENTIABLE), *DIFFERENTIABLE)


@pytest.mark.parametrize(("function", "case"), CALLS)
def test_rule(function: Function, case: Case) -> None:
    if case.cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(function, case)


@pytest.mark.parametrize(("function", "case"), ONCE)
def test_float32(function: Function, case: Case) -> None:
    """Float32 against the float64 truth of the same numbers."""
    if case.cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if case.dtype == torch.float32:
        pytest.skip("torch has no float64 for it")
    call, active = case.build(torch.float32)
    call = in_dtype(torch.float32, call, torch.float64)  # constants follow
    row = directions(call, active)
    y, (dy,) = tangentfast_jvp(function, call, [row])
    exact = in_dtype(torch.float64, call, torch.float32)
    exact_row = in_dtype(torch.float64, row, torch.float32)
    want, dwant = reference(function, exact, exact_row)
    limit = rounding(terms(call))
    assert units(y, want) <= limit
    assert units(dy, dwant, summands=contributions(function, exact, exact_row)) <= limit


SIXTEEN_BIT = ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "gelu", "linear",
               "scaled_dot_product_attention", "self_attention")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("function", "case"),
    [p for p in ONCE if name_of(p.values[0]) in SIXTEEN_BIT and not p.values[1].complex],
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
