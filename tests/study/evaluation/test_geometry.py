"""Cosines and inner products of vectors that anyone can draw."""

from __future__ import annotations

import pytest
import torch

from tangentfast.study.evaluation import cosine, gram


def test_by_hand() -> None:
    vectors = [
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([0.0, 2.0])},
        {"b": torch.tensor([-5.0])},
    ]
    assert gram(vectors) == [[25, 0, -20], [0, 4, 0], [-20, 0, 25]]
    assert cosine(vectors) == [[1, 0, -0.8], [0, 1, 0], [-0.8, 0, 1]]


def test_cosine_stays_in_its_range() -> None:
    torch.manual_seed(0)
    vectors = [{"a": torch.randn(50) * scale} for scale in (1e-3, 1, 1e3)]
    values = torch.tensor(cosine([*vectors, vectors[0]]))
    assert values.abs().max() <= 1
    assert values[0, 3] == pytest.approx(1, rel=1e-14)


def test_zero_vector() -> None:
    with pytest.raises(ValueError, match=r"vectors \[1\] are zero, expected fine-tuned ones"):
        cosine([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])
