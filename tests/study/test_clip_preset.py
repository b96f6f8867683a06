"""The papers' setting, rehearsed: preset `clip` with a tiny CLIP and small copies of its data."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import torch

for extra in ("typer", "pydantic", "tomlkit", "open_clip", "torchvision", "datasets", "scipy",
              "matplotlib", "jinja2", "rich"):  # fmt: skip
    pytest.importorskip(extra)

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TASKS = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
# As few steps as still go through every line.
SHORT = ["train.epochs={" + ", ".join(f"{name} = 0.001" for name in TASKS) + "}", "train.batch=8",
         "train.seeds=[0]", "evaluate.alphas=3", "evaluate.xi.count=3", "evaluate.pairs=1",
         "evaluate.xi_images=4", "evaluate.subsets=2", "evaluate.batch=64"]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path, add_clip: Callable[[str, dict[str, Any]], None]) -> Path:
    """Random weights of a model that open_clip knows by the name of the preset's."""
    import open_clip

    add_clip("ViT-B-32", TINY)
    torch.manual_seed(0)
    path = tmp_path / "tiny.pt"
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_one_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tangentfast import cli

    root, out = tmp_path / "data", tmp_path / "run"
    root.mkdir()
    for name in (*TASKS, "imagenet"):
        write = getattr(standins, name)
        write(
            root, *([monkeypatch] if "monkeypatch" in inspect.signature(write).parameters else [])
        )
    options = [option for setting in SHORT for option in ("--set", setting)]
    options += ["--pretrained", str(checkpoint), "--set", f"data.root='{root}'"]
    arguments = ["tangentfast", "study", "run", "--preset", "clip", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out), *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    results = json.loads((out / "results.json").read_text())
    assert [task["name"] for task in results["tasks"]] == [*TASKS, "imagenet"]
    assert results["head"] == "zero-shot"
    assert len(results["regimes"]) == 5
    for regime in results["regimes"].values():
        (run,) = regime["runs"]
        assert set(run["single"]) == set(TASKS)
        assert 0 <= run["addition"]["absolute"] <= 1
        assert math.isfinite(run["negation"]["control_base"])
    assert {entry["head"] for entry in results["head_study"]} >= {"zero-shot", "prototype", "probe"}
    # The data sets are the papers' and the model is called as theirs: the published numbers.
    assert "2604.17078" in (out / "report.html").read_text()
