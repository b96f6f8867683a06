"""Linear layers with a tangent in Triton: y and dy of one tile from one pass over their operands.

Four operands are read for three products, where three separate products read six:

    y = x Wᵀ + b,   dy = dx Wᵀ + x dWᵀ + db.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangentfast.ops.expect import expect, hopper


# An operand [rows, columns] is a tuple (pointer, stride of rows); columns are contiguous. None:
# absent, and not compiled in. Rows are counted from the tile's first, in 32 bits: 64-bit offsets of
# a whole tile would take the registers that its sums need.
@triton.jit
def _at(x, first, rows, columns):
    return x[0] + first.to(tl.int64) * x[1] + (rows[:, None] * x[1] + columns[None, :])


@triton.jit
def _load(x, first, rows, depth, D, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(_at(x, first, rows, depth))
    return tl.load(_at(x, first, rows, depth), mask=depth[None, :] < D, other=0.0)


@triton.jit
def _store(x, first, rows, columns, inside, tile):
    tl.store(_at(x, first, rows, columns), tile.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def _along(bias, columns, E):
    return tl.load(bias + columns, mask=columns < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def linear_jvp_kernel(
    x, dx, weight, dweight, bias, dbias, y, dy, M, E, D,
    EVEN: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y and of dy; either may be None."""
    # GROUP tiles below each other run at a time, then their neighbours: what they read stays in L2.
    down, across = tl.cdiv(M, BM), tl.cdiv(E, BN)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    top, left = (first + within % high) * BM, within // high * BN
    rows, columns = tl.arange(0, BM), left + tl.arange(0, BN)
    inside = (top + rows[:, None] < M) & (columns[None, :] < E)
    # Rows beyond the end read the last one, and are not stored.
    from_x = tl.minimum(rows, M - 1 - top)
    from_w = tl.minimum(tl.arange(0, BN), E - 1 - left)
    acc = tl.zeros([BM, BN], tl.float32)
    dacc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, D, BK):
        depth = start + tl.arange(0, BK)
        tile_x = _load(x, top, from_x, depth, D, EVEN)
        if y is not None or dx is not None:
            tile_w = tl.trans(_load(weight, left, from_w, depth, D, EVEN))
        if y is not None:
            acc = tl.dot(tile_x, tile_w, acc, input_precision=P)
        if dx is not None:
            tile_dx = _load(dx, top, from_x, depth, D, EVEN)
            dacc = tl.dot(tile_dx, tile_w, dacc, input_precision=P)
        if dweight is not None:
            tile_dw = tl.trans(_load(dweight, left, from_w, depth, D, EVEN))
            dacc = tl.dot(tile_x, tile_dw, dacc, input_precision=P)
    if bias is not None:
        acc += _along(bias, columns, E)
    if dbias is not None:
        dacc += _along(dbias, columns, E)
    if y is not None:
        _store(y, top, rows, columns, inside, acc)
    if dy is not None:
        _store(dy, top, rows, columns, inside, dacc)


# By bytes of a number; what ptxas keeps in registers (tests/ops/test_triton_compiled.py). Two sums
# of 128 x 128 are half of a multiprocessor's registers: no tile is larger. The last one of a list
# only fits Hopper.
TILES = {
    2: (
        {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
        {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 4},
        {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    ),
    4: (
        {"BM": 64, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3},
        {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
    ),
}


def tiles(x: Tensor) -> int:
    """How many of TILES, from the first, fit the device; the interpreter has no use for two."""
    count = len(TILES[x.dtype.itemsize])
    return 1 if not x.is_cuda else count if hopper(x) else count - 1


def _operand(t: Tensor | None) -> Any:
    if t is None:
        return None
    t = t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
    return (t, t.stride(0))


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def linear_jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None, dx: list[Tensor | None],
    dweight: list[Tensor | None], dbias: list[Tensor | None], tile: int,
) -> list[Tensor]:  # fmt: skip
    """[y, *dys]; one launch per tangent, the first of which writes y.

    x [M, D], weight [E, D] and their tangents; one whose rows are not contiguous is copied.

    Raises:
        ValueError: a shape, dtype or device that does not fit; nothing was launched.
    """
    (m, d), e = x.shape, weight.shape[0]
    expect("linear_jvp_triton", x.device, x.dtype,
           x=(x, (m, d)), weight=(weight, (e, d)), bias=(bias, (e,)),
           dx=(dx, (m, d)), dweight=(dweight, (e, d)), dbias=(dbias, (e,)))  # fmt: skip
    y, *dys = (x.new_empty(m, e) for _ in range(1 + len(dx)))
    blocks = TILES[x.dtype.itemsize][tile]
    options = {**blocks, "EVEN": d % blocks["BK"] == 0, "GROUP": 8, "P": _precision(x)}
    grid = (triton.cdiv(m, blocks["BM"]) * triton.cdiv(e, blocks["BN"]),)
    with torch.cuda.device_of(x):
        for k in range(max(len(dx), 1)):
            tangent = k < len(dx)
            linear_jvp_kernel[grid](
                _operand(x), _operand(dx[k]) if tangent else None,
                _operand(weight), _operand(dweight[k]) if tangent else None,
                _vector(bias), _vector(dbias[k]) if tangent else None,
                _operand(y) if k == 0 else None, _operand(dys[k]) if tangent else None,
                m, e, d, **options,
            )  # fmt: skip
    return [y, *dys]


def _precision(x: Tensor) -> str | None:
    """float32 as torch multiplies it: three products of 11-bit parts, or one where it may."""
    if x.dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
