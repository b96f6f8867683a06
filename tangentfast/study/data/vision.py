"""The eight data sets of the papers, and ImageNet as control, with the protocol's splits.

Six come through torchvision, in the folders that it lays out and downloads. RESISC45 and SUN397
come through Hugging Face `datasets`: `timm/resisc45` has 18,900 training and 6,300 test images,
`tanganke/sun397` 19,850 and 19,850, the size of the official partitions, which torchvision's SUN397
does not have; both are parquet, so no code of a repository is run. Cars are no longer served where
torchvision looks: without the folder, `tanganke/stanford_cars` is taken.

Validation is min(10 %, 5,000) of the training images, seed 0. EuroSAT was published without splits:
as in the papers' code 21,600 / 2,700 / 2,700 images are drawn, here with seed 0, so ours are others
of the same number; DTD's train and val are one training split there, and so here
(github.com/mlfoundations/task_vectors, issue 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .folder import class_folders, hold_out, image_files
from .names import EUROSAT, GTSRB
from .store import DataError, Samples, Source

__all__ = ["VISION"]

DIGITS = tuple("0123456789")
# Of ImageNet's training images, per class, kept for heads that need some; all would be 190 GB.
IMAGENET_PER_CLASS = 20


def _torchvision(
    name: str, root: Path, layout: str, make: Callable[..., Any], parts: Sequence[Any]
) -> list[Any]:
    """Parts of a data set of torchvision, or one message for all the ways in which it is not there.

    Args:
        name: of the task.
        root: the data folder.
        layout: what a user who has the files must put there.
        make: opens a part.
        parts: its arguments, one after the other.
    """
    try:
        return [make(part) for part in parts]
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise DataError(
            f"{name}: torchvision cannot open it in {root} ({error}); allow the download, or put "
            f"{layout} there"
        ) from error


def _samples(dataset: Any) -> Samples:
    files = next(
        (getattr(dataset, key) for key in ("samples", "_samples", "_image_files")
         if hasattr(dataset, key)),
        None,
    )  # fmt: skip

    def name(i: int) -> str:
        if files is None:
            return f"image {i} of {type(dataset).__name__}"
        return str(files[i] if isinstance(files[i], Path) else files[i][0])

    return Samples(len(dataset), lambda i: dataset[i], name)


def _joined(first: Samples, second: Samples) -> Samples:
    n = len(first)
    return Samples(
        n + len(second),
        lambda i: first.read(i) if i < n else second.read(i - n),
        lambda i: first.name(i) if i < n else second.name(i - n),
    )


def _expect(name: str, root: Path, what: str, got: Sequence[str], count: int) -> None:
    if len(got) != count:
        raise DataError(
            f"{name}: expected {count} {what} in {root}, got {len(got)}; the data set is not "
            f"complete: remove it and prepare again"
        )


def _source(classes: Sequence[str], train: Samples, test: Samples) -> Source:
    return Source(tuple(classes), *hold_out(train), test)


def _hub(name: str, repository: str, root: Path, download: bool) -> Source:
    """A data set of the Hugging Face hub; parquet files in `root/name` go first."""
    import datasets

    local = root / name
    try:
        if local.is_dir():
            files = {
                part: sorted(str(f) for f in local.rglob(f"{part}*.parquet"))
                for part in ("train", "test")
            }
            if empty := [part for part in files if not files[part]]:
                raise DataError(
                    f"{name}: expected {local}/train*.parquet and {local}/test*.parquet, "
                    f"got none for {empty}"
                )
            cache = str(root / "huggingface")
            loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
        elif download:
            loaded = datasets.load_dataset(repository, cache_dir=str(root / "huggingface"))
        else:
            raise DataError(
                f"{name}: expected {local}/train*.parquet and test*.parquet, got no folder; allow "
                f"the download of {repository}"
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: Hugging Face datasets cannot open {repository} ({error}); allow the "
            f"download, or put its train*.parquet and test*.parquet into {local}"
        ) from error
    label = loaded["train"].features.get("label")
    if not isinstance(label, datasets.ClassLabel):
        raise DataError(f"{name}: expected a column 'label' with names of classes, got {label}")

    def samples(part: str) -> Samples:
        rows = loaded[part]

        def read(i: int) -> tuple[Image.Image, int]:
            row = rows[i]
            return row["image"], row["label"]

        return Samples(len(rows), read, lambda i: f"image {i} of {part}")

    classes = [re.sub(r"[_/]+", " ", text).strip() for text in label.names]
    return _source(classes, samples("train"), samples("test"))


def cars(root: Path, download: bool) -> Source:
    """Stanford Cars: 196 models."""
    from torchvision.datasets import StanfordCars

    if not (root / "stanford_cars").is_dir():
        return _hub("cars", "tanganke/stanford_cars", root, download)
    layout = "stanford_cars/{cars_train,cars_test,devkit,cars_test_annos_withlabels.mat}"
    train, test = _torchvision(
        "cars", root, layout, partial(StanfordCars, str(root)), ("train", "test")
    )
    _expect("cars", root, "classes", train.classes, 196)
    return _source(train.classes, _samples(train), _samples(test))


def dtd(root: Path, download: bool) -> Source:
    """Describable textures: 47 kinds; the first partition, train and val to train on."""
    from torchvision.datasets import DTD

    make = partial(DTD, str(root), download=download)
    train, val, test = _torchvision(
        "dtd", root, "dtd/dtd/{images,labels}", make, ("train", "val", "test")
    )
    _expect("dtd", root, "classes", train.classes, 47)
    for part in (val, test):
        if part.classes != train.classes:
            odd = sorted(set(part.classes) ^ set(train.classes))
            raise DataError(f"dtd: classes {odd} of {root} are not in all of train, val and test")
    return _source(train.classes, _joined(_samples(train), _samples(val)), _samples(test))


def eurosat(root: Path, download: bool) -> Source:
    """Land use from space: 10 kinds."""
    from torchvision.datasets import EuroSAT

    make = partial(EuroSAT, download=download)
    (every,) = _torchvision("eurosat", root, "eurosat/2750/<class>/", make, (str(root),))
    if missing := sorted(set(EUROSAT) ^ set(every.classes)):
        raise DataError(f"eurosat: folders {missing} of {root} are missing, or are no classes")
    tenth = len(every) // 10
    rest, test = hold_out(_samples(every), tenth)
    return Source(tuple(EUROSAT[folder] for folder in every.classes), *hold_out(rest, tenth), test)


def gtsrb(root: Path, download: bool) -> Source:
    """German traffic signs: 43."""
    from torchvision.datasets import GTSRB as Signs

    layout = "gtsrb/{GTSRB/Training,GTSRB/Final_Test/Images,GT-final_test.csv}"
    make = partial(Signs, str(root), download=download)
    train, test = _torchvision("gtsrb", root, layout, make, ("train", "test"))
    folders = class_folders(root / "gtsrb" / "GTSRB" / "Training")
    _expect("gtsrb", root, "class folders", folders, len(GTSRB))
    return _source(GTSRB, _samples(train), _samples(test))


def mnist(root: Path, download: bool) -> Source:
    """Handwritten digits."""
    from torchvision.datasets import MNIST

    make = partial(MNIST, str(root), download=download)
    train, test = _torchvision("mnist", root, "MNIST/raw/*-ubyte", make, (True, False))
    return _source(DIGITS, _samples(train), _samples(test))


def resisc45(root: Path, download: bool) -> Source:
    """Aerial scenes: 45 kinds."""
    return _hub("resisc45", "timm/resisc45", root, download)


def sun397(root: Path, download: bool) -> Source:
    """Scenes: 397 kinds."""
    return _hub("sun397", "tanganke/sun397", root, download)


def svhn(root: Path, download: bool) -> Source:
    """Digits of house numbers."""
    from torchvision.datasets import SVHN

    make = partial(SVHN, str(root / "svhn"), download=download)
    layout = "svhn/{train,test}_32x32.mat"
    train, test = _torchvision("svhn", root, layout, make, ("train", "test"))
    return _source(DIGITS, _samples(train), _samples(test))


def imagenet(root: Path, download: bool) -> Source:
    """ImageNet-1k as the user has it: `imagenet/train` and `imagenet/val`, a folder a class.

    The papers' control task. `val` is the test split, as in the papers; 5,000 training images are
    the validation split, and `IMAGENET_PER_CLASS` a class stay to train on.
    """
    folders = class_folders(root / "imagenet" / "train")
    every = image_files(root / "imagenet" / "train", folders)
    test = image_files(root / "imagenet" / "val", folders)
    rest, val = hold_out(every)
    train = hold_out(rest, min(len(rest), IMAGENET_PER_CLASS * len(folders)))[1]
    names = folders
    if len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        from open_clip import IMAGENET_CLASSNAMES  # in the order of the sorted synsets

        names = list(IMAGENET_CLASSNAMES)
    return Source(tuple(names), train, val, test)


# Opens the raw data below a folder; the flag allows a download.
VISION: dict[str, Callable[[Path, bool], Source]] = {
    "cars": cars,
    "dtd": dtd,
    "eurosat": eurosat,
    "gtsrb": gtsrb,
    "mnist": mnist,
    "resisc45": resisc45,
    "sun397": sun397,
    "svhn": svhn,
    "imagenet": imagenet,
}
