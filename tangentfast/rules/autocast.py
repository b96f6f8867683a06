"""Autocast: as torch casts the operands of a product, but θ0 once and not in every step.

torch keeps the 16-bit copies of trained parameters until the autocast region ends. θ0 is frozen,
and its copies are kept by the linearized model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tangentfast._torch import base, version
from tangentfast.passes import current


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products in on the device of x; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def narrow(x: Any, dtype: torch.dtype | None) -> Any:
    """x in `dtype`, with its graph; as it is where autocast leaves it alone (float64, integers)."""
    if dtype is None or x is None or x.dtype in (dtype, torch.float64) or not x.is_floating_point():
        return x
    source = base(x)  # θ0 is read through an alias that leads to τ
    pass_ = current()
    if (
        pass_ is None
        or pass_.casts is None
        or type(source) is not nn.Parameter
        or source.requires_grad
        or source.shape != x.shape
        or source.stride() != x.stride()
    ):
        return x.to(dtype)
    cached = pass_.casts.get(source)
    if cached is None or cached[0] != (version(source), dtype):
        cached = pass_.casts[source] = (version(source), dtype), source.detach().to(dtype)
    return _Cast.apply(x, cached[1])


class _Cast(torch.autograd.Function):
    """A copy of x that was made before, in x's place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
