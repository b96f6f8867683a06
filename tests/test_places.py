"""Who shares memory with whom: against sets of byte numbers, over views of all kinds."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from tangentfast.memory import check_disjoint, place, tied
from tangentfast.ops.backend import load_native

NATIVE = load_native()[0] is not None
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BYTES = 240  # of a buffer


def bytes_of(tensor: Tensor) -> list[int]:
    """The address of every byte of every element, one after the other."""
    item = tensor.element_size()
    steps = [range(0, n * s * item, s * item) if s else [0] * n for n, s in dims(tensor)]
    starts = [tensor.data_ptr() + sum(at) for at in product(*steps)] if tensor.numel() else []
    return [start + b for start in starts for b in range(item)]


def dims(tensor: Tensor) -> Any:
    return zip(tensor.shape, tensor.stride(), strict=True)


def share(tensors: list[Tensor]) -> bool:
    every = [byte for tensor in tensors for byte in bytes_of(tensor)]
    return len(set(every)) < len(every)


@st.composite
def views(draw: st.DrawFn, buffer: Tensor) -> Tensor:
    """A few views of views of a buffer of bytes."""
    view = buffer.view(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):  # most pairs of large views overlap
        start = draw(st.integers(0, view.numel() - 1))
        view = view[start : start + draw(st.integers(0, 12))]
    for _ in range(draw(st.integers(0, 4))):
        d = draw(st.integers(0, view.dim() - 1)) if view.dim() else 0
        size = view.size(d) if view.dim() else 0
        ways = ["insert"]
        if view.dim():
            ways += ["slice", "slice", "transpose", "permute", "select"]
            ways += ["unfold", "expand", "split", "diagonal"] if size else []
        match draw(st.sampled_from(ways)):
            case "insert":
                view = view.unsqueeze(draw(st.integers(0, view.dim())))
            case "slice":
                start, step = draw(st.integers(0, 4)), draw(st.integers(1, 4))
                index = [slice(None)] * view.dim()
                index[d] = slice(start, draw(st.integers(start, max(start, size))), step)
                view = view[tuple(index)]
            case "transpose":
                view = view.transpose(d, draw(st.integers(0, view.dim() - 1)))
            case "permute":
                view = view.permute(draw(st.permutations(range(view.dim()))))
            case "select" if size:
                view = view.select(d, draw(st.integers(0, size - 1)))
            case "unfold":
                view = view.unfold(d, draw(st.integers(1, min(size, 4))), draw(st.integers(1, 4)))
            case "expand" if view.numel() <= 60:
                wide = draw(st.integers(0, view.dim()))
                view = view.unsqueeze(wide)
                shape = list(view.shape)
                shape[wide] = draw(st.integers(1, 3))
                view = view.expand(shape)
            case "split":
                parts = [n for n in range(1, size + 1) if size % n == 0]
                view = view.unflatten(d, (-1, draw(st.sampled_from(parts))))
            case "diagonal" if view.dim() > 1 and d:
                view = view.diagonal(draw(st.integers(-1, 1)), 0, d)
    return view


@st.composite
def bases(draw: st.DrawFn) -> list[Tensor]:
    """Views of one or two buffers."""
    buffers = [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(draw(st.integers(1, 2)))]
    return [draw(views(draw(st.sampled_from(buffers)))) for _ in range(draw(st.integers(1, 3)))]


def raises(check: Any, *args: Any) -> bool:
    try:
        check(*args)
    except ValueError as error:
        return "shares memory with itself or with another base" in str(error)
    return False


BUFFER = torch.zeros(60)


@given(tensors=bases())
@example([BUFFER[::2], BUFFER[1::2]])
@example([BUFFER[::2], BUFFER[3::3]])
@example([BUFFER[::4], BUFFER.view(torch.float16)[2::8], BUFFER.view(torch.float16)[3::8]])
@example([BUFFER.as_strided((3, 4), (4, 3)), BUFFER[40:]])  # 0 3 6 9 | 4 7 10 13 | 8 11 14 17
@example([BUFFER.as_strided((3, 4), (3, 4))])
@example([BUFFER.as_strided((2, 5), (2, 4))])  # strides that cross where no element does
@example([BUFFER[:1].expand(1, 1), BUFFER[1:1]])
@example([BUFFER[:1].expand(2, 0)])
@settings(max_examples=600, deadline=None)
def test_overlaps_against_sets_of_bytes(tensors: list[Tensor]) -> None:
    expected = share(tensors)
    assert raises(check_disjoint, tensors) == expected
    if NATIVE:
        counts = [1] * len(tensors)
        zeros = [torch.zeros(t.shape) for t in tensors]
        op = torch.ops.tangentfast.merge_
        assert raises(op, tensors, zeros, counts, [1.0] * len(tensors)) == expected
        nothing = [0] * len(tensors)  # a base without vectors is one all the same
        assert raises(op, tensors, [], nothing, []) == expected


def test_the_cases_are_of_both_kinds() -> None:
    found: list[bool] = []

    @given(tensors=bases())
    @settings(max_examples=100, deadline=None, database=None)
    def collect(tensors: list[Tensor]) -> None:
        found.append(share(tensors))

    collect()
    assert 5 < sum(found) < len(found) - 5


# Ties -------------------------------------------------------------------------------------------


@given(tensors=bases())
@settings(max_examples=200, deadline=None)
def test_one_place_means_the_same_elements(tensors: list[Tensor]) -> None:
    """Equal keys: the same bytes in the same order, of the same dtype."""
    again = [t.view_as(t) for t in tensors]
    for a, b in zip(tensors, again, strict=True):
        assert (place(a) == place(b)) == (a.numel() > 0)
    for a, b in product(tensors, tensors):
        if place(a) == place(b):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert bytes_of(a) == bytes_of(b)


WEIGHT = torch.randn(4, 4)
WAVES = torch.randn(4, dtype=torch.complex64)
OTHERS = {
    "another dtype": (WEIGHT, WEIGHT.view(torch.int32)),
    "another shape": (WEIGHT, WEIGHT.view(2, 8)),
    "other strides": (WEIGHT, WEIGHT.T),
    "a part": (WEIGHT, WEIGHT[:2]),
    "a shifted part": (WEIGHT[:2], WEIGHT[1:3]),
    "conjugate": (WAVES, WAVES.conj()),
    "negative": (torch.view_as_real(WAVES)[:, 1], WAVES.conj().imag),
    "equal values": (WEIGHT, WEIGHT.clone()),
    "empty": (WEIGHT[:0], WEIGHT[:0]),
    "meta": (torch.empty(3, device="meta"), torch.empty(3, device="meta")),
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_no_ties(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    assert place(a) == place(a)
    assert place(a) != place(b)
    found = tied({"a": a, "b": b, "c": a})
    assert found["a"] is found["c"] is a
    assert found["b"] is b


@pytest.mark.parametrize(
    "again",
    [
        lambda t: t,
        Tensor.detach,
        lambda t: nn.Parameter(t.detach()),
        lambda t: t.view(2, 8).view(4, 4),
        lambda t: t.T.T,
        lambda t: t[:],
        lambda t: torch.from_numpy(t.detach().numpy()),
    ],
    ids=["itself", "detached", "parameter", "viewed", "transposed twice", "sliced", "numpy"],
)
def test_ties_by_place(again: Any) -> None:
    other = again(WEIGHT)
    assert place(other) == place(WEIGHT)
    found = tied({"x": WEIGHT, "y": other, "z": torch.zeros(4, 4)})
    assert found["x"] is found["y"] is WEIGHT
    assert list(found) == ["x", "y", "z"]


def test_wrappers_are_themselves() -> None:
    pair = TwoTensor(WEIGHT, WEIGHT.clone())
    assert place(pair) == id(pair)
    assert place(pair) != place(TwoTensor(pair.a, pair.b))
    with FakeTensorMode() as mode:
        fake, other = mode.from_tensor(WEIGHT), torch.empty(4, 4)
    assert place(fake) == id(fake)
    assert len({place(fake), place(other), place(WEIGHT)}) == 3


def test_tensors_without_a_pointer_are_themselves() -> None:
    sparse = WEIGHT.to_sparse()
    assert place(sparse) == id(sparse)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert place(nested) == place(nested)
    assert place(nested) != place(nested.clone())
    inside = []
    torch.func.vmap(lambda x: inside.append(place(x) == id(x)) or x)(WEIGHT)
    assert inside == [True]
