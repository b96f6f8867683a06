"""Task addition against accuracies counted by hand.

Class 1 where ⟨w, x⟩ > 0, with w = (0, 0, −6) + α ((1, 0, 0) + (−½, 1, 0)) = (α/2, α, −6).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from evaluation_toys import ToyEncoder, ToyTask, TwoClasses, change, points
from torch import Tensor, nn

from tangentfast.study.evaluation import Mixtures, Request, addition
from tangentfast.study.evaluation.accuracy import normalized

A = ToyTask(
    "a",
    val=points(*[(a, 0, 1) for a in (10, 20, 21, 40, 41)]),
    test=points((10, 0, 1), (20, 0, 1), (30, 0, 1), (50, 0, 1), labels=[1, 1, 1, 0]),
)
B = ToyTask(
    "b",
    val=points((0, 8, 1), (0, 16, 1), (0, 32, 1), labels=[0, 1, 1]),
    test=points((0, 4, 1), (0, 16, 1), (0, 13, 1), (0, 7, 1), labels=[0, 1, 1, 1]),
)
HEADS = [nn.Identity(), nn.Identity()]


def toy(tangent: bool) -> Mixtures:
    vectors = [change(1, 0, 0), change(-0.5, 1, 0)]
    return Mixtures(ToyEncoder(TwoClasses(0, 0, -6)), vectors, tangent, batch=3)


@pytest.mark.parametrize("tangent", [True, False])
def test_addition_by_hand(tangent: bool) -> None:
    got = addition(toy(tangent), [A, B], HEADS, [0, 0.5, 1])
    assert got["single"] == {"a": 3 / 4, "b": 1.0}
    curves = got["addition"]
    assert curves["alphas"] == [0, 0.5, 1]
    # a: class 1 where the first channel is above 12/α. b: where the second is above 6/α.
    assert curves["val"] == {"a": [0, 2 / 5, 4 / 5], "b": [1 / 3, 1, 2 / 3]}
    # Alone on validation a has 1, b 2/3: normalised means (0 + 1/2)/2, (2/5 + 3/2)/2, (4/5 + 1)/2.
    assert curves["val_single"] == {"a": 1, "b": 2 / 3}
    # The mean of the accuracies themselves is highest at 1.
    assert curves["alpha"] == 0.5
    assert curves["test"] == {"a": 1 / 4, "b": 3 / 4}
    assert curves["absolute"] == 1 / 2
    assert curves["normalized"] == pytest.approx(((1 / 4) / (3 / 4) + 3 / 4) / 2, rel=1e-15)
    assert curves["at_one"] == 3 / 4


@pytest.mark.parametrize("tangent", [True, False])
def test_alpha_one_need_not_be_in_the_grid(tangent: bool) -> None:
    got = addition(toy(tangent), [A, B], HEADS, [0.5])
    assert got["addition"]["at_one"] == 3 / 4
    assert got["addition"]["test"] == {"a": 1 / 4, "b": 3 / 4}


@pytest.mark.parametrize("tangent", [True, False])
def test_test_is_looked_at_for_what_is_reported_alone(tangent: bool) -> None:
    mixtures, asked = toy(tangent), []
    sweeps = mixtures.sweeps

    def watched(requests: Sequence[Request]) -> list[Tensor]:
        tests = (id(A.test), id(B.test))
        asked.extend(r.coefficients.tolist() for r in requests if id(r.split) in tests)
        return sweeps(requests)

    mixtures.sweeps = watched  # type: ignore[method-assign]
    addition(mixtures, [A, B], HEADS, [0, 0.5, 1])
    rest = [[0.5, 0.5], [1, 1]]
    assert asked == [[[1, 0], *rest], [[0, 1], *rest]]


def test_of_equal_alphas_the_smallest() -> None:
    got = addition(toy(True), [A, B], HEADS, [0.35, 0.5, 0.51, 0.52])
    val = got["addition"]["val"]
    assert val == {"a": [2 / 5] * 4, "b": [2 / 3, 1, 1, 1]}
    assert got["addition"]["alpha"] == 0.5


def test_normalized() -> None:
    accuracy = torch.tensor([[0.4, 0.9], [0.8, 0.45]], dtype=torch.float64)
    single = torch.tensor([0.8, 0.9], dtype=torch.float64)
    assert normalized(accuracy, single).tolist() == [0.75, 0.75]


def test_no_right_image_alone() -> None:
    """A task without a ratio is left out; α is then the other's, and 0 where there is none."""
    accuracy = torch.tensor([[0.4, 0.9], [0.8, 0.45]], dtype=torch.float64)
    assert normalized(accuracy, torch.tensor([0.8, 0.0])).tolist() == pytest.approx([0.5, 1.0])
    assert normalized(accuracy, torch.zeros(2)).isnan().all()
    wrong = ToyTask("b", val=points((0, 9, 1), labels=[0]), test=B.test)
    got = addition(toy(True), [A, wrong], HEADS, [0, 0.5, 1])["addition"]
    best = max(got["val"]["a"])
    assert got["alpha"] == [0, 0.5, 1][got["val"]["a"].index(best)]


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([], "addition: alphas is empty, expected at least one"),
        ([0, float("nan")], r"addition: alphas is \[0, nan\], expected finite"),
        ([0, 0.5, 0.5], r"addition: alphas is \[0, 0.5, 0.5\], expected increasing"),
    ],
)
def test_bad_alphas(alphas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        addition(toy(True), [A, B], HEADS, alphas)


def test_tasks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1 tasks, 2 heads and 2 task vectors, expected one of ea"):
        addition(toy(True), [A], HEADS, [0])
    with pytest.raises(ValueError, match=r"tasks are \['a', 'a'\], expected different names"):
        addition(toy(True), [A, A], HEADS, [0])
