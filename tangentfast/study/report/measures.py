"""What a regime is judged by, as one table of measures, and its mean and spread over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .schema import Regime, Results, Trial

__all__ = ["MEASURE", "MEASURES", "Measure", "Spread", "by_seed", "maps", "mean", "merged"]


def mean(values: Iterable[float]) -> float:
    """Mean of `values`; NaN without any, or if one of them is NaN."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n − 1) over the seeds that have the value, `n` of `of`.

    `std` is NaN with fewer than two of them.
    """

    mean: float
    std: float
    n: int
    of: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Of one value a seed; those that are not finite count in `of` alone."""
        finite = [value for value in values if math.isfinite(value)]
        centre = mean(finite)
        std = math.nan
        if len(finite) > 1:
            std = math.sqrt(sum((v - centre) ** 2 for v in finite) / (len(finite) - 1))
        return cls(centre, std, len(finite), len(values))

    def text(self, write: Callable[[float], str]) -> str:
        """`mean ± std`, with `(n/of)` where seeds lack the value, and – where all do."""
        if not self.n:
            return "–"
        spread = f" ± {write(self.std)}" if math.isfinite(self.std) else ""
        return write(self.mean) + spread + (f" ({self.n}/{self.of})" if self.n < self.of else "")


def percent(value: float) -> str:
    """Of a fraction, one decimal, the sign left to the heading."""
    return f"{100 * value:.1f}"


def significant(value: float) -> str:
    """Three significant digits, without an exponent where a person would write none."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def rate(value: float) -> str:
    """A learning rate, as in `3e-4`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


@dataclass(frozen=True)
class Measure:
    """One column of the headline: `of` gives a value for each trial, or one for the regime.

    `points` is how a difference of two values is written: its factor, its digits and its unit.
    """

    key: str
    heading: str
    of: Callable[[Regime], Sequence[float]]
    write: Callable[[float], str]
    better: Literal["high", "low", ""] = ""
    points: tuple[float, int, str] = (100.0, 1, " points")

    def spread(self, regime: Regime) -> Spread:
        """Over the seeds of `regime`."""
        return Spread.over(self.of(regime))

    def best(self, spreads: Iterable[Spread]) -> float:
        """The best mean; NaN if this measure has no better or worse, or nothing to choose from."""
        means = [s.mean for s in spreads if s.n]
        if len(means) < 2 or not self.better:
            return math.nan
        return max(means) if self.better == "high" else min(means)


def maps(trial: Trial, kind: str = "prediction") -> list[float]:
    """ξ over the search box, of every pair of tasks."""
    return [pair_map.box for pair_map in trial.disentanglement if pair_map.kind == kind]


def merged(trial: Trial, task: str) -> float:
    """Test accuracy on `task` of the merge at the α that validation chose."""
    return trial.addition.test.get(task, math.nan) if trial.addition else math.nan


def _each(value: Callable[[Trial], float]) -> Callable[[Regime], list[float]]:
    return lambda regime: [value(trial) for trial in regime.trials]


def _fact(value: Callable[[Regime], float | None]) -> Callable[[Regime], list[float]]:
    def of(regime: Regime) -> list[float]:
        number = value(regime)
        return [] if number is None else [number]

    return of


def _addition(key: str) -> Callable[[Regime], list[float]]:
    return _each(lambda r: getattr(r.addition, key) if r.addition else math.nan)


def _negation(key: str) -> Callable[[Regime], list[float]]:
    return _each(lambda r: getattr(r.negation, key) if r.negation else math.nan)


MEASURES = (
    Measure("single", "single task, %", _each(lambda r: mean(r.single.values())), percent, "high"),
    Measure("absolute", "addition, absolute, %", _addition("absolute"), percent, "high"),
    Measure("normalized", "addition, normalised, %", _addition("normalized"), percent, "high"),
    Measure("alpha", "α", _addition("alpha"), lambda v: f"{v:.2f}"),
    Measure("at_one", "addition at α = 1, %", _addition("at_one"), percent, "high"),
    Measure("target", "negation, target, %", _negation("target"), percent, "low"),
    Measure("control", "negation, control, %", _negation("control"), percent),
    Measure(
        "xi", "ξ over the box", _each(lambda r: mean(maps(r))), lambda v: f"{v:.3f}", "low",
        (1.0, 3, ""),
    ),
    Measure(
        "seconds", "s per step", _fact(lambda r: r.seconds_per_step), significant, "low",
    ),
    Measure(
        "memory", "peak memory, MiB",
        _fact(lambda r: None if r.peak_bytes is None else r.peak_bytes / 2**20), significant, "low",
    ),
    Measure(
        "parameters", "trained parameters, M",
        _fact(lambda r: None if r.trained_parameters is None else r.trained_parameters / 1e6),
        significant,
    ),
    Measure("lr", "learning rate", _fact(lambda r: r.lr), rate),
)  # fmt: skip
MEASURE = {measure.key: measure for measure in MEASURES}


def by_seed(results: Results, regime: str, measure: Measure) -> dict[int, float]:
    """A measure's value with each seed; none for a regime that is not there."""
    if regime not in results.regimes:
        return {}
    chosen = results.regimes[regime]
    return dict(zip((trial.seed for trial in chosen.trials), measure.of(chosen), strict=True))
