"""The figures of docs/benchmarks.md: the charts of one machine, as SVG with its text as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import mixtures
from readings import CEILING, Results
from regimes import ATTENTION, COMPILED, ORDINARY, OURS, OURS_ATTENTION, OURS_NARROW, PUBLISHED

COLOURS = {
    ORDINARY: "#8a8a8a",
    ATTENTION: "#c4c4c4",
    PUBLISHED: "#c0504d",
    COMPILED: "#e0a19f",
    OURS: "#1f5fa8",
    OURS_ATTENTION: "#7fb0e0",
    OURS_NARROW: "#2e8b6f",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tangentfast",  # the same results give the same file
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(results: Results, folder: Path) -> list[str]:
    """Write a figure for everything that was measured; the names of the files."""
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for what, figure in FIGURES.items():
            drawn = figure(results)
            if drawn is not None:
                names.append(f"{results.folder}-{what}.svg")
                drawn.savefig(folder / names[-1], bbox_inches="tight", metadata={"Date": None})
                plt.close(drawn)
    return names


def _axes(width: float = 7.2, height: float = 3.2, count: int = 1) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(width, height), squeeze=False)
    return figure, list(axes[0])


def _grouped(
    axes: Axes, groups: list[str], heights: dict[str, list[float | None]], label: str
) -> None:
    """A group of columns side by side for each entry, a colour for each variant, values on top."""
    width = 0.8 / len(heights)
    for i, (variant, values) in enumerate(heights.items()):
        places = [g + (i - (len(heights) - 1) / 2) * width for g in range(len(groups))]
        drawn = [(p, v) for p, v in zip(places, values, strict=True) if v is not None]
        if drawn:
            x, y = zip(*drawn, strict=True)
            columns = axes.bar(x, y, width * 0.92, color=COLOURS.get(variant), label=variant)
            axes.bar_label(columns, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1.0, color="#444444", linewidth=0.7, linestyle=":")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.legend(fontsize=7, ncols=2)


def steps(results: Results) -> Figure | None:
    """Cost of a step by regime."""
    measured = results.named("step") + results.named("compiled")
    variants = [v for v in COLOURS if any(v in c for c in measured)]
    if not measured:
        return None
    figure, (axes,) = _axes(9.0, 3.6)
    groups = [c.title().replace(", ", "\n", 1) + "\n" * (c.name == "compiled") for c in measured]
    times = {v: [c.times(v, ORDINARY) if v in c else None for c in measured] for v in variants}
    _grouped(axes, groups, times, "time, × ordinary step")
    return figure


def memory(results: Results) -> Figure | None:
    """Peak memory of a step by regime."""
    measured = results.named("memory")
    if not measured:
        return None
    variants = [v for v in COLOURS if any(v in c for c in measured)]
    figure, (axes,) = _axes()
    peaks = {
        v: [
            c.variants[v]["bytes"] / c.variants[ORDINARY]["bytes"] if v in c else None
            for c in measured
        ]
        for v in variants
    }
    groups = [c.title().replace(", ", "\n", 1) for c in measured]
    _grouped(axes, groups, peaks, "peak memory, × ordinary")
    return figure


def tangents(results: Results) -> Figure | None:
    """K tangents: one pass against K calls."""
    measured = results.named("tangents")
    if not measured:
        return None
    figure, (axes,) = _axes(5.4)
    unit = "tangentfast, K calls"
    ks = [c.facts["K"] for c in measured]
    one = measured[0].seconds(unit)
    for variant, colour in (
        ("torch.func.jvp, K calls", COLOURS[PUBLISHED]),
        (unit, COLOURS[OURS_ATTENTION]),
        ("tangentfast, one pass", COLOURS[OURS]),
    ):
        line = [c.seconds(variant) / one for c in measured]
        axes.plot(ks, line, marker="o", color=colour, label=variant)
    axes.set_xticks(ks)
    axes.set_xlabel("K")
    axes.set_ylabel("time, × one call of our own")
    axes.legend()
    return figure


def mixture(results: Results) -> Figure | None:
    """Every point of a sweep or a map from one pass, against one forward each."""
    measured = list(mixtures(results))
    if not measured:
        return None
    figure, (axes,) = _axes(5.4)
    one = "tangentfast, one pass"
    for variant, colour in (
        ("torch.func.jvp, point by point", COLOURS[PUBLISHED]),
        ("tangentfast, point by point", COLOURS[OURS_ATTENTION]),
        (one, COLOURS[OURS]),
    ):
        heights = [
            c.times(variant, one)
            * (1 if variant == one else c.facts["points"] / c.facts["sampled"])
            if variant in c
            else 0.0
            for _, c in measured
        ]
        shift = 0.27 * (list(COLOURS.values()).index(colour) - 3.7) / 1.5
        places = [g + shift for g in range(len(measured))]
        columns = axes.bar(places, heights, 0.26, color=colour, label=variant)
        axes.bar_label(columns, [f"{h:.1f}" if h else "" for h in heights], fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(measured)), [title for title, _ in measured])
    axes.set_ylabel("time, × one pass")
    axes.legend()
    return figure


def kernels(results: Results) -> Figure | None:
    """Share of the ceiling of the largest size of each operation."""
    largest = {(c.facts["operation"], c.facts["dtype"]): c for c in results.named("kernel")}
    measured = [c for (_, dtype), c in largest.items() if dtype == "float32"]
    if not measured:
        return None
    figure, (axes,) = _axes(8.0, 3.4)
    names = ["tangentfast", "reference", "torch.func.jvp"]
    colours = [COLOURS[OURS], COLOURS[ORDINARY], COLOURS[PUBLISHED]]
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = [g + (i - 1) * 0.27 for g in range(len(measured))]
        axes.bar(places, [100 * c.share(name) for c in measured], 0.25, color=colour, label=name)
    labels = [f"{c.facts['operation']}\n{'×'.join(map(str, c.facts['size']))}" for c in measured]
    axes.set_xticks(range(len(measured)), labels, rotation=45, ha="right", fontsize=7)
    axes.axhline(100, color="#444444", linewidth=0.7, linestyle=":")
    axes.set_ylabel("% of the ceiling, float32")
    axes.legend()
    return figure


def merge(results: Results) -> Figure | None:
    """Time of every way to merge K vectors, as a multiple of merge_."""
    measured = results.named("merge")
    if not measured:
        return None
    figure, (axes,) = _axes(5.4)
    ks = [c.facts["K"] for c in measured]
    for name in measured[0].variants:
        if not name.startswith(CEILING):
            own = {"color": COLOURS[OURS], "linewidth": 2.5} if name == "tangentfast" else {}
            line = [c.times(name, "tangentfast") for c in measured]
            axes.plot(ks, line, marker="o", label="merge_" if own else name, **_options(own))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K")
    axes.set_ylabel("time, × merge_")
    axes.legend()
    return figure


def growth(results: Results) -> Figure | None:
    """Time along each axis, as a multiple of the first variant's at the first value."""
    measured = [(axis, cs) for axis, cs in results.axes() if len(cs) > 1]
    if not measured:
        return None
    figure, every = _axes(10.0, 2.8, len(measured))
    for axes, (axis, comparisons) in zip(every, measured, strict=True):
        variants = list(comparisons[0].variants)
        unit = comparisons[0].seconds(variants[0])
        values = [c.facts["value"] for c in comparisons]
        for variant in variants:
            colour = COLOURS.get(variant, COLOURS[OURS if variant == "tangentfast" else ORDINARY])
            line = [c.seconds(variant) / unit for c in comparisons]
            axes.plot(values, line, marker="o", markersize=3, color=colour, label=variant)
        axes.set_xlabel(axis)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6)
    every[0].set_ylabel("time, × the first point")
    figure.tight_layout()
    return figure


def _options(own: dict[str, Any]) -> dict[str, Any]:
    return {"linewidth": 1.2} | own


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "steps": steps,
    "memory": memory,
    "tangents": tangents,
    "mixtures": mixture,
    "kernels": kernels,
    "merge": merge,
    "growth": growth,
}
