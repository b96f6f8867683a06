"""Where a task vector comes from: a name and sampled hashes of the pre-trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tangentfast._torch import version
from tangentfast.memory import is_sharded

SAMPLES = 64  # elements of each tensor: a ViT-B takes a millisecond
HALVES = (torch.float16, torch.bfloat16)
DIGITS = 8  # of each hash in a print


@dataclass(frozen=True)
class Base:
    """The pre-trained weights θ0 that a task vector is a difference to.

    Attributes:
        name: what people call them, e.g. the model's class or the checkpoint's file name.
        fingerprint: `fingerprint` of θ0 restricted to the vector's own parameter names.
        prints: parameter name -> three hashes of its samples in one string: exact, rounded to
            float16, and to bfloat16. Empty where they are not known.
    """

    name: str
    fingerprint: str
    prints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor]) -> Base:
        """The base whose weights these are; raises as `fingerprint`."""
        samples = Samples(tensors)
        return cls(name, samples.fingerprint(tensors), {n: samples.print(n) for n in tensors})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Base:
        """Of what `to_json` gave; prints may be missing, in files of before they were."""
        return cls(entry["name"], entry["fingerprint"], dict(entry.get("prints", {})))

    def to_json(self) -> dict[str, Any]:
        """The attributes as a dictionary of strings."""
        return {"name": self.name, "fingerprint": self.fingerprint, "prints": dict(self.prints)}

    def is_same(self, other: Base, names: Collection[str], other_names: Collection[str]) -> bool:
        """Whether two vectors, or a vector and a τ, are differences to the same weights.

        Compared in the names that both have. Without prints the fingerprint says it where both
        cover the same names, and the name of the base elsewhere.
        """
        if self.prints and other.prints:
            common = [n for n in names if n in other_names and n in self.prints]
            return all(
                _same_print(self.prints[n], other.prints[n]) for n in common if n in other.prints
            )
        if set(self.prints or names) == set(other.prints or other_names):
            return self.fingerprint == other.fingerprint
        return self.name == other.name

    def __str__(self) -> str:
        return f"{self.name} [{self.fingerprint[:12]}]"


class Samples:
    """At most 64 elements of each of several tensors, evenly spaced, the first and last among them.

    Args:
        tensors: name -> tensor of any shape and dtype. Of a DTensor the whole is gathered, one at a
            time: every rank of its mesh must come here.

    Raises:
        TypeError: a tensor on meta, which has no elements.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Tensor] = {}  # [n] float64, on the CPU
        # One conversion and transfer for each dtype and device, not for each tensor.
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.is_meta:
                    raise TypeError(
                        f"fingerprint: {name!r} is on meta, which holds no numbers; expected the "
                        "weights themselves: load them first"
                    )
                whole = tensor
                if is_sharded(tensor):
                    whole = tensor.full_tensor()  # type: ignore[attr-defined]
                self.shapes[name] = tuple(tensor.shape)
                group = groups.setdefault((whole.dtype, whole.device), [])
                group.append((name, _samples(whole.detach())))
            for members in groups.values():
                parts = [part for _, part in members]
                together = torch.cat(parts).double().cpu().split([p.numel() for p in parts])
                self.values.update(zip((name for name, _ in members), together, strict=True))

    def fingerprint(self, names: Collection[str]) -> str:
        """`fingerprint` of the tensors of these names."""
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(repr((name, self.shapes[name])).encode())
            digest.update(_bytes(self.values[name]))
        return digest.hexdigest()

    def print(self, name: str) -> str:
        """The hashes of `Base.prints`."""
        values = [self.values[name], *(h[name] for h in self._rounded)]
        return "".join(self._hash(name, v) for v in values)

    @cached_property
    def _rounded(self) -> list[dict[str, Tensor]]:
        """The values in each half precision, as float64; converted all at once."""
        if not self.values:
            return []
        together = torch.cat(list(self.values.values()))
        sizes = [v.numel() for v in self.values.values()]
        rounded = [together.to(dtype).double().split(sizes) for dtype in HALVES]
        return [dict(zip(self.values, parts, strict=True)) for parts in rounded]

    def _hash(self, name: str, values: Tensor) -> str:
        shape = repr(self.shapes[name]).encode()
        return hashlib.blake2b(shape + _bytes(values), digest_size=DIGITS // 2).hexdigest()


class Weights:
    """Weights that are merged into: what they were before merge_ changed them, where it did.

    Args:
        tensors: as for `Samples`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.prints: dict[str, tuple[str, ...]] = {}  # of what they were, and vectors knew them as
        for name, tensor in tensors.items():
            owner, place = _memory(tensor)
            written, before = _merged.get(owner, {}).get(place, (-1, ()))
            if written == version(tensor) and not tensor.is_inference():
                self.prints[name] = before
        self._now: dict[str, str] = {}
        self._sample([n for n in tensors if n not in self.prints])
        self.prints |= {n: (p,) for n, p in self._now.items()}
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def are(self, base: Base, names: Collection[str]) -> bool:
        """Whether they are a vector's base in its `names`, as far as both know them.

        Each as it is now, or as it was before merges that changed nothing else. A base of before
        there were prints is compared by its fingerprint, of all `names`, as they are now.
        """
        if not base.prints:
            key = tuple(names)
            if key not in self._fingerprints:
                self._fingerprints[key] = fingerprint({n: self.tensors[n] for n in names})
            return base.fingerprint == self._fingerprints[key]
        known = {n: base.prints[n] for n in names if n in base.prints}
        others = [n for n, p in known.items() if p not in self.prints[n]]  # most are, bit for bit
        others = [n for n in others if not any(_same_print(known[n], p) for p in self.prints[n])]
        self._sample([n for n in others if n not in self._now])
        if not all(_same_print(known[n], self._now[n]) for n in others):
            return False
        self.prints |= {n: (*self.prints[n], self._now[n]) for n in others}
        return True

    def merged(self) -> None:
        """Remember them: what is now in the tensors is these and what was merged into them."""
        for name, tensor in self.tensors.items():
            owner, place = _memory(tensor)
            _merged.setdefault(owner, {})[place] = version(tensor), self.prints[name]

    def _sample(self, names: Collection[str]) -> None:
        samples = Samples({n: self.tensors[n] for n in names})
        self._now |= {n: samples.print(n) for n in names}


# Memory -> its version when merge_ had written it, and the prints of what it was before.
_merged: Any = WeakIdKeyDictionary()


def _memory(tensor: Tensor) -> tuple[object, Hashable]:
    """What lives as long as a tensor's memory, and where in it the tensor is.

    Tensors of a state dict are new ones in each, on the same storages.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor, None
    return tensor.untyped_storage(), (tensor.storage_offset(), tensor.shape, tensor.stride())


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sampled SHA-256 of named tensors, in hexadecimal; independent of their order and device.

    It covers every name and shape, and at most 64 evenly spaced elements of each tensor, as
    float64, the first and last among them. Sampled means: two models that differ elsewhere only
    have the same fingerprint. That tells one pre-trained model from another, and a base from the
    same base after training or merging; it is no checksum of a file.

    Args:
        tensors: name -> tensor of any shape and dtype; DTensors as for `Samples`.

    Raises:
        TypeError: a tensor on meta.
    """
    return Samples(tensors).fingerprint(tensors)


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


def _same_print(one: str, other: str) -> bool:
    """Whether two prints are of the same weights, cast to a half precision in one of both or not.

    Rounded and exact hash agree where every sample is representable.
    """
    parts = [[p[i : i + DIGITS] for i in range(0, len(p), DIGITS)] for p in (one, other)]
    (exact, *halves), (other_exact, *other_halves) = parts
    return exact == other_exact or any(
        a == b and (a in (exact, other_exact)) for a, b in zip(halves, other_halves, strict=True)
    )


def _bytes(values: Tensor) -> bytes:
    return values.numpy().astype("<f8", copy=False).tobytes()


def _samples(tensor: Tensor) -> Tensor:
    """At most SAMPLES elements in row-major order, in the tensor's dtype and on its device: [n]."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() <= SAMPLES:
        return tensor.reshape(-1)
    if tensor.is_contiguous():
        return tensor.view(-1)[_places(tensor.numel(), tensor.device)]
    return tensor[_indices(tensor.shape, tensor.device)]  # of any dtype, which take() is not


@lru_cache(maxsize=1024)
def _places(total: int, device: torch.device) -> Tensor:
    """SAMPLES evenly spaced places among `total`, as int64."""
    places = [i * (total - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
    return torch.tensor(places, dtype=torch.int64, device=device)


@lru_cache(maxsize=1024)
def _indices(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """The places of a tensor of this shape: an index along each dimension."""
    rest, indices = _places(shape.numel(), device), list[Tensor]()
    for size in reversed(shape):
        indices.insert(0, rest % size)
        rest = rest // size
    return tuple(indices)
