"""Anchored parameters: θ0 as it is, tied to the τ that is trained.

A module whose parameters are trained in tangent space keeps θ0 under its own name and τ beside it
(``weight`` and ``weight_tau``), so that sharding, moving and saving the module treat both alike.
Its class is replaced by a subclass in which reading ``weight`` during a pass gives the dual number
(θ0, τ); the primal is an identity whose backward delivers the gradient to τ. Outside a pass it is
plain θ0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast.dual import Dual, make_dual
from tangentfast.passes import current

SUFFIX = "_tau"


class Anchor(torch.autograd.Function):
    """θ0, whose gradient goes to τ: f_lin is linear in τ, so ∂L/∂τ = J(θ0)ᵀ ∂L/∂f_lin."""

    @staticmethod
    def forward(ctx: Any, theta0: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        ctx.dtype = tau.dtype
        return theta0.view_as(theta0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: D102
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward (create_graph=True) through a linearized model is not "
                "supported: its backward is that of the network at θ0, which is not the second "
                "derivative. Use torch.func.jvp on the original model."
            )
        return None, grad.to(ctx.dtype)


def _read(module: nn.Module, name: str) -> Tensor | None:
    theta0, pass_ = module._parameters[name], current()
    if pass_ is None or not pass_.anchors or type(theta0) is Dual or theta0 is None:
        return theta0
    tau = module._parameters[name + SUFFIX]
    primal = theta0
    if pass_.recording:
        primal = Anchor.apply(theta0, tau)
    tangent = tau.detach().to(theta0.dtype)  # type: ignore[union-attr]
    return make_dual(primal, [tangent] * pass_.k, pass_)


@cache
def _anchored(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reader(name: str) -> property:
        return property(lambda module: _read(module, name))

    body: dict[str, Any] = {name: reader(name) for name in names}
    body["__reduce_ex__"] = lambda module, _: (_restore, (cls, names), module.__dict__)
    body["__module__"], body["__qualname__"] = cls.__module__, cls.__qualname__
    body["_anchored"] = (cls, names)
    return type(cls.__name__, (cls,), body)


def _restore(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = object.__new__(_anchored(cls, names))  # type: ignore[arg-type]
    return module


def anchor(module: nn.Module, taus: dict[str, nn.Parameter]) -> None:
    """Put τ beside the parameters of `module` (its own names) and make reading them give duals."""
    for name, tau in taus.items():
        if hasattr(module, name + SUFFIX):
            raise ValueError(
                f"linearize: {type(module).__name__} has an attribute {name + SUFFIX!r} already; "
                "expected that name to be free for τ. Was the model linearized before?"
            )
        module._parameters[name + SUFFIX] = tau
    module.__class__ = _anchored(type(module), tuple(taus))  # type: ignore[arg-type]


def anchored_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's own parameters that have a τ."""
    return getattr(type(module), "_anchored", (None, ()))[1]


def release(module: nn.Module, settle: Callable[[Tensor, Tensor], nn.Parameter]) -> None:
    """Undo `anchor`: each parameter becomes ``settle(θ0, τ)`` and the class is the original one."""
    for name in anchored_names(module):
        tau = module._parameters.pop(name + SUFFIX)
        module._parameters[name] = settle(module._parameters[name], tau)  # type: ignore[arg-type]
    if anchored_names(module):
        module.__class__ = type(module)._anchored[0]  # type: ignore[attr-defined]
