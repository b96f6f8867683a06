"""Heat maps: weight disentanglement over (α1, α2), and cosines of task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..measures import Spread
from ..schema import Map, Results
from .style import Drawing, look, short

__all__ = ["cosines", "disentanglement"]

Grid = np.ndarray
PANEL = 2.05  # inches


def _mean(grids: Sequence[Grid]) -> Grid:
    """Mean over the seeds, of those that have a value."""
    stack = np.stack(grids)
    known = np.isfinite(stack)
    total = np.where(known, stack, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), math.nan)


def disentanglement(results: Results) -> Iterator[Drawing]:
    """A row of maps, one a regime and averaged over the seeds, for each pair of tasks."""
    groups: dict[tuple[str, str, tuple[str, ...]], dict[str, list[Map]]] = {}
    for name, regime in results.regimes.items():
        for trial in regime.trials:
            for pair_map in trial.disentanglement:
                group = (pair_map.kind, pair_map.head, tuple(pair_map.tasks))
                groups.setdefault(group, {}).setdefault(name, []).append(pair_map)
    for i, ((kind, head, tasks), maps) in enumerate(groups.items(), 1):
        under = f" (predictions, {head} head)" if kind == "prediction" else " (representation)"
        yield Drawing(
            f"disentanglement-{i}",
            f"Weight disentanglement error of {tasks[0]} and {tasks[1]}{under}",
            "ξ(α1, α2), mean over the seeds; light: the task vectors do not disturb each other. "
            "The square is the search box, [0, 1]²; above each map the mean of ξ in it.",
            _row(results, tasks, maps),
        )


def _row(results: Results, tasks: Sequence[str], maps: Mapping[str, Sequence[Map]]) -> Figure:
    figure = Figure(figsize=(PANEL * len(maps) + 1.3, PANEL + 0.75), layout="constrained")
    panels: list[Axes] = list(
        figure.subplots(1, len(maps), squeeze=False, sharex=True, sharey=True)[0]
    )
    grids = {
        name: _mean([np.array(m.xi, dtype=float) for m in of_seeds])
        for name, of_seeds in maps.items()
    }
    values = np.concatenate([grid.ravel() for grid in grids.values()])
    values = values[np.isfinite(values)]
    # A few points far out, as a divergence has them, would leave the rest of the maps blank.
    top = float(np.percentile(values, 98)) if values.size else 1.0
    mesh = None
    for axes, (name, of_seeds) in zip(panels, maps.items(), strict=True):
        alphas = of_seeds[0].alphas
        # xi[i][j] is at α1 = alphas[i], which goes to the right here.
        mesh = axes.pcolormesh(
            alphas, alphas, np.ma.masked_invalid(grids[name].T), shading="nearest", cmap="Blues",
            vmin=0.0, vmax=top or 1.0, rasterized=True,
        )  # fmt: skip
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.4))
        box = Spread.over([m.box for m in of_seeds]).text(lambda v: f"{v:.3f}")
        axes.set_title(f"{look(results, name).label}\n{box}")
        axes.set_box_aspect(1)
        axes.set_facecolor("#bbbbbb")  # where there is no value
        axes.set_xlabel(f"α1, {short(tasks[0])}")
        ticks = sorted({alphas[0], 0.0, 1.0, alphas[-1]} if alphas[-1] > alphas[0] else {alphas[0]})
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel(f"α2, {short(tasks[1])}")
    if mesh is not None:
        extend = "max" if values.size and values.max() > top else "neither"
        figure.colorbar(mesh, ax=panels, label="ξ", extend=extend, shrink=0.7, aspect=14)
    return figure


def cosines(results: Results) -> Iterator[Drawing]:
    """Cosine similarity of the task vectors, a matrix for each regime."""
    matrices = {
        name: _mean(
            [np.array(trial.cosine, dtype=float) for trial in regime.trials if trial.cosine]
        )
        for name, regime in results.regimes.items()
        if any(trial.cosine for trial in regime.trials)
    }
    tasks = [short(task.name, 14) for task in results.tasks]
    if not matrices or len(tasks) < 2:
        return
    size = max(2.2, 0.36 * len(tasks) + 0.4)
    columns = min(len(matrices), max(1, int(13 / size)))
    rows = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(size * columns + 2.0, (size + 0.5) * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    apart = ~np.eye(len(tasks), dtype=bool)
    values = np.concatenate([m[apart] for m in matrices.values()])
    values = values[np.isfinite(values)]
    top = float(np.abs(values).max()) if values.size else 0.0
    image = None
    for axes, (name, matrix) in zip(panels.flat, matrices.items(), strict=False):
        shown = np.ma.masked_invalid(np.where(apart, matrix, math.nan))
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-(top or 1.0), vmax=top or 1.0)
        for (i, j), value in np.ndenumerate(matrix):
            if apart[i, j] and math.isfinite(value) and len(tasks) <= 12:
                colour = "white" if abs(value) > 0.6 * top else "black"
                text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".").replace("-", "−")
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=6.5)
        axes.set_title(look(results, name).label)
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for i, axes in enumerate(panels.flat):
        if i >= len(matrices):
            axes.set_axis_off()
        elif i + columns >= len(matrices):  # none below that has the names
            axes.tick_params(labelbottom=True)
    if image is not None:
        figure.colorbar(image, ax=panels, label="cosine", shrink=0.85)
    yield Drawing(
        "cosines",
        "Cosine similarity of task vectors",
        "Mean over the seeds; the diagonal, 1, is left out.",
        figure,
    )
