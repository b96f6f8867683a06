"""Preparing: once, checked, resumed where it stopped, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import standins
import torch
from PIL import Image

from tangentfast.study.data import DataError, load_task, prepare, store
from tangentfast.study.data.store import Samples, Source, prepare_source, resize

pytest.importorskip("rich")
CLASSES = ["bee", "cat_fish", "dog"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for part, each in (("train", 20), ("test", 5)):
        standins.image_folder(tmp_path / "raw" / part, CLASSES, each)
    return tmp_path / "raw"


def made(raw: Path) -> tuple[Path, Path]:
    """The root, and the folder of the prepared task."""
    root = raw.parent / "root"
    folder = prepare(f"folder:{raw}", image_size=8, root=root)
    assert folder is not None
    return root, folder


def test_folder(raw: Path) -> None:
    root, folder = made(raw)
    task = load_task(f"folder:{raw}", image_size=8, seed=0, root=root)
    assert task.classes == ("bee", "cat fish", "dog")
    assert [len(split) for split in (task.train, task.val, task.test)] == [54, 6, 15]
    for split in (task.train, task.val, task.test):
        images = split.images(torch.arange(len(split)))
        assert images.shape[1:] == (3, 8, 8)
        assert torch.equal(standins.painted(images), split.labels)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["train", "val", "test"]
    files = {file.name for file in folder.iterdir()}
    assert files == {"manifest.json"} | {
        f"{part}.{kind}.npy" for part in manifest["splits"] for kind in ("images", "labels")
    }


def test_folder_with_its_own_validation_split(raw: Path) -> None:
    standins.image_folder(raw / "val", CLASSES, 2)
    root, _ = made(raw)
    task = load_task(f"folder:{raw}", image_size=8, seed=0, root=root)
    assert [len(split) for split in (task.train, task.val, task.test)] == [60, 6, 15]


def test_subsets(raw: Path) -> None:
    root, _ = made(raw)
    name = f"folder:{raw}"
    one, same, other = (
        load_task(name, image_size=8, seed=seed, sizes=(20, 3, 4), root=root) for seed in (0, 0, 1)
    )
    assert [len(split) for split in (one.train, one.val, one.test)] == [20, 3, 4]
    assert torch.equal(one.train.labels, same.train.labels)
    assert not torch.equal(one.train.labels, other.train.labels)
    assert torch.equal(standins.painted(one.train.images(torch.arange(20))), one.train.labels)
    with pytest.raises(ValueError, match="ask for 7 images of val, there are 6"):
        load_task(name, image_size=8, seed=0, sizes=(20, 7, 4), root=root)


def test_reading_does_not_change_the_files(raw: Path) -> None:
    root, folder = made(raw)
    before = (folder / "test.images.npy").read_bytes()
    task = load_task(f"folder:{raw}", image_size=8, seed=0, root=root)
    task.test.images(torch.arange(3)).zero_()
    task.test.labels.zero_()
    assert (folder / "test.images.npy").read_bytes() == before
    again = load_task(f"folder:{raw}", image_size=8, seed=0, root=root)
    assert again.test.labels.unique().tolist() == [0, 1, 2]


class Counted:
    """A source that counts how often an image is read, by split."""

    def __init__(self) -> None:
        self.reads = {part: 0 for part in store.PARTS}
        self.opened = 0

    def samples(self, part: str) -> Samples:
        def read(i: int) -> tuple[Image.Image, int]:
            self.reads[part] += 1
            return standins.paint(i % 2), i % 2

        return Samples(6, read, str)

    def open(self) -> Source:
        self.opened += 1
        return Source(("a", "b"), *(self.samples(part) for part in store.PARTS))


def test_only_what_is_missing_or_damaged_is_made(tmp_path: Path) -> None:
    source = Counted()
    folder = prepare_source("x", source.open, 8, tmp_path)
    assert source.reads == {"train": 6, "val": 6, "test": 6}
    prepare_source("x", source.open, 8, tmp_path)
    assert source.opened == 1
    first = (folder / "val.images.npy").read_bytes()
    damaged = bytearray(first)
    damaged[-1] ^= 1  # of the same length: the checksum alone can tell
    (folder / "val.images.npy").write_bytes(damaged)
    (folder / "test.labels.npy").unlink()
    prepare_source("x", source.open, 8, tmp_path)
    assert source.reads == {"train": 6, "val": 12, "test": 12}
    assert (folder / "val.images.npy").read_bytes() == first


def test_resumes_after_a_failure(tmp_path: Path) -> None:
    source = Counted()
    whole = source.open()

    def fail(i: int) -> tuple[Image.Image, int]:
        if i == 4:
            raise OSError("image file is truncated")
        return whole.val.read(i)

    broken = Source(whole.classes, whole.train, Samples(6, fail, lambda i: f"{i}.jpg"), whole.test)
    with pytest.raises(DataError, match=r"x: 4\.jpg cannot be decoded \(image file is truncated\)"):
        prepare_source("x", lambda: broken, 8, tmp_path)
    folder = tmp_path / "prepared" / "x-8"
    names = {"manifest.json", "train.images.npy", "train.labels.npy"}
    assert {file.name for file in folder.iterdir()} == names
    with pytest.raises(DataError, match="expected the prepared split val"):
        store.load_prepared("x", 8, tmp_path)
    prepare_source("x", source.open, 8, tmp_path)
    assert source.reads["train"] == 6  # once, before the failure
    assert len(store.load_prepared("x", 8, tmp_path).test) == 6


def test_another_set_of_classes_makes_everything_anew(tmp_path: Path) -> None:
    source = Counted()
    folder = prepare_source("x", source.open, 8, tmp_path)
    (folder / "val.labels.npy").unlink()
    renamed = Source(("a", "c"), *(source.samples(part) for part in store.PARTS))
    prepare_source("x", lambda: renamed, 8, tmp_path)
    assert source.reads == {"train": 12, "val": 12, "test": 12}
    assert store.load_prepared("x", 8, tmp_path).classes == ("a", "c")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(DataError, match=r"x: cannot write train to .* free space or choose")
    with refused, standins.largest_file(1000):
        prepare_source("x", Counted().open, 16, tmp_path)
    assert list((tmp_path / "prepared" / "x-16").iterdir()) == []


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:  # images, labels, manifest, each and its folder; then the images of val
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    source = Counted()
    with pytest.raises(DataError, match=r"cannot write val .*No space left on device"):
        prepare_source("x", source.open, 8, tmp_path)
    names = {"manifest.json", "train.images.npy", "train.labels.npy"}
    assert {file.name for file in (tmp_path / "prepared" / "x-8").iterdir()} == names
    prepare_source("x", source.open, 8, tmp_path)
    assert source.reads == {"train": 6, "val": 12, "test": 6}


def test_labels_must_be_classes(tmp_path: Path) -> None:
    samples = Samples(2, lambda i: (standins.paint(0), i), lambda i: f"image {i}")
    with pytest.raises(DataError, match="x: image 1 has class 1, there are 1"):
        prepare_source("x", lambda: Source(("a",), samples, samples, samples), 8, tmp_path)
    source = Source(("a", "b", "c"), samples, samples, samples)
    with pytest.raises(DataError, match=r"every class needs an image to train on, \[2\] have none"):
        prepare_source("x", lambda: source, 8, tmp_path)
    assert list((tmp_path / "prepared" / "x-8").iterdir()) == []


def test_wrong_paths(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"folder:{tmp_path}/no: expected a folder"):
        prepare(f"folder:{tmp_path}/no", image_size=8, root=tmp_path)
    with pytest.raises(DataError, match=r"one sub-folder a class at .*raw/train/train, got none"):
        prepare(f"folder:{raw}/train", image_size=8, root=tmp_path)
    (raw / "test" / "dog").rename(raw / "test" / "horse")
    with pytest.raises(DataError, match=r"raw/test: classes \['dog'\] have no folder here"):
        prepare(f"folder:{raw}", image_size=8, root=tmp_path)
    (raw / "test" / "dog").mkdir()
    with pytest.raises(DataError, match=r"folders \['horse'\] are no class"):
        prepare(f"folder:{raw}", image_size=8, root=tmp_path)
    with pytest.raises(DataError, match="a data folder is needed"):
        load_task(f"folder:{raw}", image_size=8, seed=0)


def test_a_truncated_or_strange_prepared_folder(raw: Path) -> None:
    root, folder = made(raw)
    path = folder / "val.images.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"should have {size} bytes, has {size - 1}; prepare it"):
        load_task(f"folder:{raw}", image_size=8, seed=0, root=root)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_task(f"folder:{raw}", image_size=8, seed=0, root=root)


def test_two_folders_of_one_name_do_not_meet(raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "raw"
    for part in ("train", "test"):
        standins.image_folder(other / part, ["x", "y"], 10)
    first, second = (
        prepare(f"folder:{path}", image_size=8, root=tmp_path) for path in (raw, other)
    )
    assert first != second


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (7, 5)])
def test_resize_keeps_the_centre(size: tuple[int, int]) -> None:
    width, height = size
    image = Image.new("RGB", size, (10, 20, 30))
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((200, 150, 100), (left, top, left + side, top + side))
    small = resize(image, 10)
    assert small.shape == (3, 10, 10)
    assert (
        np.abs(small.astype(int) - np.array([200, 150, 100])[:, None, None])[:, 3:7, 3:7].max() <= 2
    )
    # Against torch's own resize of the whole, for a picture that is not plain.
    noise = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(noise).permute(2, 0, 1)[None].float(), (10, 10), mode="bicubic",
        antialias=True,
    )[0].round().clamp(0, 255)  # fmt: skip
    got = torch.from_numpy(resize(Image.fromarray(noise), 10).copy()).float()
    assert (got - expected).abs().max() <= 1
