"""Functions that need no derivative: constants, metadata, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from case import on
from cases import C, Call, Case, R, Table, each, positive
from checks import Function, calls, check_complete, of_kind
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tangentfast.dual import Dual, make_dual, name_of
from tangentfast.passes import Pass, running
from tangentfast.rules import RULES
from tangentfast.rules.state import SETTERS

PAIR = [C(R(3, 4), R(3, 4)), C(R(3, 4), 0.5), C(torch.zeros(3, 4), R(3, 4))]
CONSTANT: Table = {
    **each("detach isnan isinf isfinite isposinf isneginf logical_not any all argmax argmin "
           "argsort nonzero count_nonzero floor ceil round special_round trunc fix sign sgn "
           "signbit int long short bool byte char zeros_like ones_like empty_like rand_like "
           "randn_like Tensor.data", [C(R(3, 4))]),
    **each("eq ne lt le gt ge greater less greater_equal less_equal not_equal",
           [*PAIR, C(R(4, 4, ties=True), 0)]),
    **each("isclose allclose equal logical_and logical_or logical_xor heaviside", PAIR[:1]),
    **each("floor_divide __floordiv__", [C(R(3, 4), 0.5), C(R(3, 4), positive)]),
    "__rfloordiv__": [C(positive, 2.0)],
    "searchsorted": [C(torch.linspace(-1, 1, 5).double(), R(3))],
    "bucketize": [C(R(3), torch.linspace(-1, 1, 5).double())],
    "full_like": [C(R(3, 4), 2.0)], "randint_like": [C(R(3, 4), 5)],
    **each("new_zeros new_ones new_empty", [C(R(3, 4), (2, 2))]),
    "new_full": [C(R(3, 4), (2, 2), 1.5)], "new_tensor": [C(R(3, 4), [1.0, 2.0])],
    "new_empty_strided": [C(R(3, 4), (2, 2), (1, 2))],
    "bernoulli": [C(R(3, 4, low=0.1, high=0.9))], "multinomial": [C(R(3, 4, low=0.1, high=0.9), 2)],
}  # fmt: skip

METADATA: Table = {
    **each("size dim ndimension numel nelement element_size stride storage_offset is_contiguous "
           "is_floating_point is_complex is_signed is_conj is_neg is_inference is_pinned is_shared "
           "is_distributed is_coalesced get_device data_ptr untyped_storage dim_order __len__ "
           "__repr__ __dlpack_device__ is_storage is_tensor requires_grad_", [C(R(3, 4))]),
    **each("is_same_size is_set_to result_type", [C(R(3, 4), R(3, 4))]),
    "retain_grad": [C(R(3, 4))],  # an error for a tensor without grad
    "__format__": [C(R(), ".3f")],
    "register_hook": [C(R(3, 4), print)], "register_post_accumulate_grad_hook": [C(R(3, 4), print)],
    "can_cast": [C(torch.float32, torch.int32)], "broadcast_shapes": [C((2, 1), (1, 3))],
}  # fmt: skip
if hasattr(Tensor, "has_names"):  # newer torch has no named tensors
    METADATA["has_names"] = [C(R(3, 4))]

FORBIDDEN: Table = {
    **each("item numpy __bool__ __float__ __int__ __index__ __complex__ is_nonzero __array__ "
           "tolist", [C(R())]),
    "backward": [on(Tensor, C(R())), on(torch.autograd, C(R()), since="2.11")],
    "__contains__": [C(R(3, 4), 0.5)], "grad": [C(R(), R())],
    "__reduce_ex__": [C(R(3, 4), 2)],
    "Tensor.data": [C(R(3, 4), torch.zeros(3, 4))],
    # the last is the CUDA array interface, a property that has no name
    **each("Tensor._cdata Tensor.__get__", [C(R(3, 4))]),
}  # fmt: skip


def duals_of(case: Case) -> tuple[Call, Call, Pass]:
    """The call on plain tensors, on duals of the same tensors, and the pass that owns these."""
    call, active = case.build(torch.float64)
    leaves, spec = tree_flatten(call)
    pass_ = Pass(1)
    duals = [
        make_dual(x, [torch.ones_like(x)], pass_) if i in active else x
        for i, x in enumerate(leaves)
    ]
    return call, tree_unflatten(duals, spec), pass_


def outcome(function: Function, call: Call) -> Any:
    """What a call returns, or the exception it raises."""
    torch.manual_seed(0)
    try:
        return function(*call[0], **call[1])
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(("function", "case"), list(calls(CONSTANT, "constant")))
def test_constant(function: Function, case: Case) -> None:
    """The result is torch's and has no tangent."""
    plain, dual, pass_ = duals_of(case)
    want = outcome(function, plain)
    with running(pass_):
        got = outcome(function, dual)
    assert type(got) is type(want)
    if not isinstance(want, Tensor):
        assert got == want
    elif "empty" in name_of(function):  # its numbers mean nothing
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize(("function", "case"), list(calls(METADATA, "metadata")))
def test_metadata(function: Function, case: Case) -> None:
    """What is asked about a dual is answered as for its primal, in or out of a pass."""
    plain, dual, _ = duals_of(case)
    want, got = outcome(function, plain), outcome(function, dual)
    got = got.primal if type(got) is Dual else got  # requires_grad_ gives what it was called on
    assert type(got) is type(want)
    if isinstance(want, torch.UntypedStorage):
        assert got.data_ptr() == want.data_ptr()
    elif isinstance(want, Tensor):
        assert got is want
    elif not isinstance(want, torch.utils.hooks.RemovableHandle):  # one for each registration
        assert got == want


def test_hook_of_a_dual_is_its_primals() -> None:
    x = torch.ones(3, requires_grad=True)
    seen: list[Tensor] = []
    make_dual(x, [torch.ones(3)], Pass(1)).register_hook(seen.append)
    (2 * x).sum().backward()
    assert torch.equal(seen[0], torch.full((3,), 2.0))


@pytest.mark.filterwarnings("ignore:volatile")
def test_getters_and_setters() -> None:
    """A property that is metadata, read from a dual and written to it, is the primal's."""
    x = torch.randn(2, 3, requires_grad=True)
    dual = make_dual(x, [torch.ones(2, 3)], Pass(1))
    getters = [f for f in of_kind("metadata") if f.__name__ == "__get__"]
    setters = [f for f in of_kind("metadata") if f.__name__ == "__set__"]
    assert len(getters) > 30
    assert len(setters) == len(SETTERS)
    for get in getters:
        assert outcome(get, ((dual,), {})) == outcome(get, ((x,), {})), name_of(get)
    for put in setters:
        value = outcome(put.__self__.__get__, ((x,), {}))
        assert outcome(put, ((dual, value), {})) == outcome(put, ((x, value), {})), name_of(put)
    dual.requires_grad = False
    assert not x.requires_grad


def test_every_getter_is_classified() -> None:
    """A property that a newer torch adds is metadata, has a derivative, or leads past a tangent."""
    undispatched = ("__weakref__", "_python_dispatch")
    getters = {
        name: getattr(Tensor, name).__get__
        for name in dir(Tensor)
        if type(getattr(Tensor, name)) in (type(Tensor.shape), property)
        and name not in undispatched
    }
    assert len(getters) > 40
    assert [name for name, get in getters.items() if get not in RULES] == []


@pytest.mark.parametrize(("function", "case"), list(calls(FORBIDDEN, "forbidden")))
def test_forbidden(function: Function, case: Case) -> None:
    _, dual, pass_ = duals_of(case)
    with running(pass_), pytest.raises(RuntimeError, match=re.escape(RULES[function].apply())):
        function(*dual[0], **dual[1])


@pytest.mark.parametrize(
    ("kind", "table"),
    [("constant", CONSTANT), ("metadata", METADATA), ("forbidden", FORBIDDEN)],
    ids=["constant", "metadata", "forbidden"],
)
def test_every_function_has_cases(kind: str, table: Table) -> None:
    properties = [f for f in of_kind("metadata") if f.__name__ in ("__get__", "__set__")]
    check_complete(table, [f for f in of_kind(kind) if f not in properties], kind)
