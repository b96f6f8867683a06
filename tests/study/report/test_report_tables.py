"""Tables and claims against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from synthetic_results import results

from tangentfast.study.report import show
from tangentfast.study.report.claims import CLAIMS, compare, findings, verdict
from tangentfast.study.report.measures import Spread, percent, rate
from tangentfast.study.report.published import PUBLISHED, RELATIVE, SOURCES, model
from tangentfast.study.report.schema import Results, load
from tangentfast.study.report.table import Table
from tangentfast.study.report.tables import headline, side_by_side, tables

EIGHT = ("StanfordCars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN")


def two(absolute: dict[str, list[float]], **more: dict[str, list[float]]) -> dict[str, Any]:
    """Results of one regime each, whose addition has these values with every seed."""
    found = results(tasks=("a", "b"), seeds=(0, 1, 2), regimes=tuple(absolute))
    for name, values in absolute.items():
        runs = found["regimes"][name]["runs"]
        for run, value in zip(runs, values, strict=True):
            run["addition"]["absolute"] = value
        for key, of in more.items():
            for run, value in zip(runs, of[name], strict=True):
                run["addition"][key] = value
    return found


def column(table: Table, heading: str) -> list[str]:
    return [row[table.columns.index(heading)] for row in table.rows]


def test_spread_is_mean_and_sample_deviation() -> None:
    spread = Spread.over([0.70, 0.72, 0.77])
    assert spread.mean == pytest.approx(0.73)
    # deviations −0.03, −0.01, 0.04: squares sum to 0.0026, over 2 is 0.0013
    assert spread.std == pytest.approx(math.sqrt(0.0013))
    assert spread.text(percent) == "73.0 ± 3.6"
    assert Spread.over([0.5]).text(percent) == "50.0"
    assert Spread.over([0.5, math.nan, 0.6]).text(percent) == "55.0 ± 7.1 (2/3)"
    assert Spread.over([math.nan]).text(percent) == "–"
    assert Spread.over([]).text(percent) == "–"


def test_headline_has_the_numbers() -> None:
    found = two({"nonlinear": [0.60, 0.62, 0.64], "ntk": [0.70, 0.72, 0.77]})
    for name in ("nonlinear", "ntk"):
        for run, boxes in zip(
            found["regimes"][name]["runs"], ((0.1, 0.3), (0.2, 0.4), (0.3, 0.5)), strict=True
        ):
            run["single"] = {"a": 0.8, "b": 0.9}
            maps = [m for m in run["disentanglement"] if m["kind"] == "prediction"]
            for one, value in zip(maps, boxes, strict=True):
                one["box"] = value
    table = headline(load(found))
    assert [row[0] for row in table.rows] == ["non-linear", "NTK-linear"]
    assert column(table, "addition, absolute, %") == ["62.0 ± 2.0", "73.0 ± 3.6"]
    assert column(table, "single task, %") == ["85.0 ± 0.0", "85.0 ± 0.0"]
    # (0.1 + 0.3) / 2, (0.2 + 0.4) / 2, (0.3 + 0.5) / 2: representations are left out
    assert column(table, "ξ over the box") == ["0.300 ± 0.100", "0.300 ± 0.100"]
    assert column(table, "s per step") == ["0.16", "0.25"]
    assert column(table, "peak memory, MiB") == ["620", "700"]
    assert column(table, "trained parameters, M") == ["22.1", "22.1"]
    assert column(table, "learning rate") == ["1e-4", "1e-4"]
    best = {(table.rows[i][0], table.columns[j]) for i, j in table.best}
    assert ("NTK-linear", "addition, absolute, %") in best
    assert ("non-linear", "addition, absolute, %") not in best
    assert ("non-linear", "s per step") in best
    assert not any(heading in ("α", "learning rate") for _, heading in best)


def test_merged_by_task_is_at_the_chosen_alpha() -> None:
    found = results(tasks=("a", "b"), seeds=(0, 1), regimes=("ntk",))
    for run, more in zip(found["regimes"]["ntk"]["runs"], (0.0, 0.2), strict=True):
        run["addition"]["test"] = {"a": 0.2 + more, "b": 0.6 + more}
    found["base"] = {"a": 0.1, "b": 0.5, "colours": 0.6}
    table = next(t for t in tables(load(found)) if t.name == "merged")
    assert table.columns == ("task", "no fine-tuning", "NTK-linear")
    assert table.rows == (
        ("a", "10.0", "30.0 ± 14.1"),
        ("b", "50.0", "70.0 ± 14.1"),
        ("mean", "30.0", "50.0 ± 14.1"),
    )


def test_negation_that_the_control_forbids_is_told() -> None:
    found = results(tasks=("a", "b"), seeds=(0,), regimes=("nonlinear", "ntk"))
    table = next(t for t in tables(load(found)) if t.name == "negation-target")
    assert "no α > 0" not in table.note
    found["regimes"]["ntk"]["runs"][0]["negation"]["tasks"]["a"]["reached"] = False
    table = next(t for t in tables(load(found)) if t.name == "negation-target")
    assert "In 1 of 4 cases no α > 0 keeps the control, and nothing is negated." in table.note


def test_written_forms() -> None:
    table = Table(
        "t", "50 % of a_b", ("a|b", "α & ξ"), (("x_1 <b>", "1.0 ± 0.5"), ("y*", "–")),
        best=frozenset({(0, 1)}),
    )  # fmt: skip
    assert table.markdown() == (
        "| a\\|b | α &amp; ξ |\n| --- | ---: |\n| x_1 &lt;b> | **1.0 ± 0.5** |\n| y\\* | – |\n"
    )
    assert table.latex() == "\n".join(
        [
            r"\begin{table}", r"\centering", r"\caption{50 \% of a\_b.}", r"\label{tab:t}",
            r"\begin{tabular}{lr}", r"\toprule", r"a|b & $\alpha$ \& $\xi$ \\", r"\midrule",
            r"x\_1 \textless{}b\textgreater{} & \textbf{1.0 $\pm$ 0.5} \\", r"y* & -- \\",
            r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip


def test_all_tables_are_rectangular_and_named_once() -> None:
    found = tables(load(results()))
    assert len({table.name for table in found}) == len(found) == 10
    for table in found:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
        latex = table.latex()
        assert latex.count("{") == latex.count("}")
        assert latex.isascii()


def test_learning_rate_at_the_edge_is_told() -> None:
    found = results(tasks=("a", "b"), regimes=("nonlinear", "posthoc", "ntk"))
    found["regimes"]["ntk"] |= {"lr": 1e-3, "lr_grid": {"1e-04": 0.5, "1e-03": 0.6}}
    table = next(t for t in tables(load(found)) if t.name == "learning-rates")
    assert table.columns[1:4] == ("1e-5", "1e-4", "1e-3")
    assert column(table, "at the edge of the grid") == ["no", "–", "yes"]
    assert table.best == {(0, 2), (2, 3)}
    assert [rate(value) for value in (1e-5, 2.5e-4, 0.1)] == ["1e-5", "2.5e-4", "1e-1"]


def test_differences_are_taken_seed_by_seed() -> None:
    found = two({"nonlinear": [0.60, 0.62, 0.64], "ntk": [0.65, 0.66, 0.72]})
    for run in found["regimes"]["ntk"]["runs"][::-1]:  # the order of runs does not matter
        run["addition"]["normalized"] = 0.8
    difference = compare(load(found), "ntk", "nonlinear", "absolute")
    # 0.05, 0.04, 0.08: mean 0.0566.., deviation sqrt((0.0067² + 0.0167² + 0.0233²) / 2) = 0.0208
    assert difference.text() == "+5.7 ± 2.1 points"
    assert difference.verdict == "better"
    reverse = compare(load(found), "nonlinear", "ntk", "absolute")
    assert (reverse.text(), reverse.verdict) == ("−5.7 ± 2.1 points", "worse")
    xi = compare(load(found), "ntk", "nonlinear", "xi")
    assert xi.difference.mean < 0
    assert xi.verdict == "better"  # less of it is better
    spread = two({"nonlinear": [0.60, 0.62, 0.64], "ntk": [0.65, 0.60, 0.64]})
    assert compare(load(spread), "ntk", "nonlinear", "absolute").verdict == "undecided"


def test_only_common_seeds_count() -> None:
    found = two({"nonlinear": [0.60, 0.62, 0.64], "ntk": [0.65, 0.66, 0.72]})
    del found["regimes"]["ntk"]["runs"][0]
    # 0.66 − 0.62 and 0.72 − 0.64
    assert compare(load(found), "ntk", "nonlinear", "absolute").text() == "+6.0 ± 2.8 points"


def test_claims_in_words() -> None:
    found = load(results())
    tangent, attention = (findings(found, claim) for claim in CLAIMS)
    assert [f.left for f in tangent] == ["NTK-linear", "post-hoc linear", "attention-only, tangent"]
    assert "NTK-linear is better than non-linear in 4 of 4 measures" in verdict(tangent)
    sentence = attention[0].sentence()
    assert sentence.startswith("attention-only against non-linear: better in merged accuracy +")
    # 0.12 s over 0.16 s, 500 MiB over 620 MiB
    assert sentence.endswith("Training costs 0.75 × the time per step and 0.81 × the memory.")
    one = load(results(seeds=(0,)))
    assert (
        "with one seed, so undecided, merged accuracy +" in findings(one, CLAIMS[0])[0].sentence()
    )
    assert "do not decide" in verdict(findings(one, CLAIMS[0]))
    none = findings(load(results(regimes=("ntk",))), CLAIMS[0])
    assert verdict(none).startswith("This run has none of the pairs")


def papers(name: str = "ViT-B-32", library: str = "open_clip") -> Results:
    found = results(tasks=EIGHT)
    found["model"] |= {"name": name, "library": library}
    return load(found)


def test_published_numbers_stand_beside_the_papers_own_only() -> None:
    assert model(papers()) == "ViT-B/32"
    assert model(papers("ViT-L-14-quickgelu")) == "ViT-L/14"
    assert model(papers("ViT-B-32-256")) is None
    assert model(papers(library="timm")) is None
    assert model(load(results())) is None
    found = results(tasks=(*EIGHT[:7], "CIFAR10"))
    found["model"] |= {"name": "ViT-B-32", "library": "open_clip"}
    assert model(load(found)) is None
    assert "compare" not in {table.name for table in tables(load(results()))}
    assert "compare" in {table.name for table in tables(papers())}


def test_published_numbers() -> None:
    assert len(PUBLISHED) == 18 * 3 - 1  # B/16's normalised accuracy is not given once
    orthoreg, tak = SOURCES
    assert PUBLISHED[orthoreg, "ViT-B/32", "ntk", "normalized"] == pytest.approx(0.853)
    assert PUBLISHED[tak, "ViT-L/14", "attention", "at_one"] == pytest.approx(0.662)
    assert PUBLISHED[orthoreg, "ViT-B/16", "attention", "target"] == pytest.approx(0.192)
    # +77.5 % and +59.7 %, as OrthoReg's table 3 says
    assert RELATIVE[orthoreg, "ViT-L/14", "ntk", "seconds"] == pytest.approx(1.775, abs=1e-3)
    assert RELATIVE[orthoreg, "ViT-L/14", "ntk", "memory"] == pytest.approx(1.597, abs=1e-3)


def test_side_by_side() -> None:
    runs = {"clip": papers("ViT-L-14"), "small": load(results(regimes=("nonlinear", "ntk")))}
    table = side_by_side(runs)
    assert table.columns == (
        "measure", "regime", "clip", "small", "OrthoReg, ViT-L/14", "TAK, ViT-L/14",
    )  # fmt: skip
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows["addition, absolute, %", "NTK-linear"][2:] == ("86.2", "88.0")
    assert rows["addition, absolute, %", "attention-only"][1:] == ("not run", "87.8", "88.2")
    assert rows["α", "NTK-linear"][2:] == ("–", "–")
    # ours: 0.25 s over 0.16 s
    assert rows["time, × non-linear", "NTK-linear"] == ("1.56", "1.56", "1.78", "–")
    assert rows["time, × non-linear", "attention-only"] == ("0.75", "not run", "0.798", "–")


def test_the_terminal_shows_the_headline(capsys: pytest.CaptureFixture[str]) -> None:
    show(two({"nonlinear": [0.60, 0.62, 0.64], "ntk": [0.70, 0.72, 0.77]}))
    printed = capsys.readouterr().out
    for word in ("62.0 ± 2.0", "73.0 ± 3.6", "NTK-", "learning rate", "vit_small_patch14_dinov2"):
        assert word in printed
