"""Features of an encoder at any mixture Σ_t c_t τ_t of task vectors, many mixtures at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import tangentfast as tf
from tangentfast.fingerprint import Base, Weights
from tangentfast.study.evaluation.span import combine, extend

if TYPE_CHECKING:
    from tangentfast.study.data import Split
    from tangentfast.study.encoders import Encoder

Reduce: TypeAlias = Callable[[Tensor, Tensor], Tensor]

ROWS = 8192  # features that are recombined at a time: 17 MB of 512 float32 each


class Request(NamedTuple):
    """What one split is wanted for; `Mixtures.sweep` describes the fields."""

    split: Split
    coefficients: Tensor
    reduce: Reduce | Sequence[Reduce]


class Mixtures:
    """One encoder, T task vectors, and the model of a regime: linear in τ, or not.

    With `tangent` the model is f(x; θ0) + J(x) Σ_t c_t τ_t. A split costs one pass of 1 + 2r
    forwards for any number of mixtures, r the rank of their coefficients (see `span.extend`). What
    the pass found, f(x; θ0) and r derivatives, is kept within `keep_bytes`, and a later sweep
    computes only the directions outside their span. With T = 8 tasks, addition and single tasks
    cost 5 forwards of each split (J Στ alone 3), and negation then none of the task's own split;
    what needs every J τ_t, such as all subsets, costs 1 + 2·8 = 17 at once or 18 after addition.
    So nothing has to be planned ahead: a sweep that finds something new pays one forward for it.

    Without `tangent` the model is f(x; θ0 + Σ_t c_t τ_t): one forward for each different mixture,
    merged in place into a private copy whose θ0 is copied back afterwards, bit for bit.

    Args:
        encoder: its module is copied, to `device` and in evaluation mode; never changed.
        vectors: T task vectors of this module; plain mappings of names to tensors do too.
        tangent: whether the model is the linearized one.
        device: where features are computed.
        batch: images in a pass.
        keep_bytes: what the kept features of all splits together may take on the CPU; the least
            recently used split goes first.

    Raises:
        TypeError, ValueError: no vector, a name or shape that the module does not have, a number
            that is not finite, or a vector that is a difference to other weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        vectors: Sequence[Mapping[str, Tensor]],
        tangent: bool,
        *,
        device: str = "cpu",
        batch: int = 128,
        keep_bytes: int = 1 << 30,
    ) -> None:
        if batch < 1:
            raise ValueError(f"Mixtures: batch is {batch}, expected at least 1")
        self.encoder = encoder
        self.tangent = tangent
        self.device = torch.device(device)
        self.batch = batch
        self.keep_bytes = keep_bytes
        self.module: nn.Module = copy.deepcopy(encoder.module).to(self.device).eval()
        self._weights: dict[str, Tensor] = dict[str, Tensor](
            self.module.named_parameters(remove_duplicate=False)
        )
        if not tangent:  # merge_ writes buffers too, a tangent has none
            self._weights |= dict(self.module.named_buffers(remove_duplicate=False))
        self._dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        _check(vectors, self._weights)
        # Plain mappings: the base is checked once, above, not at each merge.
        self.vectors = [{n: t.to(self.device) for n, t in v.items()} for v in vectors]
        self._saved: dict[int, _SavedFeatures] = {}
        names = {} if tangent else dict.fromkeys(name for v in self.vectors for name in v)
        self._theta0 = {name: self._weights[name].detach().clone() for name in names}

    def sweep(
        self, split: Split, coefficients: Tensor, reduce: Reduce | Sequence[Reduce]
    ) -> Tensor:
        """Reduced features of every image of a split at each of G mixtures.

        Args:
            split: N images.
            coefficients: [G, T], any real dtype; row g stands for Σ_t coefficients[g, t] τ_t.
            reduce: ``reduce(features [m, D], index [m]) -> [m]`` or ``[m, ...]``, image by image:
                an entry of the result depends on that feature and index alone, and an image may
                occur several times, for several mixtures. Features are on `device`, float32 or
                wider; the index into the split is int64 on the CPU. Or G such functions, one a row.

        Returns:
            [G, N, ...] on the CPU; features themselves are never all in memory.

        Raises:
            ValueError: no rows, rows of another length, numbers that are not finite, no images.
            FloatingPointError: the features at a mixture are not finite.
        """
        return self.sweeps([Request(split, coefficients, reduce)])[0]

    @torch.no_grad()
    def sweeps(self, requests: Sequence[Request]) -> list[Tensor]:
        """`sweep` for several requests, a list of their results.

        Cheaper than one by one: requests for one split share its pass when `tangent`, and otherwise
        a mixture that several ask for is merged once.
        """
        answers = [_Answer(request, len(self.vectors)) for request in requests]
        if self.tangent:
            by_split: dict[int, list[_Answer]] = {}
            for answer in answers:
                by_split.setdefault(id(answer.split), []).append(answer)
            for together in by_split.values():
                self._linear(together)
        else:
            self._merged(answers)
        return [answer.values for answer in answers]

    def _merged(self, answers: Sequence[_Answer]) -> None:
        users: dict[tuple[float, ...], dict[int, list[int]]] = {}  # mixture -> answer -> rows
        for a, answer in enumerate(answers):
            for g, row in enumerate(answer.rows.tolist()):
                users.setdefault(tuple(row), {}).setdefault(a, []).append(g)
        for mixture, wanted in users.items():
            used = [t for t, c in enumerate(mixture) if c]
            try:
                if used:
                    tf.merge_(
                        self.module, [self.vectors[t] for t in used], [mixture[t] for t in used]
                    )
                for a, rows in wanted.items():
                    for index in self._batches(answers[a].split):
                        features = _features(self.module(self._images(answers[a].split, index)))
                        for g in rows:
                            answers[a].take([g], features[None], index)
            finally:
                for name, theta0 in self._theta0.items():
                    self._weights[name].copy_(theta0)

    def _linear(self, answers: Sequence[_Answer]) -> None:
        """Answers for one split, from one pass."""
        split = answers[0].split
        saved = self._saved.pop(id(split), None)
        rows = torch.cat([answer.rows for answer in answers])
        known = rows.new_empty(0, rows.shape[1]) if saved is None else saved.basis
        basis = extend(known, rows)
        directions = [self._direction(row) for row in basis[len(known) :].tolist()]
        # Column 0 is f(x; θ0), which every mixture has once.
        tables = [
            torch.cat([a.rows.new_ones(len(a.rows), 1), combine(basis, a.rows)], 1) for a in answers
        ]
        old = [] if saved is None else saved.features
        buffers: list[Tensor] | None = []
        for index in self._batches(split):
            fresh = []
            if directions or not old:
                fresh = self._pass(split, index, directions)[1 if old else 0 :]
                if not int(index[0]):
                    buffers = self._buffers(len(split), fresh, old)
                for whole, part in zip(buffers or [], fresh, strict=buffers is not None):
                    whole[index] = part.cpu()
            parts = [f[index].to(self.device) for f in old]
            features = torch.stack([*parts, *fresh])  # [1 + r, n, D]
            for answer, table in zip(answers, tables, strict=True):
                table = table.to(self.device, features.dtype)
                for chosen in answer.chunks(max(1, ROWS // len(index))):
                    mixed = torch.einsum("gk,knd->gnd", table[chosen], features)
                    answer.take(chosen, mixed, index)
        if buffers is not None:
            self._saved[id(split)] = _SavedFeatures(split, basis, old + buffers)

    def _pass(
        self, split: Split, index: Tensor, directions: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        """f(x; θ0) and J(x) τ for each direction τ: [n, D] each."""
        images = self._images(split, index)
        if not directions:
            return [_features(self.module(images))]
        out, tangents = tf.jvp(self.module, (images,), params=directions)
        return [_features(out), *map(_features, tangents)]

    def _direction(self, row: Sequence[float]) -> dict[str, Tensor]:
        """Σ_t row[t] τ_t, in float32 at least."""
        used = [t for t, c in enumerate(row) if c]
        if len(used) == 1 and row[used[0]] == 1:
            return self.vectors[used[0]]
        zero = {
            name: torch.zeros_like(tensor, dtype=_at_least_float32(tensor))
            for t in used
            for name, tensor in self.vectors[t].items()
        }
        return tf.merge_(zero, [self.vectors[t] for t in used], [row[t] for t in used])

    def _buffers(self, images: int, fresh: list[Tensor], old: list[Tensor]) -> list[Tensor] | None:
        """Memory for `fresh` [n, D] of a whole split [images, D], where the budget has it."""
        size = images * fresh[0].shape[1] * fresh[0].element_size() * (len(fresh) + len(old))
        if size > self.keep_bytes:
            return None
        while sum(saved.bytes for saved in self._saved.values()) + size > self.keep_bytes:
            del self._saved[next(iter(self._saved))]
        return [torch.empty(images, f.shape[1], dtype=f.dtype) for f in fresh]

    def _batches(self, split: Split) -> Iterator[Tensor]:
        return iter(torch.arange(len(split)).split(self.batch))

    def _images(self, split: Split, index: Tensor) -> Tensor:
        images = split.images(index).to(self.device)  # as uint8: a quarter of the transfer
        return self.encoder.normalize(images).to(self._dtype)


@dataclass(frozen=True)
class _SavedFeatures:
    """f(x; θ0) and J(x) τ for each row τ of `basis`, of a whole split: [N, D] each, on the CPU."""

    split: Split  # held, so that no other split gets its id
    basis: Tensor
    features: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(f.nbytes for f in self.features)


class _Answer:
    """A request, checked, and its result as it fills."""

    values: Tensor

    def __init__(self, request: Request, vectors: int) -> None:
        rows = request.coefficients
        if rows.ndim != 2 or rows.shape[1] != vectors or not len(rows):
            raise ValueError(
                f"Mixtures: coefficients are {list(rows.shape)}, expected [G, {vectors}]: at least "
                "one row, a column for each task vector"
            )
        self.split = request.split
        self.rows = rows.detach().to("cpu", torch.float64)
        if not self.rows.isfinite().all():
            bad = int((~self.rows.isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"Mixtures: coefficients[{bad}] is {self.rows[bad].tolist()}, expected finite "
                "numbers"
            )
        if not len(self.split):
            raise ValueError("Mixtures: the split has no images, expected at least one")
        reduce = request.reduce
        self.reducers = list(reduce) if isinstance(reduce, Sequence) else [reduce] * len(rows)
        if len(self.reducers) != len(rows):
            raise ValueError(
                f"Mixtures: {len(self.reducers)} functions in reduce for {len(rows)} rows of "
                "coefficients, expected one each"
            )

    def chunks(self, most: int) -> Iterator[list[int]]:
        """Rows in order, at most `most` at a time, of one function each."""
        for _, group in groupby(range(len(self.rows)), key=lambda g: id(self.reducers[g])):
            rows = list(group)
            yield from (rows[i : i + most] for i in range(0, len(rows), most))

    def take(self, rows: list[int], features: Tensor, index: Tensor) -> None:
        """Reduce the features [len(rows), n, D] of the images index [n] at mixtures `rows`."""
        if not features.isfinite().all():
            bad = int((~features.isfinite()).flatten(1).any(1).nonzero()[0])
            raise FloatingPointError(
                f"Mixtures: features at coefficients {self.rows[rows[bad]].tolist()} are not "
                "finite; expected finite ones: use smaller coefficients, or fine-tune with a "
                "smaller learning rate or in float32"
            )
        got = self.reducers[rows[0]](features.flatten(0, 1), index.repeat(len(rows))).cpu()
        if got.shape[:1] != (len(rows) * len(index),):
            raise ValueError(
                f"Mixtures: reduce gave {list(got.shape)} for {len(rows) * len(index)} features, "
                "expected one entry for each"
            )
        if not hasattr(self, "values"):
            self.values = got.new_empty(len(self.rows), len(self.split), *got.shape[1:])
        place = torch.tensor(rows)[:, None]
        self.values[place, index] = got.view(len(rows), len(index), *got.shape[1:])


def _features(out: object) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim != 2 or not out.is_floating_point():
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"Mixtures: the encoder returned {got}, expected float features [n, D]")
    return out.to(_at_least_float32(out))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(vectors: Sequence[Mapping[str, Tensor]], weights: Mapping[str, Tensor]) -> None:
    if isinstance(vectors, Mapping) or not vectors:
        got = "one mapping" if isinstance(vectors, Mapping) else "none"
        raise TypeError(f"Mixtures: vectors should be a sequence of at least one, is {got}")
    for t, vector in enumerate(vectors):
        for name, tensor in vector.items():
            what = f"Mixtures: vectors[{t}][{name!r}]"
            if name not in weights:
                raise ValueError(f"{what} is no parameter of the encoder; expected its own names")
            if tensor.shape != weights[name].shape:
                raise ValueError(
                    f"{what} has shape {tuple(tensor.shape)}, the encoder has "
                    f"{tuple(weights[name].shape)}"
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{what} has numbers that are not finite; fine-tune again with a smaller "
                    "learning rate"
                )
        base = getattr(vector, "base", None)
        if not isinstance(base, Base):
            continue
        if not Weights({name: weights[name] for name in vector}).are(base, vector):
            raise ValueError(
                f"Mixtures: vectors[{t}] is a difference to {base}, and the encoder has other "
                "weights; load those that it was fine-tuned from"
            )
