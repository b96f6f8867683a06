"""Task addition: one model θ0 + α Σ_t τ_t for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tangentfast.study.evaluation.accuracy import (
    accuracies,
    check_tasks,
    first_best,
    grid,
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
    What is reported is measured on test.

    Args:
        mixtures: encoder and T task vectors.
        tasks: T; task t is what vector t was fine-tuned on.
        heads: T, features -> logits.
        alphas: A coefficients, increasing.

    Returns:
        ``base``: name -> test accuracy at θ0. ``single``: name -> test accuracy at τ_t.
        ``addition``: ``alphas`` [A]; ``val`` and ``test``, name -> accuracies [A]; ``alpha``;
        ``absolute`` and ``normalized``, means over tasks at alpha; ``at_one``, the mean at α = 1.
        Accuracies are fractions; all numbers are Python's.

    Raises:
        ValueError: counts or alphas that do not fit.
        FloatingPointError: a mixture's features are not finite.
    """
    check_tasks("addition", mixtures, tasks, heads)
    values = grid(alphas, "addition")
    count, names = len(tasks), [task.name for task in tasks]
    alone = torch.eye(count, dtype=torch.float64)
    sweep = values[:, None].expand(-1, count)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(-1, count)
    rows = [torch.cat([alone[t : t + 1], ends, sweep]) for t in range(count)]
    both = accuracies(
        mixtures,
        [
            wanted
            for task, head, row in zip(tasks, heads, rows, strict=True)
            for wanted in ((task.val, head, row[[0, *range(3, len(row))]]), (task.test, head, row))
        ],
    )
    val, test = torch.stack(both[0::2], 1), torch.stack(both[1::2], 1)  # [1 + A, T], [3 + A, T]
    chosen = first_best(normalized(val[1:], val[0]))
    single, base, one, curve = test[0], test[1], test[2], test[3:]
    return {
        "base": dict(zip(names, base.tolist(), strict=True)),
        "single": dict(zip(names, single.tolist(), strict=True)),
        "addition": {
            "alphas": values.tolist(),
            "val": dict(zip(names, val[1:].T.tolist(), strict=True)),
            "test": dict(zip(names, curve.T.tolist(), strict=True)),
            "alpha": values[chosen].item(),
            "absolute": curve[chosen].mean().item(),
            "normalized": normalized(curve[chosen], single).item(),
            "at_one": one.mean().item(),
        },
    }
