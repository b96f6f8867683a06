"""Attention with K tangents, and its backward, in Triton: no [T, S] matrix in memory.

The softmax is taken online, one block of keys after the other (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). With p_ij = exp(s_ij - m_i), m_i the largest
score so far, the sums over j

    z = Σ p,   c = Σ p v,   a = Σ p ds,   u = Σ (p ds) v + p dv

all scale alike when m_i grows. P = p / z and dP = P (ds - Σ P ds) then give

    o = c / z,   do = Σ dP v + P dv = u / z - (a / z) o.

Products with v take p and p ds rounded to its type; z and a are sums of what was rounded. An error
e of one p ds then reaches do as e (v - o) / z, as where ds itself is rounded, and not as e v / z.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangentfast.ops.attention.op import backward_outputs, jvp_outputs, wide
from tangentfast.ops.attention.reference import parts
from tangentfast.ops.expect import expect, hopper

LOG2E = tl.constexpr(1.4426950408889634)


# An operand [N, H, rows, columns] is a tuple (pointer, strides of N, H, rows); columns are
# contiguous, but for masks, whose fifth entry is their stride. None: absent, and not compiled in.
@triton.jit
def _at(x, n, h, rows, columns):
    return x[0] + n * x[1] + h * x[2] + rows.to(tl.int64)[:, None] * x[3] + columns[None, :]


@triton.jit
def _place(blocks, heads):
    """This program's block of rows, batch entry and head; a second axis would end at 65535."""
    head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, (head // heads).to(tl.int64), (head % heads).to(tl.int64)


@triton.jit
def _load(x, n, h, rows, count, columns, WIDTH: tl.constexpr):
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(_at(x, n, h, rows, columns), mask=inside, other=0.0)


@triton.jit
def _store(x, n, h, rows, count, columns, WIDTH: tl.constexpr, tile):
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    tl.store(_at(x, n, h, rows, columns), tile.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def _rows_at(x, n, h, rows):
    return x[0] + n * x[1] + h * x[2] + rows.to(tl.int64) * x[3]


@triton.jit
def _mask(x, n, h, rows, columns, inside):
    at = _at(x, n, h, rows, columns.to(tl.int64) * x[4])
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _scores(q, k, mask, n, h, rows, columns, T, S, scale, CAUSAL: tl.constexpr, P: tl.constexpr):
    """log2(e) (scale q kᵀ + mask), -inf where a row does not see a column."""
    s = tl.dot(q, tl.trans(k), input_precision=P) * (scale * LOG2E)
    inside = (rows[:, None] < T) & (columns[None, :] < S)
    if mask is not None:
        s += _mask(mask, n, h, rows, columns, inside) * LOG2E
    if CAUSAL:
        inside = inside & (columns[None, :] <= rows[:, None])
    return tl.where(inside, s, float("-inf"))


@triton.jit
def attention_jvp_kernel(
    q, k, v, mask, dq, dk, dv, dmask, o, lse, do, heads, group, T, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of o, of their log-sum-exp (unless o is None) and of do (unless None)."""
    SCORES: tl.constexpr = dq is not None or dk is not None or dmask is not None
    block, n, h = _place(tl.cdiv(T, BM), heads)
    rows = block * BM + tl.arange(0, BM)
    g = h // group
    depth, values = tl.arange(0, BD), tl.arange(0, BDV)
    tile_q = _load(q, n, h, rows, T, depth, D)
    if dq is not None:
        tile_dq = _load(dq, n, h, rows, T, depth, D)
    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    c = tl.zeros([BM, BDV], tl.float32)
    a = tl.zeros([BM], tl.float32)
    u = tl.zeros([BM, BDV], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (block + 1) * BM)
    for start in range(0, end, BN):
        columns = start + tl.arange(0, BN)
        tile_k = _load(k, n, g, columns, S, depth, D)
        tile_v = _load(v, n, g, columns, S, values, DV)
        s = _scores(tile_q, tile_k, mask, n, h, rows, columns, T, S, scale, CAUSAL, P)
        top = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(m - shift)
        m = top
        narrow = p.to(tile_v.dtype)
        p = narrow.to(tl.float32)
        z = z * fade + tl.sum(p, 1)
        c = tl.dot(narrow, tile_v, c * fade[:, None], input_precision=P)
        if do is not None:
            u *= fade[:, None]
        if dv is not None:
            tile_dv = _load(dv, n, g, columns, S, values, DV)
            u = tl.dot(narrow, tile_dv, u, input_precision=P)
        if SCORES:
            ds = tl.zeros([BM, BN], tl.float32)
            if dq is not None:
                ds = tl.dot(tile_dq, tl.trans(tile_k), ds, input_precision=P)
            if dk is not None:
                tile_dk = _load(dk, n, g, columns, S, depth, D)
                ds = tl.dot(tile_q, tl.trans(tile_dk), ds, input_precision=P)
            ds *= scale
            if dmask is not None:
                inside = (rows[:, None] < T) & (columns[None, :] < S)
                ds += _mask(dmask, n, h, rows, columns, inside)
            w = (p * ds).to(tile_v.dtype)
            a = a * fade + tl.sum(w.to(tl.float32), 1)
            u = tl.dot(w, tile_v, u, input_precision=P)
    seen = m > float("-inf")
    # NaN scores are not "nothing": they must reach o.
    z = tl.where((z == 0.0) & (seen == 0), 1.0, z)
    c = c / z[:, None]
    if o is not None:
        _store(o, n, h, rows, T, values, DV, c)
        whole = tl.where((z == 1.0) & (seen == 0), float("inf"), (m + tl.log2(z)) / LOG2E)
        tl.store(_rows_at(lse, n, h, rows), whole, mask=rows < T)
    if do is not None:
        _store(do, n, h, rows, T, values, DV, u / z[:, None] - (a / z)[:, None] * c)


@triton.jit
def attention_dq_kernel(
    grad, q, k, v, mask, o, lse, delta, dq, heads, group, T, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of dq, and of delta = rowsum(grad o), which the kernel of dk and dv reads."""
    block, n, h = _place(tl.cdiv(T, BM), heads)
    rows = block * BM + tl.arange(0, BM)
    g = h // group
    depth, values = tl.arange(0, BD), tl.arange(0, BDV)
    tile_g = _load(grad, n, h, rows, T, values, DV)
    tile_o = _load(o, n, h, rows, T, values, DV)
    mean = tl.sum(tile_g.to(tl.float32) * tile_o.to(tl.float32), 1)
    tl.store(_rows_at(delta, n, h, rows), mean, mask=rows < T)
    tile_q = _load(q, n, h, rows, T, depth, D)
    whole = tl.load(_rows_at(lse, n, h, rows), mask=rows < T, other=float("inf")) * LOG2E
    out = tl.zeros([BM, BD], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (block + 1) * BM)
    for start in range(0, end, BN):
        columns = start + tl.arange(0, BN)
        tile_k = _load(k, n, g, columns, S, depth, D)
        tile_v = _load(v, n, g, columns, S, values, DV)
        s = _scores(tile_q, tile_k, mask, n, h, rows, columns, T, S, scale, CAUSAL, P)
        p = tl.exp2(s - whole[:, None])
        dp = tl.dot(tile_g, tl.trans(tile_v), input_precision=P)
        ds = (p * (dp - mean[:, None])).to(tile_k.dtype)
        out = tl.dot(ds, tile_k, out, input_precision=P)
    _store(dq, n, h, rows, T, depth, D, out * scale)


@triton.jit
def attention_dkv_kernel(
    grad, q, k, v, mask, lse, delta, dk, dv, shared, group, T, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN rows of dk and dv, summed in order over the `group` query heads that share them."""
    block, n, g = _place(tl.cdiv(S, BN), shared)
    columns = block * BN + tl.arange(0, BN)
    depth, values = tl.arange(0, BD), tl.arange(0, BDV)
    tile_k = _load(k, n, g, columns, S, depth, D)
    tile_v = _load(v, n, g, columns, S, values, DV)
    out_k = tl.zeros([BN, BD], tl.float32)
    out_v = tl.zeros([BN, BDV], tl.float32)
    first = 0
    if CAUSAL:
        first = block * BN // BM * BM
    for h in range(g * group, (g + 1) * group):
        for start in range(first, T, BM):
            rows = start + tl.arange(0, BM)
            tile_q = _load(q, n, h, rows, T, depth, D)
            tile_g = _load(grad, n, h, rows, T, values, DV)
            whole = tl.load(_rows_at(lse, n, h, rows), mask=rows < T, other=float("inf")) * LOG2E
            mean = tl.load(_rows_at(delta, n, h, rows), mask=rows < T, other=0.0)
            s = _scores(tile_q, tile_k, mask, n, h, rows, columns, T, S, scale, CAUSAL, P)
            p = tl.exp2(s - whole[:, None])
            out_v = tl.dot(tl.trans(p.to(tile_g.dtype)), tile_g, out_v, input_precision=P)
            dp = tl.dot(tile_g, tl.trans(tile_v), input_precision=P)
            ds = (p * (dp - mean[:, None])).to(tile_q.dtype)
            out_k = tl.dot(tl.trans(ds), tile_q, out_k, input_precision=P)
    _store(dk, n, g, columns, S, depth, D, out_k * scale)
    _store(dv, n, g, columns, S, values, DV, out_v)


def _operand(x: Tensor | None) -> Any:
    if x is None:
        return None
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return (x, *x.stride()[:3])


def _whole(x: Tensor | None) -> Any:
    return None if x is None else (x, *x.stride())


def _constants(q: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    d, dv = q.shape[3], v.shape[3]
    return {
        "D": d, "DV": dv, "CAUSAL": causal,
        "BD": max(16, triton.next_power_of_2(d)), "BDV": max(16, triton.next_power_of_2(dv)),
        # Three products of 11-bit parts: float32 but for the last bit or two, on tensor cores.
        "P": "tf32x3" if q.dtype == torch.float32 else None,
    }  # fmt: skip


def _blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """The largest tiles that ptxas was seen to keep in registers, for heads of up to 128 in 16 bits
    and of up to 64 in float32; wider heads spill a little.
    """
    width = max(q.shape[3], v.shape[3])
    rows, columns = 128, 32
    if q.dtype == torch.float32:
        rows, columns = 16, 32 if width <= 64 else 16
    elif width > 128:
        rows, columns = 32, 16
    elif width > 64 and not hopper(q):
        rows, columns = 32, 32
    return {"BM": rows, "BN": columns, "num_warps": 8, "num_stages": 2}


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """The sizes N, H, Hk, T and S, of operands that fit each other."""
    n, h, t, d = q.shape
    shared, s, width = *k.shape[1:3], v.shape[3]
    expect(op, q.device, q.dtype, k=(k, (n, shared, s, d)), v=(v, (n, shared, s, width)))
    expect(op, q.device, wide(q), mask=(mask, (n, h, t, s)))
    if h % shared:
        raise ValueError(f"{op}: q has {h} heads, expected a multiple of k's {shared}.")
    return n, h, shared, t, s


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dq: list[Tensor | None], dk: list[Tensor | None], dv: list[Tensor | None],
    dmask: list[Tensor | None], primal: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """One launch per tangent, the first of which also writes o and its log-sum-exp.

    q [N, H, T, D], k [N, Hk, S, D], v [N, Hk, S, Dv], mask [N, H, T, S]; H is a multiple of Hk.

    A launch with the log-sum-exp known would save one of its six products, but needs a second
    kernel, and takes o rounded to 16 bits into u / z - (a / z) o.
    """
    n, h, shared, t, s = _check("attention_jvp_triton", q, k, v, mask)
    expect("attention_jvp_triton", q.device, q.dtype, dq=(dq, q.shape), dk=(dk, k.shape),
           dv=(dv, v.shape))  # fmt: skip
    expect("attention_jvp_triton", q.device, wide(q), dmask=(dmask, (n, h, t, s)))
    o, lse, dos = jvp_outputs(q, v, len(dq), primal)
    blocks = _blocks(q, v)
    grid = (triton.cdiv(t, blocks["BM"]) * n * h,)
    operands = [*map(_operand, (q, k, v)), _whole(mask)]
    with torch.cuda.device_of(q):
        for i in range(max(len(dos), 1 if primal else 0)):
            tangents: list[Any] = [None] * 4
            do = dos[i] if dos else None
            if do is not None:
                tangents = [*map(_operand, (dq[i], dk[i], dv[i])), _whole(dmask[i])]
            first = primal and i == 0
            attention_jvp_kernel[grid](
                *operands, *tangents,
                _operand(o) if first else None, _whole(lse) if first else None, _operand(do),
                h, h // shared, t, s, scale,
                **_constants(q, v, causal), **blocks,
            )  # fmt: skip
    return o, lse, dos


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float, packed: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, or one [N, T, 3, H, D] of all; one program owns each of their rows,
    so that the bits repeat.
    """
    n, h, shared, t, s = _check("attention_backward_triton", q, k, v, mask)
    shape = (n, h, t, v.shape[3])
    if packed and not q.shape == k.shape == v.shape:
        raise ValueError("attention_backward_triton: packed is for q, k and v of one shape")
    expect("attention_backward_triton", q.device, q.dtype, grad=(grad, shape), o=(o, shape))
    expect("attention_backward_triton", q.device, wide(q), lse=(lse, (n, h, t)))
    grads = backward_outputs(q, k, v, packed)
    dq, dk, dv = parts(grads[0]) if packed else grads
    blocks = _blocks(q, v)
    delta = _whole(torch.empty_like(lse))
    operands = [*map(_operand, (grad, q, k, v)), _whole(mask)]
    sizes = (h // shared, t, s, scale)
    options = {**_constants(q, v, causal), **blocks}
    with torch.cuda.device_of(q):
        attention_dq_kernel[(triton.cdiv(t, blocks["BM"]) * n * h,)](
            *operands, _operand(o), _whole(lse), delta, _operand(dq), h, *sizes, **options
        )
        attention_dkv_kernel[(triton.cdiv(s, blocks["BN"]) * n * shared,)](
            *operands, _whole(lse), delta, _operand(dk), _operand(dv), shared, *sizes, **options
        )
    return grads
