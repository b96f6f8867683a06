"""The figures show the numbers, in the regime's colour, with no text cut off or on other text."""

from __future__ import annotations

import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from synthetic_results import TASKS, results

from tangentfast.study.report.figures import draw, files
from tangentfast.study.report.figures.bar_charts import cost
from tangentfast.study.report.figures.runs import by_run
from tangentfast.study.report.figures.style import look
from tangentfast.study.report.schema import load

NAMES = {
    "over-alpha", "by-task", "radar", "disentanglement-1", "disentanglement-2", "disentanglement-3",
    "heads", "negation", "over-tasks", "cosines", "cost",
}  # fmt: skip


def drawn(found: dict[str, Any]) -> dict[str, Figure]:
    return {drawing.name: drawing.figure for drawing in draw(load(found))}


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return drawn(results())


def test_every_figure_is_drawn(figures: dict[str, Figure]) -> None:
    assert set(figures) == NAMES


def overlaps(figure: Figure) -> list[str]:
    """Texts that leave the figure, and pairs that lie on one another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unseen = {  # ticks beyond the axes, which matplotlib keeps and does not draw
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if not min(low, high) - 1e-9 <= tick.get_loc() <= max(low, high) + 1e-9
        for label in (tick.label1, tick.label2)
    }
    texts = [
        t for t in figure.findobj(Text)
        if isinstance(t, Text) and id(t) not in unseen and t.get_visible() and t.get_text().strip()
        # A rotated text's box is larger than what it covers.
        and t.get_rotation() in (0, 90)
    ]  # fmt: skip
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    page = figure.bbox
    wrong = [
        f"{text!r} is cut off"
        for text, box in boxes
        if box.x0 < page.x0 - 1
        or box.y0 < page.y0 - 1
        or box.x1 > page.x1 + 1
        or box.y1 > page.y1 + 1
    ]
    for i, (text, box) in enumerate(boxes):
        for other, second in boxes[i + 1 :]:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            if wide > 1 and high > 1:
                wrong.append(f"{text!r} is on {other!r}")
    return wrong


@pytest.mark.parametrize("name", sorted(NAMES))
def test_texts_do_not_meet(figures: dict[str, Figure], name: str) -> None:
    assert overlaps(figures[name]) == []


def test_overlaps_are_found() -> None:
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "one")
    figure.text(0.12, 0.5, "two")
    figure.text(0.95, 0.1, "three")
    assert overlaps(figure) == ["'three' is cut off", "'one' is on 'two'"]


def test_long_names_and_other_shapes() -> None:
    names = tuple(f"a rather long name of task {i}" for i in range(10))
    for name, figure in drawn(results(names, (0,), ("nonlinear", "attention-tangent"))).items():
        assert overlaps(figure) == [], name
    for name, figure in drawn(results(tasks=("a", "b"), regimes=("ntk",))).items():
        assert overlaps(figure) == [], name


def test_a_map_has_alpha1_to_the_right_and_the_search_box() -> None:
    found = results(tasks=("a", "b"), seeds=(0, 1), regimes=("ntk",))
    for run, scale in zip(found["regimes"]["ntk"]["runs"], (1.0, 3.0), strict=True):
        run["disentanglement"] = [
            {"tasks": ["a", "b"], "kind": "prediction", "head": "probe", "alphas": [0, 1, 2],
             "xi": [[0.0, 0.1 * scale, 0.2], [0.0, 0.3, 0.4], [0.5, 0.6, 0.7]], "box": 0.1}
        ]  # fmt: skip
    figure = drawn(found)["disentanglement-1"]
    axes = figure.axes[0]
    (mesh,) = (child for child in axes.get_children() if isinstance(child, QuadMesh))
    # Row: α2, column: α1; 0.2 is the mean of 0.1 and 0.3.
    expected = [[0.0, 0.0, 0.5], [0.2, 0.3, 0.6], [0.2, 0.4, 0.7]]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), expected)
    assert axes.get_xlabel() == "α1, a"
    assert axes.get_ylabel() == "α2, b"
    box = next(p for p in axes.patches if isinstance(p, Rectangle))
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (0, 0, 1, 1)
    assert axes.get_title() == "NTK-linear\n0.100 ± 0.000"


def test_maps_share_their_colours(figures: dict[str, Figure]) -> None:
    meshes = [c for a in figures["disentanglement-1"].axes[:5] for c in a.collections]
    assert len(meshes) == 5
    assert len({mesh.get_clim() for mesh in meshes}) == 1


def test_curves_are_means_over_tasks_and_seeds() -> None:
    found = results(tasks=("a", "b"), seeds=(0, 1), regimes=("ntk",))
    for run, shift in zip(found["regimes"]["ntk"]["runs"], (0.0, 0.2), strict=True):
        run["addition"] |= {
            "alphas": [0.0, 1.0], "val": {"a": [0.2, 0.3 + shift], "b": [0.4, 0.5 + shift]},
            "val_single": {"a": 0.5, "b": 1.0},
            "alpha": 1.0, "absolute": 0.35 + shift, "normalized": 0.6 + shift,
        }  # fmt: skip
    left, right = drawn(found)["over-alpha"].axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.3, 0.5])  # (0.4 + 0.6) / 2
    # a: 0.4 and (0.6 + 1.0) / 2; b: 0.4 and (0.5 + 0.7) / 2
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.4, 0.7])
    # Test at the chosen α of both seeds.
    np.testing.assert_allclose(left.lines[1].get_xydata(), [(1.0, 0.35), (1.0, 0.55)])
    np.testing.assert_allclose(right.lines[1].get_xydata(), [(1.0, 0.6), (1.0, 0.8)])


def test_bars_have_the_height_of_the_table(figures: dict[str, Figure]) -> None:
    found = load(results())
    bars = [p for p in figures["by-task"].axes[0].patches if isinstance(p, Rectangle)]
    assert len(bars) == len(TASKS) * 5
    for bar, task in zip(bars, TASKS, strict=False):  # the first regime's
        values = [
            run.addition.test[task] for run in found.regimes["nonlinear"].trials if run.addition
        ]
        assert bar.get_height() == pytest.approx(sum(values) / 3)


def test_a_regime_has_one_colour_everywhere(figures: dict[str, Figure]) -> None:
    found = load(results())
    colours = {to_hex(look(found, name).colour) for name in found.regimes}
    assert len(colours) == 5
    for name in ("over-alpha", "radar", "over-tasks"):
        lines = {to_hex(line.get_color()) for a in figures[name].axes for line in a.lines}
        assert colours <= lines, name
    for name in ("by-task", "heads", "negation"):
        faces = {to_hex(p.get_facecolor()) for a in figures[name].axes for p in a.patches}
        assert faces == colours, name
    # One that another run lacks keeps it.
    fewer = load(results(regimes=("ntk", "attention")))
    assert look(fewer, "ntk") == look(found, "ntk")


def test_an_unknown_regime_gets_a_free_colour() -> None:
    found = results(tasks=("a", "b"), regimes=("ntk", "attention"))
    found["regimes"]["mine"] = found["regimes"].pop("attention") | {"label": "mine"}
    read = load(found)
    assert look(read, "mine").colour not in {
        look(load(results()), n).colour for n in results()["regimes"]
    }
    assert "over-alpha" in drawn(found)


def test_files_are_pictures_and_the_same_each_time() -> None:
    def written() -> dict[str, bytes]:
        (drawing,) = cost(load(results(tasks=("a", "b"), seeds=(0,))))
        return files(drawing)

    first = written()
    assert set(first) == {"cost.png", "cost.svg"}
    with Image.open(io.BytesIO(first["cost.png"])) as picture:
        assert picture.width > 1000
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert (255, 255, 255) in {colour for _, colour in colours}
        assert len(colours) > 20
    assert ElementTree.fromstring(first["cost.svg"]).tag.endswith("}svg")
    assert written() == first


def test_values_that_are_not_there() -> None:
    found = results(tasks=("a", "b", "c"), seeds=(0, 1), regimes=("ntk",))
    for regime in found["regimes"].values():
        for run in regime["runs"]:
            run["disentanglement"][0]["xi"][3] = [math.nan] * 11
            run["addition"]["val"]["a"] = [None] * 21
            run["addition"]["test"]["a"] = None
            run["addition"]["alpha"] = None
            run["single"]["a"] = math.nan
            run["cosine"] = [[math.nan] * 3] * 3
            run["negation"] |= {"target": math.nan, "control": math.nan}
    for name, figure in drawn(found).items():
        FigureCanvasAgg(figure).draw()
        assert overlaps(figure) == [], name


def test_one_task_has_neither_maps_nor_radar() -> None:
    found = drawn(results(tasks=("a",), seeds=(0,)))
    assert set(found) == {"over-alpha", "by-task", "negation", "cost"}


def test_runs_side_by_side() -> None:
    first, second = load(results()), load(results(regimes=("ntk", "nonlinear"), seeds=(0,)))
    (drawing,) = by_run({"first": first, "second": second})
    assert overlaps(drawing.figure) == []
    assert len(drawing.figure.axes[0].patches) == 5 + 2
