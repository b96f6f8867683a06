"""Encoders of every library, with random weights: shapes, statistics, what they refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tangentfast as tf
from tangentfast.study import encoders
from tangentfast.study.assets import AssetError
from tangentfast.study.data import TensorSplit
from tangentfast.study.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, encode, load_encoder

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip


@pytest.fixture
def tiny_clip(add_clip: Callable[[str, dict[str, Any]], None]) -> str:
    """The name of a small CLIP that open_clip knows."""
    add_clip("tiny-test-clip", TINY_CLIP)
    return "tiny-test-clip"


def images(size: int, n: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def test_normalize() -> None:
    encoder = Encoder("any", nn.Identity(), 2)
    pixels = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).expand(1, 3, 2, 2)
    expected = np.array([[0, 1], [0.2, 0.4]]) - np.array(IMAGENET_MEAN)[:, None, None]
    expected = expected / np.array(IMAGENET_STD)[:, None, None]
    np.testing.assert_allclose(encoder.normalize(pixels)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"should be uint8 in 0\.\.255, are torch\.float32"):
        encoder.normalize(pixels.float())


def test_encode_is_the_module_batch_by_batch() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5))
    encoder = Encoder("any", module, 2)
    split = TensorSplit(images(2, 7), torch.zeros(7))
    module.train()
    features = encode(encoder, split, batch=3)
    assert not features.requires_grad
    with torch.no_grad():
        expected = module[1](encoder.normalize(split.pixels).flatten(1))
    torch.testing.assert_close(features, expected)


def test_open_clip(tiny_clip: str, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(tiny_clip).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    encoder = load_encoder("open_clip", tiny_clip, str(file))
    assert (encoder.name, encoder.image_size) == (tiny_clip, 32)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN
    assert encoder.logit_scale == pytest.approx(50, rel=1e-6)
    assert not encoder.module.training
    x, prompts = encoder.normalize(images(32)), ["a bee", "a longer prompt about a cat"]
    assert encoder.text is not None
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(x), model.encode_image(x))
        torch.testing.assert_close(
            encoder.text(prompts), model.encode_text(open_clip.get_tokenizer(tiny_clip)(prompts))
        )
    assert encoder.text(prompts).shape == (2, 24)
    # The package's own selection finds the attention layers in the image tower alone.
    names = set(tf.linearize(encoder.module, params="attention").task_vector())
    assert {name.rsplit(".", 1)[1] for name in names} <= {"in_proj_weight", "weight"}
    assert len(names) == 4


def test_open_clip_at_another_size(tiny_clip: str, tmp_path: Path) -> None:
    import open_clip

    file = tmp_path / "weights.pt"
    torch.save(open_clip.create_model(tiny_clip).state_dict(), file)
    encoder = load_encoder("open_clip", tiny_clip, str(file), 48)
    assert encoder.image_size == 48
    with torch.no_grad():
        assert encoder.module(encoder.normalize(images(48))).shape == (3, 24)


def test_weights_with_the_quick_gelu_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    asked = {}

    def create_model(name: str, **options: object) -> nn.Module:
        asked.update(options)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(AssetError, match=rf"ViT-B-32: the weights '{tag}' cannot be loaded"):
            load_encoder("open_clip", "ViT-B-32", tag)
        assert asked["force_quick_gelu"] is quick


def test_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "test_vit"
    torch.manual_seed(0)
    model = timm.create_model(name).eval()  # with a classifier, as checkpoints have one
    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    encoder = load_encoder("timm", name, str(file))
    data = timm.data.resolve_model_data_config(model)
    assert (encoder.mean, encoder.std) == (data["mean"], data["std"])
    assert encoder.image_size == data["input_size"][1]
    x = encoder.normalize(images(encoder.image_size))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(encoder.module(x), expected)
    larger = load_encoder("timm", name, str(file), encoder.image_size + 32)
    with torch.no_grad():
        assert larger.module(larger.normalize(images(larger.image_size))).isfinite().all()


def test_timm_convolutional_network_takes_any_size() -> None:
    pytest.importorskip("timm")
    encoder = load_encoder("timm", "test_resnet", None, 64)
    assert encoder.image_size == 64
    with torch.no_grad():
        assert encoder.module(encoder.normalize(images(64))).ndim == 2


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, tiny_clip: str) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_vit").state_dict()
    state["blocks.0.other.weight"] = state.pop("blocks.0.mlp.fc1.weight")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(AssetError, match=r"mlp\.fc1\.weight"):
        load_encoder("timm", "test_vit", str(tmp_path / "weights.pt"))
    with pytest.raises(AssetError, match=f"open_clip {tiny_clip}: the weights .* cannot be loaded"):
        load_encoder("open_clip", tiny_clip, str(tmp_path / "weights.pt"))


def test_adapter_for_any_module(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("my_models")
    mine.small = lambda pretrained, image_size: Encoder(  # type: ignore[attr-defined]
        f"small {pretrained}", nn.Flatten().train(), image_size
    )
    mine.bare = lambda pretrained, image_size: nn.Flatten()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_models", mine)
    encoder = load_encoder("module", "my_models:small", "tag", 20)
    assert (encoder.name, encoder.image_size) == ("small tag", 20)
    assert not encoder.module.training
    with pytest.raises(ValueError, match=r"my_models:bare should return an Encoder, .* Flatten"):
        load_encoder("module", "my_models:bare")
    for name in ("my_models", "my_models:none", "no_such_package:small", ""):
        with pytest.raises(ValueError, match=rf"'package\.module:function', is '{name}'"):
            load_encoder("module", name)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"among \['dinov2-wheel', 'module', .*, is 'keras'"):
        load_encoder("keras", "x")
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=r"no model 'ViT-B-33'; it has .*ViT-B-32"):
        load_encoder("open_clip", "ViT-B-33")
    with pytest.raises(ValueError, match=r"tags \[.*'openai'.*, is 'closedai'"):
        load_encoder("open_clip", "ViT-B-32", "closedai")
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"no model 'vit_tiny_patch17'; it has vit_"):
        load_encoder("timm", "vit_tiny_patch17")
    with pytest.raises(ValueError, match=r"tags \['augreg_.*, is 'unheard'"):
        load_encoder("timm", "vit_tiny_patch16_224", "unheard")


def test_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        encoders, "dinov2_vit_small", lambda size: sizes.append(size) or nn.Flatten()
    )
    assert load_encoder("dinov2-wheel", "any").image_size == 56
    assert load_encoder("dinov2-wheel", "any", None, 70).image_size == 70
    assert sizes == [56, 70]
