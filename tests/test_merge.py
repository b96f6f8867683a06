"""merge_ against float64 truth and the reference: numbers, shared memory, kinds of base."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tangentfast.fingerprint import Base, fingerprint
from tangentfast.merge import merge_
from tangentfast.ops.backend import load_native
from tangentfast.ops.merge.reference import to_odd_
from tangentfast.task_vector import TaskVector

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NATIVE = load_native()[0] is not None
BACKENDS = ["reference", *(["native"] if NATIVE else [])]
native_only = pytest.mark.skipif(not NATIVE, reason="no native extension")


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: equal only when signs of zero and NaNs agree too."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


LONG = np.longdouble  # at least 64 digits on x86: 11 more than float64


def long(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().numpy().astype(LONG)


def truth(base: Tensor, vectors: list[Tensor], alphas: list[float]) -> tuple[Any, Any]:
    """The sum, and a bound of its error: half a unit of the base's last place, and no more than
    what a sum with twice the digits (or our own, of float64) can add to that.
    """
    total, size = long(base), abs(long(base))
    for vector, alpha in zip(vectors, alphas, strict=True):
        total = total + LONG(alpha) * long(vector)
        size = size + abs(LONG(alpha) * long(vector))
    halves = all(t.element_size() == 2 for t in (base, *vectors))
    step = LONG(2) ** (-23 if halves else -52 if base.dtype != torch.float64 else -61)
    info = torch.finfo(base.dtype)
    bound = abs(total) * info.eps / 2 + (len(vectors) + 2) * step * size
    return total, bound + info.smallest_normal * info.eps


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory: transposed, or every second element of a NaN buffer."""
    if layout == "transposed":
        backwards = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "strided" and tensor.dim():
        buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        view = buffer[..., ::2]
        view.copy_(tensor)
        return view
    return tensor.clone()


layouts = st.sampled_from(["contiguous", "transposed", "strided"])


@st.composite
def merges(
    draw: st.DrawFn, device: torch.device | None = None
) -> tuple[list[Tensor], list[list[Tensor]], list[float]]:
    """Bases in any dtype and layout, K vectors for each in any other, and K coefficients."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(0, 9))
    alphas = draw(st.lists(st.floats(-3, 3, width=32), min_size=count, max_size=count))
    bases, rows = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(), (0,), (1,), (7,), (3, 5), (4, 1, 9), (0, 3), (61, 67)]))

        def tensor(shape: tuple[int, ...] = shape) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return in_layout(values.to(device, draw(st.sampled_from(DTYPES))), draw(layouts))

        bases.append(tensor())
        rows.append([tensor() for _ in range(count)])
    return bases, rows, alphas


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_truth(backend: str, device: torch.device, data: st.DataObject) -> None:
    bases, rows, alphas = data.draw(merges(device))
    names = [f"p{i}" for i in range(len(bases))]
    expected = [truth(b, row, alphas) for b, row in zip(bases, rows, strict=True)]
    vectors = [{n: row[k] for n, row in zip(names, rows, strict=True)} for k in range(len(alphas))]
    strides = [b.stride() for b in bases]
    merged = merge_(dict(zip(names, bases, strict=True)), vectors, alphas, backend=backend)
    for base, stride, (value, bound) in zip(merged.values(), strides, expected, strict=True):
        assert base.stride() == stride
        assert (abs(long(base) - value) <= bound).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_give_the_same_bits(dtype: torch.dtype, offset: int) -> None:
    """Many tensors, of every alignment, in several launches."""
    torch.manual_seed(0)
    sizes = [1, 7, 8, 4097, 16384, 16385, 40001, *range(9, 400)]

    def tensors() -> dict[str, Tensor]:
        return {
            str(n): torch.randn(n + offset).to(dtype if n % 5 else DTYPES[n % 4])[offset:]
            for n in sizes
        }

    base, vectors = tensors(), [tensors() for _ in range(9)]
    there = {n: t.cuda() for n, t in base.items()}
    # .cuda() would align the views
    moved = [
        {n: torch.cat([t.new_zeros(offset), t]).cuda()[offset:] for n, t in v.items()}
        for v in vectors
    ]
    merge_(base, vectors, 0.3, backend="native")
    merge_(there, moved, 0.3, backend="native")
    for name, tensor in base.items():
        assert same_bits(tensor, there[name].cpu())


@native_only
@given(case=merges(), threads=st.sampled_from([1, 2]))
@settings(max_examples=50, deadline=None)
def test_backends_agree_bit_for_bit(
    case: tuple[list[Tensor], list[list[Tensor]], list[float]], threads: int
) -> None:
    bases, rows, alphas = case
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for backend in BACKENDS:
            # clone() would drop the gaps of a strided layout
            own = {str(i): copy.deepcopy(b) for i, b in enumerate(bases)}
            vectors = [{str(i): row[k] for i, row in enumerate(rows)} for k in range(len(alphas))]
            results.append(merge_(own, vectors, alphas, backend=backend))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        assert same_bits(results[0][name], results[1][name])


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_size_give_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = {n: torch.randn(size).to(dtype) for n, size in [("a", 300_001), ("b", 1), ("c", 70_000)]}
    vectors = [{n: torch.randn(t.shape) for n, t in base.items()} for _ in range(5)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merge_(copy.deepcopy(base), vectors, 0.3, backend="native"))
    finally:
        torch.set_num_threads(before)
    results.append(merge_(copy.deepcopy(base), vectors, 0.3, backend="reference"))
    for other in results[1:]:
        assert all(same_bits(results[0][n], other[n]) for n in base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "one"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_float64_is_rounded_once(backend: str, dtype: torch.dtype, one: float) -> None:
    """A hair above the tie: by way of float32 it would become the tie, and fall to even."""
    base = {"a": torch.ones(40, dtype=dtype)}
    vector = {"a": torch.full((40,), one / 2 + 2.0**-40, dtype=torch.float64)}
    assert (merge_(base, vector, backend=backend)["a"] == 1 + one).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_odd_keeps_exact_values_and_specials(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    again = to_odd_(every.clone(), torch.empty_like(every))
    assert torch.equal(again[~every.isnan()], every[~every.isnan()])
    assert torch.equal(again.isnan(), every.isnan())
    huge = torch.tensor([1e300, -1e300, torch.inf, -torch.inf], dtype=torch.float64)
    assert torch.equal(to_odd_(huge.clone(), torch.empty_like(huge)).to(dtype), huge.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 3e-4, 0.02], ids="base of {}".format)
@pytest.mark.parametrize("count", [1, 2, 8, 13, 20, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_less_exact_than_the_naive_sum(
    dtype: torch.dtype, count: int, scale: float, backend: str
) -> None:
    """Root mean square of the errors, of merge_ and of ``base + α Σ τ`` in the tensors' dtype."""
    torch.manual_seed(0)
    base = (scale * torch.randn(2000, dtype=torch.float64)).to(dtype)
    vectors = [(3e-4 * torch.randn(2000, dtype=torch.float64)).to(dtype) for _ in range(count)]
    value, _ = truth(base, vectors, [0.3] * count)

    def error(merged: Tensor) -> float:
        return float(((long(merged) - value) ** 2).mean() ** 0.5)

    naive = base + 0.3 * sum(vectors, torch.zeros(()))
    merged = merge_({"w": base.clone()}, [{"w": v} for v in vectors], 0.3, backend=backend)["w"]
    assert error(merged) <= error(naive)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_specials_pass_through(backend: str, dtype: torch.dtype) -> None:
    base = {"a": torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 1.0, -0.0] * 5, dtype=dtype)}
    vector = {"a": torch.tensor([torch.nan, 1.0, torch.inf, 1.0, -torch.inf, -0.0] * 5)}
    merged = merge_(base, vector, backend=backend)["a"].float()
    nan, inf = torch.nan, torch.inf
    expected = torch.tensor([nan, inf, nan, nan, -inf, -0.0] * 5)
    assert torch.equal(merged.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(merged.signbit()[4::6], expected.signbit()[4::6])


# Memory that base and vectors share ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_are_read_before_any_write(backend: str, dtype: torch.dtype) -> None:
    """Bases and vectors are windows of one buffer: exact, shifted and crossed aliases."""
    torch.manual_seed(1)
    buffer = torch.randn(200_000).to(dtype)
    base = {"a": buffer[:60_000], "b": buffer[60_000:120_000]}
    vectors = [
        {"a": base["a"], "b": buffer[60_001:120_001]},
        {"a": base["b"], "b": base["a"]},
        {"a": buffer[1:60_001], "b": buffer[:120_000:2]},
    ]
    fresh = merge_(
        {n: t.clone() for n, t in base.items()},
        [{n: t.clone() for n, t in v.items()} for v in vectors],
        [0.5, -1.0, 2.0],
        backend="reference",
    )
    rest = buffer[120_000:].clone()
    merge_(base, vectors, [0.5, -1.0, 2.0], backend=backend)
    assert same_bits(base["a"], fresh["a"])
    assert same_bits(base["b"], fresh["b"])
    assert same_bits(buffer[120_000:], rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_slices_of_one_buffer_are_disjoint_bases(backend: str) -> None:
    whole = torch.randn(6, 9)
    expected = whole + 2
    base = dict(zip("qkv", whole.split(3, dim=1), strict=True))
    merge_(base, {n: torch.ones(6, 3) for n in "qkv"}, 2, backend=backend)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "share",
    [
        lambda b: {"a": b[:10], "b": b[5:15]},
        lambda b: {"a": b[:1].expand(10), "b": b[1:11]},
        lambda b: {"a": b[:12].unfold(0, 4, 2), "b": b[12:]},
        lambda b: {"a": b[:20].view(4, 5)[:, 1:3], "b": b[2:20:6]},
    ],
    ids=["partial", "expanded", "windows", "crossing strides"],
)
def test_bases_that_share_memory_raise(backend: str, share: object) -> None:
    buffer = torch.arange(20.0)
    base = share(buffer)  # type: ignore[operator]
    vector = {n: torch.ones(t.shape) for n, t in base.items()}
    with pytest.raises(ValueError, match=r"shares memory with itself or with another base"):
        merge_(base, vector, backend=backend)
    assert torch.equal(buffer, torch.arange(20.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_bit_and_channels_last(backend: str) -> None:
    image = torch.randn(2, 3, 4, 5)
    expected = image + 0.5 * image.flip(0)
    negated = torch.complex(image, -image.flip(0)).conj().imag  # a view whose sign is a flag
    assert negated.is_neg()
    base = {"a": image.clone(memory_format=torch.channels_last)}
    assert torch.equal(merge_(base, {"a": negated}, 0.5, backend=backend)["a"], expected)
    target = torch.complex(image, -image).conj().imag
    merge_({"a": target}, {"a": image.flip(0)}, 0.5, backend=backend)
    assert torch.equal(target, expected)


# Kinds of base ------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, _weight=torch.arange(24.0).reshape(6, 4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_module_leaf_parameters_and_version_counters() -> None:
    model = nn.Linear(3, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    versions = {n: p._version for n, p in model.named_parameters()}
    loss = (model.weight * model.weight).sum()  # saves the weight for backward
    assert merge_(model, {"weight": torch.ones(2, 3)}, 2) is model
    assert torch.equal(model.weight, before["weight"] + 2)
    assert model.weight.requires_grad
    assert model.weight.is_leaf
    assert model.weight._version > versions["weight"]
    assert model.bias._version == versions["bias"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_parameters_are_merged_once() -> None:
    model = Tied()
    before = model.embed.weight.detach().clone()
    step = torch.ones(6, 4)
    merge_(model, [{"head.weight": step}, {"embed.weight": step, "head.weight": step.clone()}], 1.0)
    assert torch.equal(model.embed.weight, before + 2)
    merge_(model.state_dict(), {"embed.weight": step, "head.weight": step}, 1.0)
    assert torch.equal(model.head.weight, before + 3)
    with pytest.raises(
        ValueError,
        match=r"vectors\[0\] has differing tensors or alphas for 'embed.weight' and 'head.weight'",
    ):
        merge_(model, {"embed.weight": step, "head.weight": 2 * step})
    with pytest.raises(ValueError, match="differing tensors or alphas"):
        merge_(model, {"embed.weight": step, "head.weight": step}, {"embed.*": 1, "*": 2})
    assert torch.equal(model.embed.weight, before + 3)


def test_buffers() -> None:
    model = Tied()
    merge_(model, {"norm.running_mean": torch.ones(4)}, 3)
    assert torch.equal(model.norm.running_mean, torch.full((4,), 3.0))
    with pytest.raises(
        ValueError, match=r"num_batches_tracked'\] names a tensor of dtype torch.in"
    ):
        merge_(model, {"norm.num_batches_tracked": torch.ones(())})
    with pytest.raises(ValueError, match=r"vectors\[0\]\['scratch'\] is not in the base"):
        merge_(model, {"scratch": torch.ones(3)})


def test_task_vector_and_linearized_like_base() -> None:
    origin = Base("net", "f" * 64)
    step = TaskVector({"w": torch.ones(3)}, base=origin)
    total = TaskVector({"w": torch.zeros(3), "b": torch.zeros(2)}, base=origin)
    merge_(total, [step, step], [0.5, 2])
    assert total["w"].tolist() == [2.5] * 3

    class Linearized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta0 = nn.Parameter(torch.ones(3), requires_grad=False)
            self.own = nn.Parameter(torch.zeros(3))
            self.base = origin
            self.tau = {"w": self.own}

    lin = Linearized()
    merge_(lin, step, 0.5, strict_base=True)
    assert lin.own.tolist() == [0.5] * 3
    assert lin.theta0.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match=r"difference to other \[eeeeeeeeeeee\], which is not net"):
        merge_(
            lin, TaskVector({"w": torch.ones(3)}, base=Base("other", "e" * 64)), strict_base=True
        )
    assert lin.own.tolist() == [0.5] * 3


def test_fingerprint_of_the_base() -> None:
    base = {"w": torch.arange(5.0), "b": torch.zeros(2)}
    origin = Base("net", fingerprint({"w": base["w"]}))
    step = TaskVector({"w": torch.ones(5)}, base=origin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_(base, step, strict_base=True)
    message = r"vectors\[1\] is a difference to net \[.{12}\], which is not the base given"
    before = base["w"].clone()
    with pytest.raises(ValueError, match=message):
        merge_(base, [{"w": torch.ones(5)}, step], strict_base=True)
    assert torch.equal(base["w"], before)
    with pytest.warns(UserWarning, match=message) as caught:
        merge_(base, [{"w": torch.ones(5)}, step])
    assert caught[0].filename == __file__
    assert torch.equal(base["w"], before + 2)
