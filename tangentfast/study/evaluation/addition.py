"""Task addition: one model θ0 + α Σ_t τ_t for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tangentfast.study.evaluation.accuracy import (
    check_tasks,
    first_best,
    grid,
    merged_accuracies,
    normalized,
)
from tangentfast.study.evaluation.mixtures import Mixtures

if TYPE_CHECKING:
    from tangentfast.study.data import Task


def addition(
    mixtures: Mixtures,
    tasks: Sequence[Task],
    heads: Sequence[nn.Module],
    alphas: Sequence[float],
) -> dict[str, Any]:
    """Accuracy of α Σ_t τ_t on every task, α chosen on validation, and of each task alone.

    α is the grid's with the highest mean *normalised* validation accuracy, merged over single-task
    validation accuracy; of equal ones the smallest (Ortiz-Jimenez et al. 2023, arXiv:2305.12827).
    Test is looked at for what is reported alone: at that α, and where nothing is chosen.

    Args:
        mixtures: encoder and T task vectors.
        tasks: T; task t is what vector t was fine-tuned on.
        heads: T, features -> logits.
        alphas: A coefficients, increasing.

    Returns:
        ``single``: name -> test accuracy at τ_t.
        ``addition``: ``alphas`` [A]; on validation ``val``, name -> accuracies [A], and
        ``val_single``, name -> accuracy at τ_t; ``alpha``; on test ``test``, name -> accuracy at
        alpha, ``absolute`` and ``normalized``, means over tasks at alpha, and ``at_one``, the mean
        at α = 1. Accuracies are fractions; all numbers are Python's.

    Raises:
        ValueError: counts or alphas that do not fit.
        FloatingPointError: a mixture's features are not finite.
    """
    check_tasks("addition", mixtures, tasks, heads)
    values = grid(alphas, "addition")
    names, every = [task.name for task in tasks], [tuple(range(len(tasks)))]
    val_single, (val,) = merged_accuracies(mixtures, tasks, heads, "val", every, [values])
    alpha = values[first_best(normalized(val, val_single))]
    ends = torch.stack([alpha, torch.ones_like(alpha)])
    single, ((merged, one),) = merged_accuracies(mixtures, tasks, heads, "test", every, [ends])
    return {
        "single": dict(zip(names, single.tolist(), strict=True)),
        "addition": {
            "alphas": values.tolist(),
            "val": dict(zip(names, val.T.tolist(), strict=True)),
            "val_single": dict(zip(names, val_single.tolist(), strict=True)),
            "alpha": alpha.item(),
            "test": dict(zip(names, merged.tolist(), strict=True)),
            "absolute": merged.mean().item(),
            "normalized": normalized(merged, single).item(),
            "at_one": one.mean().item(),
        },
    }
