"""Merge and gram: weighted sums and inner products of many tensors in one pass over memory.

merge:  b ← round(b + Σ_k α_k v_k)          gram:  G[i, j] = Σ_names ⟨v_i, v_j⟩
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress, repeat
from operator import attrgetter

import torch
from torch import Tensor

from tangentfast.ops.contract import Op, Provider, define
from tangentfast.ops.merge import reference
from tangentfast.ops.merge.reference import split


@torch.no_grad()
def merge_(
    bases: Sequence[Tensor],
    vectors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float],
    backend: str | None = None,
) -> None:
    """In place: ``bases[i] ← round(bases[i] + Σ_k alphas[k] · vectors[k])``, k over its vectors.

    The terms are summed in the order of k and the base is added last, all with twice the digits of
    the widest tensor: float32 among halves, float64 with a float32, a pair of float64 for a float64
    base. The sum is rounded once, so that no other order of summation is more exact. All vectors
    are read as they were before any write, whatever memory they share with bases. Everything is
    checked and allocated, on all devices, before the first write. Not differentiable.

    Args:
        bases: tensors of any shape and layout; float64, float32, float16 or bfloat16.
        vectors: those of bases[0], then those of bases[1], ...; each of its base's shape and
            device, of any of these dtypes.
        counts: for each base the number of its vectors.
        alphas: for each vector its coefficient.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or bases share memory.
        RuntimeError: a base was made in inference mode, and this is not; or no such backend.
    """
    # The op has a kernel for shapes alone, which would do nothing, silently.
    if any(map(attrgetter("is_meta"), chain(bases, vectors))):
        raise ValueError("merge_: a tensor is on meta, expected tensors with memory")
    devices = {base.device for base in bases}
    providers = {device: MERGE.provider(device, backend) for device in devices}
    if len(devices) > 1:  # an op checks its own device, and would find a fault after another wrote
        vectors = list(chain(*reference.prepare(bases, split(vectors, counts))))
    for device, provider in providers.items():
        some = bases, vectors, counts, alphas
        if len(devices) > 1:
            some = _on(device, bases, vectors, counts, alphas)
        provider.run(*some)


def _on(
    device: torch.device,
    bases: Sequence[Tensor],
    vectors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
    """The part of a call that is about one device."""
    here = [base.device == device for base in bases]
    terms = list(chain.from_iterable(repeat(h, n) for h, n in zip(here, counts, strict=True)))
    return (
        list(compress(bases, here)),
        list(compress(vectors, terms)),
        list(compress(counts, here)),
        list(compress(alphas, terms)),
    )


@torch.no_grad()
def gram(
    rows: Sequence[Sequence[Tensor]],
    owners: Sequence[Sequence[int]],
    size: int,
    backend: str | None = None,
) -> Tensor:
    """Inner products ``G[owners[r][a], owners[r][b]] = Σ_r ⟨rows[r][a], rows[r][b]⟩``.

    Accumulated in float64 in an order that does not depend on the number of threads.

    Args:
        rows: for each name the tensors that have it, of one shape and device.
        owners: for each tensor its row and column in G; rising within a row.
        size: K.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`).

    Returns:
        G [K, K] float64, on the tensors' device; on the CPU when they are on several.
    """
    devices = list(dict.fromkeys(row[0].device for row in rows if row)) or [torch.device("cpu")]
    target = devices[0] if len(devices) == 1 else torch.device("cpu")
    total = torch.zeros(size, size, dtype=torch.float64, device=target)
    for device in devices:
        here = [r for r, row in enumerate(rows) if row and row[0].device == device]
        tensors = [rows[r] for r in here]
        columns = [list(owners[r]) for r in here]
        if not here:
            continue
        counts = [len(row) for row in tensors]
        run = GRAM.provider(device, backend).run
        total += run(list(chain(*tensors)), counts, list(chain(*columns)), size).to(target)
    return total


# bases[i] <- round(bases[i] + sum of alphas[k] vectors[k] over its counts[i] vectors): the vectors
# of bases[0] come first, then those of bases[1], ...
native_merge = define(
    "merge_(Tensor(a!)[] bases, Tensor[] vectors, int[] counts, float[] alphas) -> ()",
    lambda bases, vectors, counts, alphas: None,
)
MERGE = Op(
    "merge_",
    Provider("native", native_merge, op="merge_"),
    Provider("reference", reference.merge_),
)
# G[owners[a], owners[b]] += <tensors[a], tensors[b]> for a, b in the same row; the rows have
# counts[0], counts[1], ... consecutive tensors, with rising owners < size. Returns [size, size].
native_gram = define(
    "gram(Tensor[] tensors, int[] counts, int[] owners, int size) -> Tensor",
    lambda tensors, counts, owners, size: tensors[0].new_empty((size, size), dtype=torch.float64),
)
GRAM = Op("gram", Provider("native", native_gram, op="gram"), Provider("reference", reference.gram))
