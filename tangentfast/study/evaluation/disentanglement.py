"""Weight disentanglement error: how far two task vectors disturb each other's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tangentfast.study.evaluation.accuracy import ROUNDING, check_tasks, grid, placed
from tangentfast.study.evaluation.mixtures import Mixtures, Reduce, Request

if TYPE_CHECKING:
    from tangentfast.study.data import Split, Task

REPRESENTATION = "none (representation)"


def disentanglement(
    mixtures: Mixtures,
    tasks: Sequence[Task],
    pair: tuple[int, int],
    heads: Mapping[str, Sequence[nn.Module]],
    alphas: Sequence[float],
    *,
    representation: bool = False,
    images: int | None = None,
) -> list[dict[str, Any]]:
    """ξ(α1, α2) of two tasks on a grid, for any number of heads at once and for none.

        ξ(α1, α2) = Σ_{t=1,2} E_{x∼D_t} [ dist( f(x; α_t τ_t), f(x; α1 τ1 + α2 τ2) ) ]

    (Ortiz-Jimenez et al. 2023, arXiv:2305.12827), D_t the test split of task t. For predictions
    dist is 1 where the predicted classes differ, else 0, and ξ is at most 2. For representations
    (after Jin et al. 2024, arXiv:2407.07089, who set the encoder's share apart from the head's)
    dist is the Kullback-Leibler divergence KL(p ‖ q) = Σ_d p_d (log p_d − log q_d) in nats, with
    p = softmax(z) over the D entries of the features z = f(x; α_t τ_t) as the encoder gives them
    (not normalised), and q the same at α1 τ1 + α2 τ2: a mean over images, without an upper bound.

    One sweep serves all heads and the representation. At A coefficients a linear regime costs one
    pass of 5 forwards a task (two where the features are not kept), another A² forwards.

    Args:
        mixtures: encoder and T task vectors.
        tasks: T; task t is what vector t was fine-tuned on.
        pair: the indices of task 1 and task 2.
        heads: name -> T heads, features -> logits; may be empty for the representation alone.
        alphas: A coefficients, increasing, some of them in the search box [0, 1].
        representation: whether ξ of the features is wanted too.
        images: of each test split at most so many, evenly spaced; None takes all.

    Returns:
        One entry for each head, then the representation's: ``tasks``, both names; ``kind``,
        "prediction" or "representation"; ``head``, its name or "none (representation)";
        ``alphas`` [A]; ``xi`` [A][A], α1 first; ``box``, its mean over grid points in [0, 1]².

    Raises:
        ValueError: counts, the pair or alphas that do not fit, or nothing to compare.
        FloatingPointError: a mixture's features are not finite.
    """
    for group in heads.values():
        check_tasks("disentanglement", mixtures, tasks, group)
    if len(set(pair)) < 2 or not all(0 <= t < len(mixtures.vectors) for t in pair):
        raise ValueError(
            f"disentanglement: pair is {pair}, expected two different indices below "
            f"{len(mixtures.vectors)}"
        )
    if not heads and not representation:
        raise ValueError("disentanglement: no heads and no representation, expected one at least")
    values = grid(alphas, "disentanglement")
    inside = (values >= -ROUNDING) & (values <= 1 + ROUNDING)
    if not inside.any():
        raise ValueError(
            f"disentanglement: alphas is {list(alphas)}, expected some in the search box [0, 1]"
        )
    splits = [_thinned(tasks[t].test, images) for t in pair]
    xi = _xi(mixtures, splits, pair, heads, values, representation)
    common = {"tasks": [tasks[t].name for t in pair], "alphas": values.tolist()}
    kinds = [("prediction", name) for name in heads]
    kinds += [("representation", REPRESENTATION)] if representation else []
    return [
        {
            **common,
            "kind": kind,
            "head": head,
            "xi": xi[..., column].tolist(),
            "box": xi[inside][:, inside, column].mean().item(),
        }
        for column, (kind, head) in enumerate(kinds)
    ]


def _xi(
    mixtures: Mixtures,
    splits: Sequence[Split],
    pair: tuple[int, int],
    heads: Mapping[str, Sequence[nn.Module]],
    alphas: Tensor,
    representation: bool,
) -> Tensor:
    """ξ on the grid for each head, then the representation: float64 [A, A, columns]."""
    count = len(alphas)
    directions = torch.eye(len(mixtures.vectors), dtype=torch.float64)[list(pair)]
    looks = [
        _signature([placed(mixtures, group[t]) for group in heads.values()], representation)
        for t in pair
    ]
    # [A, N, signature]: what α τ_t makes of its own task.
    alone = mixtures.sweeps(
        [
            Request(split, alphas[:, None] * direction, look)
            for split, direction, look in zip(splits, directions, looks, strict=True)
        ]
    )
    xi = alphas.new_zeros(count, count, len(heads) + representation)
    # Where the other coefficient is 0 both sides are one model, and dist is 0.
    own, other = torch.cartesian_prod(torch.arange(count), alphas.nonzero().flatten()).T
    if not len(own):
        return xi
    requests = []
    for t, (split, look) in enumerate(zip(splits, looks, strict=True)):
        reference = alone[t].to(mixtures.device)
        rows = alphas[own, None] * directions[t] + alphas[other, None] * directions[1 - t]
        reduce = [partial(_distances, reference[i], look, len(heads)) for i in own.tolist()]
        requests.append(Request(split, rows, reduce))
    first, second = (distances.double().mean(1) for distances in mixtures.sweeps(requests))
    xi[own, other] += first
    xi[other, own] += second  # of task 2 the own coefficient is α2
    return xi


def _signature(heads: Sequence[Callable[[Tensor], Tensor]], representation: bool) -> Reduce:
    """What is compared of features [n, D]: a predicted class by head, then log softmax: [n, H + D].

    Classes are exact in float32 up to 2²⁴ of them.
    """

    def look(features: Tensor, _: Tensor) -> Tensor:
        columns = [head(features).argmax(-1, keepdim=True).to(features.dtype) for head in heads]
        if representation:
            columns.append(features.log_softmax(-1))
        return torch.cat(columns, 1)

    return look


def _distances(
    reference: Tensor, look: Reduce, heads: int, features: Tensor, index: Tensor
) -> Tensor:
    """Dist of each head's predictions, and of the representations where they are looked at."""
    mine, other = reference[index.to(reference.device)], look(features, index)
    differ = (mine[:, :heads] != other[:, :heads]).to(features.dtype)
    p, q = mine[:, heads:], other[:, heads:]
    if not p.shape[1]:
        return differ
    # Never negative but for rounding.
    divergence = (p.exp() * (p - q)).sum(1, keepdim=True).clamp_min(0)
    return torch.cat([differ, divergence], 1)


@dataclass
class _Thinned:
    """Some images of a split."""

    split: Split
    chosen: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor) -> Tensor:
        return self.split.images(self.chosen[index])


def _thinned(split: Split, most: int | None) -> Split:
    """At most so many images, evenly spaced: data sets come sorted by class."""
    if most is None or len(split) <= most:
        return split
    if most < 1:
        raise ValueError(f"disentanglement: images is {most}, expected at least 1")
    chosen = torch.arange(most) * len(split) // most
    return _Thinned(split, chosen, split.labels[chosen])
