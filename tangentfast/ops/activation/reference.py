"""Activations with K tangents, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Row = tuple[Tensor | None, ...] | None

# f(x) and f'(x) dx: the Jacobian is diagonal, so that torch's backward kernels are the JVP.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dx, x: aten.gelu_backward(dx, x, approximate="tanh"),
    ),
    # x σ(1.702 x) = silu(1.702 x) / 1.702
    "quick_gelu": (
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda dx, x: aten.silu_backward(dx, 1.702 * x),
    ),
    "silu": (F.silu, aten.silu_backward),
    "sigmoid": (torch.sigmoid, lambda dx, x: aten.sigmoid_backward(dx, torch.sigmoid(x))),
}


def check_kind(kind: str, op: str) -> None:
    """Raise ValueError for an activation that there is not."""
    if kind not in KINDS:
        *most, last = KINDS
        raise ValueError(f"{op}: kind is {kind!r}, expected {', '.join(most)} or {last}")


def activation_jvp(
    x: Tensor,
    kind: str,
    tangents: Sequence[Row],
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = f(x + b) (g + c) and its K tangents; see `ops.activation.activation_jvp`."""
    check_kind(kind, "activation_jvp")
    f, slope_times = KINDS[kind]
    x = _sum(x, bias)
    value = f(x)
    full_gate = gate if gate is None else _sum(gate, gate_bias)
    y = value if full_gate is None else value * full_gate
    dys: list[Tensor | None] = []
    with torch.no_grad():
        for row in tangents:
            if row is None:
                dys.append(None)
                continue
            dx, dbias, dgate, dgate_bias = (*row, None, None, None)[:4]
            dy = None
            moved = _sum(dx, dbias)
            if moved is not None:
                dy = slope_times(moved.expand_as(x), x)
                dy = dy if full_gate is None else dy.mul_(full_gate)
            moved = _sum(dgate, dgate_bias)
            if moved is not None:
                dy = value * moved if dy is None else dy.addcmul_(value, moved)
            dys.append(dy)
    return y, dys


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor:
    """a + b, where None is the structural zero."""
    return b if a is None else a if b is None else a + b  # type: ignore[return-value]
