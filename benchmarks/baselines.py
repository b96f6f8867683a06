"""What tangentfast is compared with, written from the published methods; each names its source."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class FullNTK:
    """Full NTK linearization, ``torch.func.jvp`` and backward through it.

    Ortiz-Jimenez et al. (2023), arXiv:2305.12827, section 4: f(x; θ0) + J(x) τ by one
    Jacobian-vector product. Attention runs on the math backend, the only one with a forward
    derivative.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = {n: p.detach() for n, p in model.named_parameters()}
        self.tau = {n: torch.zeros_like(p, requires_grad=True) for n, p in self.base.items()}

    def parameters(self) -> list[Tensor]:
        """The trained τ."""
        return list(self.tau.values())

    def __call__(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            y, dy = torch.func.jvp(
                lambda p: torch.func.functional_call(self.model, p, (x,)), (self.base,), (self.tau,)
            )
        return y + dy


def step(model: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Tensor:
    """One training step without the optimizer: forward, a loss, backward. Returns the output."""
    for parameter in parameters:
        parameter.grad = None
    out = model(x)
    out.square().mean().backward()
    return out.detach()
