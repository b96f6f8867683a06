"""Task vectors: τ = θ − θ0 by parameter name, their arithmetic, and their file format."""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tangentfast.fingerprint import Base, fingerprint
from tangentfast.merge import gram

Source: TypeAlias = nn.Module | Mapping[str, Any] | str | os.PathLike[str]

FORMAT = "tangentfast.task_vector"
FORMAT_VERSION = 1


class TaskVector(Mapping[str, Tensor]):
    """A task vector τ: parameter name -> tensor (Ilharco et al. 2023, arXiv:2212.04089).

    A read-only mapping with the arithmetic of a vector space: ``0.4 * tv1 - tv2``. Names missing
    in one operand count as zero. Tensors are detached and shared with the caller, not copied.

    Args:
        tensors: name -> floating-point tensor of any shape and device.
        base: the weights that this is a difference to, when known.
        selection: which parameters were selected, in words; ``"all"`` by default.

    Raises:
        TypeError: an entry is no floating-point or complex tensor.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, base: Base | None = None, selection: str = "all"
    ) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not (
                tensor.is_floating_point() or tensor.is_complex()
            ):
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"TaskVector: {name!r} is {got}, expected a floating-point tensor")
        self._tensors = _tie({name: tensor.detach() for name, tensor in tensors.items()})
        self.base = base
        self.selection = selection

    @classmethod
    def from_checkpoints(cls, pretrained: Source, finetuned: Source) -> TaskVector:
        """``finetuned − pretrained``, entry by entry, in float32 at least.

        Args:
            pretrained: a module, a state dict, or a file: ``.safetensors``, or ``.pt``, ``.pth``,
                ``.bin`` read with ``weights_only=True``. ``{"state_dict": ...}`` is unwrapped.
            finetuned: the same, of a model with the same floating-point entries.

        Returns:
            A vector over all floating-point entries, on the device of `pretrained`, in the wider
            of both dtypes and float32. Tied parameters share one tensor.

        Raises:
            ValueError: an entry is missing in one of both, shapes differ, or a file holds no state.
        """
        before, after = _floating_state(pretrained), _floating_state(finetuned)
        for here, there, where in ((before, after, "finetuned"), (after, before, "pretrained")):
            if missing := [name for name in here if name not in there]:
                raise ValueError(f"from_checkpoints: {where} has no {_listed(missing)}")
        differing = [n for n in before if before[n].shape != after[n].shape]
        if differing:
            shapes = (
                f"{n} {tuple(before[n].shape)} and {tuple(after[n].shape)}" for n in differing
            )
            raise ValueError(
                f"from_checkpoints: shapes of pretrained and finetuned differ: {_listed(shapes)}"
            )
        memo: dict[tuple[int, int], Tensor] = {}
        tau = {}
        for name, old in before.items():
            new = after[name]
            key = (id(old), id(new))
            if key not in memo:
                dtype = torch.promote_types(
                    torch.promote_types(old.dtype, new.dtype), torch.float32
                )
                memo[key] = new.to(old.device, dtype) - old.to(dtype)
            tau[name] = memo[key]
        return cls(tau, base=Base(_source_name(pretrained), fingerprint(before)))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The parameter names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """Counts, selection and base; never computes."""
        numbers = sum(t.numel() for t in {id(t): t for t in self.values()}.values())
        base = f", base={self.base}" if self.base else ""
        return (
            f"TaskVector({len(self)} tensors, {numbers:,} numbers, "
            f"selection={self.selection!r}{base})"
        )

    __hash__ = None  # type: ignore[assignment]  # mutable tensors
    __array_ufunc__ = None  # numpy numbers leave the arithmetic to us

    def __eq__(self, other: object) -> bool:
        """Same names and equal tensors."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            isinstance(other[n], Tensor) and torch.equal(self[n], other[n]) for n in self
        )

    def __add__(self, other: Mapping[str, Tensor]) -> TaskVector:
        """Sum over the union of names."""
        return self._combine(other, torch.add, lambda t: t.clone())

    def __radd__(self, other: object) -> TaskVector:
        """``0 + tv``, so that sum() works."""
        if isinstance(other, Real) and other == 0:
            return self
        return NotImplemented

    def __sub__(self, other: Mapping[str, Tensor]) -> TaskVector:
        """Difference over the union of names."""
        return self._combine(other, torch.sub, torch.neg)

    def __neg__(self) -> TaskVector:
        """The negated vector: forgetting the task."""
        return self._map(torch.neg)

    def __mul__(self, factor: float) -> TaskVector:
        """Every entry times a number."""
        if not isinstance(factor, Real) or isinstance(factor, bool):
            return NotImplemented
        return self._map(lambda t: t * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        """Every entry divided by a number."""
        if not isinstance(divisor, Real) or isinstance(divisor, bool):
            return NotImplemented
        return self._map(lambda t: t / float(divisor))

    def norm(self) -> float:
        """Global L2 norm, accumulated in float64; a tied parameter counts once."""
        return math.sqrt(gram([self]).item())

    def dot(self, other: Mapping[str, Tensor]) -> float:
        """⟨self, other⟩ over the common names, accumulated in float64; differing shapes raise."""
        return float(gram([self, other])[0, 1])

    def cosine(self, other: Mapping[str, Tensor]) -> float:
        """Cosine of the angle to `other`; NaN when one of both is zero."""
        g = gram([self, other])
        return float(g[0, 1] / (g[0, 0] * g[1, 1]).sqrt())

    def to(self, *args: Any, **kwargs: Any) -> TaskVector:
        """A vector on another device or of another floating dtype; arguments of `Tensor.to`."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with base, selection and versions in its metadata.

        The file appears complete or not at all: it is written beside `path` and then renamed.

        Raises:
            TypeError: a dtype that the format has not (complex128; complex64 before its 0.6).
        """
        first: dict[int, str] = {}
        aliases = {n: first[id(t)] for n, t in self.items() if first.setdefault(id(t), n) != n}
        own = {n: t for n, t in self.items() if n not in aliases}
        # The format holds no views: copy what is not contiguous or shares memory with another.
        users = Counter(t.untyped_storage().data_ptr() for t in own.values())
        tensors = {
            n: t.clone(memory_format=torch.contiguous_format)
            if users[t.untyped_storage().data_ptr()] > 1
            else t.contiguous()
            for n, t in own.items()
        }
        base = {"name": self.base.name, "fingerprint": self.base.fingerprint} if self.base else None
        header = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "names": json.dumps(list(self)),
            "aliases": json.dumps(aliases),
            "base": json.dumps(base),
            "selection": self.selection,
            "package": f"tangentfast {metadata.version('tangentfast')}",
        }
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.touch()
            mode = part.stat().st_mode  # what the user's umask says; safetensors makes it 0600
            try:
                save_file(tensors, part, metadata=header)
            except KeyError as error:
                raise TypeError(
                    f"save: safetensors {metadata.version('safetensors')} cannot hold {error}. "
                    "Expected another dtype: convert the entries that have it."
                ) from error
            part.chmod(mode)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TaskVector:
        """Read a file that `save` wrote, onto `device`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, no task vector, or of a newer format version, or
                its entries are not those that it names.
        """
        what = f"TaskVector.load: {path}"
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                names, aliases, base = _parse_header(what, header)
                stored = {aliases.get(name, name) for name in names}
                if missing := sorted(stored - set(file.keys())):
                    raise ValueError(f"{what} lacks the tensors {_listed(missing)}")
                tensors = {name: file.get_tensor(name) for name in stored}
        except SafetensorError as error:
            raise ValueError(f"{what} is no readable safetensors file: {error}") from error
        ordered = {name: tensors[aliases.get(name, name)] for name in names}
        return cls(ordered, base=base, selection=header.get("selection", "all"))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TaskVector:
        done = {key: function(t) for key, t in {id(t): t for t in self.values()}.items()}
        tensors = {name: done[id(t)] for name, t in self.items()}
        return TaskVector(tensors, base=self.base, selection=self.selection)

    def _combine(
        self,
        other: Mapping[str, Tensor],
        both: Callable[[Tensor, Tensor], Tensor],
        other_alone: Callable[[Tensor], Tensor],
    ) -> TaskVector:
        if not isinstance(other, Mapping):
            return NotImplemented
        other = other if isinstance(other, TaskVector) else TaskVector(other)
        base = _common_base(self, other)
        memo: dict[tuple[int, int], Tensor] = {}  # tied names stay tied
        tensors = {}
        for name in dict.fromkeys([*self, *other]):
            mine, theirs = self._tensors.get(name), other._tensors.get(name)
            key = (id(mine), id(theirs))
            if key not in memo:
                if theirs is None:
                    memo[key] = self[name].clone()
                elif mine is None:
                    memo[key] = other_alone(theirs)
                elif mine.shape != theirs.shape:  # never broadcast
                    raise ValueError(
                        f"TaskVector: {name!r} has shape {tuple(mine.shape)} on the left, "
                        f"{tuple(theirs.shape)} on the right"
                    )
                else:
                    memo[key] = both(mine, theirs)
            tensors[name] = memo[key]
        selection = " + ".join(dict.fromkeys([self.selection, other.selection]))
        return TaskVector(tensors, base=base, selection=selection)


def _common_base(left: TaskVector, right: TaskVector) -> Base | None:
    """The base of a combination; warns when the operands are differences to different weights.

    A fingerprint covers the names of its own vector: it is compared, and kept, only for the same.
    """
    if left.base and right.base:
        comparable = left.keys() == right.keys()
        same = left.base.name == right.base.name
        if left.base != right.base if comparable else not same:
            warnings.warn(
                f"TaskVector: combining vectors of different bases, {left.base} and {right.base}",
                stacklevel=4,
            )
    for vector, other in ((left, right), (right, left)):
        if vector.base and other.keys() <= vector.keys():
            return vector.base
    return None


def _tie(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same mapping, where tensors that are the same memory become one object."""
    memo: dict[object, Tensor] = {}

    def place(tensor: Tensor) -> object:
        if tensor.numel() == 0:
            return id(tensor)
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    return {name: memo.setdefault(place(t), t) for name, t in tensors.items()}


def _floating_state(source: Source) -> dict[str, Tensor]:
    """The floating-point entries of a module, a state dict or a file."""
    state: Any = source
    if isinstance(source, nn.Module):
        state = source.state_dict()
    elif isinstance(source, str | os.PathLike):
        state = _read(Path(source))
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(
            f"from_checkpoints: {_source_name(source)} holds a {type(state).__name__}, "
            "expected a state dict"
        )
    floating = {
        name: entry.detach()
        for name, entry in state.items()
        if isinstance(entry, Tensor) and entry.is_floating_point()
    }
    if not floating:
        raise ValueError(f"from_checkpoints: {_source_name(source)} has no floating-point tensor")
    return _tie(floating)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"from_checkpoints: {path} is no safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(
            f"from_checkpoints: {path} ends in {path.suffix!r}, "
            "expected .safetensors, .pt, .pth or .bin"
        )
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"from_checkpoints: {path} holds more than tensors, and unpickling anything else runs "
            "code; save model.state_dict() in its place"
        ) from error


def _source_name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return Path(source).name
    return type(source).__name__ if isinstance(source, nn.Module) else "state dict"


def _parse_header(
    what: str, header: Mapping[str, str]
) -> tuple[list[str], dict[str, str], Base | None]:
    """Names, aliases and base from a file's metadata."""
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{what} is no task vector: its metadata has format {header.get('format')!r}, "
            f"expected {FORMAT!r}; from_checkpoints reads checkpoints"
        )
    try:
        version = int(header["version"])
        names, aliases = json.loads(header["names"]), json.loads(header["aliases"])
        base = json.loads(header["base"])
        origin = Base(base["name"], base["fingerprint"]) if base is not None else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what} has damaged metadata: {error!r}") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{what} has format version {version}, this tangentfast reads up to "
            f"{FORMAT_VERSION}; upgrade tangentfast (written by {header.get('package')})"
        )
    return names, aliases, origin


def _listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {rest} more" if rest > 0 else "")
