"""The benchmarks run, each once on tiny problems, and their JSON turns into the documents."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for extra in ("pytest_benchmark", "open_clip", "timm", "matplotlib"):
    pytest.importorskip(extra)

ROOT = Path(__file__).parents[1]
FIGURES = ("steps", "memory", "tangents", "mixtures", "kernels", "merge", "growth")
README = "before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole suite, tiny, in a process of its own; with those of the project beside them."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(ROOT / "benchmarks" / "results", folder, dirs_exist_ok=True)
    path = folder / "tiny" / "2026-01-01-abc.json"
    path.parent.mkdir()
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "--benchmark-only"]
    options = ["--benchmark-quiet", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command + options, cwd=ROOT, env=os.environ | {"BENCH_SMOKE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "failed" not in done.stdout
    return path


@pytest.fixture(scope="module")
def documents(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What document.py makes of it."""
    root = tmp_path_factory.mktemp("documents")
    (root / "README.md").write_text(README)
    command = [sys.executable, str(ROOT / "benchmarks" / "document.py")]
    command += ["--results", str(results.parents[1]), "--root", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readings")


@pytest.mark.slow
def test_every_benchmark_leaves_its_seconds(results: Path) -> None:
    data = json.loads(results.read_text())
    functions = {b["name"].partition("[")[0] for b in data["benchmarks"]}
    defined = {
        name
        for file in (ROOT / "benchmarks").glob("bench_*.py")
        for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)
    }
    assert functions == defined - {"compiled"}  # a minute of compilation
    for b in data["benchmarks"]:
        for measured in b["variants"].values():
            assert measured.get("bytes", 0) > 0 or min(measured["seconds"]) > 0


@pytest.mark.slow
def test_json_tells_the_machine_and_not_the_host(results: Path) -> None:
    data = json.loads(results.read_text())
    assert data["machine"]["versions"]["torch"]
    assert data["machine"]["threads"] > 0
    assert os.uname().nodename not in json.dumps(data["machine"])
    assert str(ROOT) not in results.read_text()


@pytest.mark.slow
def test_page_shows_everything_that_was_measured(results: Path, documents: Path) -> None:
    page = (documents / "docs" / "benchmarks.md").read_text()
    for figure in FIGURES:
        for folder in results.parents[1].iterdir():
            name = f"{folder.name}-{figure}.svg"
            assert f"(figures/{name})" in page
            assert (documents / "docs" / "figures" / name).read_text().startswith("<?xml")
    data = json.loads(results.read_text())
    operations = {b["facts"].get("operation") for b in data["benchmarks"]} - {None}
    assert operations
    for row in [
        *operations,
        "merge_",
        "`gram`",
        "α sweep",
        "tokens",
        "AdamW",
        "own operations",
        "training step",
    ]:
        assert row in page.replace("\n", " ")


@pytest.mark.slow
def test_readme_changes_between_its_markers_only(documents: Path) -> None:
    text = (documents / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n")
    assert text.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "| `linearize(model)` |" in text
    assert "old" not in text


def test_ratios_are_medians_of_pairs(readings: ModuleType) -> None:
    variants: dict[str, Any] = {
        "a": {"seconds": [1.0, 4.0, 9.0], "work": 8.0},
        "b": {"seconds": [1.0, 2.0, 3.0], "work": 8.0},
        "ceiling: copy": {"seconds": [1.0, 1.0, 1.0], "work": 8.0},
        "ceiling: read": {"seconds": [4.0, 0.5, 4.0], "work": 8.0},
    }
    found = readings.Comparison("x", "x", {}, variants)
    assert found.times("a", "b") == 2.0
    assert found.seconds("a") == 4.0
    assert found.rate("b") == 4.0
    assert found.share("b") == pytest.approx(1 / 3)  # of 8, 16 and 8: 1, 1/4 and 1/3


def test_slope_is_least_squares(readings: ModuleType) -> None:
    assert readings.slope([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx((3.0, 2.0))


def test_tolerance_notices_a_wrong_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    harness = importlib.import_module("harness")
    x = torch.randn(100)
    harness.assert_close([x, None], [x.clone()], "equal")
    with pytest.raises(AssertionError, match="relative error"):
        harness.assert_close(x * 1.001, x, "off by a thousandth")
