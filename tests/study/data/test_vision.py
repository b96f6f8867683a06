"""The papers' data sets: torchvision's and datasets' own loaders, on small copies of formats."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
import standins
import torch

from tangentfast.study.data import VISION, DataError, Split, load_task, prepare
from tangentfast.study.data.folder import hold_out
from tangentfast.study.data.store import Samples

pytest.importorskip("torchvision")
pytest.importorskip("rich")
# Classes, and images of train, val and test: of the stand-ins, by the protocol's rule.
EXPECTED = {
    "cars": (196, 706, 78, 196),
    "dtd": (47, 85, 9, 47),
    "eurosat": (10, 160, 20, 20),
    "gtsrb": (43, 78, 8, 43),
    "mnist": (10, 36, 4, 10),
    "resisc45": (45, 81, 9, 45),
    "sun397": (397, 1430, 158, 397),
    "svhn": (10, 36, 4, 10),
    "imagenet": (12, 240, 36, 24),
}


def make(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = getattr(standins, name)
    takes = inspect.signature(writer).parameters
    writer(root, *([monkeypatch] if "monkeypatch" in takes else []))


def classes_seen(name: str, split: Split) -> torch.Tensor:
    seen = standins.painted(split.images(torch.arange(len(split))))
    return seen % 20 if name == "mnist" else seen  # grey: the second channel says nothing new


@pytest.mark.parametrize("name", sorted(VISION))
def test_real_loaders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(name, tmp_path, monkeypatch)
    folder = prepare(name, image_size=8, root=tmp_path, download=False)
    task = load_task(name, image_size=8, seed=0, root=tmp_path)
    splits = (task.train, task.val, task.test)
    assert (len(task.classes), *map(len, splits)) == EXPECTED[name]
    assert task.source == "real"
    for split in splits:
        assert torch.equal(classes_seen(name, split), split.labels)
    assert not any("_" in label or "/indoor" in label for label in task.classes)
    # The raw data are not needed any more.
    for entry in tmp_path.iterdir():
        if entry.name != "prepared":
            shutil.rmtree(entry)
    assert prepare(name, image_size=8, root=tmp_path, download=False) == folder


@pytest.mark.parametrize("name", sorted(VISION))
def test_without_the_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(name, image_size=8, root=tmp_path, download=False)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "prepared").exists()
    with pytest.raises(DataError, match=rf"{name}: expected the prepared split train at 8 px"):
        load_task(name, image_size=8, seed=0, root=tmp_path)


def test_a_missing_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.eurosat(tmp_path)
    shutil.rmtree(tmp_path / "eurosat" / "2750" / "River")
    with pytest.raises(DataError, match=r"eurosat: folders \['River'\]"):
        prepare("eurosat", image_size=8, root=tmp_path, download=False)
    standins.gtsrb(tmp_path)
    shutil.rmtree(tmp_path / "gtsrb" / "GTSRB" / "Training" / "00007")
    with pytest.raises(DataError, match=r"gtsrb: expected 43 class folders .* got 42"):
        prepare("gtsrb", image_size=8, root=tmp_path, download=False)
    standins.dtd(tmp_path)
    labels = tmp_path / "dtd" / "dtd" / "labels" / "test1.txt"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"dtd: classes \['texture00'\]"):
        prepare("dtd", image_size=8, root=tmp_path, download=False)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    standins.dtd(tmp_path)
    image = tmp_path / "dtd" / "dtd" / "images" / "texture05" / "test_5.jpg"
    image.write_bytes(image.read_bytes()[:150])
    with pytest.raises(DataError, match=rf"dtd: {image} cannot be decoded"):
        prepare("dtd", image_size=8, root=tmp_path, download=False)
    left = {file.name for file in (tmp_path / "prepared" / "dtd-8").iterdir()}
    assert left == {
        "manifest.json", "train.images.npy", "train.labels.npy", "val.images.npy",
        "val.labels.npy",
    }  # fmt: skip


def test_hub_files_without_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "resisc45").mkdir()
    for part in ("train", "test"):
        table = datasets.Dataset.from_dict({"label": [0, 1]})
        table.to_parquet(str(tmp_path / "resisc45" / f"{part}-0.parquet"))
    with pytest.raises(DataError, match=r"resisc45: expected a column 'label' with names"):
        prepare("resisc45", image_size=8, root=tmp_path, download=False)
    (tmp_path / "resisc45" / "test-0.parquet").unlink()
    with pytest.raises(DataError, match=r"got none for \['test'\]"):
        prepare("resisc45", image_size=8, root=tmp_path, download=False)


@pytest.mark.parametrize(("n", "held"), [(5, 1), (100, 10), (73257, 5000)])
def test_validation_split(n: int, held: int) -> None:
    samples = Samples(n, lambda i: (standins.paint(0), i), str)
    train, val = hold_out(samples)
    assert (len(train), len(val)) == (n - held, held)
    if n < 1000:
        seen = [part.read(i)[1] for part in (train, val) for i in range(len(part))]
        assert sorted(seen) == list(range(n))
        assert [val.read(i)[1] for i in range(held)] == [
            hold_out(samples)[1].read(i)[1] for i in range(held)
        ]
        assert val.name(0) == str(val.read(0)[1])
