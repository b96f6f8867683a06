"""Task vectors: τ = θ − θ0 by parameter name, their arithmetic, and their file format."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from fnmatch import fnmatchcase
from itertools import count
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tangentfast import vector_file
from tangentfast.checkpoints import Source, read_state, weights
from tangentfast.fingerprint import Base
from tangentfast.memory import tied
from tangentfast.merge import gram
from tangentfast.names import close_names

RESERVED = "__metadata__"


class TaskVector(Mapping[str, Tensor]):
    """A task vector τ: parameter name -> tensor (Ilharco et al. 2023, arXiv:2212.04089).

    A read-only mapping with the arithmetic of a vector space: ``0.4 * tv1 - tv2``. Names missing
    in one operand count as zero. Tensors are detached and shared with the caller, not copied.

    Args:
        tensors: name -> floating-point tensor of any shape and device.
        base: the weights that this is a difference to, when known.
        selection: which parameters were selected, in words; ``"all"`` by default.

    Raises:
        TypeError: a name is no string, an entry no floating-point or complex tensor.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, base: Base | None = None, selection: str = "all"
    ) -> None:
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"TaskVector: the name {name!r} is no string, expected one")
            if not isinstance(tensor, Tensor) or not (
                tensor.is_floating_point() or tensor.is_complex()
            ):
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"TaskVector: {name!r} is {got}, expected a floating-point tensor")
        self._tensors = tied({name: tensor.detach() for name, tensor in tensors.items()})
        self.base = base
        self.selection = selection

    @classmethod
    def from_checkpoints(cls, pretrained: Source, finetuned: Source) -> TaskVector:
        """``finetuned − pretrained``, entry by entry, in float32 at least.

        Args:
            pretrained: a module, a state dict, or a file: safetensors, or one of ``torch.save``,
                read with ``weights_only=True``, of whatever name. An entry such as
                ``{"state_dict": ...}`` or ``{"model": ...}`` is unwrapped, and what lies beside it
                is ignored.
            finetuned: the same, of a model with the same floating-point entries.

        Returns:
            A vector over all floating-point and complex entries, on the device of `pretrained`, in
            the wider of both dtypes and float32. Tied parameters share one tensor.

        Raises:
            ValueError: an entry is missing in one of both, shapes differ, or whole numbers do; a
                source has no weights, those of several models, of a part of one (a shard), of an
                adapter, quantised or otherwise not to be subtracted, or cannot be read.
            OSError: a file is not there or is a folder.
        """
        for source in (pretrained, finetuned):
            if isinstance(source, TaskVector):
                raise ValueError(
                    "from_checkpoints: a TaskVector is a difference already, expected two models"
                )
        name, old_state = read_state(pretrained)
        before, after = map(tied, weights(old_state, read_state(finetuned)[1]))
        memo: dict[tuple[int, int], Tensor] = {}
        tau = {}
        for entry, old in before.items():
            new = after[entry]
            key = (id(old), id(new))
            if key not in memo:
                dtype = torch.promote_types(
                    torch.promote_types(old.dtype, new.dtype), torch.float32
                )
                memo[key] = new.to(old.device, dtype) - old.to(dtype)
            tau[entry] = memo[key]
        return cls(tau, base=Base.of(name, before))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a parameter."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The parameter names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    # A mapping's own views look up every name again; merging walks over hundreds of them.

    def keys(self) -> KeysView[str]:
        """The parameter names."""
        return self._tensors.keys()

    def values(self) -> ValuesView[Tensor]:
        """The tensors."""
        return self._tensors.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Names and tensors."""
        return self._tensors.items()

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor of a parameter, or `default`."""
        return self._tensors.get(name, default)

    def select(self, *patterns: str) -> TaskVector:
        """The part of the vector whose names match one of the globs, such as ``"blocks.0.*"``.

        Its tensors are those of this vector; `selection` says what was selected.

        Raises:
            ValueError: a pattern matches no name.
        """
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self):
                raise ValueError(
                    f"select: {pattern!r} matches no name of the vector{close_names(pattern, self)}"
                )
        part = {n: t for n, t in self.items() if any(fnmatchcase(n, p) for p in patterns)}
        selection = " | ".join(patterns)
        if self.selection != "all":
            selection = f"{self.selection}: {selection}"
        known = self.base is not None and (self.base.prints or len(part) == len(self))
        return TaskVector(part, base=self.base if known else None, selection=selection)

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
        """Write a safetensors file with base, selection, versions and a digest in its metadata.

        The file appears complete or not at all, whoever writes or reads the same path meanwhile,
        and its folder must be there; see `tangentfast.files.replacing` for links, modes and pipes.
        Tensors come to the CPU one at a time; a tied one is written once.

        Raises:
            TypeError: a dtype that the format has not (complex128; complex64 before its 0.6), or a
                tensor without plain memory.
        """
        first: dict[int, str] = {}
        aliases = {n: first[id(t)] for n, t in self.items() if first.setdefault(id(t), n) != n}
        own = {n: t for n, t in self.items() if n not in aliases}
        if RESERVED in own:  # a name of the format: the parameter is stored under another
            stored = next(s for i in count(1) if (s := RESERVED + "_" * i) not in own)
            own[stored] = own.pop(RESERVED)
            aliases = {n: stored if o == RESERVED else o for n, o in aliases.items()}
            aliases[RESERVED] = stored
        base = self.base.to_json() if self.base else None
        contents = vector_file.Contents(list(self), aliases, base, self.selection, own)
        vector_file.write(path, contents)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        mmap: bool = False,
        verify: bool | None = None,
    ) -> TaskVector:
        """Read a file that `save` wrote, onto `device`.

        Args:
            path: the file.
            device: where the tensors are put.
            mmap: map the file in place of reading it: its pages are read when they are used. It
                must not change meanwhile: where it is overwritten the vector changes, and where it
                is cut short the process ends (SIGBUS). `save` does neither.
            verify: compare the digest that the file has with its bytes. None: where they are read,
                not where they are mapped, nor in a file of an earlier version, without a digest.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, no task vector, or of a newer format version; it
                is damaged; or ``verify=True`` and it has no digest.
        """
        what = f"TaskVector.load: {path}"
        contents = vector_file.read(what, path, device, mmap, verify)
        names, aliases, base = contents.names, contents.aliases, contents.base
        ordered = {name: contents.tensors[aliases.get(name, name)] for name in names}
        origin = Base.from_json(base) if base is not None else None
        return cls(ordered, base=origin, selection=contents.selection)

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
    """The base of a combination; warns when the operands are differences to different weights."""
    if left.base and right.base and not left.base.is_same(right.base, left.keys(), right.keys()):
        warnings.warn(
            f"TaskVector: combining vectors of different bases, {left.base} and {right.base}",
            stacklevel=4,
        )
    for vector, other in ((left, right), (right, left)):
        if vector.base and other.keys() <= vector.keys():
            return vector.base
    return None
