"""Several runs: the headline's measures by regime, one bar a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..measures import MEASURE
from ..schema import Results
from .style import INK, STYLE, Drawing, empty, look

__all__ = ["by_run"]

SHOWN = ("absolute", "normalized", "target", "xi")
HATCHES = ("", "////", "....", "xxxx", "----", "oooo")  # a run; the colour is the regime's


def by_run(runs: Mapping[str, Results]) -> Iterator[Drawing]:
    """Merged accuracy, negation and ξ of every regime in every run."""
    with mpl.rc_context(STYLE):
        yield Drawing(
            "compare",
            "Regimes by run",
            "Colour: regime; hatching: run; mean and standard deviation over seeds. Where a bar "
            "is missing the run has no such value.",
            _draw(runs),
        )


def _draw(runs: Mapping[str, Results]) -> Figure:
    # A regime looks as in the first run that has it.
    looks = {
        name: look(results, name)
        for results in reversed(list(runs.values()))
        for name in results.regimes
    }
    order = list(dict.fromkeys(name for results in runs.values() for name in results.regimes))
    figure = Figure(figsize=(10.0, 6.6), layout="constrained")
    panels = figure.subplots(2, 2).flat
    width = 0.84 / len(runs)
    for axes, key in zip(panels, SHOWN, strict=True):
        measure = MEASURE[key]
        factor = 1.0 if key == "xi" else 100.0
        drawn = False
        for n, results in enumerate(runs.values()):
            for place, name in enumerate(order):
                s = measure.spread(results.regimes[name]) if name in results.regimes else None
                if s is None or not s.n:
                    continue
                drawn = True
                x = place + (n - (len(runs) - 1) / 2) * width
                axes.bar(
                    x, factor * s.mean, width * 0.92, color=looks[name].colour, edgecolor=INK,
                    linewidth=0.4, hatch=HATCHES[n % len(HATCHES)],
                )  # fmt: skip
                if math.isfinite(s.std):
                    axes.errorbar(x, factor * s.mean, factor * s.std, ecolor=INK, elinewidth=0.8)
        axes.set_title(
            f"{measure.heading}: {'higher' if measure.better == 'high' else 'lower'} is better"
        )
        axes.set_xticks(
            np.arange(len(order)), [looks[name].label for name in order],
            rotation=20, ha="right", rotation_mode="anchor",
        )  # fmt: skip
        axes.set_xlim(-0.6, len(order) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
        if not drawn:
            empty(axes)
    handles = [
        Patch(facecolor="none", edgecolor=INK, hatch=HATCHES[n % len(HATCHES)], label=name)
        for n, name in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure
