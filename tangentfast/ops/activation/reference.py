"""Activations with K tangents, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# f(x) and f'(x) dx: the Jacobian is diagonal, so that torch's backward kernels are the JVP.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dx, x: aten.gelu_backward(dx, x, approximate="tanh"),
    ),
    "silu": (F.silu, aten.silu_backward),
}


def activation_jvp(x: Tensor, kind: str, dx: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """y = f(x) and dy = f'(x) dx; see `ops.activation.activation_jvp`."""
    if kind not in KINDS:
        *most, last = KINDS
        raise ValueError(f"activation_jvp: kind is {kind!r}, expected {', '.join(most)} or {last}")
    f, slope_times = KINDS[kind]
    y = f(x)
    with torch.no_grad():
        return y, [slope_times(t, x) for t in dx]
