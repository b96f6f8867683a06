"""ξ on a grid against predictions written down by hand, and against the formula written out.

Class 1 where ⟨w, x⟩ > 0, with w = (0, 0, −6) + α1 (1, −¼, 0) + α2 (−½, 1, 0). Task a has images
(a, 0, 1), so class 1 where (α1 − α2/2) a > 6; task b (0, b, 1), where (α2 − α1/4) b > 6.
"""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_toys import (
    ToyEncoder,
    ToyTask,
    TwoClasses,
    change,
    noise,
    points,
    transformer,
    vectors_of,
)
from torch import nn
from torch.nn import functional as F

import tangentfast as tf
from tangentfast.study.evaluation import Mixtures, disentanglement

A = ToyTask("a", val=points((1, 1, 1)), test=points((10, 0, 1), (40, 0, 1)))
B = ToyTask("b", val=points((1, 1, 1)), test=points((0, 7, 1), (0, 100, 1)))
ALPHAS = [-1, 0, 0.5, 1]
HEADS = {"identity": [nn.Identity()] * 2}


def toy(tangent: bool = True) -> Mixtures:
    vectors = [change(1, -0.25, 0), change(-0.5, 1, 0)]
    return Mixtures(ToyEncoder(TwoClasses(0, 0, -6)), vectors, tangent, batch=1)


@pytest.mark.parametrize("tangent", [True, False])
def test_predictions_by_hand(tangent: bool) -> None:
    (got,) = disentanglement(toy(tangent), [A, B], (0, 1), HEADS, ALPHAS)
    assert got == {
        "tasks": ["a", "b"],
        "kind": "prediction",
        "head": "identity",
        "alphas": ALPHAS,
        # [α1][α2]. Images of a that change class: (0, -1): 40, (½, -1): 10, (½, 1): 40, (1, 1): 10;
        # of b: (-1, 0): 100, (1, 1): 7.
        "xi": [[0, 0.5, 0, 0], [0.5, 0, 0, 0], [0.5, 0, 0, 0.5], [0, 0, 0, 1]],
        "box": 1.5 / 9,
    }


@pytest.mark.parametrize("tangent", [True, False])
def test_the_other_order_transposes(tangent: bool) -> None:
    (got,) = disentanglement(toy(tangent), [A, B], (0, 1), HEADS, ALPHAS)
    (other,) = disentanglement(toy(tangent), [A, B], (1, 0), HEADS, ALPHAS)
    assert other["tasks"] == ["b", "a"]
    assert torch.equal(torch.tensor(other["xi"]), torch.tensor(got["xi"]).T)


@pytest.mark.parametrize("tangent", [True, False])
def test_representation_by_hand(tangent: bool) -> None:
    def divergence(margin: float, other: float) -> float:
        """KL of (1 − p, p) against (1 − q, q), p and q the logistic function of the margins."""
        p, q = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(-other))
        return p * math.log(p / q) + (1 - p) * (math.log(1 - p) - math.log(1 - q))

    # Margins α a − 6 alone, at α1 = α2 = ½: a of 10, 40 have −1, 14 alone and −3.5, 4 together;
    # b of 7, 100 have −2.5, 44 alone and −3.375, 31.5 together (44 and 31.5 are both certainty).
    a = (divergence(-1, -3.5) + divergence(14, 4)) / 2
    b = divergence(-2.5, -3.375) / 2
    heads, representation = disentanglement(
        toy(tangent), [A, B], (0, 1), HEADS, [0, 0.5], representation=True
    )
    assert heads["kind"] == "prediction"
    assert representation["kind"] == "representation"
    assert representation["head"] == "none (representation)"
    xi = representation["xi"]
    assert xi[0][0] == 0
    assert xi[1][1] == pytest.approx(a + b, rel=1e-9)
    assert representation["box"] == pytest.approx(sum(map(sum, xi)) / 4)


def test_representation_has_a_direction() -> None:
    """KL(alone ‖ together), not the other way round, and both tasks in the right place."""
    _, got = disentanglement(toy(), [A, B], (0, 1), HEADS, [0, 1], representation=True)
    logits = torch.tensor([[0.0, -6.0]] * 4, dtype=torch.float64)
    # α1 = 0, α2 = 1: alone, a stays at −6, together −5 − 6 and −20 − 6; b does not change.
    together = torch.tensor([[0.0, -11.0], [0.0, -26.0]], dtype=torch.float64)
    p, q = logits[:2].log_softmax(1), together.log_softmax(1)
    assert got["xi"][0][1] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("tangent", [True, False])
def test_formula_on_a_transformer(tangent: bool, device: torch.device) -> None:
    encoder, alphas = transformer(), [-0.5, 0.25, 1]
    vectors = vectors_of(encoder, 3, scale=0.3)
    tasks = [ToyTask(f"task {t}", val=noise(1), test=noise(9, seed=10 + t)) for t in range(3)]
    heads = {
        name: [nn.Linear(16, 4, dtype=torch.float64) for _ in range(3)] for name in ("one", "two")
    }
    mixed = Mixtures(encoder, vectors, tangent, device=str(device), batch=4)
    got = disentanglement(mixed, tasks, (2, 0), heads, alphas, representation=True)
    assert [entry["head"] for entry in got] == ["one", "two", "none (representation)"]
    assert max(map(max, got[0]["xi"])) > 0.1
    for i, first in enumerate(alphas):
        for j, second in enumerate(alphas):
            expected = torch.zeros(3, dtype=torch.float64)
            for t, own in ((2, first * vectors[2]), (0, second * vectors[0])):
                z, other = (
                    self_at(encoder, tau, tangent)(tasks[t].test.pixels.double())
                    for tau in (own, first * vectors[2] + second * vectors[0])
                )
                for column, head in enumerate(group[t] for group in heads.values()):
                    differ = head(z).argmax(1) != head(other).argmax(1)
                    expected[column] += differ.double().mean()
                logs = other.log_softmax(1), z.log_softmax(1)
                expected[2] += F.kl_div(*logs, reduction="batchmean", log_target=True)
            at = torch.tensor([entry["xi"][i][j] for entry in got], dtype=torch.float64)
            torch.testing.assert_close(at, expected.detach(), rtol=1e-10, atol=1e-12)
    for entry in got:
        inside = [row[1:] for row in entry["xi"][1:]]
        assert entry["box"] == pytest.approx(sum(map(sum, inside)) / 4)


def self_at(encoder: ToyEncoder, tau: tf.TaskVector, tangent: bool) -> nn.Module:
    lin = tf.linearize(encoder.module, at=tau)
    return lin if tangent else lin.materialize()


@pytest.mark.parametrize("tangent", [True, False])
def test_some_images_evenly_spaced(tangent: bool) -> None:
    ten = points(*[(a, 0, 1) for a in range(0, 100, 10)])
    tasks = [ToyTask("a", val=ten, test=ten), B]
    (got,) = disentanglement(toy(tangent), tasks, (0, 1), HEADS, [1], images=4)
    # Images 0, 2, 5, 7 with a of 0, 20, 50, 70: all above 12, or none. Both of b: 7 changes.
    assert got["xi"] == [[0.5]]
    (got,) = disentanglement(toy(tangent), tasks, (0, 1), HEADS, [1], images=10)
    assert got["xi"] == [[0.1 + 0.5]]  # 10 changes too
    with pytest.raises(ValueError, match="images is 0, expected at least 1"):
        disentanglement(toy(tangent), tasks, (0, 1), HEADS, [1], images=0)


def test_no_coefficient_but_zero() -> None:
    (got,) = disentanglement(toy(), [A, B], (0, 1), HEADS, [0])
    assert (got["xi"], got["box"]) == ([[0]], 0)


def test_linear_map_is_one_pass_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    jvp = tf.jvp

    def spy(*args, params, **kwargs):
        counts.append(len(params))
        return jvp(*args, params=params, **kwargs)

    monkeypatch.setattr(tf, "jvp", spy)
    mixed = toy()
    mixed.batch = 2
    disentanglement(mixed, [A, B], (0, 1), HEADS, ALPHAS, representation=True)
    # For each task its own direction first, for what it is compared with; then the other's.
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("pair", "heads", "alphas", "message"),
    [
        ((0, 0), HEADS, [0, 1], r"pair is \(0, 0\), expected two different indices below 2"),
        ((0, 2), HEADS, [0, 1], r"pair is \(0, 2\), expected two different indices below 2"),
        ((0, 1), {}, [0, 1], "no heads and no representation, expected one at least"),
        ((0, 1), HEADS, [-1, 2], r"alphas is \[-1, 2\], expected some in the search box \[0, 1\]"),
        ((0, 1), HEADS, [], "alphas is empty"),
        ((0, 1), {"short": [nn.Identity()]}, [0, 1], "2 tasks, 1 heads and 2 task vectors"),
    ],
)
def test_arguments_that_do_not_fit(pair, heads, alphas, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        disentanglement(toy(), [A, B], pair, heads, alphas)
