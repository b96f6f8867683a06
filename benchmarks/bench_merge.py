"""merge_ and gram of 8 vectors of 60 M float32 numbers, against what people write instead.

    pytest benchmarks/bench_merge.py

Traffic counted: merge_ reads K vectors and the base and writes the base, K + 2 streams of 240 MB;
a loop of ``add_`` moves 3 K; a copy moves 2. Every result is checked before it is timed. At the
end ratios and GB/s of all that ran are printed, from the best round of each: the rounds that
nothing else on the machine disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tangentfast.merge import gram, merge_
from tangentfast.ops.backend import load_native

pytest.importorskip("pytest_benchmark")

K, N, PARTS = 8, 60_000_000, 120
ALPHA = 0.1
STREAM = N * 4 / 1e9  # GB
seconds: dict[str, tuple[float, float]] = {}  # name -> best seconds, streams moved

native_only = pytest.mark.skipif(load_native()[0] is None, reason="no native extension")


@cache
def data() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base of 120 tensors and K vectors of the same names."""
    torch.manual_seed(0)
    sizes = {f"p{i}": N // PARTS for i in range(PARTS)}
    base = {name: torch.randn(size) for name, size in sizes.items()}
    return base, [{name: torch.randn(size) for name, size in sizes.items()} for _ in range(K)]


def add_loop(base: dict[str, Tensor], vectors: list[dict[str, Tensor]]) -> None:
    for vector in vectors:
        for name, tensor in vector.items():
            base[name].add_(tensor, alpha=ALPHA)


def foreach_loop(base: dict[str, Tensor], vectors: list[dict[str, Tensor]]) -> None:
    for vector in vectors:
        torch._foreach_add_(list(base.values()), list(vector.values()), alpha=ALPHA)


def sum_then_apply(base: dict[str, Tensor], vectors: list[dict[str, Tensor]]) -> None:
    """As task-vector scripts do: sum, scale and add whole dictionaries."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = {name: total[name] + vector[name] for name in total}
    for name, tensor in total.items():
        base[name].copy_(base[name] + ALPHA * tensor)


def native(base: dict[str, Tensor], vectors: list[dict[str, Tensor]]) -> None:
    merge_(base, vectors, ALPHA, backend="native")


def reference(base: dict[str, Tensor], vectors: list[dict[str, Tensor]]) -> None:
    merge_(base, vectors, ALPHA, backend="reference")


MERGES = [
    pytest.param(add_loop, 3 * K, id="add_ loop"),
    pytest.param(foreach_loop, 3 * K, id="foreach_add_ loop"),
    pytest.param(sum_then_apply, 3 * (K - 1) + 7, id="sum, then apply"),
    pytest.param(reference, 5 * K + 3, id="reference"),
    pytest.param(native, K + 2, id="merge_", marks=native_only),
]


@pytest.mark.parametrize(("function", "streams"), MERGES)
def test_merge(
    function: Callable[..., None], streams: int, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    base, vectors = data()
    own = {name: tensor.clone() for name, tensor in base.items()}
    function(own, vectors)
    for name in ("p0", f"p{PARTS - 1}"):
        exact = base[name].double() + ALPHA * sum(v[name].double() for v in vectors)
        assert (own[name] - exact).abs().max() <= 2e-6
    record(benchmark, request, streams, function, own, vectors)


def test_copy(benchmark: Any, request: pytest.FixtureRequest) -> None:
    source = torch.randn(N)
    target = torch.empty(N)
    assert torch.equal(target.copy_(source), source)
    record(benchmark, request, 2, target.copy_, source)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_only)])
def test_gram(backend: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    vectors = data()[1]
    exact = sum(float(torch.dot(v.double(), v.double())) for v in vectors[1].values())
    assert float(gram(vectors, backend=backend)[1, 1]) == pytest.approx(exact, rel=1e-12)
    streams = K if backend == "native" else K * (K + 1) * 2
    record(benchmark, request, streams, lambda: gram(vectors, backend=backend))


def record(
    benchmark: Any, request: pytest.FixtureRequest, streams: int, function: Any, *args: Any
) -> None:
    benchmark.pedantic(function, args=args, rounds=7, warmup_rounds=1)
    best = benchmark.stats.stats.min
    benchmark.extra_info |= {"streams": streams, "GB/s": streams * STREAM / best}
    seconds[request.node.name.removeprefix("test_")] = (best, streams)


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints ratios and rates of what was timed."""
    yield
    loop = seconds.get("merge[add_ loop]")
    if loop is None:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{K} × {N / 1e6:.0f} M float32, {torch.get_num_threads()} threads")
        for name, (best, streams) in seconds.items():
            rate, ratio = streams * STREAM / best, loop[0] / best
            print(f"{name:28s} {best:7.3f} s {rate:6.1f} GB/s {ratio:6.2f} × add_ loop")
