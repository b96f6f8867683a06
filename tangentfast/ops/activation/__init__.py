"""GELU, quick-GELU, SiLU and their gated forms with K tangents: y and every dy in one pass.

The native op has a gradient by x, gate and biases, which is torch's own backward of the primal;
tangents have none, and nothing of them is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangentfast.ops._old import choose, in_rows, load_native, native_dtypes, ordinary
from tangentfast.ops.activation import reference
from tangentfast.ops.activation.reference import Row

__all__ = ["activation_jvp"]


def activation_jvp(
    x: Tensor,
    kind: str,
    tangents: Sequence[Row],
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = f(x + b) (g + c) and dy = f'(x + b) (g + c) (dx + db) + f(x + b) (dg + dc).

    The gate g + c is optional: SwiGLU is ``"silu"`` with a gate, GEGLU is ``"gelu"`` with one.
    Computed in float32 (float64 for float64), y and dy rounded once.

    Args:
        x: [..., N], float64, float32, float16 or bfloat16; its rows, and those of gate and their
            tangents, may be parts of longer ones, as ``chunk(2, -1)`` gives them.
        kind: f: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"`` (x σ(1.702 x)), ``"silu"`` or
            ``"sigmoid"``.
        tangents: K rows (dx, dbias, dgate, dgate_bias), each shaped like its primal or None; a row
            may be shorter, and may be None.
        bias, gate_bias: b, c [N] of the dtype of x, or None.
        gate: g, like x, or None.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`).

    Returns:
        y, with its ordinary graph, and K tangents of y, without one; None for a row that is None.

    Raises:
        ValueError, TypeError: an unknown kind; a shape, dtype or device that does not fit.
    """
    # Types and devices alone decide, never tangents, so that a block run again by checkpointing
    # keeps what it kept the first time.
    if (
        choose("activation_jvp", x.device, backend) == "reference"
        or not ordinary(x, bias, gate, gate_bias)
        or not native_dtypes(x)
    ):
        return reference.activation_jvp(x, kind, tangents, bias, gate, gate_bias)
    flat: list[Tensor | None] = []
    for row in tangents:
        if row is not None:
            flat += row
            flat += [None] * (4 - len(row))
    y, dys = torch.ops.tangentfast.activation_jvp.default(x, bias, gate, gate_bias, kind, flat)
    return y, in_rows(tangents, dys)


def _register_fake() -> None:
    """Shapes without data, for torch.compile and opcheck."""

    @torch.library.register_fake("tangentfast::activation_jvp")
    def _(
        x: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        kind: str,
        tangents: list[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        def empty() -> Tensor:
            return torch.empty_like(x, memory_format=torch.contiguous_format)

        return empty(), [empty() for _ in tangents[::4]]


if load_native()[0] is not None:
    _register_fake()
