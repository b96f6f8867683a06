"""The benchmarks run, each once on tiny problems, and their JSON turns into the documents."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


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
    rows = ["merge_", "`gram`", "α sweep", "tokens", "AdamW", "ViT-Ti/16, training step"]
    for row in [*operations, *rows]:
        assert row in page.replace("\n", " ")


@pytest.mark.slow
def test_readme_changes_between_its_markers_only(documents: Path) -> None:
    text = (documents / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n")
    assert text.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "| `linearize(model)` |" in text
    assert "old" not in text


Load = Callable[[str], ModuleType]


def test_page_is_generated(load: Load) -> None:
    """docs/benchmarks.md and README's part are what the newest results of every machine give."""
    every = load("readings").newest(ROOT / "benchmarks" / "results")
    every = [r for r in every if not r.machine["gpu"]]
    drawn = {r.folder: [p.name for p in (ROOT / "docs" / "figures").iterdir()] for r in every}
    pages = load("pages")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == pages.page(every, drawn)
    assert pages.short(every) in (ROOT / "README.md").read_text()
    for results in every:
        assert not results.smoke
        for shown in (results.commit, results.date, results.machine["versions"]["torch"]):
            assert shown in pages.machines(every)


AVX2, AVX512 = ["avx2"], ["avx2", "avx512f"]


@pytest.mark.parametrize(
    ("machine", "kind", "step", "narrow"),
    [
        ({"cpu": "AMD EPYC", "isa": "avx2"}, ["avx2"], 1.45, 1.10),
        ({"cpu": "AMD EPYC", "isa": "avx512 avx512_bf16"}, ["avx512"], 0.90, 1.36),
        ({"cpu": "AMD EPYC", "isa": "avx512_bf16", "vendor": "AuthenticAMD",
          "instructions": [*AVX512, "avx512_bf16"]}, ["avx512"], 0.90, 1.36),
        ({"cpu": "AMD EPYC", "isa": "avx2", "vendor": "AuthenticAMD", "instructions": AVX512},
         ["avx512", "as", "avx2"], 1.45, 1.10),
        ({"cpu": "Xeon", "isa": "avx512", "vendor": "GenuineIntel",
          "instructions": [*AVX512, "amx_bf16"]}, ["avx512"], 1.45, 1.36),
        ({"cpu": "Neoverse", "isa": "default", "vendor": "", "instructions": []},
         ["default"], 1.45, 1.10),
    ],
)  # fmt: skip
def test_bars_of_a_kind_of_cpu(
    machine: dict[str, Any], kind: list[str], step: float, narrow: float, load: Load
) -> None:
    """The first results had neither `vendor` nor `instructions`, but a longer `isa`."""
    readings = load("readings")
    whole = machine | {"gpu": "", "cores": 2}
    assert readings.kind(whole) == kind
    results = readings.Results("f", "d", "t", "c", whole, 1.0, False, [])
    limits = {bar.what: bar.limit for bar in load("bars").bars(results)}
    assert limits["ViT-B/32 float32, all: step, × ordinary"] == step
    assert limits["ViT-B/32 bfloat16, all: step, × ordinary"] == narrow
    assert limits["8 tangents in one pass, × 8 calls of our own"] == 0.60
    assert load("machine").slug(whole).endswith("-".join([*kind, "2cores"]))


def test_newest_of_a_day(load: Load, tmp_path: Path) -> None:
    for commit, at in (("a", "09:00"), ("b", "10:30"), ("c", "")):
        data = {"date": "2026-01-01", "commit": commit, "machine": {}, "seconds": 1, "smoke": False}
        path = tmp_path / "m" / f"2026-01-01-{commit}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data | {"benchmarks": []} | ({"time": at} if at else {})))
    assert [r.commit for r in load("readings").newest(tmp_path)] == ["b"]


class Benchmark:
    """What `compare` needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], Any], **options: int) -> Any:
        return function()


@pytest.mark.parametrize("cold", [0.05, 0.3])  # repeated to see how long it takes; not
def test_first_call_is_no_sample(cold: float, load: Load) -> None:
    calls = []

    def variant() -> None:
        time.sleep(0 if calls else cold)
        calls.append(1)

    benchmark = Benchmark()
    load("harness").compare(benchmark, {"a": variant}, lambda results: None, against="a", seconds=0)
    (seconds,) = benchmark.extra_info["variants"]["a"]["seconds"]
    assert seconds < cold / 2
    assert len(calls) > 1


def test_choice_within_a_sample_is_noticed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import tangentfast as tf

    calls: list[str] = []
    monkeypatch.setattr(tf, "info", lambda: SimpleNamespace(measured=tuple(calls)))
    with pytest.raises(AssertionError, match="chosen within a sample"):
        load("harness").compare(
            Benchmark(), {"a": lambda: calls.append("x")}, lambda results: None, against="a"
        )


def test_own_operations_are_those_of_the_step(load: Load) -> None:
    import torch

    x = torch.randn(3, 3, requires_grad=True)
    calls: list[int] = []

    def step() -> list[torch.Tensor]:
        y = (x @ x).tanh()
        if len(calls) == 1:  # in the step that is counted alone
            y = y + 1
        calls.append(1)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x])]

    bench = load("bench_python")
    with pytest.raises(AssertionError, match=r"aten\.add"):
        bench.own_operations(step)
    replay, count = bench.own_operations(step)
    assert count > 5
    for result, exact in zip(replay(), step(), strict=True):
        assert torch.equal(result, exact)
        assert not result.requires_grad
    with torch.no_grad():
        x.add_(1.0)  # a replay computes, it does not recall
    assert torch.equal(replay()[0], step()[0])


def test_ratios_are_medians_of_pairs(load: Load) -> None:
    variants: dict[str, Any] = {
        "a": {"seconds": [1.0, 4.0, 9.0], "work": 8.0},
        "b": {"seconds": [1.0, 2.0, 3.0], "work": 8.0},
        "ceiling: copy": {"seconds": [1.0, 1.0, 1.0], "work": 8.0},
        "ceiling: read": {"seconds": [4.0, 0.5, 4.0], "work": 8.0},
    }
    c = load("readings").Comparison("x", "x", {}, variants)
    assert c.times("a", "b") == 2.0
    assert c.seconds("a") == 4.0
    assert c.rate("b") == 4.0
    assert c.share("b") == pytest.approx(1 / 3)  # of 8, 16 and 8: 1, 1/4 and 1/3


def test_slope_is_least_squares(load: Load) -> None:
    assert load("readings").slope([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx(
        (3.0, 2.0)
    )


def test_tolerance_notices_a_wrong_tangent(load: Load) -> None:
    import torch

    harness = load("harness")
    x = torch.randn(100)
    harness.assert_close([x, None], [x.clone()], "equal")
    with pytest.raises(AssertionError, match="relative error"):
        harness.assert_close(x * 1.001, x, "off by a thousandth")
