"""What the suite must show: each bar, and where its figure is read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from readings import COPIES, Comparison, Run
from regimes import COMPILED, ORDINARY, OURS, OURS_ATTENTION, PUBLISHED

Reading = Callable[[Run], float | None]


@dataclass(frozen=True)
class Bar:
    """A figure with its limit; `at_least` says on which side of it is good."""

    what: str
    limit: float
    at_least: bool
    reading: Reading

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _step(model: str, dtype: str, variant: str, against: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = _find(run, "step", model, dtype)
        return None if found is None else found.times(variant, against)

    return reading


def _memory(model: str, dtype: str, variant: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = _find(run, "step", model, dtype)
        return None if found is None else run.memory(found, variant, ORDINARY)

    return reading


def _find(run: Run, start: str, model: str, dtype: str) -> Comparison | None:
    for found in run.named(start):
        if (found.facts["model"], found.facts["dtype"]) == (model, dtype):
            return found
    return None


def _first(start: str, variant: str, against: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = run.first(start)
        return None if found is None else found.times(variant, against)

    return reading


def _with(start: str, k: int, read: Callable[[Comparison], float]) -> Reading:
    def reading(run: Run) -> float | None:
        found = [c for c in run.named(start) if c.facts["K"] == k]
        return read(found[0]) if found else None

    return reading


def _rows() -> list[Bar]:
    bars = []
    for model, dtype, variant, step, faster in (
        ("ViT-B/32", "float32", OURS, 1.50, 2.0),
        ("ViT-B/32", "float32", OURS_ATTENTION, 1.25, 2.5),
        ("ViT-B/32", "bfloat16", OURS, 1.10, 5.0),
        ("ViT-B/16", "float32", OURS, 1.50, 2.0),
    ):
        what = f"{model} {dtype}, {variant.rpartition(' ')[2]}"
        bars += [
            Bar(f"{what}: step, × ordinary", step, False, _step(model, dtype, variant, ORDINARY)),
            Bar(
                f"{what}: × faster than `torch.func.jvp`",
                faster,
                True,
                _step(model, dtype, PUBLISHED, variant),
            ),
            Bar(f"{what}: peak memory, × ordinary", 1.10, False, _memory(model, dtype, variant)),
        ]
    return bars


BARS = [
    *_rows(),
    Bar(
        "× faster than the compiled `torch.func.jvp` step",
        1.25,
        True,
        _first("compiled", COMPILED, OURS),
    ),
    Bar(
        "8 tangents in one pass, × 8 `torch.func.jvp` calls",
        0.60,
        False,
        _with("tangents", 8, lambda c: c.times("tangentfast, one pass", "torch.func.jvp, K calls")),
    ),
    Bar(
        "8 tangents in one pass, × 8 calls of our own",
        0.80,
        False,
        _with("tangents", 8, lambda c: c.times("tangentfast, one pass", "tangentfast, K calls")),
    ),
    Bar(
        "α sweep of 21 points: × faster than point by point",
        10.0,
        True,
        _first("alpha_sweep", "tangentfast, point by point", "tangentfast, one pass"),
    ),
    Bar("merge_, K = 8: share of the copy ceiling", 0.90, True,
        _with("merge", 8, lambda c: c.share("tangentfast", *COPIES))),
]  # fmt: skip
