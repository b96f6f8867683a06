"""tangentfast.study.tasks: what the splits promise, on the real data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tangentfast.study import tasks
from tangentfast.study.assets import ANIMAL_MNIST, cache_folder
from tangentfast.study.tasks import Task, load_tasks, normalize

SIZES = (60, 20, 30)
NEEDS = {"digits": ("sklearn",), "animals": (), "letters": ("matplotlib", "PIL")}


def load(name: str, seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> Task:
    for module in NEEDS[name]:
        pytest.importorskip(module)
    file = f"animal_mnist-{ANIMAL_MNIST.version}-py3-none-any.whl"
    if name == "animals" and not (cache_folder() / file).exists():
        pytest.skip("animal-mnist is not in the cache: `make demo` puts it there")
    (task,) = load_tasks([name], seed=seed, sizes=sizes)
    return task


def contents(split: tasks.Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


@pytest.mark.parametrize("name", sorted(tasks.LOADERS))
def test_splits(name: str) -> None:
    task = load(name)
    splits = (task.train, task.val, task.test)
    assert task.name == name
    for split, size in zip(splits, SIZES, strict=True):
        assert split.images.shape == (size, 3, 56, 56)
        assert split.images.dtype == torch.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == torch.int64
        assert split.labels.min() >= 0
        assert split.labels.max() < len(task.classes)
    every = [content for split in splits for content in contents(split)]
    assert len(set(every)) == sum(SIZES)


@pytest.mark.parametrize("name", sorted(tasks.LOADERS))
def test_splits_depend_on_the_seed_alone(name: str) -> None:
    one, same, other = load(name, 0), load(name, 0), load(name, 1)
    for part in ("train", "val", "test"):
        a, b, c = (getattr(task, part) for task in (one, same, other))
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, c.images)


def test_duplicates_go_before_the_split() -> None:
    different = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 4, 4)
    images = torch.cat([different, different, different])
    # The copies have other labels: content alone decides, and the first label stays.
    labels = np.concatenate([np.zeros(50), np.ones(100)]).astype("int64")
    task = tasks._task("copies", "ab", images, labels, 0, (30, 10, 10))
    every = [content for s in (task.train, task.val, task.test) for content in contents(s)]
    assert len(set(every)) == 50
    assert not torch.cat([task.train.labels, task.val.labels, task.test.labels]).any()
    with pytest.raises(ValueError, match=r"ask for 51 images, the task has 50 different ones"):
        tasks._task("copies", "ab", images, labels, 0, (30, 10, 11))


def test_images_keep_their_labels() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    task, data = load("digits"), sklearn.load_digits()
    # The inverse of the enlargement, near enough to find the original among 1,797.
    small = torch.nn.functional.interpolate(task.test.images.float(), (8, 8), mode="area")[:, 0]
    originals = torch.from_numpy(data.images / 16 * 255).float()
    nearest = torch.cdist(small.flatten(1), originals.flatten(1)).argmin(1)
    assert torch.equal(task.test.labels, torch.from_numpy(data.target)[nearest])


def test_normalize() -> None:
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).expand(1, 3, 2, 2)
    expected = np.array([[0, 1], [0.2, 0.4]]) - np.array(tasks.MEAN)[:, None, None]
    expected = expected / np.array(tasks.STD)[:, None, None]
    np.testing.assert_allclose(normalize(images)[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"should be uint8 in 0\.\.255, are torch\.float32"):
        normalize(images.float())


def test_unknown_task() -> None:
    with pytest.raises(
        ValueError, match=r"among \['animals', 'digits', 'letters'\], got \['cars'\]"
    ):
        load_tasks(["cars"])
