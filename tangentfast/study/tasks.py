"""Small image classification tasks out of ordinary packages: two real ones and a generated one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .assets import animal_arrays

__all__ = ["LOADERS", "MEAN", "SIZES", "STD", "Split", "Task", "load_tasks", "normalize"]

PIXELS = 56
# The statistics DINOv2 was trained with, those of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Images to train on, to choose on, to report on.
SIZES = (800, 150, 300)


class Split(NamedTuple):
    """Images uint8 [N, 3, 56, 56] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A classification task; no image occurs in two of its splits, or twice in one."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split


def normalize(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] → float32 [N, 3, H, W], centred and scaled as DINOv2 expects it.

    Raises:
        TypeError: `images` is not uint8, so its range is unknown.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: images should be uint8 in 0..255, are {images.dtype}")
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def load_tasks(
    names: Sequence[str] = ("digits", "animals", "letters"),
    *,
    seed: int = 0,
    sizes: tuple[int, int, int] = SIZES,
) -> list[Task]:
    """The named tasks, each with `sizes` images to train on, validate on and test on.

    Raises:
        ValueError: an unknown name, or more images asked for than the task has.
        AssetError: a wheel cannot be had.
    """
    if unknown := [name for name in names if name not in LOADERS]:
        raise ValueError(f"load_tasks: names should be among {sorted(LOADERS)}, got {unknown}")
    return [LOADERS[name](seed, sizes) for name in names]


def digits(seed: int, sizes: tuple[int, int, int]) -> Task:
    """1,797 real handwritten digits of 8x8 pixels: scikit-learn's `load_digits`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images / 16 * 255).round().to(torch.uint8)
    return _task("digits", "0123456789", _rgb(images), data.target, seed, sizes)


ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def animals(seed: int, sizes: tuple[int, int, int]) -> Task:
    """Real silhouettes of ten animals, 28x28 pixels, 9,716 of them unique: PyPI's animal-mnist."""
    images, labels = animal_arrays()
    return _task("animals", ANIMALS, _rgb(torch.from_numpy(images)), labels, seed, sizes)


LETTERS = "ABCDEFGHIJ"


def letters(seed: int, sizes: tuple[int, int, int]) -> Task:
    """Generated: the capitals A to J in matplotlib's fonts, turned, shifted and coloured."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = sorted(file for file in folder.glob("*.ttf") if FACES.fullmatch(file.stem))
    random = np.random.default_rng(seed)
    images, labels = [], []
    # A few more than needed, should two come out alike.
    for label in random.integers(len(LETTERS), size=sum(sizes) + 20).tolist():
        ink, paper = random.integers(256, size=(2, 3))
        while abs(int(ink.sum()) - int(paper.sum())) < CONTRAST:
            ink, paper = random.integers(256, size=(2, 3))
        font = ImageFont.truetype(
            str(files[random.integers(len(files))]), int(random.integers(28, 45))
        )
        picture = Image.new("RGB", (PIXELS, PIXELS), tuple(paper.tolist()))
        middle = (PIXELS / 2 + random.uniform(-5, 5), PIXELS / 2 + random.uniform(-5, 5))
        draw = ImageDraw.Draw(picture)
        draw.text(middle, LETTERS[label], tuple(ink.tolist()), font, anchor="mm")
        angle, corner = random.uniform(-15, 15), tuple(paper.tolist())
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=corner)
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        labels.append(label)
    return _task("letters", LETTERS, torch.stack(images), np.array(labels), seed, sizes)


# matplotlib's other fonts are mathematical, with glyphs at places of their own.
FACES = re.compile(r"DejaVu(Sans|SansMono|Serif)(-\w+)?|STIXGeneral\w*")
# Least difference of the summed RGB values of ink and paper: below it, letters are hard to see.
CONTRAST = 250

LOADERS: dict[str, Callable[[int, tuple[int, int, int]], Task]] = {
    "digits": digits,
    "animals": animals,
    "letters": letters,
}


def _rgb(images: Tensor) -> Tensor:
    """Grey uint8 [N, h, w] → uint8 [N, 3, 56, 56]."""
    size = (PIXELS, PIXELS)
    large = F.interpolate(images[:, None].float(), size, mode="bicubic", antialias=True)
    return large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def _task(
    name: str,
    classes: Sequence[str],
    images: Tensor,
    labels: np.ndarray,
    seed: int,
    sizes: tuple[int, int, int],
) -> Task:
    # Duplicates go first: an image of the training split must not come back in the test split,
    # under whatever label.
    first: dict[bytes, int] = {}
    for index, image in enumerate(images):
        first.setdefault(image.numpy().tobytes(), index)
    unique = torch.tensor(list(first.values()))
    if len(unique) < sum(sizes):
        raise ValueError(
            f"{name}: sizes {sizes} ask for {sum(sizes)} images, the task has {len(unique)} "
            f"different ones; ask for fewer"
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    targets = torch.as_tensor(labels, dtype=torch.int64)
    chosen = unique[order[: sum(sizes)]].split(list(sizes))
    train, val, test = (Split(images[index].contiguous(), targets[index]) for index in chosen)
    return Task(name, tuple(classes), train, val, test)
