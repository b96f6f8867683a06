"""What is wrong with a results.json is said by file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import results

from tangentfast.study.report import ResultsError
from tangentfast.study.report.schema import load


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    found = results(tasks=("a", "b"), seeds=(0,), regimes=("ntk",))
    change(found)
    with pytest.raises(ResultsError) as error:
        load(found)
    return str(error.value)


def test_a_missing_key_is_named() -> None:
    assert "results: regimes.ntk.label is missing" in broken(
        lambda r: r["regimes"]["ntk"].pop("label")
    )
    text = broken(lambda r: r["regimes"]["ntk"]["runs"][0]["addition"].pop("alpha"))
    assert "regimes.ntk.runs[0].addition.alpha is missing" in text
    assert "`tangentfast study evaluate` writes it anew" in text
    both = broken(lambda r: (r.pop("model"), r.pop("head")))
    assert "model is missing; head is missing" in both


def test_many_errors_are_counted() -> None:
    def empty(found: dict[str, Any]) -> None:
        found.clear()

    text = broken(empty)
    assert text.count(" is missing") == 5
    assert "; and 3 more; " in text


def test_a_wrong_value_is_shown() -> None:
    def text(found: dict[str, Any]) -> None:
        found["regimes"]["ntk"]["runs"][0]["single"]["a"] = "good"

    assert "regimes.ntk.runs[0].single.a: " in broken(text)
    assert "got 'good'" in broken(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=2), "schema is 2, this version of tangentfast reads 1"),
        (
            lambda r: r["regimes"]["ntk"]["runs"][0]["addition"]["val"]["a"].pop(),
            "regimes.ntk.runs[0].addition: val.a has 20 values, alphas has 21",
        ),
        (
            lambda r: r["regimes"]["ntk"]["runs"][0]["disentanglement"][0]["xi"].pop(),
            "regimes.ntk.runs[0].disentanglement[0]: xi has rows of",
        ),
        (
            lambda r: r["regimes"]["ntk"]["runs"][0]["cosine"].pop(),
            "regimes.ntk.runs[0].cosine is not 2 × 2, one row a task",
        ),
        (
            lambda r: r["regimes"]["ntk"]["runs"][0].update(seed=7),
            "regimes.ntk.runs[0].seed is 7, seeds are [0]",
        ),
        (
            lambda r: r["regimes"]["ntk"]["runs"][0]["single"].update(z=0.5),
            "regimes.ntk.runs[0] has the unknown tasks ['z']",
        ),
    ],
    ids=["schema", "curve", "map", "cosine", "seed", "task"],
)  # fmt: skip
def test_inconsistencies(change: Callable[[dict[str, Any]], object], message: str) -> None:
    assert message in broken(change)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(
        ResultsError, match=r"results\.json: No such file.*expected the folder of a run"
    ):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1,')
    with pytest.raises(ResultsError, match=r"results\.json: is not JSON: .*; run the study anew"):
        load(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ResultsError, match=r"results\.json: "):
        load(tmp_path)


def test_null_and_nan_are_nan(tmp_path: Path) -> None:
    found = results(tasks=("a", "b"), seeds=(0,), regimes=("ntk",))
    run = found["regimes"]["ntk"]["runs"][0]
    run["single"] = {"a": None, "b": math.nan}
    found["regimes"]["ntk"]["seconds_per_step"] = None
    (tmp_path / "results.json").write_text(json.dumps(found))
    read = load(tmp_path)
    assert all(math.isnan(value) for value in read.regimes["ntk"].trials[0].single.values())
    assert math.isnan(read.regimes["ntk"].seconds_per_step)


def test_the_control_is_no_task() -> None:
    found = load(results(tasks=("a", "b")))
    assert [task.name for task in found.tasks] == ["a", "b"]
    assert [task.name for task in found.all_tasks] == ["a", "b", "colours"]
