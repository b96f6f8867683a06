"""Merging task vectors into a model in one pass, and their Gram matrix."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tangentfast._torch import in_transform
from tangentfast.coefficients import Alphas, Coefficients
from tangentfast.fingerprint import Base, Weights
from tangentfast.interrupts import held
from tangentfast.memory import is_sharded
from tangentfast.names import listed
from tangentfast.ops import merge as op
from tangentfast.targets import Target, check_tensor, entries_of, numbers, partner

Vectors: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
T = TypeVar("T")

PLAIN = {Tensor, nn.Parameter}


def merge_(
    base: T,
    vectors: Vectors,
    alphas: Alphas = 1.0,
    *,
    strict_base: bool = False,
    backend: str | None = None,
) -> T:
    """Add task vectors to a base in place: ``b ← round(b + Σ_k α_k v_k)`` for each parameter b.

    One pass over memory: every vector is read once, the base read and written once. The terms are
    summed in the order of k and the base is added last, with twice the digits of the widest tensor
    (float32 among halves, float64 with a float32, a pair of float64 for a float64 base); the sum is
    rounded once. So it is never less exact than ``base + α Σ v``, whatever K is, and does not
    depend on the number of threads. (Ilharco et al. 2023, arXiv:2212.04089.)

    Everything is checked and allocated before the first write: after an error, base is bit for bit
    what it was. A signal that comes while base is written, such as Ctrl-C, waits: the merge is
    done and returns, and the signal is delivered three seconds later (to a loop of merges: before
    one of them writes), when it can no longer be taken for an error of this one.

    Args:
        base: what is changed. A module (parameters and floating-point buffers), a mapping of
            tensors such as a state dict, a `TaskVector`, or a `LinearizedModel`, whose τ is
            changed. Any floating or complex dtype and any layout. Tied parameters are merged once.
            DTensors are merged shard by shard, on each rank.
        vectors: one mapping name -> tensor, such as a `TaskVector`, or a sequence of K. A vector
            may leave names out; its tensors have the base's shapes and devices, any of float64,
            float32, float16, bfloat16 (complex ones for a complex parameter, DTensors placed alike
            for a DTensor), and may be the base's own memory.
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

            Where α is 0 the vector is not read: its NaN does not pass. Alphas that require grad
            raise, under grad mode: merge_ is not differentiable.
        strict_base: raise instead of warn when a vector is a difference to other weights.
        backend: ``"native"`` or ``"reference"``; None takes TANGENTFAST_BACKEND, or the best.

    Returns:
        base itself.

    Raises:
        TypeError, ValueError: something is not as described above; the message names it.
        RuntimeError: the backend named is not there, or base is of inference mode, and this is not.

    Warns:
        UserWarning: a vector is a difference to other weights than base (see `Base`). What merge_
            has added to this very memory, of vectors that know their base, does not count, until
            something else writes them.
            And after the write: a float16 base holds infinities now (float16 ends at 65504), or a
            ``running_var`` is negative, whose root batch norm takes.
    """
    entries, rows = entries_of(base), _rows(vectors)
    coefficients = Coefficients(alphas, len(rows))
    call = _plain_call(entries, rows, coefficients)
    looked_at = call is None  # what the op checks as well is left to it, in the plain case
    call = call or _call(entries, rows, coefficients)
    try:
        weights = _check_bases(base, entries, rows, strict_base)
        infinite = _infinite(call)
    except Exception:
        if not looked_at:
            _call(entries, rows, coefficients)  # a tensor that cannot be sampled has a name here
        raise
    with held():  # to the end: an exception of a handler means that nothing was written
        refusal = call.merge(backend)
        if refusal is not None and not looked_at:
            # The op counts the tensor that does not fit. Here it has a name, ties are no overlaps,
            # and complex numbers are pairs.
            again = any(map(torch.is_complex, call.bases)) or not isinstance(refusal, RuntimeError)
            call = _call(entries, rows, coefficients)
            refusal = call.merge(backend) if again else refusal
        if refusal is not None:
            raise refusal
        if weights is not None:
            weights.merged()
        _warn_of_results(call, infinite)
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
            what = f"gram: vectors[{k}][{name!r}]"
            check_tensor(what, tensor)
            if is_sharded(tensor):
                raise TypeError(f"{what} is a DTensor; gather it with full_tensor()")
            check_tensor(what, tensor, row[0], f"vectors[{owners[0]}]")
        rows.setdefault(tuple((k, id(t)) for k, t in zip(owners, row, strict=True)), row)
    owner_lists = [[k for k, _ in key] for key in rows]
    return op.gram(list(rows.values()), owner_lists, len(vectors), backend)


@dataclass
class _Call:
    """The op's arguments: bases, then for each its vectors and coefficients, one after another."""

    names: list[str]
    bases: list[Tensor]
    vectors: list[Tensor]
    counts: list[int]
    alphas: list[float]

    def merge(self, backend: str | None) -> Exception | None:
        """Merge; returns the error where the op refused, which has written nothing then."""
        try:
            op.merge_(self.bases, self.vectors, self.counts, self.alphas, backend)
        except (TypeError, ValueError, RuntimeError) as error:
            return error
        return None


def _plain_call(
    entries: Mapping[str, Tensor], rows: list[Mapping[str, Tensor]], coefficients: Coefficients
) -> _Call | None:
    """The call where all vectors have the same names and a number each; None elsewhere.

    Models have hundreds of tensors: what the op checks as well is left to it.
    """
    alphas = coefficients.same()
    if not rows or alphas is None or in_transform():
        return None
    names = list(rows[0])
    if any(list(row) != names for row in rows[1:]) or not {*map(type, names)} <= {str}:
        return None
    try:
        bases = [entries[name] for name in names]
    except KeyError:
        return None
    columns = [list(row.values()) for row in rows]
    if not {*map(type, bases), *map(type, chain(*columns))} <= PLAIN:
        return None
    vectors = (
        columns[0] if len(rows) == 1 else list(chain.from_iterable(zip(*columns, strict=True)))
    )
    return _Call(names, bases, vectors, [len(rows)] * len(names), alphas * len(names))


def _call(
    entries: Mapping[str, Tensor], rows: list[Mapping[str, Tensor]], coefficients: Coefficients
) -> _Call:
    """The call for any base, vectors and alphas; raises for what does not fit."""
    target = Target.of(entries)
    for k, vector in enumerate(rows):
        target.check(f"vectors[{k}]", vector)
    coefficients.fit(target.canonical, target.tensors)
    terms: dict[str, list[tuple[Tensor, float]]] = {name: [] for name in target.tensors}
    for k, vector in enumerate(rows):
        used: dict[str, str] = {}  # canonical name -> the name that the vector has it under
        for name, tensor in vector.items():
            canonical = target.canonical[name]
            term = (tensor, coefficients.of(k, name))
            if canonical not in used:
                used[canonical] = name
                terms[canonical].append(term)
            elif not _same_term(terms[canonical][-1], term):
                raise ValueError(
                    f"merge_: vectors[{k}] has differing tensors or alphas for {used[canonical]!r} "
                    f"and {name!r}, which are one tied parameter of the base; keep one of both"
                )
    call = _Call([], [], [], [], [])
    for name, row in terms.items():
        own = target.tensors[name]
        read = [(partner(tensor, own), alpha) for tensor, alpha in row if alpha]
        if read:
            call.names.append(name)
            call.bases.append(numbers(own))
            call.counts.append(len(read))
            call.vectors += [tensor for tensor, _ in read]
            call.alphas += [alpha for _, alpha in read]
    return call


def _rows(vectors: Any) -> list[Mapping[str, Tensor]]:
    """The vectors as a list of mappings."""
    if isinstance(vectors, Mapping):
        return [vectors]
    if isinstance(vectors, str | os.PathLike) or not isinstance(vectors, Collection):
        vectors = [vectors]
    rows = list(vectors)
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            hint = ""
            if isinstance(row, str | os.PathLike):
                hint = f"; read it first: TaskVector.load({str(row)!r})"
            raise TypeError(
                f"merge_: vectors[{k}] is a {type(row).__name__}, expected a TaskVector or a "
                f"mapping of names to tensors{hint}"
            )
    return rows


def _same_term(a: tuple[Tensor, float], b: tuple[Tensor, float]) -> bool:
    if a[1] != b[1] or a[0].dtype != b[0].dtype:
        return False
    if a[0] is b[0]:
        return True
    mine, theirs = partner(a[0], a[0]), partner(b[0], b[0])
    return torch.equal(mine, theirs)


def _check_bases(
    base: object,
    entries: Mapping[str, Tensor],
    rows: list[Mapping[str, Tensor]],
    strict: bool,
) -> Weights | None:
    """Warn, or raise when `strict`, of vectors that are differences to other weights.

    Returns:
        The weights that vectors know their base of, unless base is itself a difference.
    """
    origins = {k: _origin(row) for k, row in enumerate(rows)}
    origins = {k: origin for k, origin in origins.items() if isinstance(origin, Base)}
    if not origins:
        return None
    own, weights = _origin(base), None
    if not isinstance(own, Base):
        weights = Weights({name: entries[name] for k in origins for name in rows[k]})
    for k, origin in origins.items():
        if weights is not None:
            got, same = "the base given", weights.are(origin, rows[k])
        else:
            got, same = str(own), own.is_same(origin, entries, rows[k])
        if same:
            continue
        message = f"merge_: vectors[{k}] is a difference to {origin}, which is not {got}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return weights


def _origin(of: object) -> Any:
    return getattr(of, "base", None)


def _infinite(call: _Call) -> set[str]:
    """The names of float16 bases that hold infinities."""
    pairs = zip(call.names, call.bases, strict=True)
    return {name for name, base in pairs if base.dtype is torch.float16 and _has_infinity(base)}


def _has_infinity(tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    least, most = tensor.aminmax()  # 20 times as fast as isinf, but NaN hides the rest
    return bool(tensor.isinf().any() if least.isnan() else least.isinf() | most.isinf())


def _warn_of_results(call: _Call, infinite: set[str]) -> None:
    """Warn of results that are of no use: overflow of float16, negative variances."""
    if overflowed := sorted(_infinite(call) - infinite):
        warnings.warn(
            f"merge_: {listed(overflowed)} hold infinities now: float16 ends at 65504; merge into "
            "a float32 or bfloat16 base, or with smaller alphas",
            stacklevel=3,
        )
    variances = [i for i, name in enumerate(call.names) if name.endswith("running_var")]
    if below := [call.names[i] for i in variances if (call.bases[i] < 0).any()]:
        warnings.warn(
            f"merge_: {listed(below)} are negative now, and batch norm takes their root; leave "
            "running statistics out of the vectors, or estimate them again from data",
            stacklevel=3,
        )
