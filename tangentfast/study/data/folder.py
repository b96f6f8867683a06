"""Image folders: `folder:PATH` with `train`, `test` and perhaps `val`, a folder a class in each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .store import DataError, Samples, Source

__all__ = ["class_folders", "folder_name", "hold_out", "image_files", "open_folder"]

# Read lazily, one image at a time, so formats are told by their names.
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
# The validation split of Ortiz-Jimenez et al. 2023: a tenth of train, at most so many, seed 0.
VALIDATION_SHARE, VALIDATION_MOST = 10, 5000


def hold_out(samples: Samples, n: int | None = None, seed: int = 0) -> tuple[Samples, Samples]:
    """Samples drawn out of `samples`, and what remains: (remaining, drawn).

    Args:
        samples: of a training split.
        n: how many; by default min(10 %, 5,000), the validation split of the papers.
        seed: of the draw.
    """
    if n is None:
        n = min(max(1, len(samples) // VALIDATION_SHARE), VALIDATION_MOST)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return samples.take(sorted(order[n:])), samples.take(sorted(order[:n]))


def folder_name(path: Path) -> str:
    """A name for the prepared copy of an image folder: two folders of one name do not meet."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    return f"folder-{path.resolve().name}-{digest}"


def class_folders(folder: Path) -> list[str]:
    """The classes of a split: its sub-folders, sorted.

    Raises:
        DataError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder with one sub-folder a class at {folder}, got none")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: expected one sub-folder a class, got no sub-folder")
    return names


def image_files(folder: Path, classes: Sequence[str]) -> Samples:
    """The images of a split, sorted by class and name.

    Raises:
        DataError: a class without a folder, or a folder of no class.
    """
    present = class_folders(folder)
    if missing := sorted(set(classes) - set(present)):
        raise DataError(f"{folder}: classes {missing} have no folder here")
    if unknown := sorted(set(present) - set(classes)):
        raise DataError(f"{folder}: folders {unknown} are no class of the training split")
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]

    def read(i: int) -> tuple[Image.Image, int]:
        file, label = files[i]
        with Image.open(file) as image:
            return image.convert("RGB"), label

    return Samples(len(files), read, lambda i: str(files[i][0]))


def open_folder(path: Path) -> Source:
    """The data set in an image folder; without `val`, the papers' share of `train` is held out.

    Raises:
        DataError: a split or a class is missing.
    """
    if not path.is_dir():
        raise DataError(f"folder:{path}: expected a folder with train and test in it, got none")
    classes = class_folders(path / "train")
    train, test = (image_files(path / part, classes) for part in ("train", "test"))
    if (path / "val").is_dir():
        val = image_files(path / "val", classes)
    else:
        train, val = hold_out(train)
    return Source(tuple(name.replace("_", " ") for name in classes), train, val, test)
