"""torch, torchvision and open_clip at tiny sizes: ``ZOO[name]() -> (model, args, kwargs)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import MODELS, Made, images, stirred
from torch import nn

# Tiny already, in the models of tests/models.py.
ZOO: dict[str, Callable[[], Made]] = {
    name: MODELS[name]
    for name in (
        "torch.TransformerEncoderLayer",
        "open_clip.CLIP",
        "open_clip.CustomTextCLIP",
        "open_clip.CLIP.attentional_pool",
        "open_clip.CLIP.attention_pool_resnet",
        "torchvision.VisionTransformer",
        "torchvision.swin_v2",
    )
}


def _sequence(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _transformer() -> Made:
    model = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True, norm_first=True)
    return stirred(model), (_sequence(2, 7, 32), _sequence(2, 5, 32)), {}


def _encoder() -> Made:
    """Of two layers; in evaluation mode torch packs padded batches into nested tensors."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    model = nn.TransformerEncoder(layer, 2)
    return stirred(model), (_sequence(2, 7, 32),), dict(src_key_padding_mask=mask)


ZOO["torch.Transformer"] = _transformer
ZOO["torch.TransformerEncoder"] = _encoder


def _torchvision(kind: str) -> Made:
    models = pytest.importorskip("torchvision").models
    return stirred(getattr(models, kind)(num_classes=2)), (images(32, 2),), {}


def _regnet() -> Made:
    regnet = pytest.importorskip("torchvision").models.regnet
    blocks = regnet.BlockParams.from_init_params(6, 8, 8.0, 2.0, 8, se_ratio=0.25)
    return stirred(regnet.RegNet(blocks, 2, stem_width=8)), (images(32, 2),), {}


def _convnext() -> Made:
    convnext = pytest.importorskip("torchvision").models.convnext
    rows = [(8, 16, 1), (16, 32, 1), (32, None, 1)]
    model = convnext.ConvNeXt([convnext.CNBlockConfig(*row) for row in rows], num_classes=2)
    return stirred(model), (images(32, 2),), {}


def _maxvit() -> Made:
    maxvit = pytest.importorskip("torchvision").models.maxvit
    model = maxvit.MaxVit((32, 32), 8, 2, [16, 32], [1, 1], 8, 0.0, num_classes=2)
    return stirred(model), (images(32, 2),), {}


ZOO["torchvision.regnet"] = _regnet
ZOO["torchvision.convnext"] = _convnext
ZOO["torchvision.maxvit"] = _maxvit
for _name in ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"):
    ZOO[f"torchvision.{_name}"] = partial(_torchvision, _name)


def _coca() -> Made:
    module = pytest.importorskip("open_clip.coca_model")
    sizes: dict[str, Any] = dict(layers=1, width=32)
    model = module.CoCa(
        32,
        dict(context_length=9, vocab_size=99, heads=4, mlp_ratio=2, **sizes),
        dict(context_length=8, vocab_size=99, heads=4, embed_cls=True, output_tokens=True, **sizes),
        dict(
            image_size=28, patch_size=7, head_width=8, attentional_pool=True, attn_pooler_heads=4,
            attn_pooler_queries=5, output_tokens=True, **sizes,
        ),
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():  # some are left as they come from the memory
            p.normal_(std=0.1)
    return stirred(model), (images(28, 2), torch.randint(3, 90, (2, 8))), {}


ZOO["open_clip.CoCa"] = _coca
