"""Where a task vector comes from: a name and a sampled hash of the pre-trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 64  # elements of each tensor: a ViT-B takes a few milliseconds


@dataclass(frozen=True)
class Base:
    """The pre-trained weights θ0 that a task vector is a difference to.

    Attributes:
        name: what people call them, e.g. the model's class or the checkpoint's file name.
        fingerprint: `fingerprint` of θ0 restricted to the vector's own parameter names.
    """

    name: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name} [{self.fingerprint[:12]}]"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sampled SHA-256 of named tensors, in hexadecimal; independent of their order and device.

    It covers every name and shape, and at most 64 evenly spaced elements of each tensor, as
    float64, the first and last among them. Sampled means: two models that differ elsewhere only
    have the same fingerprint. That tells one pre-trained model from another, and a base from the
    same base after training or merging; it is no checksum of a file.

    Args:
        tensors: name -> real tensor of any shape and dtype.
    """
    names = sorted(tensors)
    samples = [_samples(tensors[name].detach()) for name in names]
    # One transfer for each device, not for each tensor.
    by_device: dict[torch.device, list[int]] = {}
    for i, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append(i)
    for members in by_device.values():
        together = torch.cat([samples[i] for i in members]).cpu()
        parts = together.split([samples[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            samples[i] = part
    digest = hashlib.sha256()
    for name, sample in zip(names, samples, strict=True):
        digest.update(repr((name, tuple(tensors[name].shape))).encode())
        digest.update(sample.numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    """At most SAMPLES elements, evenly spaced in row-major order: [n] float64."""
    total = tensor.numel()
    count = min(total, SAMPLES)
    places = [i * (total - 1) // max(count - 1, 1) for i in range(count)]
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat[torch.tensor(places, dtype=torch.int64, device=tensor.device)].double()
    rows = [torch.tensor(_unravel(p, tensor.shape), dtype=torch.int64) for p in places]
    index = torch.stack(rows, 1).to(tensor.device) if rows else None
    return (tensor[tuple(index)] if index is not None else tensor.reshape(-1)).double()


def _unravel(place: int, shape: torch.Size) -> list[int]:
    """Row-major place -> one index per dimension, without copying a non-contiguous tensor."""
    index = []
    for size in reversed(shape):
        place, i = divmod(place, size)
        index.append(i)
    return index[::-1]
