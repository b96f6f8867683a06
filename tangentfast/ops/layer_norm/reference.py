"""Layer norm and RMS norm with K tangents, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Row = tuple[Tensor | None, ...] | None
Sums = tuple[Tensor, list[Tensor | None]]


def add_jvp(x: Tensor, residual: Tensor, tangents: Sequence[Row]) -> Sums:
    """s = x + residual, and ds of each row (dx, dresidual, ...)."""
    dss: list[Tensor | None] = []
    with torch.no_grad():
        for row in tangents:
            dx, dresidual = (None, None) if row is None else row[:2]
            both = dx is not None and dresidual is not None
            dss.append(dx + dresidual if both else dresidual if dx is None else dx)  # type: ignore[operator]
    return x + residual, dss


def layer_norm_jvp(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tangents: Sequence[Row],
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x̂ w + b and dy = (P dx / σ) w + x̂ dw + db, with x̂ = (x - μ) / σ.

    P removes from a row its mean and its part along x̂. It is symmetric, so that P dx / σ is what
    torch's backward kernel computes, with statistics in float32 for 16-bit inputs.

    Args:
        x: [..., *normalized_shape], floating point.
        normalized_shape, eps: as in ``torch.nn.functional.layer_norm``.
        weight, bias: [*normalized_shape] or None.
        tangents: K rows (dx, dweight, dbias), each shaped like its primal or None; a row may be
            None.

    Returns:
        y, with its ordinary graph, and K tangents of y, without one.
    """
    shape = list(normalized_shape)
    if torch.is_autocast_enabled(x.device.type):  # which casts inside layer_norm
        y = F.layer_norm(x, shape, weight, bias, eps)
        x = x.to(y.dtype)
        with torch.no_grad():
            mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)[1:]
    else:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    dys: list[Tensor | None] = []
    x_hat = None
    with torch.no_grad():
        for row in tangents:
            if row is None:
                dys.append(None)
                continue
            dx, dweight, dbias = row
            dy = None
            if dx is not None:
                dy = torch.ops.aten.native_layer_norm_backward(
                    dx.to(x.dtype), x, shape, mean, rstd, None, None, [True, False, False]
                )[0]
                dy = dy if weight is None else dy.mul_(weight.to(dy.dtype))
            if dweight is not None:
                if x_hat is None:
                    x_hat = ((x - mean) * rstd).to(y.dtype)
                dweight = dweight.to(y.dtype)
                dy = x_hat * dweight if dy is None else dy.addcmul_(x_hat, dweight)
            if dbias is not None:
                dy = dbias.to(y.dtype).expand_as(y) if dy is None else dy.add_(dbias)
            dys.append(dy)
    return y, dys


def rms_norm_jvp(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    tangents: Sequence[Row],
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x r w and dy = (dx r + x dr) w + x r dw, with r = (mean x² + eps)^-1/2, dr = -r³ mean(x
    dx).

    Args and returns as in `layer_norm_jvp`, with rows (dx, dweight); `eps` None is the machine
    epsilon of the type computed in, as in ``torch.nn.functional.rms_norm``: float32 for 16-bit
    inputs.
    """
    shape = list(normalized_shape)
    eps = machine_epsilon(x) if eps is None else eps
    y = F.rms_norm(x, shape, weight, eps)
    dims = tuple(range(-len(shape), 0))
    dys: list[Tensor | None] = []
    with torch.no_grad():
        wide = torch.promote_types(y.dtype, torch.float32)
        x = x.to(wide)
        r = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        for row in tangents:
            if row is None:
                dys.append(None)
                continue
            dx, dweight = row
            dy = None
            if dx is not None:
                dx = dx.to(wide)
                dr = (x * dx).mean(dims, keepdim=True) * -(r**3)
                dy = torch.addcmul(dx * r, x, dr)
                dy = dy if weight is None else dy.mul_(weight)
            if dweight is not None:
                dweight = dweight.to(wide)
                dy = x * r * dweight if dy is None else dy.addcmul_(x * r, dweight)
            dys.append(None if dy is None else dy.to(y.dtype))
    return y, dys


def machine_epsilon(x: Tensor) -> float:
    """Of the type that sums over x are computed in."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
