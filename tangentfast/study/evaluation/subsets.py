"""Task addition over the number of tasks merged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

from torch import nn

from tangentfast.study.evaluation.accuracy import (
    Subset,
    check_tasks,
    first_best,
    grid,
    merged_accuracies,
    normalized,
)
from tangentfast.study.evaluation.mixtures import Mixtures

if TYPE_CHECKING:
    from tangentfast.study.data import Task


def subsets(
    mixtures: Mixtures,
    tasks: Sequence[Task],
    heads: Sequence[nn.Module],
    alphas: Sequence[float] | float,
    *,
    limit: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Test accuracy of α Σ_{t∈S} τ_t on the tasks of S, for many subsets S of two tasks or more.

    A linear regime takes one pass over each split for all of them; another takes one forward for
    each subset, and one for each α more where α is chosen.

    Args:
        mixtures: encoder and T task vectors, T at least 2.
        tasks: T; task t is what vector t was fine-tuned on.
        heads: T, features -> logits.
        alphas: coefficients, increasing, of which every subset gets its own by its mean normalised
            validation accuracy (the smallest of equal ones); or one number, fixed for all.
        limit: at most so many subsets, at least 1. Where there are more, sizes take turns from T
            down to 2 and each draws without replacement, so that all are there.
        seed: of that draw.

    Returns:
        By size and then by index: ``tasks``, names; ``alpha``; ``chosen``, "validation" or "fixed";
        ``absolute`` and ``normalized``, means over the subset's tasks. Fractions.

    Raises:
        ValueError: counts, alphas or a limit that do not fit.
        FloatingPointError: a mixture's features are not finite.
    """
    check_tasks("subsets", mixtures, tasks, heads)
    if len(tasks) < 2 or limit < 1:
        raise ValueError(
            f"subsets: {len(tasks)} tasks and a limit of {limit}, expected at least 2 and 1"
        )
    how, alphas = ("fixed", [alphas]) if isinstance(alphas, int | float) else ("validation", alphas)
    values = grid(alphas, "subsets")
    chosen = _choose(len(tasks), limit, seed)
    best = [0] * len(chosen)
    if how == "validation":
        single, merged = merged_accuracies(
            mixtures, tasks, heads, "val", chosen, [values] * len(chosen)
        )
        best = [
            first_best(normalized(merged[s], single[list(subset)]))
            for s, subset in enumerate(chosen)
        ]
    at = [values[b : b + 1] for b in best]
    single, merged = merged_accuracies(mixtures, tasks, heads, "test", chosen, at)
    return [
        {
            "tasks": [tasks[t].name for t in subset],
            "alpha": at[s].item(),
            "chosen": how,
            "absolute": merged[s].mean().item(),
            "normalized": normalized(merged[s], single[list(subset)]).item(),
        }
        for s, subset in enumerate(chosen)
    ]


def _choose(count: int, limit: int, seed: int) -> list[Subset]:
    sizes = range(count, 1, -1)
    if sum(comb(count, size) for size in sizes) <= limit:
        return [s for size in reversed(sizes) for s in combinations(range(count), size)]
    draw = random.Random(seed)
    drawn: dict[int, set[Subset]] = {size: set() for size in sizes}
    left = limit
    while left:
        for size in sizes:
            if not left or len(drawn[size]) == comb(count, size):
                continue
            before = len(drawn[size])
            while len(drawn[size]) == before:
                drawn[size].add(tuple(sorted(draw.sample(range(count), size))))
            left -= 1
    return sorted((s for group in drawn.values() for s in group), key=lambda s: (len(s), s))
