"""A tiny encoder and tasks in memory, for tests of the study that need no weights and no files."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from tangentfast.study.data import Task, TensorSplit
from tangentfast.study.encoders import Encoder


class Head(nn.Module):
    """Frozen logits of random, or trained, prototypes."""

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            torch.randn(classes, width, generator=generator), requires_grad=False
        )

    def forward(self, features: Tensor) -> Tensor:
        return 10 * nn.functional.normalize(features, dim=-1) @ self.weight.T / 6


@cache
def _network(seed: int) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    module: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=32, depth=2,
        num_heads=2,
    )  # fmt: skip
    return module.eval()


def encoder(seed: int = 0) -> Encoder:
    return Encoder("tiny", copy.deepcopy(_network(seed)), 16, (0.5,) * 3, (0.25,) * 3)


def task(name: str = "tints", classes: int = 4, train: int = 90, seed: int = 0) -> Task:
    """One of three channels brighter than the others, or none, under noise."""
    generator = torch.Generator().manual_seed(seed)

    def split(n: int) -> TensorSplit:
        labels = torch.randint(classes, (n,), generator=generator)
        pixels = torch.randint(120, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[label : label + 1] += 40
        return TensorSplit(pixels, labels)

    names = tuple(map(str, range(classes)))
    return Task(name, names, split(train), split(40), split(40), "generated")
