"""Task negation against accuracies counted by hand.

Class 1 where ⟨w, x⟩ > 0, with w = (1, 0, −6) − α (1, 0, 0): where the first channel a is above
6 / (1 − α).
"""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_toys import ToyEncoder, ToyTask, TwoClasses, change, points
from torch import nn

from tangentfast.study.evaluation import Mixtures, negation

TARGET = ToyTask(
    "target",
    val=points((7, 0, 1), (10, 0, 1), (20, 0, 1), (60, 0, 1)),
    test=points((7, 0, 1), (13, 0, 1), (30, 0, 1)),
)
CONTROL = ToyTask(
    "control",
    val=points(*[(a, 0, 1) for a in (9, 20, 100, 100, 100)], labels=[1, 1, 1, 1, 0]),
    test=points((9, 0, 1), (13, 0, 1), (100, 0, 1), labels=[1, 1, 0]),
)
ALPHAS = [0, 0.25, 0.5, 0.75, 1]


def run(tangent: bool = True, alphas: list[float] = ALPHAS, **options: Any) -> dict[str, Any]:
    encoder = ToyEncoder(TwoClasses(1, 0, -6))
    mixed = Mixtures(encoder, [change(1, 0, 0)], tangent, batch=3)
    return negation(mixed, [TARGET], [nn.Identity()], CONTROL, nn.Identity(), alphas, **options)


@pytest.mark.parametrize("tangent", [True, False])
def test_negation_by_hand(tangent: bool) -> None:
    # 3/4 of 4/5 is 3/5, which α = ½ has to the image; 0.75 * 0.8 is above 0.6 in float64.
    assert run(tangent, threshold=0.75) == {
        "alphas": ALPHAS,
        "threshold": 0.75,
        "control_base": 2 / 3,
        "target": 2 / 3,
        "control": 1 / 3,
        "tasks": {
            "target": {
                "target_val": [1, 3 / 4, 2 / 4, 1 / 4, 0],
                "control_val": [4 / 5, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
                "alpha": 0.5,
                "reached": True,
                "target": 2 / 3,
                "control": 1 / 3,
            }
        },
    }


def test_default_threshold_keeps_95_percent() -> None:
    got = run()
    assert got["threshold"] == 0.95
    assert got["tasks"]["target"]["alpha"] == 0.25
    assert got["target"] == 2 / 3  # above 8 on test


@pytest.mark.parametrize("alphas", [[0, 0.5, 1], [0.5, 1]])
def test_nothing_but_theta0_keeps_the_threshold(alphas: list[float]) -> None:
    got = run(alphas=alphas)
    result = got["tasks"]["target"]
    assert (result["alpha"], result["reached"]) == (0, False)
    assert len(result["target_val"]) == len(result["control_val"]) == len(alphas)
    assert (result["target"], result["control"]) == (1, got["control_base"])


def test_of_equal_alphas_the_smallest() -> None:
    assert run(alphas=[0, 0.2, 0.25, 0.3])["tasks"]["target"]["alpha"] == 0.2
    kept = run(alphas=[0, 0.05])["tasks"]["target"]  # forgets nothing, and keeps the control
    assert (kept["alpha"], kept["reached"]) == (0, True)


@pytest.mark.parametrize("tangent", [True, False])
def test_means_over_tasks(tangent: bool) -> None:
    other = ToyTask("other", val=points((0, 9, 1)), test=points((0, 9, 1), (0, 50, 1)))
    encoder = ToyEncoder(TwoClasses(1, 1, -6))
    mixed = Mixtures(encoder, [change(1, 0, 0), change(0, 1, 0)], tangent)
    heads = [nn.Identity()] * 2
    got = negation(mixed, [TARGET, other], heads, CONTROL, nn.Identity(), ALPHAS, threshold=0.75)
    # The control task has nothing in the second channel: τ of `other` may be taken off whole, and
    # at α = ½ its only validation image is forgotten already.
    assert {name: r["alpha"] for name, r in got["tasks"].items()} == {"target": 0.5, "other": 0.5}
    assert got["tasks"]["other"]["target"] == 1 / 2
    assert got["tasks"]["other"]["control"] == got["control_base"] == 2 / 3
    assert got["target"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert got["control"] == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_arguments_that_do_not_fit() -> None:
    for threshold in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"threshold is .*, expected a share in \(0, 1\]"):
            run(threshold=threshold)
    with pytest.raises(ValueError, match=r"alphas is \[-0.5, 0\], expected none below 0"):
        run(alphas=[-0.5, 0])
    with pytest.raises(ValueError, match="negation: alphas is empty"):
        run(alphas=[])
    mixed = Mixtures(ToyEncoder(TwoClasses(1, 0, -6)), [change(1, 0, 0)], True)
    with pytest.raises(ValueError, match="control task 'target' is among the tasks"):
        negation(mixed, [TARGET], [nn.Identity()], TARGET, nn.Identity(), ALPHAS)
