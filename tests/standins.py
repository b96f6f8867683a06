"""Small data sets in the on-disk formats of the real ones: the true loaders read them.

Every image has one colour, and the colour is its class (`paint`, `painted`), so that a test can see
whether images kept their labels on the way.
"""

from __future__ import annotations

import csv
import hashlib
import io
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

STEP = 12  # between the shades of two classes: JPEG shifts a plain colour by less than half of it


def paint(label: int, size: tuple[int, int] = (10, 8)) -> Image.Image:
    from PIL import Image  # not there without the extras, which files and limits do without

    return Image.new("RGB", size, (STEP * (label % 20), STEP * (label // 20), 128))


def painted(images: Tensor) -> Tensor:
    """The classes int64 [N] that images uint8 [N, 3, S, S] were painted with."""
    red, green = (images[:, :2].double().mean((2, 3)) / STEP).round().long().unbind(1)
    return red + 20 * green


def save(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(label).save(path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file, as it does on a full disk.

    Any file: a test's own output too, so that nothing but what is tested belongs inside.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def image_folder(folder: Path, classes: Sequence[str], each: int) -> None:
    for label, name in enumerate(classes):
        for k in range(each):
            save(folder / name / f"{k}.png", label)


def cars(root: Path) -> None:
    scipy = pytest.importorskip("scipy.io")
    base, names = root / "stanford_cars", [f"Maker Model {k}" for k in range(196)]
    (base / "devkit").mkdir(parents=True)
    scipy.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})
    for part, file, each in (
        ("cars_train", base / "devkit" / "cars_train_annos.mat", 4),
        ("cars_test", base / "cars_test_annos_withlabels.mat", 1),
    ):
        rows = [(f"{k:05}.jpg", k % 196 + 1) for k in range(196 * each)]
        for name, label in rows:
            save(base / part / name, label - 1)
        table = np.array(rows, dtype=[("fname", object), ("class", "i4")])
        scipy.savemat(file, {"annotations": table})


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        lines = [f"texture{k:02}/{part}_{k}.jpg" for k in range(47)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")
        for label, line in enumerate(lines):
            save(base / "images" / line, label)


def eurosat(root: Path) -> None:
    from tangentfast.study.data.names import EUROSAT

    for label, name in enumerate(sorted(EUROSAT)):
        for k in range(20):
            save(root / "eurosat" / "2750" / name / f"{name}_{k}.jpg", label)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for label in range(43):
        for k in range(2):
            save(base / "GTSRB" / "Training" / f"{label:05}" / f"{k:05}.ppm", label)
        save(base / "GTSRB" / "Final_Test" / "Images" / f"{label:05}.ppm", label)
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "ClassId"])
        writer.writerows([f"{label:05}.ppm", 10, label] for label in range(43))


def mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 10)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = np.broadcast_to((STEP * labels)[:, None, None], (n, 28, 28))
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, n], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    (root / "svhn").mkdir()
    sums = dict(SVHN.split_list)
    for part, n in (("train", 40), ("test", 10)):
        labels = np.arange(n) % 10
        images = np.stack([np.asarray(paint(k, (32, 32))) for k in labels], 3)
        file = root / "svhn" / f"{part}_32x32.mat"
        # As published, a zero has the label 10.
        scipy.savemat(file, {"X": images, "y": np.where(labels, labels, 10)[:, None]})
        # torchvision opens the published bytes only: the stand-in's take their place.
        url, name, _ = sums[part]
        sums[part] = [url, name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", sums)


def parquet(folder: Path, classes: Sequence[str], train: int, test: int) -> None:
    """Parquet files as the hub has them: the images' bytes, and the names of the classes."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir(parents=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    )
    for part, each in (("train", train), ("test", test)):
        labels = [k % len(classes) for k in range(each * len(classes))]
        rows = {"image": [_png(k) for k in labels], "label": labels}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{part}-00000-of-00001.parquet"))


def _png(label: int) -> dict[str, object]:
    buffer = io.BytesIO()
    paint(label).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def resisc45(root: Path) -> None:
    parquet(root / "resisc45", [f"land_use_{k}" for k in range(45)], 2, 1)


def sun397(root: Path) -> None:
    parquet(root / "sun397", [f"place_{k}/indoor" for k in range(397)], 4, 1)


def imagenet(root: Path) -> None:
    classes = [f"n{k:08}" for k in range(12)]
    image_folder(root / "imagenet" / "train", classes, 30)
    image_folder(root / "imagenet" / "val", classes, 2)
