"""What a classification task is to the rest of the study: classes, and three splits of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SIZES", "Split", "Task", "TensorSplit", "unique_splits"]

# Images to train on, to choose on, to report on, where a task has no splits of its own.
SIZES = (800, 150, 300)


class Split(Protocol):
    """Images with labels, read by index."""

    @property
    def labels(self) -> Tensor:
        """The classes, int64 [N]."""

    def __len__(self) -> int:
        """N."""

    def images(self, index: Tensor) -> Tensor:
        """The images `index` (int64 [n], on the CPU): uint8 [n, 3, S, S]."""


@dataclass(frozen=True)
class TensorSplit:
    """A split whose pixels are one tensor uint8 [N, 3, S, S], in memory or mapped from a file."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor) -> Tensor:
        """See `Split.images`."""
        # With NumPy: torch would start OpenMP threads for each thread that reads ahead, and with
        # more of them than cores the ones that train sleep at every barrier (1.2 × the step).
        return torch.from_numpy(self.pixels.numpy()[index.numpy()])


@dataclass(frozen=True)
class Task:
    """A classification task; no image occurs in two of its splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source: str
    """"real" or "generated"."""


def unique_splits(
    name: str, images: Tensor, labels: Tensor, seed: int, sizes: Sequence[int]
) -> list[Tensor]:
    """Index (int64) of as many splits as `sizes` has, drawn without an image occurring twice.

    Equal images count once, under their first label. As far as the images reach every split has its
    classes in equal parts, so that a small training split lacks none.

    Args:
        name: of the task, for the error.
        images: uint8 [N, ...].
        labels: int64 [N].
        seed: of the draw.
        sizes: number of images of each split.

    Raises:
        ValueError: more images asked for than there are different ones.
    """
    first: dict[bytes, int] = {}
    for index, image in enumerate(images):
        first.setdefault(image.numpy().tobytes(), index)
    if len(first) < sum(sizes):
        raise ValueError(
            f"{name}: sizes {tuple(sizes)} ask for {sum(sizes)} images, the task has {len(first)} "
            f"different ones; ask for fewer"
        )
    unique = torch.tensor(list(first.values()))
    order = unique[torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))]
    # The k-th image of each class comes before every class's next one.
    seen = torch.nn.functional.one_hot(labels[order]).cumsum(0)
    rank = seen.gather(1, labels[order, None])[:, 0]
    order = order[rank.argsort(stable=True)]
    return list(order[: sum(sizes)].split(list(sizes)))
