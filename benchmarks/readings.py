"""What can be read from the JSON of a run: ratios, rates, shares of the ceiling, slopes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CEILING = "ceiling: "
COPIES = ("copy_", "memcpy")


@dataclass(frozen=True)
class Comparison:
    """One comparison of variants: what was measured, and the figures of each variant."""

    name: str
    suite: str
    facts: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    def __contains__(self, variant: str) -> bool:
        return variant in self.variants

    def seconds(self, variant: str) -> float:
        """The median over rounds."""
        return statistics.median(self.variants[variant]["seconds"])

    def times(self, variant: str, against: str) -> float:
        """Time of `variant` over that of `against`: the median over the rounds that had both."""
        a, b = self.variants[variant]["seconds"], self.variants[against]["seconds"]
        return statistics.median(x / y for x, y in zip(a, b, strict=False))

    def rate(self, variant: str) -> float:
        """Bytes or FLOPs per second, median over rounds."""
        return statistics.median(self._rates(variant))

    def share(self, variant: str, *ceilings: str) -> float:
        """Rate over the best ceiling (of those named) of the same round, median over rounds."""
        names = [CEILING + name for name in ceilings]
        names = names or [name for name in self.variants if name.startswith(CEILING)]
        rows = [self._rates(name) for name in names if name in self.variants]
        best = [max(rates) for rates in zip(*rows, strict=True)]
        pairs = zip(self._rates(variant), best, strict=True)
        return statistics.median(rate / top for rate, top in pairs)

    def _rates(self, variant: str) -> list[float]:
        figures = self.variants[variant]
        return [figures["work"] / seconds for seconds in figures["seconds"]]

    def title(self) -> str:
        """Network, batch and dtype."""
        f = self.facts
        return f"{f['model']}, batch {f['batch']}, {f['dtype']}"


@dataclass(frozen=True)
class Run:
    """One run of the suite on one machine."""

    date: str
    commit: str
    machine: dict[str, Any]
    seconds: float
    smoke: bool
    comparisons: list[Comparison]

    @classmethod
    def load(cls, path: Path) -> Run:
        data = json.loads(path.read_text())
        comparisons = [
            Comparison(b["name"], b["suite"], b["facts"], b["variants"]) for b in data["benchmarks"]
        ]
        rest = {key: data[key] for key in ("date", "commit", "machine", "seconds", "smoke")}
        return cls(comparisons=comparisons, **rest)

    def named(self, start: str) -> list[Comparison]:
        """Comparisons of one benchmark function, in the order they ran."""
        return [c for c in self.comparisons if c.name.partition("[")[0] == start]

    def first(self, start: str) -> Comparison | None:
        """The first of them, if there is one."""
        return next(iter(self.named(start)), None)

    def memory(self, step: Comparison, variant: str, against: str) -> float | None:
        """Peak memory of the same network's step, as a multiple; None where it was not measured."""
        for found in self.named("memory"):
            same = all(found.facts[k] == step.facts[k] for k in ("model", "dtype", "batch"))
            if same and variant in found:
                peaks = found.variants
                return float(peaks[variant]["bytes"] / peaks[against]["bytes"])
        return None

    def axes(self) -> Iterator[tuple[str, list[Comparison]]]:
        """The comparisons along each axis of growth."""
        found = [c for c in self.comparisons if "axis" in c.facts]
        for axis in dict.fromkeys(c.facts["axis"] for c in found):
            yield axis, [c for c in found if c.facts["axis"] == axis]


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares y = a + b x: a and b."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    b = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan
    return mean_y - b * mean_x, b
