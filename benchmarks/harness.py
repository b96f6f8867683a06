"""How everything here is measured: variants interleaved, results checked first, raw seconds kept.

``compare`` runs every variant once a round, so that a disturbance of the machine meets all of them,
and a ratio is the median over the ratios of single rounds. It writes the seconds of every round
into pytest-benchmark's ``extra_info``; document.py computes what is shown from those, and only from
those. BENCH_SMOKE=1 makes every problem tiny and runs one round: it shows that the suite works.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

SMOKE = os.environ.get("BENCH_SMOKE") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORTEST = 0.0 if SMOKE else 2e-3  # seconds: what is quicker is called several times a round
SLOW = 5.0  # seconds: a first round of this length needs no other one to warm up

# Relative error of the concatenated results. The tests hold the library to float64 truth; here two
# ways in one dtype are compared, each with its own rounding.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def compare(
    benchmark: Any,
    variants: Mapping[str, Run],
    check: Callable[[dict[str, Any]], None],
    *,
    against: str,
    work: Mapping[str, float] | None = None,
    rounds: int = 7,
    seconds: float = 10.0,
    **facts: Any,
) -> None:
    """Time `variants`, interleaved, and record them.

    The first round gives the results for `check`, which raises where they differ, and its times:
    as many rounds follow as fit into `seconds`, at most `rounds`. Where the first round was slow it
    is one of those, and a third variant that took more than half of it is not run again.

    Args:
        benchmark: pytest-benchmark's fixture; its own time is that of the whole comparison.
        variants: name -> what is timed. Short ones are repeated within a round.
        check: gets name -> result.
        against: the variant that ratios refer to.
        work: bytes moved or FLOPs done by one call of a variant, for rates.
        facts: what was measured; JSON values. `unit` is "B" or "FLOP" where there is `work`.
    """

    def measure() -> dict[str, list[float]]:
        results, first = {}, {}
        for name, run in variants.items():
            first[name], results[name] = timed(run)
        check(results)
        results.clear()
        total = sum(first.values())
        slow = total >= SLOW
        samples = {name: [took] if slow else [] for name, took in first.items()}
        dear = total / 2 if slow and len(variants) > 2 else math.inf
        again = [name for name, took in first.items() if took <= dear]
        calls = {name: max(1, math.ceil(SHORTEST / first[name])) for name in again}
        left = (seconds - total * slow) / sum(first[name] for name in again)
        count = 1 if SMOKE else max(not slow, min(rounds - slow, int(left)))
        for r in range(count):
            for name in again if r % 2 == 0 else again[::-1]:
                samples[name].append(timed(variants[name], calls[name])[0])
        return samples

    samples = benchmark.pedantic(measure, rounds=1, iterations=1)
    work = work or {}
    benchmark.extra_info |= {
        "facts": facts | {"against": against, "rounds": len(samples[against])},
        "variants": {
            name: {"seconds": took} | ({"work": work[name]} if name in work else {})
            for name, took in samples.items()
        },
    }


def timed(run: Run, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the last call's result; on a GPU from idle to idle."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    result = run()
    synchronize()
    return (time.perf_counter() - start) / calls, result


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tensors(results: Any) -> list[Tensor]:
    """The tensors of nested sequences and mappings; None stands for nothing."""
    if isinstance(results, Tensor):
        return [results]
    if results is None:
        return []
    parts: Iterable[Any] = results.values() if isinstance(results, Mapping) else results
    return [tensor for part in parts for tensor in tensors(part)]


def assert_close(found: Any, expected: Any, what: str, slack: float = 1.0) -> None:
    """Relative error of all tensors of `found` together, in the Euclidean norm.

    Together, since some gradients are zero in exact arithmetic (those of key biases).
    """
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    wide = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    error = math.sqrt(sum(float((a - b).square().sum()) for a, b in wide))
    size = math.sqrt(sum(float(b.square().sum()) for _, b in wide))
    limit = TOLERANCE[pairs[0][0].dtype] * slack
    assert error <= limit * size, f"{what}: relative error {error / size:.1e}, limit {limit:.1e}"
