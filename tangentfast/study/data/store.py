"""Prepared data sets: decoded and resized once, kept as arrays that are mapped and not read.

A folder `<root>/prepared/<name>-<image size>` has `<split>.images.npy` (uint8 [N, 3, S, S]) and
`<split>.labels.npy` (int64 [N]) for train, val and test, and `manifest.json` with the classes and
each file's size and sha256. A split is in the manifest when its files are whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..files import replacing, write_json
from .task import Task, TensorSplit

__all__ = ["DataError", "Samples", "Source", "load_prepared", "prepare_source", "prepared_folder"]

PARTS = ("train", "val", "test")
# Images decoded at a time: what is in memory beside the data set itself.
CHUNK = 256


class DataError(RuntimeError):
    """A data set is not there, or is not what it should be."""


@dataclass(frozen=True)
class Samples:
    """One split of a data set as it was published: images that are decoded when they are asked for.

    `read(i)` gives the i-th image and its class; `name(i)` says which one that is, for errors.
    """

    size: int
    read: Callable[[int], tuple[Image.Image, int]]
    name: Callable[[int], str]

    def __len__(self) -> int:
        return self.size

    def take(self, index: Sequence[int]) -> Samples:
        """The samples `index`, in that order."""
        return Samples(len(index), lambda i: self.read(index[i]), lambda i: self.name(index[i]))


@dataclass(frozen=True)
class Source:
    """A data set ready to be prepared: its classes, and the samples of train, val and test."""

    classes: tuple[str, ...]
    train: Samples
    val: Samples
    test: Samples


def prepared_folder(name: str, image_size: int, root: Path) -> Path:
    """Where a data set lies once it is prepared."""
    return root / "prepared" / f"{name}-{image_size}"


def prepare_source(
    name: str, open_source: Callable[[], Source], image_size: int, root: Path
) -> Path:
    """Decode and resize a data set into its folder; splits that are there and whole are kept.

    Args:
        name: of the folder and in errors.
        open_source: called if a split is missing or damaged.
        image_size: S; the shorter side is resized to it (bicubic), the centre is cut out.
        root: the data folder.

    Raises:
        DataError: an image that cannot be decoded, a class without a training image, a label
            without a class, a folder that cannot be written, a disk that is full. What was
            written of the split is removed; finished splits stay, and are not made again.
    """
    folder = prepared_folder(name, image_size, root)
    manifest = _read_manifest(folder)
    whole = {part for part in PARTS if _is_whole(folder, manifest["splits"].get(part))}
    if len(whole) == len(PARTS):
        return folder
    source = open_source()
    classes = list(source.classes)
    if manifest["classes"] not in (None, classes):
        whole = set()  # the data set has changed since
    manifest = {
        "classes": classes,
        "splits": {part: manifest["splits"][part] for part in PARTS if part in whole},
    }
    for part in PARTS:
        if part in whole:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            manifest["splits"][part] = _write_split(
                name, folder, part, getattr(source, part), len(classes), image_size
            )
            write_json(folder / "manifest.json", manifest)
        except OSError as error:
            raise DataError(
                f"{name}: cannot write {part} to {folder}: {error}; free space or choose another "
                f"data folder, then run again: finished splits are kept"
            ) from error
    return folder


def load_prepared(name: str, image_size: int, root: Path) -> Task:
    """The task that `prepare_source` wrote; its pixels are mapped, and read when they are used.

    Raises:
        DataError: it is not prepared, not whole, or a file has not the size it was written with.
    """
    folder = prepared_folder(name, image_size, root)
    manifest = _read_manifest(folder)
    again = f"prepare it: tangentfast study prepare (data folder {root})"
    splits = []
    for part in PARTS:
        if part not in manifest["splits"]:
            raise DataError(
                f"{name}: expected the prepared split {part} at {image_size} px in {folder}, "
                f"got none; {again}"
            )
        for file, entry in manifest["splits"][part].items():
            size = (folder / file).stat().st_size if (folder / file).exists() else None
            if size != entry["bytes"]:
                raise DataError(
                    f"{name}: {folder / file} should have {entry['bytes']} bytes, has {size}; "
                    f"{again}"
                )
        # Copy on write: torch has no tensors that may not be written to.
        pixels, labels = (
            torch.from_numpy(np.load(folder / file, mmap_mode="c")) for file in _files(part)
        )
        splits.append(TensorSplit(pixels, labels.clone()))
    train, val, test = splits
    return Task(name, tuple(manifest["classes"]), train, val, test, "real")


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size` pixels (bicubic), then the centre: uint8 [3, size, size].

    The preprocessing of CLIP (Radford et al. 2021, arXiv:2103.00020).
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    large = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def _files(part: str) -> tuple[str, str]:
    return f"{part}.images.npy", f"{part}.labels.npy"


def _write_split(
    name: str, folder: Path, part: str, samples: Samples, classes: int, image_size: int
) -> dict[str, dict[str, Any]]:
    """Write one split; returns the entries of its files in the manifest."""
    from rich.progress import track

    def read(i: int) -> tuple[np.ndarray, int]:
        try:
            image, label = samples.read(i)
            return resize(image, image_size), label
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{name}: {samples.name(i)} cannot be decoded ({error}); replace or remove it, "
                f"then run again"
            ) from error

    images, labels_file = _files(part)
    labels = np.empty(len(samples), np.int64)
    # Written as a stream: on a full disk a mapped file ends the process, a write raises.
    with replacing(folder / images) as file, ThreadPoolExecutor() as pool:
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (len(samples), 3, image_size, image_size),
        }
        np.lib.format.write_array_header_1_0(file, header)
        chunks = range(0, len(samples), CHUNK)
        for start in track(chunks, description=f"{name}, {part}", transient=True):
            rows = range(start, min(start + CHUNK, len(samples)))
            for i, (pixels, label) in zip(rows, pool.map(read, rows), strict=True):
                if not 0 <= label < classes:
                    raise DataError(
                        f"{name}: {samples.name(i)} has class {label}, there are {classes}"
                    )
                file.write(np.ascontiguousarray(pixels).data)
                labels[i] = label
        if part == "train" and (empty := sorted(set(range(classes)) - set(labels.tolist()))):
            raise DataError(f"{name}: every class needs an image to train on, {empty} have none")
    with replacing(folder / labels_file) as file:
        np.save(file, labels)
    return {file: _entry(folder / file) for file in (images, labels_file)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        return {"classes": None, "splits": {}}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); delete {folder} and prepare again"
        ) from error
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _is_whole(folder: Path, entries: dict[str, dict[str, Any]] | None) -> bool:
    return entries is not None and all(
        (folder / file).exists() and _entry(folder / file) == entry
        for file, entry in entries.items()
    )
