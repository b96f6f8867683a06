"""Layer norm and RMS norm with K tangents: y and every dy in one read of x and of each dx.

The native ops have a gradient by x, residual, weight and bias, which is torch's own backward of
the primal; tangents have none, and nothing of them is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangentfast._torch import has_kernel
from tangentfast.ops._old import choose, in_rows, load_native, native_dtypes, ordinary
from tangentfast.ops.layer_norm import reference
from tangentfast.ops.layer_norm.reference import Row, Sums

__all__ = ["add_layer_norm_jvp", "add_rms_norm_jvp", "layer_norm_jvp", "rms_norm_jvp"]


def layer_norm_jvp(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x̂ w + b and dy = (P dx / σ) w + x̂ dw + db, with x̂ = (x - μ) / σ.

    Statistics and sums run in float32 (float64 for float64) and y and dy are rounded once.

    Args:
        x: [..., *normalized_shape], float64, float32, float16 or bfloat16.
        normalized_shape, eps: as in ``torch.nn.functional.layer_norm``.
        weight, bias: [*normalized_shape] or None; like x, or float32 beside a 16-bit x.
        tangents: K rows (dx, dweight, dbias), each shaped like its primal or None; a row may be
            None.
        backend: ``"native"``, ``"reference"`` or None (see `tangentfast.ops.backend`).

    Returns:
        y, with its ordinary graph, and K tangents of y, without one; None for a row that is None.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    if not _native("layer_norm_jvp", x, None, weight, bias, backend):
        return reference.layer_norm_jvp(x, normalized_shape, weight, bias, eps, tangents)
    flat = [t for row in tangents if row is not None for t in (row[0], None, row[1], row[2])]
    y, _, _, dys, _ = torch.ops.tangentfast.layer_norm_jvp.default(
        x, None, normalized_shape, weight, bias, eps, flat
    )
    return y, in_rows(tangents, dys)


def rms_norm_jvp(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x̂ w and dy = (dx - x̂ mean(x̂ dx)) r w + x̂ dw, with x̂ = x r, r = (mean x² + eps)^-1/2.

    Args, returns and errors as in `layer_norm_jvp`, with rows (dx, dweight); `eps` None is the
    machine epsilon of the type computed in, as in ``torch.nn.functional.rms_norm``.
    """
    if not _native("rms_norm_jvp", x, None, weight, None, backend):
        return reference.rms_norm_jvp(x, normalized_shape, weight, eps, tangents)
    flat = [t for row in tangents if row is not None for t in (row[0], None, row[1], None)]
    eps = reference.machine_epsilon(x) if eps is None else eps
    y, _, dys, _ = torch.ops.tangentfast.rms_norm_jvp.default(
        x, None, normalized_shape, weight, eps, flat
    )
    return y, in_rows(tangents, dys)


def add_layer_norm_jvp(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Sums, tuple[Tensor, list[Tensor | None]]]:
    """s = x + residual and `layer_norm_jvp` of s, in one pass; both come out with their tangents.

    Args and errors as in `layer_norm_jvp`, with rows (dx, dresidual, dweight, dbias); `residual`
    is like x.

    Returns:
        (s, ds) and (y, dy).
    """
    if not _native("layer_norm_jvp", x, residual, weight, bias, backend):
        s, dss = reference.add_jvp(x, residual, tangents)
        rows = [row and (ds, row[2], row[3]) for row, ds in zip(tangents, dss, strict=True)]
        return (s, dss), reference.layer_norm_jvp(s, normalized_shape, weight, bias, eps, rows)
    y, _, _, dys, sums = torch.ops.tangentfast.layer_norm_jvp.default(
        x, residual, normalized_shape, weight, bias, eps, _flat(tangents)
    )
    return _sums(tangents, sums), (y, in_rows(tangents, dys))


def add_rms_norm_jvp(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    tangents: Sequence[Row],
    backend: str | None = None,
) -> tuple[Sums, tuple[Tensor, list[Tensor | None]]]:
    """s = x + residual and `rms_norm_jvp` of s, as in `add_layer_norm_jvp`; rows (dx, dresidual,
    dweight).
    """
    if not _native("rms_norm_jvp", x, residual, weight, None, backend):
        s, dss = reference.add_jvp(x, residual, tangents)
        rows = [row and (ds, row[2]) for row, ds in zip(tangents, dss, strict=True)]
        return (s, dss), reference.rms_norm_jvp(s, normalized_shape, weight, eps, rows)
    eps = reference.machine_epsilon(x) if eps is None else eps
    whole = [row and (*row, None) for row in tangents]
    y, _, dys, sums = torch.ops.tangentfast.rms_norm_jvp.default(
        x, residual, normalized_shape, weight, eps, _flat(whole)
    )
    return _sums(tangents, sums), (y, in_rows(tangents, dys))


def _native(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    backend: str | None,
) -> bool:
    """Whether the native op takes this call: decided by types and devices alone, never by tangents,
    so that a block run again by checkpointing keeps what it kept the first time.
    """
    device = x.device
    return (
        choose(op, device, backend) == "native"
        and ordinary(x, residual, weight, bias)
        and native_dtypes(x, weight, bias)
        and not (torch.is_autocast_enabled(device.type) and _autocasts(device.type))
    )


def _autocasts(kind: str) -> bool:
    """Whether autocast changes the types inside a norm on this kind of device."""
    return has_kernel("aten::layer_norm", f"Autocast{kind.upper()}")


def _flat(tangents: Sequence[Row]) -> list[Tensor | None]:
    """The op's list of tangents. A sum of one summand is that summand: it goes in as dx."""
    flat: list[Tensor | None] = []
    for row in tangents:
        if row is not None:
            dx, dresidual, *rest = row
            flat += (dresidual, None, *rest) if dx is None else (dx, dresidual, *rest)
    return flat


def _sums(tangents: Sequence[Row], sums: list[Tensor]) -> Sums:
    s, *rest = sums
    computed = iter(rest)
    dss: list[Tensor | None] = []
    for row in tangents:
        dx, dresidual = (None, None) if row is None else row[:2]
        both = dx is not None and dresidual is not None
        dss.append(next(computed) if both else dresidual if dx is None else dx)
    return s, dss


def _register_fakes() -> None:
    """Shapes without data, for torch.compile and opcheck."""

    def outputs(
        x: Tensor, residual: Tensor | None, shape: list[int], tangents: list[Tensor | None]
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        def empty() -> Tensor:
            return torch.empty_like(x, memory_format=torch.contiguous_format)

        reduced = [*x.shape[: x.dim() - len(shape)], *[1] * len(shape)]
        wide = torch.promote_types(x.dtype, torch.float32)
        added = sum(t is not None for t in tangents[1::4]) + (residual is not None)
        dys = [empty() for _ in tangents[::4]]
        return empty(), x.new_empty(reduced, dtype=wide), dys, [empty() for _ in range(added)]

    @torch.library.register_fake("tangentfast::layer_norm_jvp")
    def _(
        x: Tensor,
        residual: Tensor | None,
        normalized_shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tangents: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        y, rstd, dys, sums = outputs(x, residual, normalized_shape, tangents)
        return y, torch.empty_like(rstd), rstd, dys, sums

    @torch.library.register_fake("tangentfast::rms_norm_jvp")
    def _(
        x: Tensor,
        residual: Tensor | None,
        normalized_shape: list[int],
        weight: Tensor | None,
        eps: float,
        tangents: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        return outputs(x, residual, normalized_shape, tangents)


if load_native()[0] is not None:
    _register_fakes()
