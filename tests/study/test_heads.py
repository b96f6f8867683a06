"""Heads against their formulas, written out class by class, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tangentfast.study import heads
from tangentfast.study.data import Task, TensorSplit, templates
from tangentfast.study.encoders import Encoder, encode
from tangentfast.study.heads import (
    CosineHead,
    PrototypeHead,
    build_head,
    probe_head,
    zero_shot_head,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_prototype_logits_are_cosines_to_class_means() -> None:
    features, labels, query = normal(30, 8), torch.arange(30) % 4, normal(2, 5, 8, seed=1)
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


def test_prototype_head_refuses() -> None:
    with pytest.raises(ValueError, match=r"are \[3, 3\] and \[2\]"):
        PrototypeHead(torch.eye(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"every class needs an image, \[1\] have none"):
        PrototypeHead(torch.eye(3), torch.tensor([0, 2, 2]))


def spoken(prompts: list[str]) -> torch.Tensor:
    """Text features that depend on every letter, of very different norms."""
    rows = [normal(6, seed=sum(map(ord, prompt))) for prompt in prompts]
    return torch.stack(rows) * torch.tensor([[10.0 ** (len(p) % 3)] for p in prompts]).double()


def test_zero_shot_averages_normalised_prompts() -> None:
    encoder = Encoder("any", nn.Identity(), 2, text=spoken, logit_scale=50.0)
    prompts, classes = ("a {}.", "this is a {}!", "{}"), ("bee", "cat")
    head = zero_shot_head(encoder, classes, prompts)
    z = normal(6, seed=9)
    for c, name in enumerate(classes):
        vectors = [spoken([prompt.format(name)])[0] for prompt in prompts]
        mean = sum(v / v.norm() for v in vectors) / 3
        expected = 50 * (z / z.norm()) @ (mean / mean.norm())
        torch.testing.assert_close(head(z)[c], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs a text tower, any has none"):
        zero_shot_head(Encoder("any", nn.Identity(), 2), classes, prompts)


@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_probe_minimises_the_penalised_loss(
    penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scikit-learn's minimum: C = 1/(N λ), the same loss up to a factor."""
    linear = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(heads, "PENALTIES", (penalty,))
    labels = torch.arange(60) % 3
    x = normal(60, 5) * torch.tensor([1.0, 10, 0.1, 1, 1]) + F.one_hot(labels, 5) + 3
    head = probe_head((x, labels), (x, labels), 3)
    mean, std = x.mean(0), x.std(0)
    reference = linear.LogisticRegression(C=1 / (60 * penalty), tol=1e-10, max_iter=1000)
    reference.fit((x - mean) / std, labels)
    expected = torch.from_numpy(reference.decision_function((x - mean) / std))
    torch.testing.assert_close(
        head(x).log_softmax(1), expected.log_softmax(1), rtol=1e-4, atol=1e-4
    )


def test_probe_chooses_its_penalty_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, val_labels = torch.arange(40) % 2, torch.arange(400) % 2
    # One feature tells a little, 39 are noise that a weak penalty learns by heart.
    x, val = normal(40, 40), normal(400, 40, seed=1)
    x[:, 0] += 1.5 * labels
    val[:, 0] += 1.5 * val_labels

    def accuracy(penalties: tuple[float, ...]) -> float:
        monkeypatch.setattr(heads, "PENALTIES", penalties)
        head = probe_head((x, labels), (val, val_labels), 2)
        return (head(val).argmax(1) == val_labels).double().mean().item()

    alone = [accuracy((penalty,)) for penalty in (1e-3, 1e-1, 10.0)]
    assert max(alone) > min(alone)
    assert accuracy((1e-3, 1e-1, 10.0)) == pytest.approx(max(alone), abs=0.01)


def test_probe_without_validation_images() -> None:
    x, labels = normal(6, 3), torch.arange(6) % 2
    with pytest.raises(ValueError, match="is the split empty"):
        probe_head((x, labels), (x[:0], labels[:0]), 2)


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 2, 2), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 4
    pixels[:, 0] = (60 * labels)[:, None, None]
    parts = [TensorSplit(pixels[i], labels[i]) for i in torch.arange(40).split([20, 8, 12])]
    return Task("shapes", ("a", "b", "c", "d"), *parts, "generated")


@pytest.mark.parametrize("kind", heads.HEADS)
def test_build(kind: heads.HeadKind, task: Task) -> None:
    def text(prompts: list[str]) -> torch.Tensor:
        return spoken(prompts).float().repeat(1, 2)

    encoder = Encoder("any", nn.Flatten(), 2, text=text)
    head = build_head(kind, encoder, task, batch=7)
    assert list(head.parameters())
    assert not any(p.requires_grad for p in head.parameters())
    features = encode(encoder, task.test)
    assert head(features).shape == (12, 4)
    if kind == "zero-shot":
        expected: nn.Module = zero_shot_head(encoder, task.classes, templates("shapes"))
    elif kind == "prototype":
        expected = PrototypeHead(encode(encoder, task.train), task.train.labels)
    else:
        train, val = ((encode(encoder, split), split.labels) for split in (task.train, task.val))
        expected = probe_head(train, val, 4)
    torch.testing.assert_close(head(features), expected(features))


def test_heads_can_be_trained(task: Task) -> None:
    encoder = Encoder("any", nn.Flatten(), 2)
    head = build_head("prototype", encoder, task).requires_grad_()
    head(encode(encoder, task.train)).sum().backward()
    assert isinstance(head, CosineHead)
    assert head.weight.grad is not None


def test_unknown_head(task: Task) -> None:
    with pytest.raises(ValueError, match=r"among \['zero-shot', .*\], is 'mlp'"):
        build_head("mlp", Encoder("any", nn.Flatten(), 2), task)  # type: ignore[arg-type]
