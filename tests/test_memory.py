"""What is saved for the backward: as much as in an ordinary step, and nothing of a tangent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tangentfast as tf


def saved_bytes(model: Any, x: Tensor, own: set[int]) -> int:
    """Of all storages but those in `own`, each counted once."""
    found: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    return sum(s.nbytes() for address, s in found.items() if address not in own)


def open_clip_vit() -> nn.Module:
    module = pytest.importorskip("open_clip.transformer")
    tower: nn.Module = module.VisionTransformer(
        64, 16, width=128, layers=3, heads=2, mlp_ratio=4.0, output_dim=32
    )
    return tower


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=128, num_heads=2, depth=3
    )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [open_clip_vit, timm_vit])
@pytest.mark.parametrize("params", ["all", "attention"])
def test_as_an_ordinary_step(build: Any, params: str, dtype: torch.dtype) -> None:
    model, x = build().to(dtype), torch.randn(8, 3, 64, 64, dtype=dtype)
    lin = tf.linearize(model, params)
    for tau in lin.tau.values():
        torch.nn.init.normal_(tau, std=0.01)
    tf.train_only(model, params)
    weights = {*model.parameters(), *lin.tau.values()}
    own = {w.untyped_storage().data_ptr() for w in weights}
    ordinary = saved_bytes(model, x, own)
    # Beyond it: scalars a row of a norm whose weight has no tangent, and a few small tensors.
    assert saved_bytes(lin, x, own) <= 1.02 * ordinary
