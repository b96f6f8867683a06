"""Curves: accuracy over α, and over the number of merged tasks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..measures import mean
from ..schema import Addition, Results
from .style import Drawing, Look, empty, key, look

__all__ = ["over_alpha", "over_tasks"]


def _axes(xlabel: str, part: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = list(figure.subplots(1, 2))
    titles = ("absolute", "normalised by single-task accuracy")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=xlabel)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
    panels[0].set_ylabel(f"{part} accuracy, mean over tasks")
    return figure, panels


def _band(axes: Axes, x: list[float], curves: np.ndarray, k: Look, marked: bool = False) -> None:
    """Mean and standard deviation of curves [seeds, len(x)]."""
    centre = curves.mean(0)
    marker = k.marker if marked else None
    axes.plot(x, centre, color=k.colour, linestyle=k.line, marker=marker, markersize=5)
    if len(curves) > 1:
        std = curves.std(0, ddof=1)
        axes.fill_between(x, centre - std, centre + std, color=k.colour, alpha=0.18, linewidth=0)


def _alpha_curves(added: Addition) -> tuple[list[float], list[float]]:
    """Mean accuracy over tasks at every α: absolute, and divided by the single-task accuracy."""
    absolute = [mean(values) for values in zip(*added.val.values(), strict=True)]
    ratios = [
        [value / single for value in added.val[task]]
        for task, single in added.val_single.items()
        if task in added.val and single > 0
    ]
    return absolute, [mean(values) for values in zip(*ratios, strict=True)]


def over_alpha(results: Results) -> Iterator[Drawing]:
    """Absolute and normalised accuracy of θ0 + α Σ τ."""
    figure, panels = _axes("α", "validation")
    looks = []
    for name, regime in results.regimes.items():
        seeds = [trial.addition for trial in regime.trials if trial.addition and trial.addition.val]
        if not seeds:
            continue
        k = look(results, name)
        looks.append(k)
        # Seeds of one regime share the grid; one with another grid cannot be averaged with them.
        alphas = seeds[0].alphas
        seeds = [added for added in seeds if added.alphas == alphas]
        both = [_alpha_curves(added) for added in seeds]
        tested = [[added.absolute for added in seeds], [added.normalized for added in seeds]]
        for which, axes in enumerate(panels):
            curves = [curve[which] for curve in both]
            if all(len(curve) == len(alphas) for curve in curves):
                _band(axes, alphas, np.array(curves, dtype=float), k)
            axes.plot(
                [added.alpha for added in seeds], tested[which], k.marker, color=k.colour,
                markeredgecolor="white", markersize=7,
            )  # fmt: skip
    if not looks:
        return
    base = [results.base[t.name] for t in results.tasks if t.name in results.base]
    if base:
        panels[0].axhline(mean(base), color="#8a8a8a", linewidth=0.9, linestyle=":")
    panels[1].axhline(1.0, color="#8a8a8a", linewidth=0.9, linestyle=":")
    key(figure, looks)
    yield Drawing(
        "over-alpha",
        "Task addition: accuracy over α",
        "θ0 + α Σ τ. Lines: mean over the seeds on validation, bands: their standard deviation, "
        "markers: test at the α that validation chose with each seed. Dotted: test without "
        "fine-tuning (left), single task (right).",
        figure,
    )


def over_tasks(results: Results) -> Iterator[Drawing]:
    """Accuracy of merges of some tasks, by their number."""
    figure, panels = _axes("merged tasks", "test")
    looks = []
    sizes: set[int] = set()
    count = len(results.regimes)
    for n, (name, regime) in enumerate(results.regimes.items()):
        trials = [trial for trial in regime.trials if trial.subsets]
        if not trials:
            continue
        k = look(results, name)
        looks.append(k)
        present = sorted({len(s.tasks) for trial in trials for s in trial.subsets})
        sizes |= set(present)
        for which, axes in zip(("absolute", "normalized"), panels, strict=True):
            points = [(len(s.tasks), getattr(s, which)) for trial in trials for s in trial.subsets]
            shift = 0.5 * ((n + 0.5) / count - 0.5)  # regimes side by side, not on one another
            x, y = np.array(points, dtype=float).T
            axes.plot(
                x + shift, y, ".", color=k.colour, alpha=0.35, markersize=4, markeredgewidth=0
            )
            means = [
                [
                    mean(getattr(s, which) for s in trial.subsets if len(s.tasks) == size)
                    for size in present
                ]
                for trial in trials
            ]
            _band(axes, [size + shift for size in present], np.array(means, dtype=float), k, True)
    if not looks:
        return
    for axes in panels:
        axes.set_xticks(sorted(sizes))
        if not axes.lines:
            empty(axes)
    key(figure, looks)
    yield Drawing(
        "over-tasks",
        "Accuracy by number of merged tasks",
        "Points: subsets of the tasks, lines: their mean, bands: its deviation where several seeds "
        "were looked at.",
        figure,
    )
