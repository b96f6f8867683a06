"""How everything here is measured: variants interleaved, results checked first, raw seconds noted.

``compare`` runs every variant once a round, so that a disturbance of the machine meets all of them,
and a ratio is the median over the ratios of single rounds. It writes the seconds of every round
into pytest-benchmark's ``extra_info``; document.py computes what is shown from those, and only from
those. The first round is never a sample: in it the library measures which of several ways is the
fastest, compilers compile, and caches and pages are touched. BENCH_SMOKE=1 makes every problem tiny
and runs one round: it shows that the suite works.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import tangentfast as tf

Call = Callable[[], Any]

SMOKE = os.environ.get("BENCH_SMOKE") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORTEST = 0.0 if SMOKE else 2e-3  # seconds: what is quicker is called several times a round
SHORT = 0.1  # seconds of a first call that is repeated to see how long one takes
SLOW = 10.0  # seconds of two rounds: a third variant that takes most of them has one sample

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
    variants: Mapping[str, Call],
    check: Callable[[dict[str, Any]], None],
    *,
    against: str,
    work: Mapping[str, float] | None = None,
    rounds: int = 7,
    seconds: float = 10.0,
    **facts: Any,
) -> None:
    """Time `variants`, interleaved, and record them.

    The first round gives the results for `check`, which raises where they differ, and is no sample.
    At least one round follows, then as many as fit into `seconds`, at most `rounds`. Where a round
    is slow, a third variant that takes more than half of it is left out of all but one.

    Args:
        benchmark: pytest-benchmark's fixture; its own time is that of the whole comparison.
        variants: name -> what is timed. Short ones are repeated within a round.
        check: gets name -> result.
        against: the variant that ratios refer to.
        work: bytes moved or FLOPs done by one call of a variant, for rates.
        facts: what was measured; JSON values. `unit` is "B" or "FLOP" where there is `work`.

    Raises:
        AssertionError: the results differ, or the library chose its ways within a sample.
    """

    def measure() -> dict[str, list[float]]:
        results, first = {}, {}
        for name, call in variants.items():
            first[name], results[name] = timed(call)
        check(results)
        results.clear()
        chosen = tf.info().measured
        spent = sum(first.values())
        # The first call of a short one may be mostly measurement: it does not say how many to time.
        short = {name: timed(variants[name])[0] for name, took in first.items() if took < SHORT}
        calls = {name: max(1, math.ceil(SHORTEST / short.get(name, SHORT))) for name in variants}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        names = list(variants)
        for r in range(1 if SMOKE else rounds):
            for name in names if r % 2 == 0 else names[::-1]:
                samples[name].append(timed(variants[name], calls[name])[0])
            took = {name: samples[name][0] * calls[name] for name in names}
            spent += sum(took.values())
            if r == 0 and len(names) > 2 and spent > SLOW:
                names = [name for name in names if took[name] <= sum(took.values()) / 2]
            if spent + sum(took[name] for name in names) > seconds:
                break
        assert tf.info().measured == chosen, "a way was chosen within a sample"
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


def timed(call: Call, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the last call's result; on a GPU from idle to idle."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls - 1):
        call()
    result = call()
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


def error(result: Any, expected: Any) -> float:
    """Relative error of all tensors of `result` together, in the Euclidean norm.

    Together, since some gradients are zero in exact arithmetic (those of key biases).
    """
    pairs = list(zip(tensors(result), tensors(expected), strict=True))
    wide = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    size = sum(float(b.square().sum()) for _, b in wide)
    off = sum(float((a - b).square().sum()) for a, b in wide)
    return math.sqrt(off / size) if size else off and math.inf


def assert_close(result: Any, expected: Any, what: str, slack: float = 1.0) -> None:
    """`error` is at most the dtype's tolerance, `slack` times.

    Raises:
        AssertionError: it is not; both are in the message.
    """
    limit = TOLERANCE[tensors(result)[0].dtype] * slack
    off = error(result, expected)
    assert off <= limit, f"{what}: relative error {off:.1e}, limit {limit:.1e}"
