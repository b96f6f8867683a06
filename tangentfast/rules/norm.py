"""Normalisations.

The Jacobian of x -> (x - mean) / std is symmetric, so torch's backward kernel, without weight, is
the JVP of the normalised x; weight and bias then enter as in any product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.layer_norm import NormTangent, layer_norm_jvp, rms_norm_jvp
from tangentfast.rules.registry import Inexact, Jvp, add, fused, rule

aten = torch.ops.aten


@fused("layer_norm")
def layer_norm(
    tangents: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, list[Any]]:
    rows = [row and NormTangent(row[0], row[2], row[3]) for row in tangents]
    return layer_norm_jvp(input, normalized_shape, weight, bias, eps, rows)


@fused("rms_norm")
def rms_norm(
    tangents: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, list[Any]]:
    rows = [row and NormTangent(row[0], row[2]) for row in tangents]
    return rms_norm_jvp(input, normalized_shape, weight, eps, rows)


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _affine(x_hat: Any, dx_hat: Any, weight: Any, dweight: Any, dbias: Any) -> Any:
    """d(x̂ w + b); `x_hat` is a function, called only where a weight has a tangent."""
    dy = dx_hat if dx_hat is None or weight is None else dx_hat * weight
    if dweight is not None:
        dy = add(dy, x_hat() * dweight)
    return add(dy, dbias)


@rule("group_norm")
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Jvp]:
    y = F.group_norm(input, num_groups, weight, bias, eps)
    n, c = input.shape[:2]
    sizes = (n, c, math.prod(input.shape[2:]), num_groups)

    def jvp(dx: Any, _: None, dweight: Any, dbias: Any, *__: None) -> Tensor:
        x = input.to(y.dtype).contiguous()
        x_hat, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
        dx_hat = None
        if dx is not None:
            dx = dx.to(y.dtype).contiguous()
            dx_hat = aten.native_group_norm_backward(
                dx, x, mean, rstd, None, *sizes, [True, False, False]
            )[0]
        channels = [t if t is None else _per_channel(t, input) for t in (weight, dweight, dbias)]
        return _affine(lambda: x_hat, dx_hat, *channels)

    return y, jvp


def _by_own_statistics(
    input: Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Jvp]:
    """Batch norm that keeps no statistics is a fixed function: standardised weights are made so."""
    y = F.batch_norm(input, None, None, weight, bias, training, momentum, eps)

    def jvp(dx: Any, _m: None, _v: None, dweight: Any, dbias: Any, *__: None) -> Tensor:
        x = input.to(y.dtype)
        x_hat, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, momentum, eps)
        dx_hat = None
        if dx is not None:
            dx_hat = aten.native_batch_norm_backward(
                dx.to(y.dtype), x, None, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
        channels = [t if t is None else _per_channel(t, input) for t in (weight, dweight, dbias)]
        return _affine(lambda: x_hat, dx_hat, *channels)

    return y, jvp


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Jvp]:
    if running_mean is None and running_var is None:
        return _by_own_statistics(input, weight, bias, training, momentum, eps)
    if training or running_mean is None or running_var is None:
        raise Inexact(
            "train-mode batch norm ties the samples of a batch together and moves its "
            "statistics, so that there is no fixed network to linearize. Put the batch norms in "
            "eval mode."
        )
    y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    mean, scale = (_per_channel(t, input) for t in (running_mean, torch.rsqrt(running_var + eps)))

    def jvp(dx: Any, _m: None, _v: None, dweight: Any, dbias: Any, *__: None) -> Tensor:
        channels = [t if t is None else _per_channel(t, input) for t in (weight, dweight, dbias)]
        dx_hat = None if dx is None else dx * scale
        return _affine(lambda: (input - mean) * scale, dx_hat, *channels)

    return y, jvp


@rule(torch.batch_norm)
def aten_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Tensor, Jvp]:
    """The same in the order of ``torch.batch_norm``."""
    y, jvp = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return y, lambda dx, dweight, dbias, *_: jvp(dx, None, None, dweight, dbias)


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Jvp]:
    if not use_input_stats:
        y, jvp = batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return y, lambda *d: jvp(*d)
    if running_mean is not None:
        raise Inexact("instance norm that updates running statistics moves; put it in eval mode.")
    y, jvp = group_norm(input, input.shape[1], weight, bias, eps)
    return y, lambda dx, _m, _v, dweight, dbias, *__: jvp(dx, None, dweight, dbias)


@rule(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Jvp]:
    """g v / |v|, the norm over every dimension but `dim`; over all of them where that is -1."""
    length = torch.norm_except_dim(v, 2, dim)
    direction = v / length

    def jvp(dv: Any, dg: Any, _: None) -> Tensor | None:
        turned = None
        if dv is not None:
            others = [i for i in range(v.dim()) if i != dim]
            along = (dv * direction).sum(others, keepdim=True)
            turned = (dv - along * direction) * (g / length)
        return add(turned, None if dg is None else dg * direction)

    return torch._weight_norm(v, g, dim), jvp
