"""The networks that are measured, by the names of the tables, with random weights.

Timing does not depend on what the weights are. Under BENCH_SMOKE each name gives a tiny network of
the same library.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, SMOKE
from torch import Tensor, nn

OPEN_CLIP = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-H/14": "ViT-H-14",
}
TIMM = {"ViT-Ti/16": "vit_tiny_patch16_224", "ViT-S/16": "vit_small_patch16_224"}


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A new network of the table, in training mode."""
    torch.manual_seed(0)
    build = _open_clip if name in OPEN_CLIP else _timm
    model: nn.Module = build(name)
    return model.to(DEVICE, dtype).train()


def images(batch: int, dtype: torch.dtype = torch.float32, size: int = 224) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = 32 if SMOKE else size
    return torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, dtype)


def directions(model: nn.Module, count: int, std: float = 1e-3) -> list[dict[str, Tensor]]:
    """Random task vectors of all parameters."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    return [
        {
            n: torch.empty_like(p, requires_grad=False).normal_(std=std, generator=generator)
            for n, p in model.named_parameters()
        }
        for _ in range(count)
    ]


def vit(width: int, depth: int, size: int) -> nn.Module:
    """A plain vision transformer of timm, patches of 16 pixels, heads of 64."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=size, embed_dim=width, depth=depth, num_heads=max(1, width // 64), num_classes=0
    )
    return model.to(DEVICE).train()


def _open_clip(name: str) -> nn.Module:
    """The image tower alone, from open_clip's own configuration."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config(OPEN_CLIP[name])
    vision = config["vision_cfg"]
    tower: Callable[..., nn.Module] = open_clip.transformer.VisionTransformer
    if SMOKE:
        return tower(32, 16, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=16)
    return tower(
        vision["image_size"],
        vision["patch_size"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        output_dim=config["embed_dim"],
    )


def _timm(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2} if SMOKE else {}
    model: nn.Module = timm.create_model(TIMM[name], num_classes=0, **small)
    return model
