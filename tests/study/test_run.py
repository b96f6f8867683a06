"""The command line and a whole study: tiny network, small generated tasks, real files."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("tomlkit")
pytest.importorskip("timm")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from study import toys

import tangentfast as tf
from tangentfast import cli
from tangentfast.study import run as module
from tangentfast.study import trainee
from tangentfast.study.config import PRESETS, load
from tangentfast.study.data import check_name
from tangentfast.study.encoders import Encoder
from tangentfast.study.evaluation import Mixtures, accuracies
from tangentfast.study.parts import Parts

CONFIG = """
name = "tiny"
[model]
library = "module"
name = "tiny_adapter:encoder"
[head]
kind = "prototype"
[data]
tasks = ["digits", "shapes"]
control = "colours"
sizes = [40, 40, 60]
[train]
seeds = [0, 1]
steps = 4
batch = 8
lr = [1e-4, 1e-3]
warmup = 1
[evaluate]
alphas = 3
xi = { count = 3, low = -1.0, high = 1.0 }
xi_images = 10
subsets = 3
head_study = ["prototype", "trained"]
"""
FINETUNINGS = 4 * 2 * (2 + 1) + 4 * 2  # regimes x tasks x (rates + second seed), head study


@pytest.fixture(autouse=True)
def adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's adapter module, and no collection of garbage before each measure of memory."""

    def encoder(pretrained: str | None, image_size: int | None) -> Encoder:
        return Encoder("tiny", toys.encoder(seed=3).module, image_size or 16)

    found = types.ModuleType("tiny_adapter")
    found.encoder = encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_adapter", found)
    monkeypatch.setattr("tangentfast.study.memory.gc.collect", lambda: 0)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(CONFIG, encoding="utf-8")
    return file


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tangentfast", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A step for each that is taken."""
    taken: list[int] = []
    step = trainee.Trainee.step

    def counted(self: trainee.Trainee, *more: Any) -> tuple[float, float]:
        taken.append(self.steps)
        return step(self, *more)

    monkeypatch.setattr(trainee.Trainee, "step", counted)
    return taken


def test_a_whole_study_and_a_rerun(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    out = tmp_path / "run"
    arguments = ("study", "run", "--config", config, "--out", out)
    assert command(monkeypatch, *arguments) == 0
    assert len(steps) == 4 * FINETUNINGS
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == shlex.join(["tangentfast", *map(str, arguments)])
    assert list(results["regimes"]) == [
        "nonlinear", "posthoc", "ntk", "attention", "attention-tangent",
    ]  # fmt: skip
    for name, regime in results["regimes"].items():
        assert regime["lr"] in (1e-4, 1e-3)
        assert regime["lr_grid"].keys() == {"0.0001", "0.001"}
        assert regime["lr_grid"][f"{regime['lr']:g}"] == max(regime["lr_grid"].values())
        assert regime["lr_at_edge"]
        assert [run["seed"] for run in regime["runs"]] == [0, 1]
        for run in regime["runs"]:
            assert run["addition"]["alphas"] == [0.0, 0.5, 1.0]
            assert run["negation"]["tasks"].keys() == {"digits", "shapes"}
            (prediction, representation) = run["disentanglement"]
            assert prediction["head"] == "prototype"
            assert representation["kind"] == "representation"
            assert len(run.get("subsets", [])) == (run["seed"] == 0)
            # α = 0 is θ0, whatever the regime.
            reference = results["regimes"]["nonlinear"]["runs"][0]["addition"]["val"]
            for task in ("digits", "shapes"):
                assert run["addition"]["val"][task][0] == reference[task][0]
        if name != "posthoc":
            vector = tf.TaskVector.load(out / "vectors" / name / "digits" / "seed1.safetensors")
            assert regime["trained_parameters"] == sum(t.numel() for t in vector.values())
            log = out / "logs" / f"{name}-digits-seed0-lr0.0001.jsonl"
            assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [
                1,
                2,
                3,
                4,
            ]
    parts = Parts(load(config))
    for name in ("digits", "shapes"):
        vector = tf.TaskVector.load(out / "vectors" / "ntk" / name / "seed0.safetensors")
        theta0 = Mixtures(parts.encoder, [vector], tangent=False)
        wanted = [(parts.task(name).test, parts.head(name), torch.zeros(1, 1))]
        assert results["base"][name] == accuracies(theta0, wanted)[0].item()
    posthoc, nonlinear = results["regimes"]["posthoc"], results["regimes"]["nonlinear"]
    assert posthoc["lr_grid"] == nonlinear["lr_grid"]
    assert posthoc["runs"][0]["cosine"] == nonlinear["runs"][0]["cosine"]
    cost = {"trained_parameters", "seconds_per_step", "samples_per_second", "peak_bytes"}
    assert nonlinear.keys() - posthoc.keys() == cost  # nothing was trained for it
    assert {(e["regime"], e["head"]) for e in results["head_study"]} == {
        (regime, head)
        for regime in results["regimes"]
        for head in ("prototype", "trained", "none (representation)")
    }
    assert not (out / "vectors" / "posthoc").exists()
    # The vectors of rates that lost are gone.
    assert len(list((out / "cache" / "finetuned").iterdir())) == 4 * 2 * 2 + 4 * 2
    assert (out / "report.html").exists()
    assert load(out / "config.toml") == load(config, {"out": str(out)})

    # A rerun does nothing anew, and another α grid no training.
    def never(*more: Any) -> None:
        raise AssertionError("something was computed again")

    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr("tangentfast.study.experiments.Mixtures", never)
        assert command(monkeypatch, "study", "evaluate", "--config", out / "config.toml") == 0
    again = json.loads((out / "results.json").read_text())
    for key in ("base", "regimes", "head_study"):
        assert again[key] == results[key]
    more = ("--set", "evaluate.alphas=5", "--regimes", "ntk")
    assert command(monkeypatch, "study", "evaluate", "--config", out / "config.toml", *more) == 0
    assert steps == []
    finer = json.loads((out / "results.json").read_text())["regimes"]["ntk"]["runs"][0]["addition"]
    coarse = results["regimes"]["ntk"]["runs"][0]["addition"]
    assert finer["val"]["digits"][::2] == coarse["val"]["digits"]


def test_ctrl_c_says_how_to_go_on_and_going_on_gives_the_same(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--regimes", "attention-tangent", "--seeds", "0", "--set", "train.lr=[1e-3]")
    assert (
        command(
            monkeypatch,
            "study",
            "finetune",
            "--config",
            config,
            "--out",
            tmp_path / "whole",
            *options,
        )
        == 0
    )
    step, calls = trainee.Trainee.step, []

    def interrupted(self: trainee.Trainee, *more: Any) -> tuple[float, float]:
        calls.append(0)
        if len(calls) == 7:  # in the second task
            raise KeyboardInterrupt
        return step(self, *more)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(trainee.Trainee, "step", interrupted)
        code = command(
            monkeypatch, "study", "finetune", "--config", config, "--out", parts, *options
        )
    assert code == 130
    said = capsys.readouterr().err
    again = f"tangentfast study finetune --config {parts / 'config.toml'}"
    assert f"study: interrupted; go on with: {again}" in said
    assert len(list(parts.rglob("checkpoint.pt"))) == 1
    monkeypatch.setattr(trainee.Trainee, "step", lambda *a: calls.append(1) or step(*a))
    assert command(monkeypatch, *shlex.split(again)[1:]) == 0
    assert calls.count(1) == 2  # steps 3 and 4 of the second task
    for task in ("digits", "shapes"):
        file = Path("vectors", "attention-tangent", task, "seed0.safetensors")
        whole, resumed = (tf.TaskVector.load(tmp_path / run / file) for run in ("whole", "parts"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


BAD: list[tuple[list[str], str]] = [
    (["--set", "train.lr=[1, -1]"], "study: train.lr[1] is -1; expected a number greater than 0"),
    (["--regimes", "ntk,sgd"], "study: train.regimes[1] is 'sgd'; expected 'nonlinear'"),
    (["--seeds", "0,x"], "study: train.seeds[1] is 'x'; expected a whole number"),
    (["--tasks", "digits,nothing"], "study: data.tasks[1]: task should be among"),
    (["--device", "tpu9"], "study: device is 'tpu9'; expected one that torch has here"),
    (["--set", "train.batch"], "study: --set train.batch: expected KEY=VALUE"),
    (["--preset", "small"], "study: --config and --preset are both given"),
    (["--out", "/dev/null/run"], "study: out is /dev/null/run; expected a folder to write to"),
    (["--model", "module:nowhere:f"], "study: model: "),
    (["--set", "data.sizes=[9999, 9, 9]"], "study: data: digits: sizes (9999, 9, 9) ask for"),
    (
        ["--set", "head.kind=zero-shot"],
        'study: head.kind asks for "zero-shot", but tiny has no text tower',
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: x[-1] if x[0] != "s" else "")
def test_a_bad_configuration_ends_with_one_message(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], options: list[str], message: str, steps: list[int],
) -> None:  # fmt: skip
    out = ("--out", tmp_path / "run")
    assert command(monkeypatch, "study", "run", "--config", config, *out, *options) == 2
    assert capsys.readouterr().err.startswith(message)
    assert steps == []
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_full_disk_ends_with_one_message(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*more: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.TaskVector, "save", full)
    out = tmp_path / "run"
    assert command(monkeypatch, "study", "run", "--config", config, "--out", out) == 1
    assert capsys.readouterr().err.endswith("study: [Errno 28] No space left on device\n")
    assert not list(out.rglob("result.json"))


def test_a_rate_that_diverges_loses_and_if_all_do_it_is_said(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = trainee.Trainee.step

    def explode(above: float) -> None:
        def broken(self: trainee.Trainee, *more: Any) -> tuple[float, float]:
            loss, norm = step(self, *more)
            return (float("nan") if self.options.lr > above else loss), norm

        monkeypatch.setattr(trainee.Trainee, "step", broken)

    options = ("--regimes", "attention", "--seeds", "0", "--out", tmp_path / "run")
    explode(5e-4)
    assert command(monkeypatch, "study", "evaluate", "--config", config, *options) == 0
    entry = json.loads((tmp_path / "run" / "results.json").read_text())["regimes"]["attention"]
    assert entry["lr"] == 1e-4
    assert entry["lr_grid"]["0.001"] == 0.0
    explode(0.0)
    options = (*options[:-1], tmp_path / "other")
    assert command(monkeypatch, "study", "finetune", "--config", config, *options) == 1
    assert "study: attention diverged at every rate of train.lr; finetune: the loss of digits" in (
        capsys.readouterr().err
    )


def test_info_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "info") == 0
    assert capsys.readouterr().out.strip() == str(tf.info())
    assert command(monkeypatch, "study", "--help") == 0
    said = capsys.readouterr().out
    for name in (*module.STAGES, "compare"):
        assert name in said


@pytest.mark.parametrize("name", PRESETS)
def test_tasks_of_presets_are_known(name: str) -> None:
    preset = load(name, preset=True)
    for task in [*preset.data.tasks, preset.data.control]:
        check_name(task or "")
