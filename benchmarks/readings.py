"""What can be read from the JSON of results: ratios, rates, shares of the ceiling, slopes."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CEILING = "ceiling: "
COPIES = ("copy_", "memcpy")


@dataclass(frozen=True)
class Comparison:
    """One comparison of variants: what was measured, and the numbers of each variant."""

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
        measured = self.variants[variant]
        return [measured["work"] / seconds for seconds in measured["seconds"]]

    def title(self) -> str:
        """Network, batch and dtype."""
        f = self.facts
        return f"{f['model']}, batch {f['batch']}, {f['dtype']}"


@dataclass(frozen=True)
class Results:
    """One execution of the suite on one machine; `folder` is the machine's."""

    folder: str
    date: str
    time: str
    commit: str
    machine: dict[str, Any]
    seconds: float
    smoke: bool
    comparisons: list[Comparison]

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        comparisons = [
            Comparison(b["name"], b["suite"], b["facts"], b["variants"]) for b in data["benchmarks"]
        ]
        rest = {key: data[key] for key in ("date", "commit", "machine", "seconds", "smoke")}
        time, folder = data.get("time", ""), path.parent.name
        return cls(comparisons=comparisons, time=time, folder=folder, **rest)

    @property
    def label(self) -> str:
        """The machine in a few words, for a column."""
        m = self.machine
        return m["gpu"] or f"{m['cpu']} {' '.join(map(_shown, kind(m)))}, {m['cores']} cores"

    def named(self, start: str) -> list[Comparison]:
        """Comparisons of one benchmark function, in their order."""
        return [c for c in self.comparisons if c.name.partition("[")[0] == start]

    def first(self, start: str) -> Comparison | None:
        """The first of them, if there is one."""
        return next(iter(self.named(start)), None)

    def memory(self, step: Comparison, variant: str, against: str) -> float | None:
        """Peak memory of the same network's step, as a multiple; None where it was not measured."""
        for c in self.named("memory"):
            same = all(c.facts[k] == step.facts[k] for k in ("model", "dtype", "batch"))
            if same and variant in c:
                return float(c.variants[variant]["bytes"] / c.variants[against]["bytes"])
        return None

    def axes(self) -> Iterator[tuple[str, list[Comparison]]]:
        """The comparisons along each axis of growth."""
        grown = [c for c in self.comparisons if "axis" in c.facts]
        for axis in dict.fromkeys(c.facts["axis"] for c in grown):
            yield axis, [c for c in grown if c.facts["axis"] == axis]


def newest(folder: Path) -> list[Results]:
    """The newest results of every machine that has a folder there."""
    machines = [sorted(path.glob("*.json")) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [
        max(map(Results.load, paths), key=lambda r: (r.date, r.time)) for paths in machines if paths
    ]


def instructions(machine: dict[str, Any]) -> list[str]:
    """The instruction sets of a CPU; the first results said them in `isa`."""
    if "instructions" in machine:
        return list(machine["instructions"])
    words = machine["isa"].split()
    return ["avx2", "avx512f", *words[1:]] if words[0] == "avx512" else words


def kind(machine: dict[str, Any]) -> list[str]:
    """The widest vectors of a CPU; and, where our kernels were held to narrower ones, those."""
    isa = re.split("[ _]", machine["isa"])[0]  # avx512 for avx512_bf16 too
    has = instructions(machine)
    widest = next((wide for wide in ("avx512", "avx2") if any(wide in h for h in has)), isa)
    return [widest] if widest == isa else [widest, "as", isa]


def _shown(word: str) -> str:
    return word.upper().replace("AVX512", "AVX-512") if word != "as" else word


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares y = a + b x: a and b."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    b = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan
    return mean_y - b * mean_x, b
