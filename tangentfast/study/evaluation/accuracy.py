"""Predictions and accuracies of mixtures, and how one of them is chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from tangentfast.study.evaluation.mixtures import Mixtures, Reduce, Request

if TYPE_CHECKING:
    from tangentfast.study.data import Split, Task

Subset: TypeAlias = tuple[int, ...]

# Accuracies are ratios of counts: what differs by less differs by rounding alone.
ROUNDING = 1e-9


def predictions(mixtures: Mixtures, split: Split, head: nn.Module, coefficients: Tensor) -> Tensor:
    """The predicted class of every image of a split at each mixture.

    Args:
        mixtures: encoder and T task vectors.
        split: N images.
        head: features [n, D] -> logits [n, C]; used in evaluation mode, not changed.
        coefficients: [G, T].

    Returns:
        int64 [G, N] on the CPU.

    Raises:
        ValueError, FloatingPointError: as `Mixtures.sweep`.
    """
    return mixtures.sweep(split, coefficients, argmax(mixtures, head))


def accuracies(
    mixtures: Mixtures, wanted: Sequence[tuple[Split, nn.Module, Tensor]]
) -> list[Tensor]:
    """The accuracy of each (split, head, coefficients [G, T]): float64 [G] in 0..1.

    Raises:
        ValueError, FloatingPointError: as `Mixtures.sweep`.
    """
    requests = [Request(s, rows, argmax(mixtures, head)) for s, head, rows in wanted]
    predictions = mixtures.sweeps(requests)
    return [
        (predicted == split.labels.cpu()).double().mean(1)
        for predicted, (split, _, _) in zip(predictions, wanted, strict=True)
    ]


def merged_accuracies(
    mixtures: Mixtures,
    tasks: Sequence[Task],
    heads: Sequence[nn.Module],
    part: str,
    chosen: Sequence[Subset],
    alphas: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Accuracies of tasks alone and of α Σ_{t∈S} τ_t on the tasks of each subset S.

    Args:
        mixtures: encoder and T task vectors.
        tasks: T; task t is what vector t was fine-tuned on.
        heads: T, features -> logits.
        part: of the tasks: ``"val"`` or ``"test"``.
        chosen: the subsets, indices of tasks.
        alphas: of each subset, float64 [A].

    Returns:
        At τ_t on task t: float64 [T]; and for each subset [A, tasks of it].

    Raises:
        ValueError, FloatingPointError: as `Mixtures.sweep`.
    """
    alone = torch.eye(len(tasks), dtype=torch.float64)
    wanted = []
    for t, (task, head) in enumerate(zip(tasks, heads, strict=True)):
        rows = [
            values[:, None] * alone[list(subset)].sum(0)
            for subset, values in zip(chosen, alphas, strict=True)
            if t in subset
        ]
        wanted.append((getattr(task, part), head, torch.cat([alone[t : t + 1], *rows])))
    per_task = [iter(accuracy) for accuracy in accuracies(mixtures, wanted)]
    single = torch.stack([next(accuracy) for accuracy in per_task])
    merged = [
        torch.stack([torch.stack([next(per_task[t]) for _ in values]) for t in subset], 1)
        for subset, values in zip(chosen, alphas, strict=True)
    ]
    return single, merged


def argmax(mixtures: Mixtures, head: nn.Module) -> Reduce:
    """The head's prediction, for `Mixtures.sweep`."""
    classify = placed(mixtures, head)
    return lambda features, _: classify(features).argmax(-1)


def placed(mixtures: Mixtures, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """A copy of the head where features are computed, in evaluation mode."""
    return copy.deepcopy(head).to(mixtures.device).eval()


def normalized(accuracy: Tensor, single: Tensor) -> Tensor:
    """Mean over tasks of merged accuracy / single-task accuracy of the same regime.

    Ortiz-Jimenez et al. 2023, arXiv:2305.12827. A task whose fine-tuned model classifies no image
    rightly has no such ratio, and is left out; NaN where that leaves none.

    Args:
        accuracy: [..., T], of the merged model.
        single: [T], of θ0 + τ_t on task t.

    Returns:
        [...]
    """
    learnt = single > 0
    return (accuracy[..., learnt] / single[learnt]).mean(-1)


def first_best(score: Tensor) -> int:
    """Index of the largest of [G]; of equal ones the first, which is the smallest α.

    0 where they are NaN: there is nothing to choose by.
    """
    score = score.nan_to_num(-torch.inf)
    return int((score >= score.max() - ROUNDING).nonzero()[0])


def grid(alphas: Sequence[float], what: str) -> Tensor:
    """The coefficients as float64 [A].

    Raises:
        ValueError: none, not finite, or not increasing.
    """
    if not len(alphas):
        raise ValueError(f"{what}: alphas is empty, expected at least one coefficient")
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"{what}: alphas is {list(alphas)}, expected finite numbers")
    values = torch.tensor([float(alpha) for alpha in alphas], dtype=torch.float64)
    if not (values.diff() > 0).all():
        raise ValueError(f"{what}: alphas is {list(alphas)}, expected increasing numbers")
    return values


def check_tasks(
    what: str, mixtures: Mixtures, tasks: Sequence[Task], heads: Sequence[nn.Module]
) -> None:
    """One task and one head for each task vector, under different names.

    Raises:
        ValueError: otherwise.
    """
    names = [task.name for task in tasks]
    counts = (len(tasks), len(heads), len(mixtures.vectors))
    if len(set(counts)) > 1:
        raise ValueError(
            f"{what}: {counts[0]} tasks, {counts[1]} heads and {counts[2]} task vectors, expected "
            "one of each for every task"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{what}: tasks are {names}, expected different names")
