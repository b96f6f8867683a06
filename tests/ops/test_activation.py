"""activation_jvp: both backends against float64 truth, gradients, and contract."""

from __future__ import annotations

import gc
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
    "silu": F.silu,
}


def tensors(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [t.to(device, dtype) for t in made]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (63,), (2, 5, 768), (1000,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Outputs and tangents, alone and together."""
    x, *dx = tensors(4, shape, dtype, device)
    y, dys = activation_jvp(x, kind, [None, *dx, None], backend)
    assert dys[0] is None
    assert dys[-1] is None
    function = KINDS[kind]
    assert_close(y, function(x), function(x.double()), dtype)
    for tangent, dy in zip(dx, dys[1:-1], strict=True):
        assert dy is not None
        _, want = torch_jvp(function, [x.double()], [tangent.double()])
        _, theirs = torch_jvp(function, [x], [tangent])
        assert_close(dy, theirs, want, dtype)
    for k in range(3):  # what a tangent is does not depend on its company
        _, some = activation_jvp(x, kind, dx[:k], backend)
        for a, b in zip(some, dys[1:], strict=False):
            assert torch.equal(a, b)  # type: ignore[arg-type]


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
    y, (dy,) = activation_jvp(x, kind, [torch.ones_like(x)], backend)
    want, dwant = torch_jvp(KINDS[kind], [x.double()], [torch.ones(10, dtype=torch.float64)])
    eps = torch.finfo(dtype).eps
    assert torch.all((y.double() - want).abs() <= 8 * eps * (want.abs() + 1))
    assert dy is not None
    assert torch.all((dy.double() - dwant).abs() <= 8 * eps * (dwant.abs() + 1))
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    y, _ = activation_jvp(x, kind, [], backend)
    assert y[2].isnan()
    if backend == "reference":  # torch's own function, whose GELU of ∞ is NaN on some CPUs
        assert torch.equal(y.nan_to_num(7.0), KINDS[kind](x).nan_to_num(7.0))
        return
    assert y[0] == torch.inf
    assert y[1] == 0 or y[1].isnan()  # the limit, or −∞ · 0 as IEEE has it


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str) -> None:
    """Halves of one tensor, strided, transposed, expanded and empty inputs; a single number."""
    half, dhalf = (t.chunk(2, -1)[1] for t in torch.randn(2, 4, 6, 20, dtype=torch.float64))

    def outcome(change: Any) -> tuple[Tensor, ...]:
        y, (dy,) = activation_jvp(change(half), "silu", [change(dhalf)], backend)
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
    row = half[:1, :1]
    expanded = row.expand(4, 6, 10)
    y, (dy,) = activation_jvp(expanded, "gelu", [expanded], backend)
    alone, (dalone,) = activation_jvp(row, "gelu", [row], backend)
    assert units(y, alone.expand_as(y)) <= rounding(1)
    assert units(dy, dalone.expand_as(y)) <= rounding(1)  # type: ignore[union-attr]
    for shape in ((0,), (0, 3), (3, 0), ()):
        x = torch.ones(shape)
        y, (dy,) = activation_jvp(x, "gelu", [x], backend)
        assert y.shape == dy.shape == shape  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@native_only
def test_gradient_of_the_primal(kind: str) -> None:
    """First and second derivatives, and that tangents have none."""
    x, dx = tensors(2, (2, 3), torch.float64)

    def function(x: Tensor) -> Tensor:
        y, (dy,) = activation_jvp(x, kind, [dx], "native")
        assert dy is not None
        assert not dy.requires_grad
        return y

    x.requires_grad_()
    assert torch.autograd.gradcheck(function, [x])
    assert torch.autograd.gradgradcheck(function, [x])


@native_only
def test_replay_keeps_what_the_first_run_kept() -> None:
    """Checkpointing runs a block again without tangents: the same tensors must be saved."""
    x = torch.randn(4, 8, requires_grad=True)
    kept = []
    for dx in ([], [torch.ones(4, 8)]):
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t, lambda t: t
        ):
            activation_jvp(x, "gelu", dx)
        kept.append(saved)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_tangent_stays(backend: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    dx = torch.ones(4, 8)
    y, dys = activation_jvp(x, "gelu", [dx], backend)
    alive = [weakref.ref(dx), weakref.ref(dys[0])]
    del dx, dys
    gc.collect()
    assert [t() for t in alive] == [None] * 2
    y.sum().backward()
    assert x.grad is not None


@native_only
def test_many_tangents(device: torch.device) -> None:
    """What a tangent is does not depend on its company, of more than one launch on a GPU."""
    x, *dx = tensors(36, (5, 72), device=device)
    y, dys = activation_jvp(x, "gelu", dx, "native")
    for tangent, dy in zip(dx, dys, strict=True):
        alone, (dalone,) = activation_jvp(x, "gelu", [tangent], "native")
        assert torch.equal(y, alone)
        assert torch.equal(dy, dalone)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_devices_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Aligned, with a tail, and with rows at odd steps."""
    for shape in ((3, 64), (1001,), (5, 63)):
        x, dx = tensors(2, shape, dtype)
        here = activation_jvp(x, kind, [dx], "native")
        there = activation_jvp(x.cuda(), kind, [dx.cuda()], "native")
        assert torch.equal(here[0], there[0].cpu())
        assert torch.equal(here[1][0], there[1][0].cpu())  # type: ignore[arg-type, union-attr]


@native_only
def test_threads_change_nothing() -> None:
    x, dx = tensors(2, (301, 770))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, (dy,) = activation_jvp(x, "gelu", [dx], "native")
            results.append([y, dy])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ISA_PROGRAM = """
import hashlib, torch
from tangentfast.ops.activation import activation_jvp
from tangentfast.ops.layer_norm import NormTangent, layer_norm_jvp, rms_norm_jvp
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for n in (1, 7, 63, 768, 1001):
        x, dx = ((3 * torch.randn(5, n, dtype=torch.float64)).to(dtype) for _ in range(2))
        w, b, dw, db = (torch.randn(n, dtype=torch.float64).to(dtype) for _ in range(4))
        results = [
            activation_jvp(x, kind, [dx], "native")
            for kind in ("gelu", "gelu_tanh", "silu")
        ]
        tangents = [NormTangent(dx, dw, db)]
        results.append(layer_norm_jvp(x, [n], w, b, 1e-5, tangents, "native"))
        results.append(rms_norm_jvp(x, [n], w, 1e-5, tangents, "native"))
        for y, (dy,) in results:
            for t in (y, dy):
                digest.update(t.view(torch.uint8).numpy().tobytes())
import tangentfast._C as native
print(native.isa(), digest.hexdigest())
"""


@native_only
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits(ISA_PROGRAM)


@native_only
def test_opcheck() -> None:
    x, *dx = tensors(3, (2, 3, 8))
    op = torch.ops.tangentfast.activation_jvp.default
    torch.library.opcheck(op, (x, "gelu", dx))
    torch.library.opcheck(op, (x.transpose(0, 1), "silu", []))


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
        with pytest.raises(ValueError, match="kind is 'relu', expected gelu, gelu_tanh or silu"):
            activation_jvp(torch.ones(2), "relu", [], backend=backend)


@native_only
def test_errors() -> None:
    x = torch.ones(4, 8)
    for args, error, message in [
        ((x, "relu", []), ValueError, "kind is 'relu', expected gelu, gelu_tanh or silu"),
        ((x.int(), "gelu", []), TypeError, "x has dtype Int, expected float64"),
        ((x, "gelu", [x, x.half()]), TypeError, r"dx\[1\] has dtype Half, x has Float"),
        ((x, "gelu", [x[:1]]), ValueError, r"dx\[0\] has shape \[1, 8\], x has \[4, 8\]"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.tangentfast.activation_jvp(*args)
