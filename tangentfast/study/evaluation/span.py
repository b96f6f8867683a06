"""The fewest tangents that a set of mixtures needs."""

from __future__ import annotations

import torch
from torch import Tensor

# Of rows scaled to a largest entry of 1: below it a difference is rounding, in float64 too.
TOLERANCE = 1e-12


def extend(known: Tensor, rows: Tensor) -> Tensor:
    """`known` and as few directions more as make every row of `rows` a combination of them.

    f_lin is linear in τ, so the mixtures Σ_t rows[g, t] τ_t cost one tangent for each dimension of
    the rows' span: one for a whole α sweep of Σ τ_t, two for a disentanglement map, T at most. Unit
    vectors are taken where they lie in the span: they need no sum of vectors, and condition best.

    Args:
        known: float64 [r, T], linearly independent; r may be 0.
        rows: float64 [G, T], finite.

    Returns:
        float64 [r', T], linearly independent, `known` first; r' is the rank of both together.
    """
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # signed: α τ and −α τ are one row
    rows = (rows / largest)[largest[:, 0] != 0].unique(dim=0)
    units = torch.eye(known.shape[1], dtype=known.dtype)
    whole = _orthonormal(torch.cat([known, rows]))
    inside = _residual(units, whole).norm(dim=1) <= TOLERANCE
    basis = known
    for pool in (units[inside], rows):
        while len(pool):
            distance = _residual(pool, _orthonormal(basis)).norm(dim=1)
            if distance.max() <= TOLERANCE:
                break
            basis = torch.cat([basis, pool[distance.argmax()][None]])
    return basis


def combine(basis: Tensor, rows: Tensor) -> Tensor:
    """Float64 [G, r] such that [G, r] @ basis [r, T] = rows [G, T], rows in the basis's span."""
    solution: Tensor = torch.linalg.lstsq(basis.T, rows.T).solution
    return solution.T


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span: [rank, T]."""
    if not len(rows):
        return rows
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > TOLERANCE * len(rows)]


def _residual(rows: Tensor, orthonormal: Tensor) -> Tensor:
    return rows - rows @ orthonormal.T @ orthonormal
