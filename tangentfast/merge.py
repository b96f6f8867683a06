"""Merging task vectors into a model in one pass, and their Gram matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tangentfast.fingerprint import Base, fingerprint
from tangentfast.ops import merge as op

Number: TypeAlias = float | int
Alphas: TypeAlias = (
    Number | Mapping[str, Number] | Sequence[Number | Mapping[str, Number]] | Tensor | np.ndarray
)
Vectors: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
T = TypeVar("T")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def merge_(
    base: T,
    vectors: Vectors,
    alphas: Alphas = 1.0,
    *,
    strict_base: bool = False,
    backend: str | None = None,
) -> T:
    """Add task vectors to a base in place: ``b ← round(b + Σ_k α_k v_k)`` for each parameter b.

    One pass over memory: every vector is read once, the base read and written once. The sum runs
    over k in order, in float32 (float64 when the base's tensor or a vector's is float64), and is
    rounded once; the result does not depend on the number of threads. Everything is checked before
    the first write: after an error, base is bit for bit what it was. (Ilharco et al. 2023,
    arXiv:2212.04089.)

    Args:
        base: what is changed. A module (parameters and floating-point buffers), a mapping of
            tensors such as a state dict, a `TaskVector`, or a `LinearizedModel`, whose τ is
            changed. Any floating dtype and layout. Tied parameters are merged once.
        vectors: one mapping name -> tensor, such as a `TaskVector`, or a sequence of K. A vector
            may leave names out; its tensors have the base's shapes and devices, any of float64,
            float32, float16, bfloat16, and may be the base's own memory.
        alphas: the coefficients; finite numbers, in one of these forms:

            - a number, for all vectors and parameters;
            - a mapping of parameter names or globs (``"blocks.*.attn.*"``) to numbers, for all
              vectors. The exact name wins over globs, and a longer glob over a shorter one; a
              vector's name that nothing matches, and a pattern that matches no name of the base,
              raise;
            - a sequence of K numbers or mappings, or a 1-D tensor or array: one for each vector;
            - a 2-D tensor or array [K, P]: row k is for vector k, column p for the base's p-th
              floating-point tensor, tied ones counted once, under their first name: of a module
              ``named_parameters()``, then those of ``named_buffers()`` that are in its state
              dict; of a mapping its own order; of a `LinearizedModel` ``tau``.
        strict_base: raise instead of warn when a vector is a difference to other weights.
        backend: ``"native"`` or ``"reference"``; None takes TANGENTFAST_BACKEND, or the best.

    Returns:
        base itself.

    Raises:
        TypeError, ValueError: something is not as described above; the message names it.
        RuntimeError: the backend named is not there.

    Warns:
        UserWarning: a vector's fingerprint differs from that of the base (see `fingerprint`).
            A base that has been merged into differs too: give all vectors in one call.
    """
    target = _target(base)
    rows = [vectors] if isinstance(vectors, Mapping) else list(vectors)
    for k, vector in enumerate(rows):
        if not isinstance(vector, Mapping):
            raise TypeError(
                f"merge_: vectors[{k}] is a {type(vector).__name__}, expected a TaskVector or a "
                "mapping of names to tensors"
            )
        _check_vector(f"vectors[{k}]", vector, target)
    coefficients = _Coefficients(alphas, len(rows), target)
    terms: dict[str, list[tuple[Tensor, float]]] = {name: [] for name in target.tensors}
    for k, vector in enumerate(rows):
        used: dict[str, str] = {}  # canonical name -> the name that the vector has it under
        one = coefficients.same(k)
        for name, tensor in vector.items():
            canonical = target.canonical[name]
            term = (tensor, coefficients.of(k, name) if one is None else one)
            if canonical not in used:
                used[canonical] = name
                terms[canonical].append(term)
            elif not _same_term(terms[canonical][-1], term):
                raise ValueError(
                    f"merge_: vectors[{k}] has differing tensors or alphas for {used[canonical]!r} "
                    f"and {name!r}, which are one tied parameter of the base; keep one of both"
                )
    for k, vector in enumerate(rows):
        _check_base(k, vector, target, strict_base)
    op.merge_(
        list(target.tensors.values()),
        [[tensor for tensor, _ in row] for row in terms.values()],
        [[alpha for _, alpha in row] for row in terms.values()],
        backend,
    )
    return base


def gram(vectors: Sequence[Mapping[str, Tensor]], *, backend: str | None = None) -> Tensor:
    """Inner products of K task vectors in one pass: ``G[i, j] = Σ_names ⟨v_i, v_j⟩``.

    Accumulated in float64, in an order that does not depend on the number of threads. A name that
    one vector lacks counts as zero; a parameter tied in all vectors counts once.

    Args:
        vectors: K mappings name -> floating-point tensor; a name has one shape and one device.
        backend: as for `merge_`.

    Returns:
        G [K, K] float64, symmetric; on the vectors' device, or the CPU when they are on several.

    Raises:
        TypeError, ValueError: no sequence of mappings, or a dtype, shape or device does not fit.
    """
    if isinstance(vectors, Mapping):
        raise TypeError("gram: vectors is one mapping, expected a sequence; write gram([vector])")
    rows: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
    for name in dict.fromkeys(name for vector in vectors for name in vector):
        owners = [k for k, vector in enumerate(vectors) if name in vector]
        row = [vectors[k][name] for k in owners]
        for k, tensor in zip(owners, row, strict=True):
            what, first = f"gram: vectors[{k}][{name!r}]", f"vectors[{owners[0]}]"
            _check_tensor(what, tensor, row[0], first)
        rows.setdefault(tuple((k, id(t)) for k, t in zip(owners, row, strict=True)), row)
    owner_lists = [[k for k, _ in key] for key in rows]
    return op.gram(list(rows.values()), owner_lists, len(vectors), backend)


@dataclass
class _Target:
    """What is merged into: `canonical` maps every known name to a key of `tensors`."""

    tensors: dict[str, Tensor]  # floating-point, tied ones once
    canonical: dict[str, str]
    others: dict[str, torch.dtype]  # entries that nothing can be merged into
    base: Base | None  # where the tensors themselves are a difference: their base


def _target(base: object) -> _Target:
    origin = getattr(base, "base", None)
    tau = getattr(base, "tau", None)
    if isinstance(base, nn.Module) and isinstance(tau, Mapping):
        entries = dict(tau)
    elif isinstance(base, nn.Module):
        kept = base.state_dict().keys()
        buffers = base.named_buffers(remove_duplicate=False)
        entries = dict(base.named_parameters(remove_duplicate=False))
        entries |= {name: buffer for name, buffer in buffers if name in kept}
    elif isinstance(base, Mapping):
        entries = {name: entry for name, entry in base.items() if isinstance(entry, Tensor)}
    else:
        raise TypeError(
            f"merge_: base is a {type(base).__name__}, expected a module, a mapping of tensors, "
            "a TaskVector or a LinearizedModel"
        )
    target = _Target({}, {}, {}, origin if isinstance(origin, Base) else None)
    seen: dict[object, str] = {}
    for name, entry in entries.items():
        if entry.dtype not in FLOATS:
            target.others[name] = entry.dtype
            continue
        _check_tensor(f"merge_: base[{name!r}]", entry)
        place = (entry.device, entry.data_ptr(), entry.dtype, entry.shape, entry.stride())
        first = seen.setdefault(place if entry.numel() else id(entry), name)
        target.canonical[name] = first
        if first == name:
            target.tensors[name] = entry
    return target


def _check_vector(what: str, vector: Mapping[str, Tensor], target: _Target) -> None:
    for name, tensor in vector.items():
        if name in target.others:
            raise ValueError(
                f"merge_: {what}[{name!r}] names a tensor of dtype {target.others[name]} in the "
                "base, which is left alone; drop it from the vector"
            )
        if name not in target.canonical:
            close = get_close_matches(name, target.canonical, n=3)
            hint = f"; close names are {', '.join(close)}" if close else ""
            raise ValueError(f"merge_: {what}[{name!r}] is not in the base{hint}")
        own = target.tensors[target.canonical[name]]
        if not _fits(tensor, own):
            _check_tensor(f"merge_: {what}[{name!r}]", tensor, own, "base")


def _fits(tensor: object, like: Tensor) -> bool:
    """Whether `_check_tensor` would pass, at a glance: models have hundreds of tensors."""
    return (
        type(tensor) is Tensor
        and tensor.dtype in FLOATS
        and tensor.layout is torch.strided
        and tensor.shape == like.shape
        and tensor.device == like.device
    )


def _check_tensor(
    what: str, tensor: object, like: Tensor | None = None, like_name: str = ""
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}, expected a tensor")
    if hasattr(tensor, "to_local"):
        raise TypeError(f"{what} is a DTensor; gather it with full_tensor() or merge unsharded")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}, expected float64, float32, float16 or bfloat16"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} has layout {tensor.layout}, expected dense; call to_dense()")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, {like_name} has {tuple(like.shape)}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{what} is on {tensor.device}, {like_name} on {like.device}; "
            f"move it with .to({str(like.device)!r})"
        )


def _same_term(a: tuple[Tensor, float], b: tuple[Tensor, float]) -> bool:
    return a[1] == b[1] and (a[0] is b[0] or (a[0].dtype == b[0].dtype and torch.equal(a[0], b[0])))


def _check_base(k: int, vector: Mapping[str, Tensor], target: _Target, strict: bool) -> None:
    """Warn, or raise when `strict`, when vector k is a difference to other weights."""
    expected = getattr(vector, "base", None)
    if not isinstance(expected, Base):
        return
    if target.base is None:
        named = {name: target.tensors[target.canonical[name]] for name in vector}
        got = Base("the base given", fingerprint(named))
        same = got.fingerprint == expected.fingerprint
    else:  # τ is merged into: both fingerprints cover their own names, and compare only for equal
        got = target.base
        comparable = vector.keys() == target.canonical.keys()
        same = got.fingerprint == expected.fingerprint if comparable else got.name == expected.name
    if same:
        return
    message = f"merge_: vectors[{k}] is a difference to {expected}, which is not {got}"
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


class _Coefficients:
    """alphas in any of their forms, checked when built, asked by vector and parameter name."""

    def __init__(self, alphas: Any, count: int, target: _Target) -> None:
        self.names = target.canonical
        self.columns = {name: p for p, name in enumerate(target.tensors)}
        self.table: list[list[float]] | None = None
        self.rows: list[tuple[str, float | dict[str, float]]] = []
        if isinstance(alphas, Tensor | np.ndarray):
            if alphas.ndim > 1:
                self.table = self._read_table(alphas, count)
                return
            alphas = alphas.tolist()
        if isinstance(alphas, Sequence) and not isinstance(alphas, str):
            if len(alphas) != count:
                raise ValueError(
                    f"merge_: alphas has {len(alphas)} entries, expected one for each of the "
                    f"{count} vectors"
                )
            for k, entry in enumerate(alphas):
                self.rows.append((f"alphas[{k}]", self._read(entry, f"alphas[{k}]")))
        else:
            self.rows = [("alphas", self._read(alphas, "alphas"))] * count

    def same(self, k: int) -> float | None:
        """The coefficient of vector k, where it is one for all parameters."""
        entry = self.rows[k][1] if self.table is None else None
        return entry if isinstance(entry, float) else None

    def of(self, k: int, name: str) -> float:
        """The coefficient of vector k for a parameter."""
        if self.table is not None:
            return self.table[k][self.columns[self.names[name]]]
        what, entry = self.rows[k]
        if isinstance(entry, float):
            return entry
        if name in entry:
            return entry[name]
        matching = [glob for glob in entry if fnmatchcase(name, glob)]
        if not matching:
            raise ValueError(
                f"merge_: {what} has no entry for {name!r}, a name of vectors[{k}]; "
                'add it, or a last resort under "*"'
            )
        return entry[max(matching, key=len)]

    def _read(self, entry: Any, what: str) -> float | dict[str, float]:
        if not isinstance(entry, Mapping):
            return _number(entry, what)
        for pattern in entry:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in self.names):
                close = get_close_matches(pattern, self.names, n=3)
                hint = f"; close names are {', '.join(close)}" if close else ""
                raise ValueError(f"merge_: {what}[{pattern!r}] matches no name of the base{hint}")
        return {pattern: _number(x, f"{what}[{pattern!r}]") for pattern, x in entry.items()}

    def _read_table(self, table: Tensor | np.ndarray, count: int) -> list[list[float]]:
        expected = (count, len(self.columns))
        if tuple(table.shape) != expected:
            raise ValueError(
                f"merge_: alphas has shape {tuple(table.shape)}, expected {expected}: one row for "
                "each vector, one column for each floating-point tensor of the base"
            )
        return [
            [_number(x, f"alphas[{k}, {p}]") for p, x in enumerate(row)]
            for k, row in enumerate(table.tolist())
        ]


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"merge_: {what} is {value!r}, expected a real number")
    number = float(value)
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"merge_: {what} is {number}, expected a finite number of float32's range")
    return number
