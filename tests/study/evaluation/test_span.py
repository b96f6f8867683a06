"""As few directions as the rank, and every row a combination of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tangentfast.study.evaluation.span import combine, extend

ONES = torch.ones(1, 4, dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)
NONE = torch.empty(0, 4, dtype=torch.float64)
GRID = torch.linspace(-2, 2, 9, dtype=torch.float64)
PAIR = torch.stack([a * EYE[1] + b * EYE[3] for a in GRID for b in GRID])
SUBSETS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)


@pytest.mark.parametrize(
    ("known", "rows", "rank"),
    [
        (NONE, 0 * ONES, 0),
        (NONE, GRID[:, None] * ONES, 1),
        (NONE, torch.cat([GRID[:, None] * ONES, EYE[2:3]]), 2),
        (NONE, PAIR, 2),
        (NONE, SUBSETS, 4),
        (torch.cat([ONES, EYE[1:2]]), -0.3 * ONES, 2),
        (torch.cat([ONES, EYE[1:2]]), PAIR, 3),
        (torch.cat([ONES, EYE[1:2]]), SUBSETS, 4),
        (NONE, torch.randn(3, 4, dtype=torch.float64), 3),
        (NONE, torch.tensor([[1e-9, 2e-9, 0, 0], [1e9, 2e9, 0, 0]], dtype=torch.float64), 1),
    ],
)
def test_extend(known: Tensor, rows: Tensor, rank: int) -> None:
    basis = extend(known, rows)
    assert torch.equal(basis[: len(known)], known)
    assert len(basis) == rank == torch.linalg.matrix_rank(torch.cat([known, rows]), rtol=1e-12)
    torch.testing.assert_close(combine(basis, rows) @ basis, rows, rtol=1e-13, atol=1e-13)


def test_unit_vectors_come_first() -> None:
    rows = torch.cat([GRID[:, None] * ONES, EYE[2:3]])
    assert torch.equal(extend(NONE, rows), torch.cat([EYE[2:3], ONES]))
    assert extend(NONE, PAIR).tolist() == EYE[[1, 3]].tolist()
