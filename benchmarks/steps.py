"""The training steps that are compared: forward, a loss, backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from baselines import FullNTK
from networks import directions
from regimes import (
    ATTENTION,
    COMPILED,
    ORDINARY,
    OURS,
    OURS_ATTENTION,
    OURS_NARROW,
    PUBLISHED,
)
from torch import Tensor, nn

import tangentfast as tf

# What `linearize` is given for each of ours.
LINEARIZE: dict[str, dict[str, Any]] = {
    OURS: {"params": "all"},
    OURS_ATTENTION: {"params": "attention"},
    OURS_NARROW: {"params": "all", "tangent_dtype": torch.bfloat16},
}


@dataclass
class Step:
    """A network as one regime trains it, its trained parameters by name, and a batch."""

    model: Callable[[Tensor], Tensor]
    trained: Mapping[str, Tensor]
    x: Tensor
    optimizer: torch.optim.Optimizer | None = None

    def __call__(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """One step; the output and the gradients."""
        for parameter in self.trained.values():
            parameter.grad = None
        out = self.model(self.x)
        out.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in self.trained.items()}
        if self.optimizer is not None:
            self.optimizer.step()
        return out.detach(), gradients


def step(variant: str, network: nn.Module, x: Tensor) -> Step:
    """One of the regimes; τ is small and random, the same numbers in each.

    Args:
        variant: ordinary; ordinary, with attention's linear layers alone trained (Jin et al. 2024,
            arXiv:2407.07089); NTK linearization as published, also through ``torch.compile``; ours.
        network: shared by the steps, except where it would be changed.
        x: the batch.
    """
    if variant == ORDINARY:
        return Step(network, dict(network.named_parameters()), x)
    if variant == ATTENTION:
        own = copy.deepcopy(network)
        tf.train_only(own, "attention")
        return Step(own, {n: p for n, p in own.named_parameters() if p.requires_grad}, x)
    linear: Any
    if variant in (PUBLISHED, COMPILED):
        linear = FullNTK(network)
    else:
        linear = tf.linearize(network, **LINEARIZE[variant])
    _start(network, linear.tau)
    trained = linear.tau
    return Step(torch.compile(linear) if variant == COMPILED else linear, trained, x)


def published(network: nn.Module, names: Any, x: Tensor) -> Step:
    """NTK linearization as published, of the named parameters: what ours is checked against."""
    linear = FullNTK(network, names)
    _start(network, linear.tau)
    return Step(linear, linear.tau, x)


def _start(network: nn.Module, tau: Mapping[str, Tensor]) -> None:
    values = directions(network, 1)[0]
    with torch.no_grad():
        for name, tensor in tau.items():
            tensor.copy_(values[name])
