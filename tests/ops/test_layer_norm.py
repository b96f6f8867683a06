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

from tangentfast.ops import layer_norm as ops
from tangentfast.ops.backend import load_native

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
    """x, residual, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, shape, shape[-dims:], shape[-dims:]]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes
    ]


def run(
    norm: str, args: list[Any], shape: torch.Size, rows: list[Any], backend: str | None
) -> tuple[Tensor, list[Tensor | None]]:
    """y and its tangents, of (x, weight, bias) and rows of their tangents."""
    x, w, b = args
    if norm == "layer_norm":
        return ops.layer_norm_jvp(x, shape, w, b, EPS, rows, backend)
    return ops.rms_norm_jvp(x, shape, w, EPS, [r and r[:2] for r in rows], backend)


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
    primals = tensors(shape, dims, dtype, device=device)
    x, _, w, b = primals
    moving = tensors(shape, dims, dtype, 1, device)
    for has_w, has_b in itertools.product([True, False], [norm == "layer_norm", False]):
        args = [x, w if has_w else None, b if has_b else None]
        rows = [
            tuple(t if keep else None for t, keep in zip(moving[:1] + moving[2:], mix, strict=True))
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


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@native_only
def test_residual(norm: str, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """The sum and the norm are what they are one after the other, whatever is absent."""
    x, r, w, b = tensors((3, 5, 63), 1, dtype, device=device)
    every = []
    for seed, mix in enumerate(itertools.product([True, False], repeat=4)):
        made = tensors((3, 5, 63), 1, dtype, seed + 1, device)
        row = tuple(t if keep else None for t, keep in zip(made, mix, strict=True))
        every.append(row if norm == "layer_norm" else row[:3])
    every = [row for row in every if any(t is not None for t in row)]
    batches = [every[i : i + k] for i in range(0, len(every), k)] if k else [[]]
    for rows in batches:
        rows = [*rows, None]
        got = []
        for backend in ("native", "reference"):
            if norm == "layer_norm":
                sums, norms = ops.add_layer_norm_jvp(x, r, [63], w, b, EPS, rows, backend)
            else:
                sums, norms = ops.add_rms_norm_jvp(x, r, [63], w, EPS, rows, backend)
            got.append((*sums, *norms))
        (s, dss, y, dys), (s2, dss2, y2, dys2) = got
        assert torch.equal(s, s2)
        for a, b2 in zip(dss, dss2, strict=True):
            assert (a is None) == (b2 is None)
            assert a is None or torch.equal(a, b2)
        # The reference rounds by half an eps after each of a dozen operations, a tangent's after
        # twice as many; the kernel mostly at the end.
        assert units(y, y2, dtype) <= 6
        for a, b2 in zip(dys, dys2, strict=True):
            assert (a is None) == (b2 is None)
            assert a is None or units(a, b2, dtype) <= 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_mean(offset: float, backend: str, device: torch.device) -> None:
    """Deviations of 1 around 1e4: the numbers are taken for exact, and no digit of them is lost."""
    x, dx, w, b = tensors((50, 768), 1, torch.float32, device=device)
    x = x + offset
    y, (dy,) = ops.layer_norm_jvp(x, [768], w, b, EPS, [(dx, None, None)], backend)
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
    x, _, w, b = tensors((5, size), 1, torch.float32, device=device)
    rows = []
    for seed in range(35):
        dx, _, dw, db = tensors((5, size), 1, torch.float32, seed + 1, device)
        rows.append((dx, dw, db if norm == "layer_norm" else None))
    y, dys = run(norm, [x, w, b], w.shape, rows, "native")
    for row, dy in zip(rows, dys, strict=True):
        alone, (dalone,) = run(norm, [x, w, b], w.shape, [row], "native")
        assert torch.equal(y, alone)
        assert torch.equal(dy, dalone)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_layouts(norm: str, backend: str, device: torch.device) -> None:
    """Transposed, strided, expanded, offset and empty inputs give what contiguous ones give."""
    x, r, w, b = tensors((6, 4, 10), 1, torch.float64, device=device)
    dx, _, dw, db = tensors((6, 4, 10), 1, torch.float64, 1, device)

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
    if norm == "layer_norm":
        (s, _), (y, _) = ops.add_layer_norm_jvp(strided(x), strided(r), [10], w, b, EPS, [])
        assert torch.equal(s, x + r)
    for shape in ((0, 10), (3, 0)):
        x, _, w, b = tensors(shape, 1, torch.float32, device=device)
        y, (dy,) = run(norm, [x, w, b], w.shape, [(x, w, b)], backend)
        assert y.shape == dy.shape == shape  # type: ignore[union-attr]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@native_only
def test_gradient_of_the_primal(norm: str, affine: tuple[bool, bool], residual: bool) -> None:
    """First and second derivatives, and that tangents have none."""
    x, r, w, b = (t.requires_grad_() for t in tensors((2, 3, 5), 1, torch.float64))
    if norm == "rms_norm" and affine[1]:
        return
    tangent = torch.randn(2, 3, 5, dtype=torch.float64)
    given = [x, r, *(t for t, keep in zip((w, b), affine, strict=True) if keep)]

    def function(x: Tensor, r: Tensor, *rest: Tensor) -> Any:
        named = iter(rest)
        w, b = (next(named) if keep else None for keep in affine)
        row = (tangent, tangent, None, None)
        if norm == "layer_norm" and residual:
            (s, _), (y, (dy,)) = ops.add_layer_norm_jvp(x, r, [5], w, b, EPS, [row], "native")
        elif norm == "layer_norm":
            s, (y, (dy,)) = x, ops.layer_norm_jvp(x, [5], w, b, EPS, [(tangent, None, None)])
        elif residual:
            (s, _), (y, (dy,)) = ops.add_rms_norm_jvp(x, r, [5], w, EPS, [row[:3]], "native")
        else:
            s, (y, (dy,)) = x, ops.rms_norm_jvp(x, [5], w, EPS, [(tangent, None)], "native")
        assert dy is not None
        assert not dy.requires_grad
        return y * 1.5 + s.sin() + r

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@native_only
def test_gradients_in_every_dtype(norm: str, mixed: bool, dtype: torch.dtype) -> None:
    """No farther from the truth than torch's own; float32 parameters beside 16-bit activations."""
    x, _, w, b = tensors((40, 63), 1, dtype)
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
    x, _, w, b = (t.requires_grad_() for t in tensors((4, 8), 1, torch.float32))
    kept = []
    for rows in ([], [(torch.ones(4, 8), None, None)]):
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t, lambda t: t
        ):
            ops.layer_norm_jvp(x, [8], w, b, EPS, rows)
        kept.append(saved)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_tangent_stays(backend: str) -> None:
    x, r, w, b = (t.requires_grad_() for t in tensors((4, 8), 1, torch.float32))
    row = tuple(torch.ones_like(t) for t in (x, r, w, b))
    alive = [weakref.ref(t) for t in row]
    (s, dss), (y, dys) = ops.add_layer_norm_jvp(x, r, [8], w, b, EPS, [row], backend)
    alive += [weakref.ref(t) for t in (*dss, *dys)]
    del row, dss, dys
    gc.collect()
    assert [t() for t in alive] == [None] * 6
    (y + s).sum().backward()
    assert x.grad is not None


@native_only
def test_threads_change_nothing() -> None:
    x, r, w, b = tensors((300, 768), 1, torch.float32)
    row = tuple(tensors((300, 768), 1, torch.float32, 1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (s, (ds,)), (y, (dy,)) = ops.add_layer_norm_jvp(x, r, [768], w, b, EPS, [row], "native")
            results.append([s, ds, y, dy])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native_only
def test_opcheck() -> None:
    x, r, w, b = (t.requires_grad_() for t in tensors((2, 3, 8), 1, torch.float32))
    row = tensors((2, 3, 8), 1, torch.float32, 1)
    op = torch.ops.tangentfast.layer_norm_jvp.default
    torch.library.opcheck(op, (x, r, [8], w, b, EPS, [*row, None, None, *row[2:]]))
    torch.library.opcheck(op, (x, None, [3, 8], None, None, EPS, [row[0], None, None, None]))
    op = torch.ops.tangentfast.rms_norm_jvp.default
    torch.library.opcheck(op, (x, r, [8], w, EPS, [*row[:3], None]))


@native_only
def test_torch_func_and_forward_mode_take_the_reference() -> None:
    x, _, w, b = tensors((4, 8), 1, torch.float64)

    def f(x: Tensor) -> Tensor:
        return ops.layer_norm_jvp(x, [8], w, b, EPS, [])[0]

    _, got = torch.func.jvp(f, (x,), (x,))
    _, want = torch.func.jvp(lambda x: F.layer_norm(x, [8], w, b, EPS), (x,), (x,))
    assert torch.equal(got, want)
    assert torch.func.vmap(f)(x).shape == x.shape
    torch.func.grad(lambda x: f(x).sum())(x)


@native_only
def test_errors() -> None:
    x, r, w, b = tensors((4, 8), 1, torch.float32)
    dx = torch.ones(4, 8)
    for args, error, message in [
        (
            (x, None, [7], None, None, EPS, []),
            ValueError,
            r"normalized_shape is \[7\], expected th",
        ),
        (
            (x, None, [], None, None, EPS, []),
            ValueError,
            r"normalized_shape is \[\], expected the l",
        ),
        ((x, None, [4, 4, 8], None, None, EPS, []), ValueError, r"last dimensions of x, which has"),
        ((x.int(), None, [8], None, None, EPS, []), TypeError, "x has dtype Int, expected float64"),
        ((x, r[:2], [8], w, b, EPS, []), ValueError, r"residual has shape \[2, 8\], expected \[4"),
        ((x, r.double(), [8], w, b, EPS, []), TypeError, "residual has dtype Double, x has Float"),
        ((x, None, [8], w[:3], b, EPS, []), ValueError, r"weight has shape \[3\], expected \[8\]"),
        ((x, None, [8], w, b[:3], EPS, []), ValueError, r"bias has shape \[3\], expected \[8\]"),
        (
            (x, None, [8], w, b, EPS, [dx]),
            ValueError,
            "tangents has 1 entries, expected dx, dresid",
        ),
        (
            (x, None, [8], w, b, EPS, [dx, dx, None, None]),
            ValueError,
            "expected none without resid",
        ),
        ((x, None, [8], None, b, EPS, [dx, None, w, None]), ValueError, "where there is no weight"),
        ((x, None, [8], w, None, EPS, [dx, None, w, b]), ValueError, "where there is no bias"),
        (
            (x, None, [8], w, b, EPS, [dx[:1], None, None, None]),
            ValueError,
            r"tangents\[0\].dx has",
        ),
        (
            (x, None, [8], w, b, EPS, [dx.half(), None, None, None]),
            TypeError,
            "has dtype Half, x h",
        ),
        (
            (x, None, [8], w, b, EPS, [dx, None, w[:2], None]),
            ValueError,
            r"\[0\].dweight has shape",
        ),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.tangentfast.layer_norm_jvp(*args)
    with pytest.raises(
        ValueError, match=r"rms_norm_jvp: tangents.0..dbias is given, expected none"
    ):
        torch.ops.tangentfast.rms_norm_jvp(x, None, [8], w, EPS, [dx, None, w, b])
