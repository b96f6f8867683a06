"""Linear layers with K tangents: y and every dy from operands that are laid out once for all.

On a CPU the native products and torch's, on a GPU the Triton kernel and torch's, are measured for
each shape, in the forward and for either gradient: which is faster is a matter of the processor and
of torch's library. Without a measurement (`ops.choice`) it is native on a CPU, whose bits do not
depend on the number of threads, and torch on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tangentfast.ops.backend import wanted
from tangentfast.ops.contract import (
    YES,
    Op,
    Provider,
    Reason,
    columns,
    define,
    define_triton,
    in_places,
    kernel_dtypes,
    plain,
    with_vjp,
)  # fmt: skip
from tangentfast.ops.linear import reference
from tangentfast.ops.linear.reference import emulated

# Below these sizes, of x and of the weight, packing costs more than it gains.
ROWS, WEIGHTS = 16, 128 * 128
# Multiplications of one product. Below, a launch is what takes time, and torch launches faster.
LAUNCH = 1 << 28
MEASURED = 1024  # rows of a measurement


class LinearTangent(NamedTuple):
    """Of a linear layer's tensors; None is zero."""

    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


def linear_jvp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tangents: Sequence[LinearTangent | None],
    backend: str | None = None,
    *,
    narrow: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:
    """y = x Wᵀ + b and dy = dx Wᵀ + x dWᵀ + db.

    Args:
        x: [..., D].
        weight: [E, D] or [D]; bias: [E], [] or None.
        tangents: K of them, each tensor shaped like its primal.
        backend: ``"native"``, ``"triton"``, ``"reference"`` or None (see `ops.backend`).
        narrow: to round the operands of the tangents' products from float32 to bfloat16, by up to
            2^-8 of each. y and its gradients know nothing of it.

    Returns:
        y [..., E], with its ordinary graph, and K tangents of y, without one.
    """
    narrow = narrow and x.dtype == torch.float32
    candidates: tuple[Provider, ...] = (LINEAR.reference,)
    if not _irregular(x, weight, bias):
        candidates = LINEAR.candidates(x.device, backend, x, weight, narrow)
    # A dbias alone is dy, with nothing to compute.
    moving = [t and (t if t.dx is not None or t.dweight is not None else None) for t in tangents]
    dx, dweight, dbias = columns(moving, 3)
    if candidates == (LINEAR.reference,):
        y, dys = reference.linear_jvp(x, weight, bias, dx, dweight, dbias, narrow)
    else:
        dx = [t if t is None else t.to(x.dtype).reshape(-1, x.shape[-1]) for t in dx]
        dweight = [t if t is None else t.to(x.dtype) for t in dweight]
        dbias = [t if t is None else t.to(x.dtype) for t in dbias]
        y, rows = with_vjp(
            partial(_run, candidates, x, weight, bias, dx, dweight, dbias, narrow),
            partial(_vjp, backend),
            x, weight, bias,
        )  # fmt: skip
        dys = [dy.view(y.shape) for dy in rows]
    results = zip(tangents, moving, in_places(moving, dys), strict=True)
    return y, [t.dbias if t and moves is None else dy for t, moves, dy in results]


def _irregular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    """Why nothing but torch's own linear takes this call."""
    if weight.dim() != 2 or x.dim() == 0 or not x.numel() or not weight.numel():
        return "no matrices, or empty ones"
    dtype = x.dtype
    if weight.dtype != dtype:
        return f"a weight of {weight.dtype} for {dtype}"
    if bias is not None and (bias.dtype != dtype or bias.dim() != 1):
        return f"a bias of {bias.dtype} with {bias.dim()} dimensions"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast changes types inside"
    return kernel_dtypes(x) or plain(x, weight, bias)


def _run(
    candidates: Sequence[Provider], x: Tensor, weight: Tensor, bias: Tensor | None,
    dx: list[Tensor | None], dweight: list[Tensor | None], dbias: list[Tensor | None],
    narrow: bool, needs: Sequence[bool],
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])

    def some(provider: Provider) -> Any:
        part = [t if t is None else t[:MEASURED] for t in dx]
        return provider.run(rows[:MEASURED], weight, bias, part, dweight, dbias, narrow)

    pattern = tuple((a is None, b is None) for a, b in zip(dx, dweight, strict=True))
    allow = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    key = (x.dtype, len(rows).bit_length(), *weight.shape, bias is None, pattern, narrow, allow)
    chosen = LINEAR.choice(key, x.device, candidates, some)
    y, dys = chosen.run(rows, weight, bias, dx, dweight, dbias, narrow)
    saved = (x if needs[1] else None, weight if needs[0] else None)
    return y.view(*x.shape[:-1], weight.shape[0]), dys, saved


def _vjp(
    backend: str | None, needs: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias."""
    names = wanted(backend)[1]  # of which Triton has no kernel of these
    backend = None if not names else "native" if "native" in names else "reference"
    g = grad.reshape(-1, grad.shape[-1])
    return (
        _product(backend, g, weight, 0).view(*grad.shape[:-1], -1) if needs[0] else None,
        _product(backend, g.t(), x.reshape(-1, x.shape[-1]), 1) if needs[1] else None,
        g.sum(0) if needs[2] else None,
    )


def _product(backend: str | None, a: Tensor, b: Tensor, rows: int) -> Tensor:
    """a b, of which dimension `rows` of a is as long as a batch has rows."""
    if torch.is_grad_enabled():  # for a second derivative
        return a @ b
    candidates = GRADIENT.candidates(a.device, backend, a, b)

    def some(provider: Provider) -> Any:
        if rows == 0:
            return provider.run(a[:MEASURED], b)
        return provider.run(a[:, :MEASURED], b[:MEASURED])

    key = (a.dtype, rows, a.shape[rows].bit_length(), a.shape[1 - rows], b.shape[1])
    result: Tensor = GRADIENT.choice(key, a.device, candidates, some).run(a, b)
    return result


def _fake_products(
    lefts: list[Tensor], rights: list[Tensor], biases: list[Tensor | None], terms: list[int],
    narrow: bool,
) -> list[Tensor]:  # fmt: skip
    shape = (lefts[0].shape[0], rights[0].shape[1])
    return [lefts[0].new_empty(shape) for _ in biases]


def _fake_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, dx: list[Tensor | None],
    dweight: list[Tensor | None], dbias: list[Tensor | None], tile: int,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape[0], weight.shape[0]) for _ in range(1 + len(dx))]


# C_o = biases[o] + the sum over its terms of lefts[l] [M, D] times rights[r] [D, N]; terms holds
# the triples (o, l, r) one after the other; narrow: operands rounded to bfloat16, sums in float32.
products = define(
    "products(Tensor[] lefts, Tensor[] rights, Tensor?[] biases, int[] terms, bool narrow) "
    "-> Tensor[]",
    _fake_products,
)
linear_jvp_triton = define_triton(
    "linear_jvp(Tensor x, Tensor weight, Tensor? bias, Tensor?[] dx, Tensor?[] dweight, "
    "Tensor?[] dbias, int tile) -> Tensor[]",
    "tangentfast.ops.linear.triton",
    _fake_triton,
)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, dx: list[Tensor | None],
    dweight: list[Tensor | None], dbias: list[Tensor | None], narrow: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Sums of products that share the panels of their operands."""
    lefts, rights = [x], [weight.t()]
    biases, terms = [bias], [0, 0, 0]
    first: list[Tensor] = []
    if narrow:
        first = products(lefts, rights, biases, terms, False)
        biases, terms = [], []
    for a, b, c in zip(dx, dweight, dbias, strict=True):
        if a is not None:
            terms += (len(biases), len(lefts), 0)
            lefts.append(a)
        if b is not None:
            terms += (len(biases), 0, len(rights))
            rights.append(b.t())
        biases.append(c)
    results = (*first, *products(lefts, rights, biases, terms, narrow))
    return results[0], list(results[1:])


def _triton(tile: int, *operands: Any) -> tuple[Tensor, list[Tensor]]:
    y, *dys = linear_jvp_triton(*operands[:-1], tile)  # without `narrow`
    return y, dys


def _takes_tile(tile: int, x: Tensor, weight: Tensor, narrow: bool) -> Reason:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or narrow:
        return f"no Triton kernel of {x.dtype}" + " with bfloat16 tangents" * narrow
    if torch.compiler.is_compiling():
        return "torch.compile sees through torch's products"
    tiles = import_module("tangentfast.ops.linear.triton").tiles(x)
    return YES if tile < tiles else f"{tiles} tiles fit this device"


def _small(x: Tensor, weight: Tensor, narrow: bool) -> bool:
    if x.is_cuda:
        return x.numel() * weight.shape[0] < LAUNCH
    few = x.numel() < ROWS * x.shape[-1] or weight.numel() < WEIGHTS
    return few and not emulated(x, weight)


LINEAR = Op(
    "linear_jvp",
    Provider("native", _native, op="products", unasked=("cpu",)),
    Provider("reference", reference.linear_jvp),
    *(
        Provider(
            "triton", partial(_triton, tile), partial(_takes_tile, tile), "linear_jvp",
            f"tile {tile}", ("cuda",),
        )
        for tile in range(3)
    ),
    small=_small,
)  # fmt: skip


def _other_layout(a: Tensor, b: Tensor) -> Reason:
    return "torch multiplies these one at a time" if emulated(a, b) else YES


def _native_product(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = products([a], [b], [None], [0, 0, 0], False)[0]
    return result


# Layouts are ways of their own on a CPU: which of them its library is fast in differs.
GRADIENT = Op(
    "linear_vjp",
    Provider("native", _native_product, op="products", unasked=("cpu",)),
    Provider("reference", reference.product),
    Provider(
        "reference", lambda a, b: (b.t() @ a.t()).t().contiguous(), _other_layout,
        way="transposed", unasked=("cpu",),
    ),
    Provider(
        "reference", lambda a, b: a.contiguous() @ b, _other_layout, way="copied", unasked=("cpu",),
    ),
    small=lambda a, b: a.numel() * b.shape[1] < ROWS * WEIGHTS and not emulated(a, b),
)  # fmt: skip
