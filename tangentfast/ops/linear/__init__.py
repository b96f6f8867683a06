"""Linear layers with K tangents: y and every dy from operands that are laid out once for all.

The native op is taken where it was measured to be faster than torch's products: forward on CPUs
with AVX2 but not AVX-512, and in 16 bits, gradients included, where the CPU has no such products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.backend import choose, load_native, ordinary
from tangentfast.ops.linear import reference
from tangentfast.ops.linear.reference import Row, emulated

__all__ = ["linear_jvp"]

# Below these sizes, of x and of the weight, packing costs more than it gains.
ROWS, WEIGHTS = 16, 128 * 128


def linear_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x Wᵀ + b and dy = dx Wᵀ + x dWᵀ + db, each accumulated in one buffer.

    Args:
        x: [..., D].
        weight: [E, D] or [D]; bias: [E], [] or None.
        tangents: K rows (dx, dweight, dbias), each shaped like its primal or None; a row may be
            None.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`). Operands of
            different types, a weight that is a vector, empty tensors and autocast run on the
            reference.

    Returns:
        y [..., E], with its ordinary graph, and K tangents of y, without one.
    """
    if (
        not _regular(x, weight, bias)
        or choose("products", x.device, backend) == "reference"
        or not (backend == "native" or _faster(x, weight))
    ):
        return reference.linear_jvp(x, weight, bias, tangents)
    given: list[Any] = []  # of each product's left, right and bias
    places: list[int | None] = []
    for row in tangents:
        multiplied = row is not None and (row[0] is not None or row[1] is not None)
        places.append(len(given) if multiplied else None)
        if multiplied:
            given.append([t if t is None else t.to(x.dtype) for t in row])  # type: ignore[union-attr]
    rows = x.reshape(-1, x.shape[-1])
    for row in given:
        row[0] = row[0] if row[0] is None else row[0].reshape(rows.shape)
    y, *products = _Linear.apply(rows, weight, bias, given)
    shape = (*x.shape[:-1], weight.shape[0])
    dys = [
        (row and row[2]) if place is None else products[place].view(shape)
        for row, place in zip(tangents, places, strict=True)
    ]
    return y.view(shape), dys


def _regular(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands are what the kernel was written for, judged by shape and type."""
    return (
        weight.dim() == 2
        and x.dim() > 0
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and (bias is None or (bias.dtype == x.dtype and bias.dim() == 1))
        and x.numel() > 0
        and weight.numel() > 0
        and ordinary(x, weight, bias)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _faster(x: Tensor, weight: Tensor) -> bool:
    if emulated(x, weight):
        return True
    native = load_native()[0]
    return (
        x.dtype == torch.float32
        and weight.numel() >= WEIGHTS
        and x.numel() >= ROWS * x.shape[-1]
        and native is not None
        and native.isa() == "avx2"
    )


def products(
    lefts: list[Tensor], rights: list[Tensor], biases: list[Tensor | None], terms: list[int]
) -> list[Tensor]:
    """The op: biases[o] + Σ lefts[l] @ rights[r] over the triples (o, l, r) of `terms`."""
    found: list[Tensor] = torch.ops.tangentfast.products.default(lefts, rights, biases, terms)
    return found


class _Linear(torch.autograd.Function):
    """y with its ordinary gradients, and its tangents, without any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """(y, *dys), of x [M, D] and rows with a dx or a dweight."""
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        lefts, rights, biases, terms = [x], [weight.t()], [bias], [0, 0, 0]
        for dx, dweight, dbias in rows:
            if dx is not None:
                terms += (len(biases), len(lefts), 0)
                lefts.append(dx)
            if dweight is not None:
                terms += (len(biases), 0, len(rights))
                rights.append(dweight.t())
            biases.append(dbias)
        y, *dys = products(lefts, rights, biases, terms)
        ctx.mark_non_differentiable(*dys)
        ctx.set_materialize_grads(False)
        return (y, *dys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _product(grad, weight) if needs[0] else None,
            _product(grad.t(), x) if needs[1] else None,
            grad.sum(0) if needs[2] else None,
            None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not emulated(a, b):  # a second derivative, or torch is as fast
        return a @ b
    return products([a], [b], [None], [0, 0, 0])[0]


def _register_fake() -> None:
    """Shapes without data, for torch.compile and opcheck."""

    @torch.library.register_fake("tangentfast::products")
    def _(
        lefts: list[Tensor], rights: list[Tensor], biases: list[Tensor | None], terms: list[int]
    ) -> list[Tensor]:
        shape = (lefts[0].shape[0], rights[0].shape[1])
        return [lefts[0].new_empty(shape) for _ in biases]


if load_native()[0] is not None:
    _register_fake()
