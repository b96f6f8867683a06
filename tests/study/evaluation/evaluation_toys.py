"""Splits in memory, encoders whose features can be written down, and one that is a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tangentfast as tf
from tangentfast.study.data import TensorSplit


@dataclass
class ToyEncoder:
    module: nn.Module

    def normalize(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.float()


@dataclass
class ToyTask:
    name: str
    val: TensorSplit
    test: TensorSplit


def points(*images: Sequence[float], labels: Sequence[int] = ()) -> TensorSplit:
    """Images of one pixel, as their three channels; class 1 unless told."""
    pixels = torch.tensor(images, dtype=torch.uint8).view(-1, 3, 1, 1)
    return TensorSplit(pixels, torch.tensor(labels or [1] * len(images)))


class TwoClasses(nn.Module):
    """Features (0, ⟨w, x⟩) of a pixel x: without a head class 1 where ⟨w, x⟩ > 0, else class 0.

    Linear in w, so that the linearized model and the model itself are one.
    """

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(margin), margin], 1)


def change(*w: float) -> dict[str, Tensor]:
    """A task vector of TwoClasses."""
    return {"w": torch.tensor(w, dtype=torch.float64)}


class SmallTransformer(nn.Module):
    """Images [n, 3, 8, 8] -> features [n, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.patches(x / 128 - 1).flatten(2).mT).mean(1)


def transformer(dtype: torch.dtype = torch.float64) -> ToyEncoder:
    torch.manual_seed(0)
    return ToyEncoder(SmallTransformer().to(dtype))


def vectors_of(encoder: ToyEncoder, count: int, scale: float = 0.1) -> list[tf.TaskVector]:
    """Random task vectors that know their base."""
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        lin = tf.linearize(encoder.module)
        with torch.no_grad():
            for tau in lin.parameters():
                tau.normal_(std=scale)
        made.append(lin.task_vector())
    return made


def noise(count: int, seed: int = 2) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorSplit(pixels, torch.randint(4, (count,), generator=generator))
