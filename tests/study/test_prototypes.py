"""tangentfast.study.prototypes against the formula in its docstring, written out class by class."""

from __future__ import annotations

import pytest
import torch

from tangentfast.study.prototypes import PrototypeHead


def test_logits_are_cosines_to_class_means() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(30) % 4
    query = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    logits = PrototypeHead(features, labels, scale=7.0)(query)
    center = features.sum(0) / 30
    for c in range(4):
        members = [f - center for f, label in zip(features, labels, strict=True) if label == c]
        mean = torch.stack([m / m.norm() for m in members]).mean(0)
        for i in range(2):
            for j in range(5):
                z = query[i, j] - center
                expected = 7.0 * (z @ mean) / (z.norm() * mean.norm())
                torch.testing.assert_close(logits[i, j, c], expected, rtol=1e-12, atol=1e-12)


def test_head_has_nothing_to_train() -> None:
    head = PrototypeHead(torch.eye(3), torch.arange(3))
    assert list(head.parameters()) == []
    assert set(head.state_dict()) == {"center", "prototypes"}


def test_head_refuses() -> None:
    with pytest.raises(ValueError, match=r"are \[3, 3\] and \[2\]"):
        PrototypeHead(torch.eye(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"every class needs an image, \[1\] have none"):
        PrototypeHead(torch.eye(3), torch.tensor([0, 2, 2]))
