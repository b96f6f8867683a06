"""Normalisations.

The Jacobian of x -> (x - mean) / std is symmetric, so torch's backward kernel, without weight, is
the JVP of the normalised x; weight and bias then enter as in any product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.layer_norm import NormTangent, layer_norm_jvp, rms_norm_jvp
from tangentfast.rules.registry import Inexact, Jvp, fused, rule

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


def _affine(y: Tensor, x_hat: Jvp, normalised: Jvp, weight: Tensor | None) -> tuple[Any, ...]:
    """y = x̂ w + b and its terms by x, w and b.

    ``x_hat()`` is x̂, computed where it is needed; ``normalised(dx)`` its tangent.
    """

    def by_input(dx: Tensor) -> Tensor:
        dx_hat = normalised(dx)
        return dx_hat if weight is None else dx_hat * _per_channel(weight, y)

    return (
        y,
        by_input,
        lambda dweight: x_hat() * _per_channel(dweight, y),
        lambda dbias: _per_channel(dbias, y),
    )


@rule("group_norm")
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Any, ...]:
    y = F.group_norm(input, num_groups, weight, bias, eps)
    n, c = input.shape[:2]
    sizes = (n, c, math.prod(input.shape[2:]), num_groups)

    @cache
    def standardised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input.to(y.dtype).contiguous()
        return x, *torch.native_group_norm(x, None, None, *sizes, eps)

    def normalised(dx: Tensor) -> Tensor:
        x, _, mean, rstd = standardised()
        dx = dx.to(y.dtype).contiguous()
        return aten.native_group_norm_backward(
            dx, x, mean, rstd, None, *sizes, [True, False, False]
        )[0]

    y, by_input, *by_others = _affine(y, lambda: standardised()[1], normalised, weight)
    return y, by_input, None, *by_others


def _by_own_statistics(
    input: Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    """Batch norm that keeps no statistics is a fixed function: standardised weights are made so."""
    y = F.batch_norm(input, None, None, weight, bias, training, momentum, eps)

    @cache
    def standardised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input.to(y.dtype)
        return x, *torch.native_batch_norm(x, None, None, None, None, True, momentum, eps)

    def normalised(dx: Tensor) -> Tensor:
        x, _, mean, rstd = standardised()
        return aten.native_batch_norm_backward(
            dx.to(y.dtype), x, None, None, None, mean, rstd, True, eps, [True, False, False]
        )[0]

    return _affine(y, lambda: standardised()[1], normalised, weight)


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
    cudnn_enabled: bool = True,
) -> tuple[Any, ...]:
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
    return _affine(y, lambda: (input - mean) * scale, lambda dx: dx * scale, weight)


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
) -> tuple[Any, ...]:
    y, by_input, *by_others = aten_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    return y, by_input, None, None, *by_others


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
) -> tuple[Any, ...]:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise Inexact("instance norm that updates running statistics moves; put it in eval mode.")
    y, by_input, _, *by_others = group_norm(input, input.shape[1], weight, bias, eps)
    return y, by_input, None, None, *by_others


@rule(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Jvp, Jvp]:
    """g v / |v|, the norm over every dimension but `dim`; over all of them where that is -1."""
    length = torch.norm_except_dim(v, 2, dim)
    direction = v / length

    def turned(dv: Tensor) -> Tensor:
        others = [i for i in range(v.dim()) if i != dim]
        along = (dv * direction).sum(others, keepdim=True)
        return (dv - along * direction) * (g / length)

    return torch._weight_norm(v, g, dim), turned, lambda dg: dg * direction
