"""The experiments on one regime's task vectors of one seed, each cached by content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

import tangentfast as tf

from .cache import digest
from .encoders import encode
from .evaluation import Mixtures, addition, cosine, disentanglement, negation, subsets
from .parts import Parts
from .regimes import REGIMES

__all__ = ["Experiments", "base_accuracy"]


class Experiments:
    """What T task vectors do in a regime's model: entries of results.json.

    A result is cached under the digest of all that it depends on; the model is built, and images
    are looked at, only where one is missing.

    Args:
        parts: of the study.
        regime: a key of `REGIMES`.
        names: T, the tasks.
        vectors: T; τ_t was fine-tuned on task t.
        heads: T, of these tasks, on the study's device.
    """

    def __init__(
        self,
        parts: Parts,
        regime: str,
        names: Sequence[str],
        vectors: Sequence[tf.TaskVector],
        heads: Sequence[nn.Module],
    ) -> None:
        self.parts, self.config, self.regime = parts, parts.config, regime
        self.tangent = REGIMES[regime].tangent
        self.names, self.tasks = list(names), [parts.task(name) for name in names]
        self.vectors, self.heads = vectors, heads
        data = [parts.data(name) for name in names]
        self._contents = [digest(d, v) for d, v in zip(data, vectors, strict=True)]

    def only(self, names: Sequence[str]) -> Experiments:
        """Those on some of the tasks, which depend on nothing of the others."""
        places = [self.names.index(name) for name in names]
        vectors, heads = [self.vectors[i] for i in places], [self.heads[i] for i in places]
        return Experiments(self.parts, self.regime, names, vectors, heads)

    def addition(self) -> dict[str, Any]:
        """``single`` and ``addition``."""
        return self._cached(
            lambda: addition(self._mixtures, self.tasks, self.heads, self.config.alphas),
            *("addition", self.config.alphas, self.heads),
        )

    def negation(self, control: str) -> dict[str, Any]:
        """``negation``, with the control task `control`."""
        task, head = self.parts.task(control), self.parts.head(control)
        alphas, threshold = self.config.alphas, self.config.evaluate.threshold
        return self._cached(
            lambda: negation(
                *(self._mixtures, self.tasks, self.heads, task, head, alphas), threshold=threshold
            ),
            *("negation", alphas, threshold, self.heads, self.parts.data(control), head),
        )

    def cosine(self) -> list[list[float]]:
        """``cosine``."""
        return self._cached(lambda: cosine(self.vectors), "cosine")

    def subsets(self, alpha: float) -> list[dict[str, Any]]:
        """``subsets``, all at one α, so that regimes are compared alike; its seed is 0."""
        limit = self.config.evaluate.subsets
        return self._cached(
            lambda: subsets(self._mixtures, self.tasks, self.heads, alpha, limit=limit),
            *("subsets", alpha, limit, self.heads),
        )

    def disentanglement(self, heads: Mapping[str, Sequence[nn.Module]]) -> list[dict[str, Any]]:
        """``disentanglement`` of the first two tasks for each head and for the representation.

        Args:
            heads: name -> T heads.
        """
        evaluate = self.config.evaluate
        alphas, images = evaluate.xi.values(), evaluate.xi_images
        return self._cached(
            lambda: disentanglement(
                *(self._mixtures, self.tasks, (0, 1), heads, alphas),
                representation=True,
                images=images,
            ),
            *("disentanglement", alphas, images, heads),
        )

    @cached_property
    def _mixtures(self) -> Mixtures:
        device, batch = self.config.device, self.config.evaluate.batch
        return Mixtures(self.parts.encoder, self.vectors, self.tangent, device=device, batch=batch)

    def _cached(self, compute: Callable[[], Any], *settings: object) -> Any:
        key = digest(self.parts.base, self.tangent, self._contents, settings)
        return self.parts.cache.get(key, compute)


def base_accuracy(parts: Parts, name: str) -> float:
    """θ0's accuracy on a task's test split, under its frozen head."""
    task, head = parts.task(name), parts.head(name)
    device, batch = parts.config.device, parts.config.evaluate.batch

    @torch.no_grad()
    def compute() -> float:
        features = encode(parts.encoder, task.test, device=device, batch=batch)
        right = head(features.to(device)).argmax(-1).cpu() == task.test.labels
        return right.double().mean().item()

    accuracy: float = parts.cache.get(digest("base", parts.base, parts.data(name), head), compute)
    return accuracy
