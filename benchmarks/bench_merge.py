"""merge_ and gram against what people write instead.

    pytest benchmarks/bench_merge.py --benchmark-only

Traffic counted: merge_ reads K vectors and the base and writes the base, K + 2 streams; a loop of
``add_`` moves 3 K; the sum of vectors as new dictionaries 3 (K - 1), its scaling, addition and copy
7. The machine's ceiling is measured in the same rounds: see ceilings.py for what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import baselines
import ceilings
import pytest
import torch
from harness import DEVICE, SMOKE, assert_close, compare
from torch import Tensor

from tangentfast.merge import gram, merge_
from tangentfast.ops.backend import native_problem

COUNTS = [1, 2, 4, 8, 16]
N = 24_000 if SMOKE else 32_000_000 if DEVICE.type == "cpu" else 300_000_000
PARTS = 120  # tensors of a model
ALPHA = 0.1
STREAM = N * 4.0  # bytes
NATIVE = not native_problem("merge_", DEVICE)


@cache
def data() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base of 120 float32 tensors and 16 vectors of the same names."""
    torch.manual_seed(0)
    noise = torch.randn(N, device=DEVICE)

    def vector(scale: float) -> dict[str, Tensor]:
        parts = (noise * scale).split(N // PARTS)
        return {f"p{i}": part.clone() for i, part in enumerate(parts)}

    return vector(1.0), [vector(0.3 + 0.1 * k) for k in range(max(COUNTS))]


Merge = Callable[[dict[str, Tensor], list[dict[str, Tensor]], float], object]


def merges(k: int) -> dict[str, tuple[Merge, int]]:
    """Each way to merge k vectors, and its streams."""
    ways: dict[str, tuple[Merge, int]] = {
        "add_ loop": (baselines.add_loop, 3 * k),
        "_foreach_add_": (baselines.foreach_loop, 3 * k),
        "sum, then apply": (baselines.sum_then_apply, 3 * (k - 1) + 7),
        "tangentfast": (merge_, k + 2),
    }
    if DEVICE.type == "cpu":
        # alpha * vector makes an array (2), the sum reads and writes two and one (3)
        ways["numpy"] = (baselines.numpy_loop, 5 * k)
    if NATIVE:
        reference: Merge = lambda b, v, a: merge_(b, v, a, backend="reference")  # noqa: E731
        ways["reference"] = (reference, 5 * k + 3)
    return ways


@pytest.mark.parametrize("k", COUNTS)
def test_merge(k: int, benchmark: Any) -> None:
    base, vectors = data()
    some = vectors[:k]
    targets = {name: {n: t.clone() for n, t in base.items()} for name in merges(k)}
    ceiling, moved = ceilings.passes(int(STREAM * (k + 2)))

    def check(results: dict[str, Any]) -> None:
        for part in ("p0", f"p{PARTS - 1}"):
            exact = base[part].double() + ALPHA * sum(v[part].double() for v in some)
            for name, target in targets.items():
                assert_close(target[part], exact.float(), f"merge, {name}")

    compare(
        benchmark,
        {
            name: lambda merge=merge, target=targets[name]: merge(target, some, ALPHA)
            for name, (merge, _) in merges(k).items()
        }
        | {f"ceiling: {name}": call for name, call in ceiling.items()},
        check,
        against="add_ loop",
        work={name: streams * STREAM for name, (_, streams) in merges(k).items()}
        | {f"ceiling: {name}": amount for name, amount in moved.items()},
        seconds=4.0,
        K=k,
        N=N,
        tensors=PARTS,
        dtype="float32",
        unit="B",
    )


def test_gram(benchmark: Any) -> None:
    """The 8 × 8 inner products: every vector read once, against a loop of dot products."""
    vectors = data()[1][:8]
    ceiling, moved = ceilings.passes(int(STREAM * 8))

    def dots() -> Tensor:
        rows = [[sum(torch.dot(v[n], w[n]) for n in v) for w in vectors] for v in vectors]
        return torch.tensor(rows)

    def check(results: dict[str, Any]) -> None:
        for name in ("tangentfast", "dot loop"):
            assert_close(results[name].float(), exact, f"gram, {name}", slack=20)

    exact = gram([{n: t.double() for n, t in v.items()} for v in vectors], backend="reference")
    exact = exact.float()
    compare(
        benchmark,
        {"tangentfast": lambda: gram(vectors), "dot loop": dots}
        | {f"ceiling: {name}": call for name, call in ceiling.items()},
        check,
        against="dot loop",
        work={"tangentfast": 8 * STREAM, "dot loop": 128 * STREAM}
        | {f"ceiling: {name}": amount for name, amount in moved.items()},
        seconds=6.0,
        K=8,
        N=N,
        tensors=PARTS,
        dtype="float32",
        unit="B",
    )
