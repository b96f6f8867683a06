"""Bar charts and radars: accuracy by task, negation, cost, and the head study."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import PercentFormatter

from ..measures import MEASURE, Spread, merged
from ..schema import Results
from .style import INK, Drawing, empty, key, legend, look, short

__all__ = ["by_task", "cost", "heads", "negation", "radar"]


def _task_spreads(results: Results) -> dict[str, tuple[list[Spread], list[Spread]]]:
    """Merged and single-task accuracy of every task, of the regimes that have a merge."""
    return {
        name: (
            [
                Spread.over([merged(trial, t.name) for trial in regime.trials])
                for t in results.tasks
            ],
            [
                Spread.over([trial.single.get(t.name, math.nan) for trial in regime.trials])
                for t in results.tasks
            ],
        )
        for name, regime in results.regimes.items()
        if any(trial.addition for trial in regime.trials)
    }


def _errors(spreads: Sequence[Spread]) -> np.ndarray:
    return np.nan_to_num([s.std for s in spreads])


def by_task(results: Results) -> Iterator[Drawing]:
    """Merged accuracy by task, with single-task accuracy and the base over the bars."""
    by_regime = _task_spreads(results)
    if not by_regime:
        return
    tasks = [task.name for task in results.tasks]
    width = 0.84 / len(by_regime)
    figure = Figure(figsize=(min(16.0, max(6.5, 1.3 * len(tasks))), 3.9), layout="constrained")
    axes = figure.subplots()
    for n, (name, (together, alone)) in enumerate(by_regime.items()):
        k = look(results, name)
        x = np.arange(len(tasks)) + (n - (len(by_regime) - 1) / 2) * width
        heights = [s.mean for s in together]
        axes.bar(x, heights, width * 0.92, color=k.colour)
        axes.errorbar(x, heights, _errors(together), fmt="none", ecolor=INK, elinewidth=0.8)
        axes.plot(x, [s.mean for s in alone], "_", color=INK, markersize=9, markeredgewidth=1.6)
    for i, task in enumerate(tasks):
        value = results.base.get(task, math.nan)
        axes.plot([i - 0.46, i + 0.46], [value, value], ":", color=INK, linewidth=1.1)
    names = [short(task) for task in tasks]
    crowded = max(map(len, names)) * len(names) > 90
    turn: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(tasks)), names, **turn)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(ylabel="test accuracy", ylim=(0, 1.04), xlim=(-0.6, len(tasks) - 0.4))
    axes.grid(axis="y")
    _colour_key(figure, results, list(by_regime), alone=True)
    yield Drawing(
        "by-task",
        "Accuracy of the merged model by task",
        "Bars: one model for all tasks at the chosen α, mean and standard deviation over seeds; "
        "dashes: each task's own fine-tuned model; dotted: no fine-tuning.",
        figure,
    )


def _colour_key(figure: Figure, results: Results, regimes: Sequence[str], alone: bool) -> None:
    handles = [
        Line2D([], [], marker="s", linestyle="", color=k.colour, markersize=8, label=k.label)
        for k in (look(results, name) for name in regimes)
    ]
    if alone:
        handles += [
            Line2D([], [], marker="_", linestyle="", color=INK, markersize=9, label="single task"),
            Line2D([], [], linestyle=":", color=INK, linewidth=1.1, label="no fine-tuning"),
        ]
    legend(figure, handles)


def radar(results: Results) -> Iterator[Drawing]:
    """Merged and single-task accuracy with a spoke for every task."""
    by_regime = _task_spreads(results)
    tasks = [task.name for task in results.tasks]
    if not by_regime or len(tasks) < 3:  # two spokes span no area
        return
    figure = Figure(figsize=(10.0, 4.9), layout=ConstrainedLayoutEngine(w_pad=0.25))
    panels = figure.subplots(1, 2, subplot_kw={"projection": "polar"})
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    closed = np.append(angles, angles[0])
    base = [results.base.get(task, math.nan) for task in tasks]
    for which, (axes, title) in enumerate(zip(panels, ("merged", "single task"), strict=True)):
        assert isinstance(axes, PolarAxes)
        for name, spreads in by_regime.items():
            k = look(results, name)
            means = [s.mean for s in spreads[which]]
            axes.plot(
                closed, [*means, means[0]], color=k.colour, linestyle=k.line, marker=k.marker,
                markersize=4, linewidth=1.4,
            )  # fmt: skip
        axes.plot(closed, [*base, base[0]], ":", color=INK, linewidth=1.1)
        axes.set_theta_offset(np.pi / 2)
        axes.set_theta_direction(-1)
        axes.set_ylim(0, 1)
        axes.set_yticks(
            [0.25, 0.5, 0.75, 1.0], ["25 %", "50 %", "75 %", "100 %"], fontsize=7, alpha=0.7
        )
        axes.set_rlabel_position(180 / len(tasks))  # between two spokes
        axes.set_xticks(angles, [short(task, 14) for task in tasks])
        axes.tick_params(axis="x", pad=3)
        for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
            side = np.sin(angle)
            label.set_horizontalalignment(
                "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            )
        axes.spines["polar"].set_alpha(0.3)
        axes.set_title(title, pad=14)
    baseline = Line2D([], [], linestyle=":", color=INK, linewidth=1.1, label="no fine-tuning")
    key(figure, [look(results, name) for name in by_regime], baseline)
    yield Drawing(
        "radar",
        "Accuracy by task, all regimes on one another",
        "Mean over the seeds; left one model for all tasks, right a model for each.",
        figure,
    )


def _bar_chart(
    axes: Axes, results: Results, spreads: Mapping[str, Spread], write: str, scale: float = 1.0
) -> None:
    """A horizontal bar for each regime, its value to the right of the axes."""
    known = {name: s for name, s in spreads.items() if s.n}
    ends = [scale * (s.mean + (s.std if math.isfinite(s.std) else 0.0)) for s in known.values()]
    for row, (name, s) in enumerate(spreads.items()):
        text = s.text(lambda v: format(scale * v, write))
        axes.text(1.02, row, text, va="center", fontsize=8, transform=axes.get_yaxis_transform())
        if s.n:
            value, std = scale * s.mean, scale * s.std
            axes.barh(row, value, 0.72, color=look(results, name).colour)
            if math.isfinite(std):
                axes.errorbar(value, row, xerr=std, fmt="none", ecolor=INK, elinewidth=0.8)
    axes.set_yticks(range(len(spreads)), [look(results, name).label for name in spreads])
    axes.set_ylim(len(spreads) - 0.4, -0.6)
    axes.set_xlim(0, (max(ends, default=1.0) or 1.0) * 1.05)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    if not known:
        empty(axes)


def _row(count: int, rows: int) -> tuple[Figure, list[Axes]]:
    size = (3.3 * count + 1.2, 0.34 * rows + 1.15)
    figure = Figure(figsize=size, layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    return figure, panels


def negation(results: Results) -> Iterator[Drawing]:
    """Accuracy on the negated task and on the control."""
    negations = [
        trial.negation for r in results.regimes.values() for trial in r.trials if trial.negation
    ]
    if not negations:
        return
    figure, panels = _row(2, len(results.regimes))
    base = [results.base[t.name] for t in results.tasks if t.name in results.base]
    bases = (sum(base) / len(base) if base else math.nan, negations[0].control_base)
    titles = ("target: lower is better", f"control, {results.control or 'no name'}")
    for axes, measure, value, title in zip(
        panels, ("target", "control"), bases, titles, strict=True
    ):
        spreads = {name: MEASURE[measure].spread(r) for name, r in results.regimes.items()}
        _bar_chart(axes, results, spreads, ".1f", 100.0)
        axes.set(title=title, xlabel="test accuracy, %")
        axes.set_xlim(0, max(axes.get_xlim()[1], 108 * value if math.isfinite(value) else 0.0))
        axes.axvline(100 * value, color=INK, linestyle=":", linewidth=1.1)
    threshold = negations[0].threshold
    panels[1].axvline(100 * threshold * bases[1], color=INK, linestyle="--", linewidth=1.1)
    yield Drawing(
        "negation",
        "Task negation",
        "θ0 − α τ, mean over tasks. Dotted: no fine-tuning; dashed: "
        f"{100 * threshold:.0f} % of the control's, which validation had to keep.",
        figure,
    )


def cost(results: Results) -> Iterator[Drawing]:
    """Time per step, peak memory and trained parameters."""
    trained = {
        name: r
        for name, r in results.regimes.items()
        if math.isfinite(r.seconds_per_step) or r.peak_bytes or r.trained_parameters
    }
    if not trained:
        return
    figure, panels = _row(3, len(trained))
    for axes, measure in zip(panels, ("seconds", "memory", "parameters"), strict=True):
        spreads = {name: MEASURE[measure].spread(r) for name, r in trained.items()}
        _bar_chart(axes, results, spreads, ".3g")
        axes.set_xlabel(MEASURE[measure].heading)
    device = results.machine.get("device", "")
    yield Drawing(
        "cost",
        "Cost of training by regime",
        f"Median time of a step and peak memory{f' on {device}' if device else ''}.",
        figure,
    )


def heads(results: Results) -> Iterator[Drawing]:
    """ξ over the search box: of the representation, and of encoder and head together."""
    if not results.head_study:
        return
    values: dict[str, dict[str, list[float]]] = {}
    for head_map in results.head_study:
        values.setdefault(head_map.head, {}).setdefault(head_map.regime, []).append(head_map.box)
    without = [head for head in values if head.startswith("none")]
    groups = [group for group in ([h for h in values if h not in without], without) if group]
    regimes = [name for name in results.regimes if any(name in of for of in values.values())]
    ratios = [max(1.0, len(group)) for group in groups]
    figure = Figure(figsize=(1.6 * sum(ratios) + 2.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=ratios)[0]
    width = 0.8 / max(1, len(regimes))
    for axes, group in zip(panels, groups, strict=True):
        for n, name in enumerate(regimes):
            spreads = [Spread.over(values[head].get(name, [])) for head in group]
            x = np.arange(len(group)) + (n - (len(regimes) - 1) / 2) * width
            axes.bar(x, [s.mean for s in spreads], width * 0.92, color=look(results, name).colour)
        without_head = group is without
        shown = ["representation" if without_head else head for head in group]
        axes.set_xticks(range(len(group)), shown)
        axes.set_ylabel("divergence over the box" if without_head else "ξ over the box")
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
    _colour_key(figure, results, regimes, alone=False)
    yield Drawing(
        "heads",
        "The encoder's share of the interference, and the head's",
        "Mean over pairs of tasks. Left: disagreement of predictions under each head; right: "
        "divergence of the features before any head, on a scale of its own.",
        figure,
    )
