"""Layer norm and RMS norm with K tangents: y and every dy in one read of x and of each dx."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tangentfast._torch import has_kernel
from tangentfast.ops.contract import (
    Op,
    Provider,
    Reason,
    columns,
    define,
    in_places,
    kernel_dtypes,
    plain,
    with_vjp,
)
from tangentfast.ops.layer_norm import reference

aten = torch.ops.aten


class NormTangent(NamedTuple):
    """Of a norm's tensors; None is zero. An RMS norm has no bias."""

    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


def layer_norm_jvp(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
    eps: float, tangents: Sequence[NormTangent | None], backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """y = x̂ w + b and dy = (P dx / σ) w + x̂ dw + db, with x̂ = (x - μ) / σ.

    P removes from a row its mean and its part along x̂. Statistics and sums run in float32 (float64
    for float64) and y and dy are rounded once.

    Args:
        x: [..., *normalized_shape], float64, float32, float16 or bfloat16.
        normalized_shape, eps: as in ``torch.nn.functional.layer_norm``.
        weight, bias: [*normalized_shape] or None; like x, or float32 beside a 16-bit x.
        tangents: K of them, each tensor shaped like its primal.
        backend: ``"native"``, ``"reference"`` or None (see `ops.backend`).

    Returns:
        y, with its ordinary graph, and K tangents of y, without one.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    provider = LAYER_NORM.provider(x.device, backend, x, weight, bias)
    y, dys = provider.run(x, normalized_shape, weight, bias, eps, *columns(tangents, 3))
    return y, in_places(tangents, dys)


def rms_norm_jvp(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None,
    tangents: Sequence[NormTangent | None], backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """y = x̂ w and dy = (dx - x̂ mean(x̂ dx)) r w + x̂ dw, with x̂ = x r, r = (mean x² + eps)^-1/2.

    Args, returns and errors as in `layer_norm_jvp`, with no dbias; `eps` None is the machine
    epsilon of the type computed in, as in ``torch.nn.functional.rms_norm``.
    """
    dx, dweight, _ = columns(tangents, 3)
    eps = reference.machine_epsilon(x) if eps is None else eps
    provider = RMS_NORM.provider(x.device, backend, x, weight)
    y, dys = provider.run(x, normalized_shape, weight, eps, dx, dweight)
    return y, in_places(tangents, dys)


def _supports(x: Tensor, *parameters: Tensor | None) -> Reason:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and has_kernel(
        "aten::layer_norm", f"Autocast{kind.upper()}"
    ):
        return "autocast changes types inside"
    return plain(x, *parameters) or kernel_dtypes(x, *parameters)


def _fake_rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float,
    dx: list[Tensor | None], dweight: list[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dims = len(normalized_shape)
    reduced = [*x.shape[: x.dim() - dims], *[1] * dims]
    y, *dys = (x.new_empty(x.shape) for _ in range(1 + len(dx)))
    return y, x.new_empty(reduced, dtype=torch.promote_types(x.dtype, torch.float32)), dys


def _fake_layer_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float,
    dx: list[Tensor | None], dweight: list[Tensor | None], dbias: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    y, rstd, dys = _fake_rms_norm(x, normalized_shape, weight, eps, dx, dweight)
    return y, torch.empty_like(rstd), rstd, dys


# mean and rstd [..., *[1]] in float32, of float64 in float64.
native_layer_norm = define(
    "layer_norm_jvp(Tensor x, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "Tensor?[] dx, Tensor?[] dweight, Tensor?[] dbias) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor[] dy)",
    _fake_layer_norm,
)
native_rms_norm = define(
    "rms_norm_jvp(Tensor x, int[] normalized_shape, Tensor? weight, float eps, "
    "Tensor?[] dx, Tensor?[] dweight) -> (Tensor y, Tensor rstd, Tensor[] dy)",
    _fake_rms_norm,
)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float,
    *tangents: list[Tensor | None],
) -> tuple[Tensor, Sequence[Tensor]]:  # fmt: skip
    def run(needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, ...]]:
        y, mean, rstd, dys = native_layer_norm(x, shape, weight, bias, eps, *tangents)
        return y, dys, (x, weight, mean, rstd)

    return with_vjp(run, partial(_layer_norm_vjp, shape), x, weight, bias)


def _layer_norm_vjp(
    shape: Sequence[int], needs: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    # On a CPU torch takes the statistics in the type of the weight.
    dtype = mean.dtype if x.device.type == "cpu" else x.dtype
    if weight is not None:
        weight = weight.to(dtype)
    elif needs[2] or x.dtype != dtype:
        weight = x.new_ones(shape, dtype=dtype)
    grads: tuple[Tensor | None, ...] = aten.native_layer_norm_backward(
        grad, x, shape, mean, rstd, weight, weight, list(needs)
    )
    return grads


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float,
    *tangents: list[Tensor | None],
) -> tuple[Tensor, Sequence[Tensor]]:  # fmt: skip
    def run(needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, ...]]:
        y, _, dys = native_rms_norm(x, shape, weight, eps, *tangents)
        return y, dys, (x, weight)

    return with_vjp(run, partial(_rms_norm_vjp, shape, eps), x, weight)


def _rms_norm_vjp(
    shape: Sequence[int], eps: float, needs: Sequence[bool], grad: Tensor, x: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The Jacobian of x̂ is symmetric, so that the op itself gives the gradient."""
    g = grad if weight is None else (grad * weight).to(x.dtype)
    if torch.is_grad_enabled():  # for a second derivative
        dims = tuple(range(-len(shape), 0))
        rstd = (x.square().mean(dims, True) + eps).rsqrt()
        x_hat = x * rstd
        gx = (g - x_hat * (g * x_hat).mean(dims, True)) * rstd
    else:
        x_hat, _, (gx,) = native_rms_norm(x, shape, None, eps, [g], [None])
    gweight = (grad * x_hat).sum_to_size(*shape) if needs[1] else None
    return gx, gweight


LAYER_NORM = Op(
    "layer_norm_jvp",
    Provider("native", _layer_norm, _supports, op="layer_norm_jvp"),
    Provider("reference", reference.layer_norm_jvp),
)
RMS_NORM = Op(
    "rms_norm_jvp",
    Provider("native", _rms_norm, _supports, op="rms_norm_jvp"),
    Provider("reference", reference.rms_norm_jvp),
)
