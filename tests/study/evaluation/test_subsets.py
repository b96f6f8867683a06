"""Subsets of tasks against accuracies counted by hand, and against task addition of those tasks."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from evaluation_toys import ToyEncoder, ToyTask, TwoClasses, change, noise, transformer, vectors_of
from test_addition import HEADS, A, B, toy
from torch import nn

import tangentfast as tf
from tangentfast.study.evaluation import Mixtures, addition, subsets
from tangentfast.study.evaluation.subsets import _choose


@pytest.mark.parametrize("tangent", [True, False])
def test_both_tasks_by_hand(tangent: bool) -> None:
    """The one subset of two tasks is task addition: the numbers of test_addition_by_hand."""
    (got,) = subsets(toy(tangent), [A, B], HEADS, [0, 0.5, 1], limit=1)
    assert got["tasks"] == ["a", "b"]
    assert (got["alpha"], got["chosen"], got["absolute"]) == (0.5, "validation", 1 / 2)
    assert got["normalized"] == pytest.approx((1 / 3 + 3 / 4) / 2, rel=1e-15)
    (fixed,) = subsets(toy(tangent), [A, B], HEADS, 1, limit=1)
    assert (fixed["alpha"], fixed["chosen"], fixed["absolute"]) == (1, "fixed", 3 / 4)
    assert fixed["normalized"] == pytest.approx((2 / 3 + 1) / 2, rel=1e-15)


@pytest.mark.parametrize("tangent", [True, False])
def test_every_subset_is_an_addition_of_its_own(tangent: bool) -> None:
    encoder, alphas = transformer(), [0, 0.25, 0.5, 1]
    vectors = vectors_of(encoder, 4, scale=0.3)
    torch.manual_seed(0)
    heads = [nn.Linear(16, 4, dtype=torch.float64) for _ in range(4)]
    tasks = [
        ToyTask(f"task {t}", val=noise(20, seed=t), test=noise(30, seed=20 + t)) for t in range(4)
    ]
    got = subsets(Mixtures(encoder, vectors, tangent), tasks, heads, alphas, limit=11)
    wanted = [s for size in (2, 3, 4) for s in combinations(range(4), size)]
    assert len({entry["alpha"] for entry in got}) > 1
    for entry, subset in zip(got, wanted, strict=True):
        chosen = [[things[t] for t in subset] for things in (vectors, tasks, heads)]
        own = addition(Mixtures(encoder, chosen[0], tangent), chosen[1], chosen[2], alphas)
        assert entry["tasks"] == [tasks[t].name for t in subset]
        for key in ("alpha", "absolute", "normalized"):
            assert entry[key] == pytest.approx(own["addition"][key], rel=1e-12)


def test_linear_regime_takes_one_pass_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    jvp = tf.jvp

    def spy(*args, params, **kwargs):
        counts.append(len(params))
        return jvp(*args, params=params, **kwargs)

    monkeypatch.setattr(tf, "jvp", spy)
    third = ToyTask("c", val=A.val, test=A.test)
    vectors = [change(1, 0, 0), change(-0.5, 1, 0), change(1, 1, 0)]
    mixed = Mixtures(ToyEncoder(TwoClasses(0, 0, -6)), vectors, True)
    subsets(mixed, [A, B, third], [*HEADS, nn.Identity()], [0, 0.5, 1], limit=4)
    # `a` and `c` have the same splits: one pass for both.
    assert counts == [3] * 4


def test_sampled_subsets() -> None:
    few = _choose(6, 13, seed=0)
    assert len(set(few)) == 13
    assert few == sorted(few, key=lambda s: (len(s), s))
    assert [sum(len(s) == size for s in few) for size in (2, 3, 4, 5, 6)] == [3, 3, 3, 3, 1]
    assert all(s == tuple(sorted(set(s))) and s[-1] < 6 for s in few)
    assert few == _choose(6, 13, seed=0) != _choose(6, 13, seed=1)
    assert len(_choose(6, 56, seed=0)) == len(set(_choose(6, 56, seed=0))) == 56
    assert len(_choose(6, 57, seed=0)) == len(_choose(6, 99, seed=0)) == 57
    assert len(_choose(40, 100, seed=0)) == 100


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 tasks and a limit of 0, expected at least 2 and 1"):
        subsets(toy(True), [A, B], HEADS, [0], limit=0)
    with pytest.raises(ValueError, match="subsets: alphas is empty"):
        subsets(toy(True), [A, B], HEADS, [], limit=1)
    with pytest.raises(ValueError, match="1 tasks, 2 heads and 2 task vectors"):
        subsets(toy(True), [A], HEADS, [0], limit=1)
