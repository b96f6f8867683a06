"""Where a task vector comes from: a name and a sampled hash of the pre-trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
        tensors: name -> tensor of any shape and dtype.
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


def checksum(tensor: Tensor) -> tuple[int, ...] | None:
    """Numbers that change with any one element and, but by chance, with any change of several.

    Sums of the elements' bits in 64 bits, whole numbers without rounding, along rows and along
    columns, each with its own odd factor so that places count. None where there is no plain memory
    to read (meta, sharded tensors).
    """
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return None
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        bits = flat.view(torch.uint8 if flat.element_size() != 4 else torch.int32)
        wide = 1 << 12
        whole = bits.numel() // wide * wide
        table = bits[:whole].view(whole // wide, wide)
        parts = [table.sum(1, dtype=torch.int64), table.sum(0, dtype=torch.int64)]
        parts.append(bits[whole:].to(torch.int64))
        sums = []
        for part in parts:
            places = 2 * torch.arange(part.numel(), device=part.device) + 1
            sums.append((part * places * 0x9E3779B97F4A7C1).sum())
        return tuple(torch.stack(sums).tolist())


def _samples(tensor: Tensor) -> Tensor:
    """At most SAMPLES elements, evenly spaced in row-major order: [n] float64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
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
