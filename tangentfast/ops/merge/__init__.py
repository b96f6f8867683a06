"""Merge and gram: weighted sums and inner products of many tensors in one pass over memory.

merge:  b ← round(b + Σ_k α_k v_k)          gram:  G[i, j] = Σ_names ⟨v_i, v_j⟩
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tangentfast.ops.backend import choose, load_native
from tangentfast.ops.merge import reference

__all__ = ["gram", "merge_"]


@torch.no_grad()
def merge_(
    bases: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    alphas: Sequence[Sequence[float]],
    backend: str | None = None,
) -> None:
    """In place: ``bases[i] ← round(bases[i] + Σ_k alphas[i][k] · vectors[i][k])``.

    The terms are summed in the order of k and the base is added last, all with twice the digits of
    the widest tensor: float32 among halves, float64 with a float32, a pair of float64 for a float64
    base. The sum is rounded once, so that no other order of summation is more exact. All vectors
    are read as they were before any write, whatever memory they share with bases. Everything is
    checked and allocated, on all devices, before the first write. Not differentiable.

    Args:
        bases: tensors of any shape and layout; float64, float32, float16 or bfloat16.
        vectors: for each base its vectors, of its shape and device, of any of these dtypes.
        alphas: for each vector its coefficient.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or bases share memory.
        RuntimeError: a base was made in inference mode, and this is not; or no such backend.
    """
    used = [i for i, row in enumerate(vectors) if row]
    devices = list(dict.fromkeys(bases[i].device for i in used))
    backends = [choose("merge_", device, backend) for device in devices]
    if len(devices) > 1:  # an op checks its own device, and would find a fault after another wrote
        ready = reference.prepare([bases[i] for i in used], [vectors[i] for i in used])
        vectors = dict(zip(used, ready, strict=True))
    for device, chosen in zip(devices, backends, strict=True):
        here = [i for i in used if bases[i].device == device]
        some, rows = [bases[i] for i in here], [vectors[i] for i in here]
        factors = [[float(a) for a in alphas[i]] for i in here]
        if chosen == "reference":
            reference.merge_(some, rows, factors)
        else:
            counts = [len(row) for row in rows]
            torch.ops.tangentfast.merge_(some, list(chain(*rows)), counts, list(chain(*factors)))


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
        if choose("gram", device, backend) == "reference":
            total += reference.gram(tensors, columns, size).to(target)
        else:
            counts = [len(row) for row in tensors]
            part = torch.ops.tangentfast.gram(
                list(chain(*tensors)), counts, list(chain(*columns)), size
            )
            total += part.to(target)
    return total


def _register_fakes() -> None:
    """Shapes without data, for torch.compile and opcheck."""

    @torch.library.register_fake("tangentfast::merge_")
    def _(
        bases: list[Tensor], vectors: list[Tensor], counts: list[int], alphas: list[float]
    ) -> None:
        return None

    @torch.library.register_fake("tangentfast::gram")
    def _(tensors: list[Tensor], counts: list[int], owners: list[int], size: int) -> Tensor:
        return tensors[0].new_empty((size, size), dtype=torch.float64)


if load_native()[0] is not None:
    _register_fakes()
