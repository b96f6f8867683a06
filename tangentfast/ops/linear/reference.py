"""Linear layers with K tangents, by torch's own products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None, dx: Sequence[Tensor | None],
    dweight: Sequence[Tensor | None], dbias: Sequence[Tensor | None], narrow: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """y = x Wᵀ + b and dy = dx Wᵀ + x dWᵀ + db, each with a dx or a dweight; see
    `ops.linear.linear_jvp`.
    """
    # One matrix for all products: a transposed x is copied once, and without a graph torch would
    # multiply it batch by batch.
    shape = (*x.shape[:-1], *weight.shape[:-1])
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 2 and x.numel() else x
    widened = weight.dim() == 2 and rows.dim() == 2 and emulated(rows, weight)
    y = _Widened.apply(rows, weight, bias) if widened else F.linear(rows, weight, bias)
    if not dx:
        return y.view(shape), []
    with torch.no_grad():
        if widened:
            rows, weight = rows.float(), weight.float()
        elif narrow:
            rows, weight = rows.bfloat16(), weight.bfloat16()
        dys = [
            _tangent(rows, weight, *terms).to(y.dtype).view(shape)
            for terms in zip(dx, dweight, dbias, strict=True)
        ]
    return y.view(shape), dys


def _tangent(
    x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """In the dtype of x, unless autocast has another."""
    if not torch.is_autocast_enabled(x.device.type):
        dx, dweight, dbias = (None if t is None else t.to(x.dtype) for t in (dx, dweight, dbias))
    if dx is None:
        return F.linear(x, dweight, dbias)  # type: ignore[arg-type]
    dy = F.linear(dx.reshape(x.shape), weight, dbias)
    if dweight is not None:
        if dy.dim() == 2 and dy.numel() and dy.dtype == x.dtype == dweight.dtype:
            dy.addmm_(x, dweight.t())  # into dy: no second buffer
        else:
            dy.add_(F.linear(x, dweight))  # dtypes differ under autocast
    return dy


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of a [M, K] and b [K, N]."""
    return (a.float() @ b.float()).to(a.dtype) if emulated(a, b) else a @ b


@cache
def _has_products(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(ops, f"_is_mkldnn_{name}_supported")())


def emulated(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these two one number at a time: 16 bits on a CPU without such
    products (its x @ w of an MLP layer takes 80 times as long as in float32).

    Judged by device and dtype alone.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and not _has_products(x.dtype)
        and not torch.is_autocast_enabled("cpu")
    )


class _Widened(torch.autograd.Function):
    """``F.linear`` of 16-bit operands in float32, rounded once; saves them in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y."""
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        needs, wide = ctx.needs_input_grad, grad.float()
        return (
            (wide @ weight.float()).to(grad.dtype) if needs[0] else None,
            (wide.t() @ x.float()).to(grad.dtype) if needs[1] else None,
            wide.sum(0).to(grad.dtype) if needs[2] else None,
        )
