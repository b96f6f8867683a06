"""Linear layers with K tangents: y and every dy from operands that are laid out once for all.

The native op is taken where it was measured to be faster than torch's products: forward on CPUs
with AVX2 but not AVX-512, and in 16 bits, gradients included, where the CPU has no such products.
On a GPU the Triton kernel and torch's products are measured for each shape (`tuned`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.activation import activation_jvp
from tangentfast.ops.activation.reference import KINDS
from tangentfast.ops.backend import choose, load_native, ordinary, register_triton
from tangentfast.ops.linear import reference, tuned
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
    *,
    kind: str = "",
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = f(x Wᵀ + b) + r and dy = f'(x Wᵀ + b) (dx Wᵀ + x dWᵀ + db) + dr.

    Args:
        x: [..., D].
        weight: [E, D] or [D]; bias: [E], [] or None.
        tangents: K rows (dx, dweight, dbias, dresidual), each shaped like its primal or None; a row
            may be shorter, and may be None.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None (see `ops.backend`). Operands
            of different types, a weight that is a vector, empty tensors and autocast run on the
            reference.
        kind: f, as `ops.activation` names it, or empty: no activation.
        residual: r [..., E], of the dtype of x, or None.

    Returns:
        y [..., E], with its ordinary graph, and K tangents of y, without one.

    Raises:
        ValueError: an unknown kind, or a residual of another shape than y.
    """
    shape = (*x.shape[:-1], *weight.shape[:-1])
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"linear_jvp: residual has shape {tuple(residual.shape)}, y has {tuple(shape)}."
        )
    chosen = (
        choose("products", x.device, backend)
        if _regular(x, weight, bias, residual)
        else "reference"
    )
    if chosen == "triton" and not _suits_triton(x, backend):
        chosen = "reference"
    if chosen == "native" and not (backend == "native" or _faster(x, weight)):
        chosen = "reference"
    if chosen != "triton" and (kind or residual is not None):
        return _epilogue(x, weight, bias, tangents, chosen, kind, residual)
    if chosen == "reference":
        return reference.linear_jvp(x, weight, bias, tangents)
    given: list[Any] = []  # of each product's left, right, bias and residual
    places: list[int | None] = []
    for row in tangents:
        full = (*row, None, None, None, None)[:4] if row is not None else (None,) * 4
        dx, dweight, dbias, dresidual = full
        # dbias alone is dy, with nothing to compute.
        terms = (dx, dweight, dresidual, dbias if kind else None)
        needed = any(t is not None for t in terms)
        places.append(len(given) if needed else None)
        if needed:
            given.append([t if t is None else t.to(x.dtype) for t in full])
    rows = x.reshape(-1, x.shape[-1])
    for row in given:
        row[0] = row[0] if row[0] is None else row[0].reshape(rows.shape)
        row[3] = row[3] if row[3] is None else row[3].reshape(rows.shape[0], -1)
    run = _native if chosen == "native" else partial(tuned.run, forced=backend == "triton")
    flat = None if residual is None else residual.reshape(rows.shape[0], -1)
    y, *products = _Linear.apply(run, rows, weight, bias, flat, kind, given)
    dys = [
        (row and row[2]) if place is None else products[place].view(shape)
        for row, place in zip(tangents, places, strict=True)
    ]
    return y.view(shape), dys


def _epilogue(
    x: Tensor, weight: Tensor, bias: Tensor | None, tangents: Sequence[Row], backend: str,
    kind: str, residual: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The same, one operation after the other."""
    rows = [row and row[:3] for row in tangents]
    y, dys = linear_jvp(x, weight, bias, rows, backend)
    if kind:
        y, dys = activation_jvp(
            y, kind, [None if dy is None else (dy.expand(y.shape),) for dy in dys]
        )
    if residual is not None:
        y = y + residual
    ends = [row[3] if row is not None and len(row) > 3 else None for row in tangents]
    return y, [
        dy if end is None else end if dy is None else dy + end
        for dy, end in zip(dys, ends, strict=True)
    ]


def _regular(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the operands are what the kernel was written for, judged by shape and type."""
    return (
        weight.dim() == 2
        and x.dim() > 0
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.is_floating_point()
        and (bias is None or (bias.dtype == x.dtype and bias.dim() == 1))
        and (residual is None or residual.dtype == x.dtype)
        and x.numel() > 0
        and weight.numel() > 0
        and ordinary(x, weight, bias, residual)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _suits_triton(x: Tensor, backend: str | None) -> bool:
    """Whether the Triton kernel knows this type and, unless it is asked for, may be measured:
    torch.compile sees through torch's products, and not through a measurement.
    """
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and (backend == "triton" or not torch.compiler.is_compiling())


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


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: None, kind: str, rows: Sequence[Any]
) -> tuple[Tensor, list[Tensor], None]:
    """y and every dy, of x [M, D] and rows with a dx or a dweight."""
    lefts, rights, biases, terms = [x], [weight.t()], [bias], [0, 0, 0]
    for dx, dweight, dbias, _ in rows:
        if dx is not None:
            terms += (len(biases), len(lefts), 0)
            lefts.append(dx)
        if dweight is not None:
            terms += (len(biases), 0, len(rights))
            rights.append(dweight.t())
        biases.append(dbias)
    y, *dys = products(lefts, rights, biases, terms)
    return y, dys, None


class _Linear(torch.autograd.Function):
    """y with its ordinary gradients, and its tangents, without any."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, list[Tensor], Tensor | None]],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        kind: str,
        rows: Sequence[Any],
    ) -> tuple[Tensor, ...]:
        """(y, *dys); `run` gives z = x Wᵀ + b, too, if there is an activation."""
        y, dys, z = run(x, weight, bias, residual, kind, rows)
        _, x_needs, weight_needs, bias_needs, *_ = ctx.needs_input_grad
        needed = x_needs or weight_needs or bias_needs
        ctx.save_for_backward(
            x if weight_needs else None, weight if x_needs else None, z if needed else None
        )
        ctx.kind = kind
        ctx.mark_non_differentiable(*dys)
        ctx.set_materialize_grads(False)
        return (y, *dys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual."""
        if grad is None:
            return (None,) * 7
        x, weight, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        at_z = grad if z is None else KINDS[ctx.kind][1](grad, z)
        return (
            None,
            _product(at_z, weight) if needs[1] else None,
            _product(at_z.t(), x) if needs[2] else None,
            at_z.sum(0) if needs[3] else None,
            grad if needs[4] else None,
            None,
            None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not emulated(a, b):  # a second derivative, or torch is as fast
        return a @ b
    return products([a], [b], [None], [0, 0, 0])[0]


def _register_fake() -> None:
    @torch.library.register_fake("tangentfast::products")
    def _(
        lefts: list[Tensor], rights: list[Tensor], biases: list[Tensor | None], terms: list[int]
    ) -> list[Tensor]:
        shape = (lefts[0].shape[0], rights[0].shape[1])
        return [lefts[0].new_empty(shape) for _ in biases]


def _fake_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    dx: list[Tensor | None], dweight: Any, dbias: Any, dresidual: Any,
    kind: str, keep: bool, tile: int,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape[0], weight.shape[0]) for _ in range(1 + len(dx) + keep)]


# Shapes without data, for torch.compile and opcheck.
if load_native()[0] is not None:
    _register_fake()
register_triton(
    "linear_jvp",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor?[] dx, Tensor?[] dweight, "
    "Tensor?[] dbias, Tensor?[] dresidual, str kind, bool keep, int tile) -> Tensor[]",
    "tangentfast.ops.linear.triton",
    _fake_triton,
)
