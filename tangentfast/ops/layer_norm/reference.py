"""Layer norm and RMS norm with K tangents, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_jvp(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
    eps: float, dx: Sequence[Tensor | None], dweight: Sequence[Tensor | None],
    dbias: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """y = x̂ w + b and dy = (P dx / σ) w + x̂ dw + db; see `ops.layer_norm.layer_norm_jvp`.

    P is symmetric, so that P dx / σ is what torch's backward kernel computes, with statistics in
    float32 for 16-bit inputs.
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
        for d, dw, db in zip(dx, dweight, dbias, strict=True):
            dy = None
            if d is not None:
                dy = torch.ops.aten.native_layer_norm_backward(
                    d.to(x.dtype), x, shape, mean, rstd, None, None, [True, False, False]
                )[0]
                dy = dy if weight is None else dy.mul_(weight.to(dy.dtype))
            if dw is not None:
                if x_hat is None:
                    x_hat = ((x - mean) * rstd).to(y.dtype)
                dw = dw.to(y.dtype)
                dy = x_hat * dw if dy is None else dy.addcmul_(x_hat, dw)
            if db is not None:
                dy = db.to(y.dtype).expand_as(y) if dy is None else dy.add_(db)
            dys.append(dy)
    return y, dys


def rms_norm_jvp(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float,
    dx: Sequence[Tensor | None], dweight: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """y = x r w and dy = (dx r + x dr) w + x r dw, with r = (mean x² + eps)^-1/2, dr = -r³ mean(x
    dx); see `ops.layer_norm.rms_norm_jvp`.
    """
    shape = list(normalized_shape)
    y = F.rms_norm(x, shape, weight, eps)
    dims = tuple(range(-len(shape), 0))
    dys: list[Tensor | None] = []
    with torch.no_grad():
        wide = torch.promote_types(y.dtype, torch.float32)
        x = x.to(wide)
        r = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        for d, dw in zip(dx, dweight, strict=True):
            dy = None
            if d is not None:
                d = d.to(wide)
                dr = (x * d).mean(dims, keepdim=True) * -(r**3)
                dy = torch.addcmul(d * r, x, dr)
                dy = dy if weight is None else dy.mul_(weight)
            if dw is not None:
                dw = dw.to(wide)
                dy = x * r * dw if dy is None else dy.addcmul_(x * r, dw)
            dys.append(None if dy is None else dy.to(y.dtype))
    return y, dys


def machine_epsilon(x: Tensor) -> float:
    """Of the type that sums over x are computed in."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
