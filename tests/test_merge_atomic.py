"""After an error base is bit for bit what it was; vectors are read as they were before any write;
and the backends agree on every layout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangentfast.merge import merge_
from tangentfast.ops import merge as op
from tangentfast.ops.backend import load_native

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NATIVE = load_native()[0] is not None
BACKENDS = ["reference", *(["native"] if NATIVE else [])]
native_only = pytest.mark.skipif(not NATIVE, reason="no native extension")
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def memory_of(tensor: Tensor) -> Tensor:
    """Every byte of the tensor's storage, gaps included."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def raises_and_leaves(
    bases: list[Tensor], call: Callable[[], object], error: type[Exception], match: str
) -> None:
    """`call` raises; of the bases not one bit is another, nor their versions."""
    here = [base for base in bases if not base.is_meta]
    before = [memory_of(base).clone() for base in here]
    versions = [None if base.is_inference() else base._version for base in here]
    with pytest.raises(error, match=match):
        call()
    for base, old, version in zip(here, before, versions, strict=True):
        assert torch.equal(memory_of(base), old)
        assert version is None or base._version == version


# After an error ---------------------------------------------------------------------------------


@by_backend
@pytest.mark.parametrize("order", [1, -1])
def test_meta_beside_cpu(backend: str, order: int) -> None:
    bases = [torch.randn(5), torch.randn(5), torch.empty(5, device="meta")][::order]
    vectors = [torch.ones(5, device=b.device) for b in bases]
    names = "abc"
    raises_and_leaves(
        bases,
        lambda: op.merge_(bases, vectors, [1] * 3, [1.0] * 3, backend),
        ValueError,
        "on meta",
    )
    raises_and_leaves(
        bases,
        lambda: merge_(
            dict(zip(names, bases, strict=True)),
            dict(zip(names, vectors, strict=True)),
            backend=backend,
        ),
        ValueError,
        r"\['[ac]'\] is on meta",
    )


@by_backend
def test_a_vector_on_another_device(backend: str) -> None:
    bases = [torch.randn(5), torch.randn(5)]
    vectors = [torch.ones(5), torch.ones(5, device="meta")]
    raises_and_leaves(
        bases, lambda: op.merge_(bases, vectors, [1, 1], [1.0, 1.0], backend), ValueError, "meta"
    )
    base = dict(zip("ab", bases, strict=True))
    raises_and_leaves(
        bases,
        lambda: merge_(base, dict(zip("ab", vectors, strict=True)), backend=backend),
        ValueError,
        r"vectors\[0\]\['b'\] is on meta",
    )


BAD = {
    "shape": (torch.ones(6), ValueError, "shape"),
    "broadcast": (torch.ones(1), ValueError, "shape"),
    "dtype": (torch.ones(5, dtype=torch.int32), TypeError, "dtype"),
    "complex": (torch.ones(5, dtype=torch.complex64), TypeError, "dtype"),
    "sparse": (torch.ones(5).to_sparse(), ValueError, "dense|sparse"),
    "meta": (torch.ones(5, device="meta"), ValueError, "meta"),
    "no tensor": ([1.0] * 5, TypeError, "expected a tensor"),
}


@by_backend
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("alphas", [0.5, {"*": 0.5}], ids=["number", "mapping"])
def test_the_last_of_many_vectors_is_bad(backend: str, kind: str, alphas: Any) -> None:
    bad, error, match = BAD[kind]
    base = {f"p{i}": torch.randn(5) for i in range(20)}
    vectors = [{n: torch.ones(5) for n in base} for _ in range(9)]
    vectors[-1]["p19"] = bad  # type: ignore[assignment]
    raises_and_leaves(
        [*base.values()],
        lambda: merge_(base, vectors, alphas, backend=backend),
        error,
        rf"vectors\[8\]\['p19'\].*({match})",
    )
    if kind == "sparse" and backend == "native":
        error, match = NotImplementedError, "Sparse"  # of torch, which has no kernel for it
    if kind != "no tensor":
        rows = [v[n] for n in base for v in vectors]
        raises_and_leaves(
            [*base.values()],
            lambda: op.merge_([*base.values()], rows, [9] * 20, [0.5] * 180, backend),
            error,
            match,
        )


@by_backend
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
def test_inference_base_beside_an_ordinary_one(backend: str, gaps: bool) -> None:
    with torch.inference_mode():
        whole = torch.randn(4, 6)
        inference = whole[:, ::2] if gaps else whole
    bases = [torch.randn(7), inference]
    vectors = [torch.ones(b.shape) for b in bases]
    expected = [b + v for b, v in zip(bases, vectors, strict=True)]
    base = dict(zip("ab", bases, strict=True))
    calls = [
        lambda: merge_(base, dict(zip("ab", vectors, strict=True)), backend=backend),
        lambda: op.merge_(bases, vectors, [1, 1], [1.0, 1.0], backend),
    ]
    for call in calls:
        raises_and_leaves(bases, call, RuntimeError, "inference")
    with torch.inference_mode():
        calls[0]()
    assert all(torch.equal(a, b) for a, b in zip(bases, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "error"),
    [("none", ValueError), ("native,none", ValueError), ("triton", RuntimeError)],
)
def test_unknown_backend(backend: str, error: type[Exception]) -> None:
    base = {"a": torch.randn(5)}
    raises_and_leaves(
        [base["a"]], lambda: merge_(base, {"a": torch.ones(5)}, backend=backend), error, "backend"
    )


@by_backend
def test_overlapping_bases_after_good_ones(backend: str) -> None:
    buffer = torch.randn(40)
    base = {f"p{i}": torch.randn(9) for i in range(5)}
    base |= {"x": buffer[:20].view(4, 5)[:, 1:3], "y": buffer[2:20:6]}
    vectors = {n: torch.ones(t.shape) for n, t in base.items()}
    raises_and_leaves(
        [*base.values()],
        lambda: merge_(base, vectors, backend=backend),
        ValueError,
        "shares memory with itself or with another base",
    )


OUT_OF_MEMORY = """
import resource, sys
import torch
from tangentfast.merge import merge_
backend, step, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dtype = getattr(torch, sys.argv[4])
n = 300_000
buffer = torch.randn(4 * n + 9).to(dtype)
first = buffer.clone()
base = {f"p{i}": buffer[i * n : (i + 1) * n].view(500, -1) for i in range(4)}
base["p1"] = base["p1"].view(-1, 500).T
# Vectors of other dtypes, layouts, and of the base's own memory: all that can need room.
vectors = [
    {m: torch.randn(b.shape).to(torch.bfloat16) for m, b in base.items()},
    {m: torch.randn(b.shape).to(torch.float64).T.contiguous().T for m, b in base.items()},
    {m: buffer[9 + i * n : 9 + (i + 1) * n].view(b.shape) for i, (m, b) in enumerate(base.items())},
]
merge_({m: b.clone() for m, b in base.items()}, vectors, 0.5, backend=backend)
copies = [{m: v.clone() for m, v in vector.items()} for vector in vectors]
new = first.clone()
again = {m: new[b.storage_offset():].as_strided(b.shape, b.stride()) for m, b in base.items()}
merge_(again, copies, 0.5, backend=backend)
del copies
assert not torch.equal(new, first)
failed = done = 0
limits = resource.getrlimit(resource.RLIMIT_AS)
for extra in range(steps):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + extra * step, limits[1]))
    try:
        merge_(base, vectors, 0.5, backend=backend)
        out = False
    except (RuntimeError, MemoryError) as error:
        out = str(error) or "MemoryError"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(buffer, first if out else new), (extra, out)
    buffer.copy_(first)
    assert not out or "memory" in out.lower() or "alloc" in out.lower(), out
    failed, done = failed + bool(out), done + (not out)
print(failed, done)
assert failed and done
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@by_backend
def test_out_of_memory(backend: str, dtype: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", OUT_OF_MEMORY, backend, str(700_001), "30", dtype]
    run = subprocess.run(
        command, env=environment, text=True, capture_output=True, check=False, timeout=100
    )
    assert run.returncode == 0, run.stdout + run.stderr


# Layouts ----------------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "transposed", "gaps", "negative", "channels_last", "offset", "split"]


def in_layout(values: Tensor, layout: str, negative: bool = False) -> Tensor:
    """The same values in other memory; `negative` sets the flag that their signs are turned."""
    if negative:
        turned = torch.complex(torch.zeros(()).double(), torch.ones(()).double())
        turned = values.double() * -turned
        if values.dtype == torch.float64:
            return in_layout_of_imag(turned, layout)
        if values.dtype == torch.float32:
            return in_layout_of_imag(turned.to(torch.complex64), layout)
        return in_layout(values, layout)  # there is no complex bfloat16
    d = values.dim()
    if layout == "transposed":
        return values.permute(tuple(range(d))[::-1]).contiguous().permute(tuple(range(d))[::-1])
    if layout == "channels_last" and d in (4, 5):
        form = torch.channels_last if d == 4 else torch.channels_last_3d
        return values.clone(memory_format=form)
    if layout == "gaps" and d:
        wide = values.new_full([2 * n + 1 for n in values.shape], torch.nan)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in values.shape)]
        return view.copy_(values)
    if layout == "offset":  # of another alignment
        return (
            values.new_full((values.numel() + 3,), torch.nan)[3:].view(values.shape).copy_(values)
        )
    if layout == "split" and d:  # a column block of a matrix
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 5), torch.nan)
        return wide[..., 2 : 2 + values.shape[-1]].copy_(values)
    return values.clone(memory_format=torch.contiguous_format)


def in_layout_of_imag(waves: Tensor, layout: str) -> Tensor:
    """The imaginary part of the conjugate: a view with gaps whose signs are a flag."""
    order = tuple(range(waves.dim()))[:: -1 if layout == "transposed" else 1]
    view = waves.permute(order).contiguous().permute(order).conj().imag
    assert view.is_neg()
    return view


SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (17,),
    (0, 3),
    (3, 1),
    (1, 1, 1),
    (5, 7),
    (64, 33),
    (700, 3),
    (2, 3, 4),
    (2, 3, 4, 5),
    (3, 8, 1, 6),
    (2, 1, 3, 4, 5),
    (2, 3, 2, 3, 2),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
    """The op's arguments: bases, vectors, counts and coefficients."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtypes = draw(st.sampled_from([DTYPES, DTYPES[2:], DTYPES[1:2], DTYPES[:1], DTYPES[3:]]))
    bases, vectors, counts = [], [], []

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return in_layout(values, draw(st.sampled_from(LAYOUTS)), draw(st.booleans()))

    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from(SHAPES))
        bases.append(tensor(shape, draw(st.sampled_from(dtypes))))
        counts.append(draw(st.integers(0, 14)))
        alike = draw(st.booleans())
        for k in range(counts[-1]):
            if alike and k:
                vectors.append(vectors[-1].clone().add_(k))  # mostly in the same layout
                continue
            kept = tuple(n if draw(st.integers(0, 4)) else 1 for n in shape)
            vectors.append(tensor(kept, draw(st.sampled_from(dtypes))).expand(shape))
    alphas = [draw(st.sampled_from([1.0, -1.0, 0.3, 1e-3, -2.5, 0.0])) for _ in vectors]
    return bases, vectors, counts, alphas


def copied(base: Tensor) -> Tensor:
    """A copy of the storage, gaps included, with the same view of it."""
    storage = base.untyped_storage().clone()
    copy = torch.tensor([], dtype=base.dtype).set_(
        storage, base.storage_offset(), base.shape, base.stride()
    )
    return torch._neg_view(copy) if base.is_neg() else copy


@native_only
@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_backends_agree_on_every_layout(
    case: tuple[list[Tensor], list[Tensor], list[int], list[float]],
) -> None:
    bases, vectors, counts, alphas = case
    before = [memory_of(v).clone() for v in vectors]
    results = []
    for backend in BACKENDS:
        own = [copied(b) for b in bases]
        for copy, base in zip(own, bases, strict=True):
            assert copy.stride() == base.stride()
            assert copy.is_neg() == base.is_neg()
        op.merge_(own, vectors, counts, alphas, backend)
        results.append(own)
    for a, b in zip(*results, strict=True):
        assert torch.equal(memory_of(a), memory_of(b))  # gaps are left alone too
    for vector, old in zip(vectors, before, strict=True):
        assert torch.equal(memory_of(vector), old)


# Vectors of the base's own memory -----------------------------------------------------------------


def windows(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer and a base [24, 24] in it, with room on both sides."""
    torch.manual_seed(0)
    buffer = torch.randn(4000).to(dtype)
    strides = {"contiguous": (24, 1), "transposed": (1, 24), "gaps": (60, 2), "rows": (30, 1)}
    return buffer, buffer.as_strided((24, 24), strides[layout], 100)


def own_memory(buffer: Tensor, base: Tensor) -> Iterator[tuple[str, Tensor]]:
    offset, stride = base.storage_offset(), base.stride()
    yield "exact", base
    yield "transposed", base.T
    for shift in (1, -1, 7, 24, 60):
        yield f"shifted by {shift}", buffer.as_strided((24, 24), stride, offset + shift)
    yield "turned and shifted", buffer.as_strided((24, 24), stride[::-1], offset + 3)
    yield "expanded row", base[5:6].expand(24, 24)
    yield "expanded column", base[:, 23:].expand(24, 24)
    yield "windows", buffer[offset:].unfold(0, 24, 1)[:24]
    yield "last element", base[-1:, -1:].expand(24, 24)
    if buffer.dtype == torch.float32:
        yield "other dtype", buffer.view(torch.bfloat16).as_strided((24, 24), (24, 1), 2 * offset)
    if buffer.dtype == torch.float64:
        yield "other dtype", buffer.view(torch.float32).as_strided((24, 24), (24, 1), 2 * offset)


@by_backend
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_memory_is_read_before_it_is_written(
    dtype: torch.dtype, layout: str, backend: str
) -> None:
    buffer, base = windows(layout, dtype)
    kinds = [name for name, _ in own_memory(buffer, base)]
    for chosen in [*([i] for i in range(len(kinds))), list(range(len(kinds)))]:
        buffer, base = windows(layout, dtype)
        old = buffer.clone()
        vectors = [v for _, v in own_memory(buffer, base)]
        vectors = [vectors[i] for i in chosen]
        alphas = [0.5 - i for i in chosen]
        expected = old.as_strided(base.shape, base.stride(), base.storage_offset())
        clones = [torch.empty(24, 24, dtype=v.dtype).copy_(v) for v in vectors]
        op.merge_([expected], clones, [len(clones)], alphas, "reference")
        op.merge_([base], vectors, [len(vectors)], alphas, backend)
        same = torch.equal(buffer.view(torch.int16), old.view(torch.int16))
        assert same, [kinds[i] for i in chosen]


@by_backend
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps", "rows"])
def test_memory_of_another_base(layout: str, backend: str) -> None:
    """Each of two bases is a vector of the other, the later one of one that is written before."""
    (_, a), (_, b) = (windows(layout, dtype) for dtype in (torch.float32, torch.float64))
    expected = [a + 2 * b.float().T, (b + 0.5 * a.double())]
    expected[0] = (a.double() + 2 * b.T).float()
    op.merge_([a, b], [b.T, a], [1, 1], [2.0, 0.5], backend)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])
