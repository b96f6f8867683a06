"""GELU and SiLU with K tangents: y and every dy in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tangentfast.ops.activation import reference
from tangentfast.ops.contract import (
    Op,
    Provider,
    Reason,
    define,
    in_places,
    kernel_dtypes,
    plain,
    with_vjp,
)


def activation_jvp(
    x: Tensor, kind: str, tangents: Sequence[Tensor | None], backend: str | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """y = f(x) and dy = f'(x) dx.

    Computed in float32 (float64 for float64), y and dy rounded once.

    Args:
        x: [...], float64, float32, float16 or bfloat16; its rows, and those of its tangents, may be
            parts of longer ones, as ``chunk(2, -1)`` gives them.
        kind: f: ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        tangents: K tensors dx, like x, or None.
        backend: ``"native"``, ``"reference"`` or None (see `ops.backend`).

    Returns:
        y, with its ordinary graph, and K tangents of y, without one.

    Raises:
        ValueError, TypeError: an unknown kind; a shape, dtype or device that does not fit.
    """
    dx = [t for t in tangents if t is not None]
    y, dys = ACTIVATION.provider(x.device, backend, x).run(x, kind, dx)
    return y, in_places(tangents, dys)


def _supports(x: Tensor) -> Reason:
    return plain(x) or kernel_dtypes(x)


def _fake(x: Tensor, kind: str, dx: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    y, *dys = (x.new_empty(x.shape) for _ in range(1 + len(dx)))
    return y, dys


native = define("activation_jvp(Tensor x, str kind, Tensor[] dx) -> (Tensor y, Tensor[] dy)", _fake)


def _native(x: Tensor, kind: str, dx: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    def run(needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], tuple[Tensor]]:
        return *native(x, kind, dx), (x,)

    return with_vjp(run, partial(_vjp, kind), x)


def _vjp(kind: str, needs: Sequence[bool], grad: Tensor, x: Tensor) -> tuple[Tensor]:
    if kind == "silu" and torch.is_grad_enabled():  # torch's kernel has no second derivative
        s = torch.sigmoid(x)
        return (grad * s * (1 + x * (1 - s)),)
    return (reference.KINDS[kind][1](grad, x),)


ACTIVATION = Op(
    "activation_jvp",
    Provider("native", _native, _supports, op="activation_jvp"),
    Provider("reference", reference.activation_jvp),
)
