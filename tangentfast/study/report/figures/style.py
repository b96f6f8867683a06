"""How every figure looks: one colour and one marker a regime, ink that a dark page may turn."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state and no display
from matplotlib.lines import Line2D

from ..schema import Results

__all__ = ["INK", "Drawing", "Look", "empty", "files", "key", "legend", "look", "short"]

INK = "#1b1f24"
# Okabe and Ito's colours, which the colour-blind tell apart; markers and lines do so in print.
_LOOKS = {
    "nonlinear": ("#d55e00", "o", "-"),
    "posthoc": ("#e69f00", "s", "--"),
    "ntk": ("#0072b2", "^", "-"),
    "attention": ("#009e73", "D", "-"),
    "attention-tangent": ("#cc79a7", "v", "-."),
}
_OTHERS = (("#56b4e9", "P", ":"), ("#8a8a8a", "X", "--"), ("#b8a100", "h", "-"))
STYLE: Any = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same figure on every machine
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a name with $ in it is a name
    "svg.hashsalt": "tangentfast",  # the same results give the same bytes
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
)


@dataclass(frozen=True)
class Look:
    """Of a regime, in all figures."""

    label: str
    colour: str
    marker: str
    line: Any  # as Line2D takes it


@dataclass(frozen=True)
class Drawing:
    """A figure: `name` of its files, `title`, and `caption`, which says what to see."""

    name: str
    title: str
    caption: str
    figure: Figure


def look(results: Results, regime: str) -> Look:
    """The look of `regime`; one that the papers do not have takes a colour that is left."""
    new = [name for name in results.regimes if name not in _LOOKS]
    appearance = _LOOKS.get(regime) or _OTHERS[new.index(regime) % len(_OTHERS)]
    label = results.regimes[regime].label
    return Look(label, *appearance)


def key(figure: Figure, looks: Iterable[Look], *more: Line2D) -> None:
    """One legend for all axes, under them."""
    handles = [
        Line2D(
            [], [], color=k.colour, marker=k.marker, linestyle=k.line, markersize=5, label=k.label
        )
        for k in looks
    ]
    handles += more
    legend(figure, handles)


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Under all axes, in as few rows as the width of the figure holds."""
    letters = max(len(str(handle.get_label())) for handle in handles)
    across = figure.get_size_inches()[0] / (0.55 + 0.075 * letters)
    rows = math.ceil(len(handles) / max(1, int(across)))
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def short(name: str, length: int = 18) -> str:
    """`name` in at most `length` letters: names that start alike often differ at the end."""
    end = length // 3
    return name if len(name) <= length else f"{name[: length - end - 1]}…{name[-end:]}"


def empty(axes: Axes, text: str = "no value") -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, alpha=0.6)


def files(drawing: Drawing) -> dict[str, bytes]:
    """The figure as PNG on white paper and as SVG without paper, by name of file."""
    written = {}
    formats: tuple[tuple[str, Any], ...] = (
        ("png", {"dpi": 150, "facecolor": "white", "metadata": {"Software": None}}),
        ("svg", {"facecolor": "none", "metadata": {"Date": None, "Creator": None}}),
    )
    with mpl.rc_context(STYLE):
        for suffix, options in formats:
            buffer = io.BytesIO()
            drawing.figure.savefig(buffer, format=suffix, **options)
            drawing.figure.set_layout_engine("none")  # it is laid out: the second keeps the places
            written[f"{drawing.name}.{suffix}"] = buffer.getvalue()
    return written
