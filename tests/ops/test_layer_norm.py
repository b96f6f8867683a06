"""layer_norm_jvp and rms_norm_jvp: both backends against float64 truth, gradients, and contract."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from truth import TOLERANCE, rounding, torch_jvp, units

from tangentfast.ops.backend import load_native
from tangentfast.ops.layer_norm import NormTangent, layer_norm_jvp, rms_norm_jvp

BACKENDS = ["reference", "native"] if load_native()[0] is not None else ["reference"]
native_only = pytest.mark.skipif(BACKENDS == ["reference"], reason="no native extension")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((3, 1), 1), ((2, 7), 1), ((3, 63), 1), ((2, 5, 768), 1), ((2, 1000), 1), ((4, 3, 5), 2)]
SHAPES += [((2, n), 1) for n in (1536, 3072, 5000)]  # rows of a block on a GPU, and longer
EPS = 1e-5


def tensors(
    shape: tuple[int, ...],
    dims: int,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Tensor]:
    """x, weight, bias, or tangents of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, shape[-dims:], shape[-dims:]]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes
    ]


def run(
    norm: str, args: list[Any], shape: torch.Size, rows: list[Any], backend: str | None
) -> tuple[Tensor, list[Tensor | None]]:
    """y and its tangents, of (x, weight, bias) and rows of their tangents."""
    x, w, b = args
    tangents = [row and NormTangent(*row) for row in rows]
    if norm == "layer_norm":
        return layer_norm_jvp(x, shape, w, b, EPS, tangents, backend)
    return rms_norm_jvp(x, shape, w, EPS, tangents, backend)


def plain(norm: str, shape: torch.Size) -> Callable[..., Tensor]:
    """The same by torch, of (x, weight, bias)."""
    if norm == "layer_norm":
        return lambda x, w, b: F.layer_norm(x, shape, w, b, EPS)
    return lambda x, w, b: F.rms_norm(x, shape, w, EPS)


def doubled(ts: Any) -> list[Any]:
    return [t if t is None else t.double() for t in ts]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_truth(
    norm: str,
    shape: tuple[int, ...],
    dims: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    """Every mix of tangents, alone and as rows of one call, with and without weight and bias."""
    x, w, b = tensors(shape, dims, dtype, device=device)
    moving = tensors(shape, dims, dtype, 1, device)
    for has_w, has_b in itertools.product([True, False], [norm == "layer_norm", False]):
        args = [x, w if has_w else None, b if has_b else None]
        rows = [
            tuple(t if keep else None for t, keep in zip(moving, mix, strict=True))
            for mix in itertools.product([False, True], [False, has_w], [False, has_b])
            if any(mix)
        ]
        rows = list(dict.fromkeys(rows))
        given = [None, *rows, None]
        y, dys = run(norm, args, w.shape, given, backend)
        assert dys[0] is None
        assert dys[-1] is None
        function = plain(norm, w.shape)
        for row, dy in zip(rows, dys[1:-1], strict=True):
            want, dwant = torch_jvp(function, doubled(args), doubled(row))
            torch_y, torch_dy = torch_jvp(function, args, row)
            assert dy is not None
            assert (dy.dtype, dy.shape) == (dtype, x.shape)
            if shape[-1] == 1:  # x̂ is 0 or ±1: of dx w / σ rounding is left
                square = x.double() ** 2 * (norm == "rms_norm")
                dx = 0 if row[0] is None else row[0].double()
                moved = dx * (w.double() if has_w else 1) / (square + EPS).sqrt()
                assert units(dy, dwant, dtype, [dwant, moved]) <= rounding(1)
                continue
            for got, theirs, truth in ((y, torch_y, want), (dy, torch_dy, dwant)):
                bar = 1.25 * units(theirs, truth, dtype) + 2
                assert units(got, truth, dtype) <= (100 if backend == "reference" else bar)
                assert units(got, truth, dtype) <= TOLERANCE.get(dtype, bar)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_mean(offset: float, backend: str, device: torch.device) -> None:
    """Deviations of 1 around 1e4: the numbers are taken for exact, and no digit of them is lost."""
    x, w, b = tensors((50, 768), 1, torch.float32, device=device)
    dx = tensors((50, 768), 1, torch.float32, 1, device)[0]
    x = x + offset
    y, (dy,) = layer_norm_jvp(x, [768], w, b, EPS, [NormTangent(dx)], backend)
    want, dwant = torch_jvp(
        plain("layer_norm", w.shape), doubled([x, w, b]), doubled([dx, None, None])
    )
    # torch may add the numbers up, which are 10,000 times their deviations; the kernel may not.
    bar = rounding(768, sums=1) * (1 if backend == "native" else abs(offset))
    assert units(y, want) <= bar
    assert units(dy, dwant) <= bar


@native_only
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", [63, 64])
def test_many_tangents(norm: str, size: int, device: torch.device) -> None:
    """What a tangent is does not depend on its company, of more than one launch on a GPU."""
    x, w, b = tensors((5, size), 1, torch.float32, device=device)
    used = 3 if norm == "layer_norm" else 2
    rows = [tensors((5, size), 1, torch.float32, seed + 1, device)[:used] for seed in range(35)]
    y, dys = run(norm, [x, w, b], w.shape, rows, "native")
    for row, dy in zip(rows, dys, strict=True):
        alone, (dalone,) = run(norm, [x, w, b], w.shape, [row], "native")
        assert torch.equal(y, alone)
        assert torch.equal(dy, dalone)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_layouts(norm: str, backend: str, device: torch.device) -> None:
    """Transposed, strided, expanded, offset and empty inputs give what contiguous ones give."""
    x, w, b = tensors((6, 4, 10), 1, torch.float64, device=device)
    dx, dw, db = tensors((6, 4, 10), 1, torch.float64, 1, device)

    def strided(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 1, 2), float("nan"))
        wide[..., 1:, 1] = t
        return wide[..., 1:, 1]

    straight = run(norm, [x, w, b], w.shape, [(dx, dw, db)], backend)
    for change in (strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        args = [change(t) for t in (x, w, b)]
        row = tuple(change(t) for t in (dx, dw, db))
        y, (dy,) = run(norm, args, w.shape, [row], backend)
        assert units(y, straight[0]) <= (0 if backend == "native" else rounding(10))
        assert units(dy, straight[1][0]) <= (0 if backend == "native" else rounding(10))
    y, (dy,) = run(
        norm, [x[:, :1].expand_as(x), w, b], w.shape, [(dx[:, :1].expand_as(x), dw, db)], backend
    )
    assert units(y[:, 0], straight[0][:, 0]) <= rounding(10)
    assert units(dy[:, 3], straight[1][0][:, 0]) <= rounding(10)
    for shape in ((0, 10), (3, 0)):
        x, w, b = tensors(shape, 1, torch.float32, device=device)
        y, (dy,) = run(norm, [x, w, b], w.shape, [(x, w, b)], backend)
        assert y.shape == dy.shape == shape  # type: ignore[union-attr]


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@native_only
def test_gradient_of_the_primal(norm: str, affine: tuple[bool, bool]) -> None:
    """First and second derivatives, and that tangents have none."""
    if norm == "rms_norm" and affine[1]:
        return
    x, w, b = (t.requires_grad_() for t in tensors((2, 3, 5), 1, torch.float64))
    tangent = torch.randn(2, 3, 5, dtype=torch.float64)
    given = [x, *(t for t, keep in zip((w, b), affine, strict=True) if keep)]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        named = iter(rest)
        args = [x, *(next(named) if keep else None for keep in affine)]
        y, (dy,) = run(norm, args, w.shape, [(tangent,)], "native")
        assert dy is not None
        assert not dy.requires_grad
        return y

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@native_only
def test_gradients_in_every_dtype(norm: str, mixed: bool, dtype: torch.dtype) -> None:
    """No farther from the truth than torch's own; float32 parameters beside 16-bit activations."""
    x, w, b = tensors((40, 63), 1, dtype)
    if mixed:
        w, b = w.float(), b.float()
    u = torch.randn(40, 63).to(dtype)
    used = [x, w, b] if norm == "layer_norm" else [x, w]

    def grads(function: Callable[..., Tensor], ts: list[Tensor], u: Tensor) -> list[Tensor]:
        ts = [t.detach().requires_grad_() for t in ts]
        return list(torch.autograd.grad(function(*ts, *[None] * (3 - len(ts))), ts, u))

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return run(norm, [x, w, b], w.shape, [], "native")[0]

    theirs = plain(norm, w.shape)
    truth = grads(theirs, doubled(used), u.double())
    other = grads(theirs, used, u)
    for got, t, want, primal in zip(grads(ours, used, u), other, truth, used, strict=True):
        assert got.dtype == primal.dtype
        assert units(got, want, dtype) <= 1.25 * units(t, want, dtype) + 1


@native_only
def test_replay_keeps_what_the_first_run_kept() -> None:
    """Checkpointing runs a block again without tangents: the same tensors must be saved."""
    x, w, b = (t.requires_grad_() for t in tensors((4, 8), 1, torch.float32))
    kept = []
    for tangents in ([], [NormTangent(torch.ones(4, 8))]):
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t, lambda t: t
        ):
            layer_norm_jvp(x, [8], w, b, EPS, tangents)
        kept.append(saved)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_tangent_stays(backend: str) -> None:
    x, w, b = (t.requires_grad_() for t in tensors((4, 8), 1, torch.float32))
    row = NormTangent(*(torch.ones_like(t) for t in (x, w, b)))
    alive = [weakref.ref(t) for t in row]
    y, dys = layer_norm_jvp(x, [8], w, b, EPS, [row], backend)
    alive += [weakref.ref(t) for t in dys]
    del row, dys
    gc.collect()
    assert [t() for t in alive] == [None] * 4
    y.sum().backward()
    assert x.grad is not None


@native_only
def test_threads_change_nothing() -> None:
    x, w, b = tensors((300, 768), 1, torch.float32)
    row = NormTangent(*tensors((300, 768), 1, torch.float32, 1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, (dy,) = layer_norm_jvp(x, [768], w, b, EPS, [row], "native")
            results.append([y, dy])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native_only
def test_opcheck() -> None:
    x, w, b = tensors((2, 3, 8), 1, torch.float32)
    dx, dw, db = tensors((2, 3, 8), 1, torch.float32, 1)
    op = torch.ops.tangentfast.layer_norm_jvp.default
    torch.library.opcheck(op, (x, [8], w, b, EPS, [dx, None], [None, dw], [None, db]))
    torch.library.opcheck(op, (x, [3, 8], None, None, EPS, [dx], [None], [None]))
    op = torch.ops.tangentfast.rms_norm_jvp.default
    torch.library.opcheck(op, (x, [8], w, EPS, [dx], [dw]))


@native_only
def test_torch_func_and_forward_mode_take_the_reference() -> None:
    x, w, b = tensors((4, 8), 1, torch.float64)

    def f(x: Tensor) -> Tensor:
        return layer_norm_jvp(x, [8], w, b, EPS, [])[0]

    _, got = torch.func.jvp(f, (x,), (x,))
    _, want = torch.func.jvp(lambda x: F.layer_norm(x, [8], w, b, EPS), (x,), (x,))
    assert torch.equal(got, want)
    assert torch.func.vmap(f)(x).shape == x.shape
    torch.func.grad(lambda x: f(x).sum())(x)


@native_only
def test_errors() -> None:
    x, w, b = tensors((4, 8), 1, torch.float32)
    dx = torch.ones(4, 8)
    none = ([None], [None], [None])
    for args, error, message in [
        (
            (x, [7], None, None, EPS, *none),
            ValueError,
            r"normalized_shape is \[7\], expected the ",
        ),
        ((x, [], None, None, EPS, *none), ValueError, r"normalized_shape is \[\], expected the l"),
        ((x, [4, 4, 8], None, None, EPS, *none), ValueError, "last dimensions of x, which has"),
        ((x.int(), [8], None, None, EPS, *none), TypeError, "x has dtype Int, expected float64"),
        ((x, [8], w[:3], b, EPS, *none), ValueError, r"weight has shape \[3\], expected \[8\]"),
        ((x, [8], w, b[:3], EPS, *none), ValueError, r"bias has shape \[3\], expected \[8\]"),
        ((x, [8], w, b, EPS, [dx], [], [w]), ValueError, "dweight has 0 entries, dx has 1"),
        (
            (x, [8], None, b, EPS, [dx, dx], [None, w], [b, b]),
            ValueError,
            r"dweight\[1\] is given, expected none where there is no weight",
        ),
        ((x, [8], w, None, EPS, [dx], [w], [b]), ValueError, "where there is no bias"),
        ((x, [8], w, b, EPS, [dx[:1]], [None], [None]), ValueError, r"dx\[0\] has shape \[1, 8\]"),
        ((x, [8], w, b, EPS, [dx.half()], [None], [None]), TypeError, "has dtype Half, x has F"),
        ((x, [8], w, b, EPS, [dx], [w[:2]], [None]), ValueError, r"dweight\[0\] has shape \[2\]"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.tangentfast.layer_norm_jvp(*args)
    with pytest.raises(ValueError, match=r"rms_norm_jvp: dweight\[0\] has shape \[2\], expected"):
        torch.ops.tangentfast.rms_norm_jvp(x, [8], w, EPS, [dx], [w[:2]])
