"""Task negation: θ0 − α τ_t forgets task t and should keep everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tangentfast.study.evaluation.accuracy import (
    ROUNDING,
    accuracies,
    check_tasks,
    first_best,
    grid,
)
from tangentfast.study.evaluation.mixtures import Mixtures

if TYPE_CHECKING:
    from tangentfast.study.data import Task


def negation(
    mixtures: Mixtures,
    tasks: Sequence[Task],
    heads: Sequence[nn.Module],
    control: Task,
    control_head: nn.Module,
    alphas: Sequence[float],
    *,
    threshold: float = 0.95,
) -> dict[str, Any]:
    """Accuracy of θ0 − α τ_t on task t and on a control task, for each t.

    α is the one with the lowest validation accuracy on task t among those, and 0, that keep the
    control task's validation accuracy at `threshold` × that of θ0 or above; of equal ones the
    smallest. What is reported is measured on test (Ilharco et al. 2023, arXiv:2212.04089;
    Ortiz-Jimenez et al. 2023, arXiv:2305.12827, with ImageNet and 0.95).

    Args:
        mixtures: encoder and T task vectors.
        tasks: T; task t is what vector t was fine-tuned on.
        heads: T, features -> logits.
        control: a task that no vector was fine-tuned on.
        control_head: its head.
        alphas: A coefficients, 0 or positive, increasing.
        threshold: the share of the control task's accuracy that must remain, in (0, 1].

    Returns:
        ``alphas`` [A]; ``threshold``; ``control_base``, θ0's accuracy on the control task;
        ``tasks``, name -> {``target_val`` and ``control_val`` [A]; ``alpha``; ``target`` and
        ``control`` on test; ``reached``, whether any α but 0 kept the threshold}; ``target`` and
        ``control``, means over tasks. Fractions.

    Raises:
        ValueError: counts, alphas or a threshold that do not fit.
        FloatingPointError: a mixture's features are not finite.
    """
    check_tasks("negation", mixtures, tasks, heads)
    if control.name in {task.name for task in tasks}:
        raise ValueError(
            f"negation: the control task {control.name!r} is among the tasks, expected another one"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"negation: threshold is {threshold}, expected a share in (0, 1]")
    values = grid(alphas, "negation")
    if values[0] < 0:
        raise ValueError(f"negation: alphas is {list(alphas)}, expected none below 0")
    candidates = torch.cat([values.new_zeros(1), values])  # θ0 first
    down = -torch.eye(len(tasks), dtype=torch.float64)
    wanted = []
    for task, head, row in zip(tasks, heads, down, strict=True):
        rows = candidates[:, None] * row
        wanted += [(task.val, head, rows), (control.val, control_head, rows)]
    measured = accuracies(mixtures, wanted)

    results: dict[str, dict[str, Any]] = {}
    wanted = []
    for task, head, row, target_val, control_val in zip(
        tasks, heads, down, measured[0::2], measured[1::2], strict=True
    ):
        allowed = control_val >= threshold * control_val[0] - ROUNDING
        best = first_best(torch.where(allowed, -target_val, -torch.inf))
        at = candidates[best, None, None] * row
        wanted += [(task.test, head, at), (control.test, control_head, at)]
        results[task.name] = {
            "target_val": target_val[1:].tolist(),
            "control_val": control_val[1:].tolist(),
            "alpha": candidates[best].item(),
            "reached": bool((allowed & (candidates > 0)).any()),
        }
    *at_best, base = accuracies(mixtures, [*wanted, (control.test, control_head, 0 * down[:1])])
    for result, target, control_left in zip(
        results.values(), at_best[0::2], at_best[1::2], strict=True
    ):
        result |= {"target": target.item(), "control": control_left.item()}
    return {
        "alphas": values.tolist(),
        "tasks": results,
        "target": torch.cat(at_best[0::2]).mean().item(),
        "control": torch.cat(at_best[1::2]).mean().item(),
        "control_base": base.item(),
        "threshold": threshold,
    }
