"""The figures of a report: one generator a figure, which yields none where there are no numbers."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

from ..schema import Results
from .bar_charts import by_task, cost, heads, negation, radar
from .curves import over_alpha, over_tasks
from .maps import cosines, disentanglement
from .style import INK, STYLE, Drawing, files

__all__ = ["FIGURES", "INK", "Drawing", "draw", "files"]

FIGURES = (
    over_alpha, by_task, radar, disentanglement, heads, negation, over_tasks, cosines, cost,
)  # fmt: skip


def draw(results: Results) -> Iterator[Drawing]:
    """Every figure that `results` has the numbers for, in the order of the report."""
    for figure in FIGURES:
        with mpl.rc_context(STYLE):
            drawings = list(figure(results))
        yield from drawings
