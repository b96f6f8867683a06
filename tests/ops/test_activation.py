"""activation_jvp: both backends against float64 truth, gradients, and contract."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from isa import assert_same_bits
from torch import Tensor
from truth import TOLERANCE, rounding, torch_jvp, units

from tangentfast.ops.activation import activation_jvp
from tangentfast.ops.backend import load_native

BACKENDS = ["reference", "native"] if load_native()[0] is not None else ["reference"]
native_only = pytest.mark.skipif(BACKENDS == ["reference"], reason="no native extension")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
Primals = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: torch.device | None = None
) -> list[Tensor]:
    """x, bias, gate, gate_bias, or tangents of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, shape[-1:], shape, shape[-1:]]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes
    ]


def plain(kind: str, x: Tensor, bias: Any, gate: Any, gate_bias: Any) -> Tensor:
    """The same by torch."""
    x = x if bias is None else x + bias
    gate = gate if gate_bias is None else gate + gate_bias
    return KINDS[kind](x) if gate is None else KINDS[kind](x) * gate


def run(kind: str, primals: Any, rows: Any, backend: str) -> tuple[Tensor, list[Tensor | None]]:
    x, *rest = primals
    return activation_jvp(x, kind, rows, *rest, backend=backend)


def doubled(ts: Any) -> list[Any]:
    return [t if t is None else t.double() for t in ts]


def picked(ts: Any, mix: Any) -> tuple[Any, ...]:
    return tuple(t if keep else None for t, keep in zip(ts, mix, strict=True))


PRESENT = [(True, *mix) for mix in itertools.product([False, True], repeat=3) if mix != (0, 0, 1)]
PRESENT = [mix for mix in PRESENT if mix[2] or not mix[3]]  # no gate_bias without a gate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (63,), (2, 5, 768), (1000,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Every mix of arguments, of their tangents, alone and as rows of one call."""
    for present in PRESENT:
        primals = picked(tensors(shape, dtype, device=device), present)
        moving = tensors(shape, dtype, 1, device)
        mixes = itertools.product(*([False, True] if p else [False] for p in present))
        rows: list[Any] = [picked(moving, mix) for mix in mixes if any(mix)]
        y, dys = run(kind, primals, [None, *rows, None], backend)
        assert dys[0] is None
        assert dys[-1] is None
        exact = doubled(primals)
        want = plain(kind, *exact)
        theirs = plain(kind, *primals)
        assert_close(y, theirs, want, dtype)
        for row, dy in zip(rows, dys[1:-1], strict=True):
            assert dy is not None
            call = lambda *a: plain(kind, *a)  # noqa: E731
            _, dwant = torch_jvp(call, exact, doubled(row))
            _, theirs = torch_jvp(call, primals, row)
            assert_close(dy, theirs, dwant, dtype)
        for k in range(4):  # what a tangent is does not depend on its company
            _, some = run(kind, primals, rows[:k], backend)
            for a, b in zip(some, dys[1:], strict=False):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)


def assert_close(got: Tensor, theirs: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """No farther from the truth than 1.25 × torch, and 6 roundings: one of the result, and those of
    the factors, sums and polynomials of f', where torch on some CPU happens to be exact."""
    assert (got.dtype, got.shape, got.requires_grad) == (dtype, want.shape, False)
    bar = 1.25 * units(theirs, want, dtype) + 6
    assert units(got, want, dtype) <= min(bar, TOLERANCE.get(dtype, bar))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_far_out(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Saturation against float64; infinities against the mathematics; NaN stays."""
    far = [-30000.0, -100.0, -20.0, -5.5, -0.0, 0.0, 5.5, 20.0, 100.0, 30000.0]
    x = torch.tensor(far, dtype=dtype)
    y, (dy,) = run(kind, (x,), [(torch.ones_like(x),)], backend)
    want, dwant = torch_jvp(KINDS[kind], [x.double()], [torch.ones(10, dtype=torch.float64)])
    eps = torch.finfo(dtype).eps
    assert torch.all((y.double() - want).abs() <= 8 * eps * (want.abs() + 1))
    assert dy is not None
    assert torch.all((dy.double() - dwant).abs() <= 8 * eps * (dwant.abs() + 1))
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    y, _ = run(kind, (x,), [], backend)
    assert y[2].isnan()
    if backend == "reference":  # torch's own function, whose GELU of ∞ is NaN on some CPUs
        assert torch.equal(y.nan_to_num(7.0), KINDS[kind](x).nan_to_num(7.0))
        return
    assert y[0] == (1 if kind == "sigmoid" else torch.inf)
    assert y[1] == 0 or (kind != "sigmoid" and y[1].isnan())  # the limit, or −∞ · 0 as IEEE has it


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str) -> None:
    """Halves of one tensor, strided, transposed, expanded and empty inputs; a single number."""
    whole, dwhole = torch.randn(2, 4, 6, 20, dtype=torch.float64).unbind()
    halves, dhalves = whole.chunk(2, -1), dwhole.chunk(2, -1)
    bias = torch.randn(20, dtype=torch.float64)[::2]

    def outcome(change: Any) -> tuple[Tensor, ...]:
        a, b, da, db = (change(t) for t in (*halves, *dhalves))
        y, (dy,) = run("silu", (a, bias, b), [(da, bias, db)], backend)
        assert dy is not None
        return y, dy

    def spread(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 1, 2), float("nan"))
        wide[..., 1:, 1] = t
        return wide[..., 1:, 1]

    want = outcome(lambda t: t.contiguous())
    changes = (lambda t: t, spread, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2))
    for change in changes:
        for a, b in zip(outcome(change), want, strict=True):
            assert units(a, b) <= (0 if backend == "native" else rounding(1))
    row = halves[0][:1, :1]
    y, (dy,) = run("gelu", (row.expand(4, 6, 10),), [(row.expand(4, 6, 10),)], backend)
    alone, (dalone,) = run("gelu", (row,), [(row,)], backend)
    assert units(y, alone.expand_as(y)) <= rounding(1)
    assert units(dy, dalone.expand_as(y)) <= rounding(1)  # type: ignore[union-attr]
    for shape in ((0,), (0, 3), (3, 0), ()):
        x = torch.ones(shape)
        y, (dy,) = run("gelu", (x,), [(x,)], backend)
        assert y.shape == dy.shape == shape  # type: ignore[union-attr]


@pytest.mark.parametrize("present", PRESENT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@native_only
def test_gradient_of_the_primal(kind: str, present: tuple[bool, ...]) -> None:
    """First and second derivatives, and that tangents have none."""
    primals = [t.requires_grad_() for t in tensors((2, 3), torch.float64)]
    tangent = torch.ones(2, 3, dtype=torch.float64)

    def function(*given: Tensor) -> Tensor:
        named = iter(given)
        args = [next(named) if p else None for p in present]
        y, (dy,) = run(kind, args, [(tangent,)], "native")
        assert dy is not None
        assert not dy.requires_grad
        return y

    given = [t for t, p in zip(primals, present, strict=True) if p]
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@native_only
def test_replay_keeps_what_the_first_run_kept() -> None:
    """Checkpointing runs a block again without tangents: the same tensors must be saved."""
    x = torch.randn(4, 8, requires_grad=True)
    kept = []
    for rows in ([], [(torch.ones(4, 8),)]):
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t, lambda t: t
        ):
            activation_jvp(x, "gelu", rows)
        kept.append(saved)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_tangent_stays(backend: str) -> None:
    primals = [t.requires_grad_() for t in tensors((4, 8), torch.float32)]
    row = tuple(torch.ones_like(t) for t in primals)
    alive = [weakref.ref(t) for t in row]
    y, dys = run("gelu", primals, [row], backend)
    alive.append(weakref.ref(dys[0]))
    del row, dys
    gc.collect()
    assert [t() for t in alive] == [None] * 5
    y.sum().backward()
    assert all(t.grad is not None for t in primals)


@native_only
def test_many_tangents(device: torch.device) -> None:
    """What a tangent is does not depend on its company, of more than one launch on a GPU."""
    primals = tensors((5, 72), torch.float32, device=device)
    rows = [tuple(tensors((5, 72), torch.float32, seed + 1, device)) for seed in range(35)]
    y, dys = run("gelu", primals, rows, "native")
    for row, dy in zip(rows, dys, strict=True):
        alone, (dalone,) = run("gelu", primals, [row], "native")
        assert torch.equal(y, alone)
        assert torch.equal(dy, dalone)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_devices_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Aligned, with a tail, and with rows at odd steps."""
    for shape in ((3, 64), (1001,), (5, 63)):
        primals, row = tensors(shape, dtype), tensors(shape, dtype, 1)
        here = run(kind, primals, [tuple(row)], "native")
        there = run(kind, [t.cuda() for t in primals], [tuple(t.cuda() for t in row)], "native")
        assert torch.equal(here[0], there[0].cpu())
        assert torch.equal(here[1][0], there[1][0].cpu())  # type: ignore[arg-type, union-attr]


@native_only
def test_threads_change_nothing() -> None:
    primals, row = tensors((301, 770), torch.float32), tensors((301, 770), torch.float32, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, (dy,) = run("gelu", primals, [tuple(row)], "native")
            results.append([y, dy])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ISA_PROGRAM = """
import hashlib, torch
from tangentfast.ops.activation import activation_jvp
from tangentfast.ops.layer_norm import add_layer_norm_jvp, add_rms_norm_jvp
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for n in (1, 7, 63, 768, 1001):
        x, r, dx, dr = ((3 * torch.randn(5, n, dtype=torch.float64)).to(dtype) for _ in range(4))
        b, c, db, dc = (torch.randn(n, dtype=torch.float64).to(dtype) for _ in range(4))
        out = []
        for kind in ("gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid"):
            y, dys = activation_jvp(x, kind, [(dx, db, dr, dc)], b, r, c, backend="native")
            out += [y, *dys]
        row = (dx, dr, db, dc)
        (s, dss), (y, dys) = add_layer_norm_jvp(x, r, [n], b, c, 1e-5, [row], "native")
        out += [s, *dss, y, *dys]
        (s, dss), (y, dys) = add_rms_norm_jvp(x, r, [n], b, 1e-5, [row[:3]], "native")
        out += [s, *dss, y, *dys]
        for t in out:
            digest.update(t.view(torch.uint8).numpy().tobytes())
import tangentfast._C as native
print(native.isa(), digest.hexdigest())
"""


@native_only
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits(ISA_PROGRAM)


@native_only
def test_opcheck() -> None:
    primals = [t.requires_grad_() for t in tensors((2, 3, 8), torch.float32)]
    row = tensors((2, 3, 8), torch.float32, 1)
    op = torch.ops.tangentfast.activation_jvp.default
    torch.library.opcheck(op, (*primals, "gelu", [*row, row[0], None, None, None]))
    torch.library.opcheck(op, (primals[0], None, None, None, "silu", []))


@native_only
def test_torch_func_and_forward_mode_take_the_reference() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return activation_jvp(x, "gelu", [])[0]

    assert torch.equal(torch.func.jvp(f, (x,), (x,))[1], torch.func.jvp(F.gelu, (x,), (x,))[1])
    assert torch.equal(torch.func.vmap(f)(x), F.gelu(x))
    torch.func.grad(lambda x: f(x).sum())(x)


def test_unknown_kind() -> None:
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="kind is 'relu', expected gelu, gelu_tanh, quick_"):
            activation_jvp(torch.ones(2), "relu", [], backend=backend)


@native_only
def test_errors() -> None:
    x, b = torch.ones(4, 8), torch.ones(8)
    none = [None] * 3
    for args, error, message in [
        ((x.int(), *none, "gelu", []), TypeError, "x has dtype Int, expected float64"),
        ((x, b[:2], None, None, "gelu", []), ValueError, r"bias has shape \[2\], expected \[8\]"),
        ((x, b.half(), None, None, "gelu", []), TypeError, "bias has dtype Half, x has Float"),
        ((x, None, x[:1], None, "gelu", []), ValueError, r"gate has shape \[1, 8\], expected \[4"),
        ((x, None, None, b, "gelu", []), ValueError, "gate_bias is given, expected none without"),
        ((x[0, 0], b, None, None, "gelu", []), ValueError, "x is a single number, expected one"),
        ((x, *none, "gelu", [x]), ValueError, "tangents has 1 entries, expected dx, dbias, dgate"),
        (
            (x, *none, "gelu", [x, b, None, None]),
            ValueError,
            r"\[0\].dbias is given, expected none",
        ),
        ((x, *none, "gelu", [x[:1], *none]), ValueError, r"tangents\[0\].dx has shape \[1, 8\], "),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.tangentfast.activation_jvp(*args)
