"""linear_jvp: backends against torch in float64, 16-bit operands, and patch embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from truth import rounding, units

from tangentfast.ops.backend import load_native
from tangentfast.ops.linear import (
    LinearTangent,
    is_patches,
    linear_jvp,
    op,
    patches_jvp,
    reference,
)

NATIVE = load_native()[0] is not None
native_only = pytest.mark.skipif(not NATIVE, reason="no native extension")
BACKENDS = ["reference", pytest.param("native", marks=native_only)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Two sums of up to 300 terms; of 16 bits in float32, with half a rounding of each of two products,
# of their sum and of a bias. Tangents have two products, which could cancel to half their size.
WIDE = rounding(300, sums=2)
SMALL = {torch.float64: WIDE, torch.float32: WIDE, torch.bfloat16: 2.0, torch.float16: 2.0}


@pytest.fixture(params=[False, True], ids=["emulated", "has_products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of machine."""
    monkeypatch.setattr(reference, "_has_products", lambda dtype: request.param)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 3, 33, 9), (1, 1, 1, 1), (2, 130, 300, 200)])
def test_truth(size: tuple[int, ...], bias: bool, dtype: torch.dtype, backend: str) -> None:
    """Outputs, tangents and gradients are within a few roundings of the float64 truth."""
    n, t, d, e = size
    operands = [draw(n, t, d).to(dtype), draw(e, d).to(dtype)] + [draw(e).to(dtype)] * bias
    rows: list[Any] = [tuple(draw(*t.shape).to(dtype) for t in operands)]
    rows = [(*row, None)[:3] for row in rows]
    rows += [(rows[0][0], None, None), (None, rows[0][1], rows[0][2]), None, (None, None, None)]
    weight = draw(n, t, e).to(dtype)

    def results(convert: Any, backend: str) -> list[Tensor]:
        given = [convert(t).requires_grad_() for t in operands]
        tangents = [
            row and LinearTangent(*(t if t is None else convert(t) for t in row)) for row in rows
        ]
        x, w, b = (*given, None)[:3]
        turned = [_turned(row) for row in tangents]
        y, dys = linear_jvp(x.transpose(0, 1), w, b, turned, backend=backend)
        assert dys[3] is dys[4] is None
        assert not any(dy.requires_grad for dy in dys[:3])
        grads = torch.autograd.grad(y, given, convert(weight).transpose(0, 1))
        return [y, *dys[:3], *grads]

    def terms(row: Any) -> list[Tensor]:
        """Of dy, which may cancel."""
        x, w = (t.double() for t in operands[:2])
        dx, dw = (0 * t if d is None else d.double() for t, d in zip((x, w), row, strict=False))
        return [F.linear(dx, w), F.linear(x, dw)]

    got = results(lambda t: t.detach().clone(), backend)
    sums = [terms((operands[0], None)), *(terms(row) for row in rows[:3])]
    sums += [[]] * (len(got) - len(sums))
    for own, exact, parts in zip(got, results(Tensor.double, "reference"), sums, strict=True):
        assert own.dtype == dtype
        assert units(own, exact, dtype, parts) <= SMALL[dtype]


def _turned(row: Any) -> Any:
    return row and row._replace(dx=None if row.dx is None else row.dx.transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_calls(backend: str) -> None:
    """What the kernel was not written for is computed all the same."""
    x, w = draw(5, 7), draw(3, 7)
    for given, wanted in [
        ((draw(7), draw(7)), ()),  # a weight that is a vector
        ((draw(7), w), (3,)),
        ((x[:0], w), (0, 3)),
        ((x[:, :0], w[:, :0]), (5, 3)),
        ((x.t()[:5, : 7 - 2], draw(3, 5)), (5, 3)),
        ((x.expand(2, 4, 5, 7), w), (2, 4, 5, 3)),
    ]:
        y, (dy,) = linear_jvp(*given, None, [LinearTangent(*given)], backend=backend)
        assert y.shape == dy.shape == wanted  # type: ignore[union-attr]
        assert units([y, dy], [F.linear(*given), 2 * F.linear(*given)]) <= rounding(7, sums=2)
    with torch.autocast("cpu", torch.bfloat16):
        y, (dy,) = linear_jvp(x, w, None, [LinearTangent(x, w)], backend=backend)
    assert y.dtype == dy.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_the_reference_has_torchs_own_graph() -> None:
    x, w = draw(32, 160).requires_grad_(), draw(160, 160).requires_grad_()
    y, (dy,) = linear_jvp(x, w, None, [LinearTangent(x, w)], backend="reference")
    assert type(y.grad_fn) is type(F.linear(x, w).view(y.shape).grad_fn)
    assert not dy.requires_grad  # type: ignore[union-attr]


@native_only
def test_second_derivative() -> None:
    """The native op's gradient can be differentiated once more."""
    x, w, b = (draw(*s).double().requires_grad_() for s in ((4, 5), (3, 5), (3,)))
    assert torch.autograd.gradgradcheck(
        lambda *a: linear_jvp(*a, [], backend="native")[0], (x, w, b)
    )


@native_only
@pytest.mark.usefixtures("products")
def test_bits_do_not_depend_on_threads() -> None:
    x, w = draw(300, 70), draw(130, 70)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(linear_jvp(x, w, None, [LinearTangent(x, w)], backend="native"))
    torch.set_num_threads(before)
    for y, (dy,) in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dy, found[0][1][0])  # type: ignore[arg-type]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_are_saved(backend: str) -> None:
    """Memory: nothing that is kept for the backward is in float32, or a tangent."""
    kept: list[Tensor] = []
    x, w = draw(8, 16).bfloat16().requires_grad_(), draw(4, 16).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_jvp(x, w, None, [LinearTangent(x.detach(), w.detach())], backend=backend)
    assert len(kept) == 2
    assert all(k.dtype == torch.bfloat16 for k in kept)
    assert {k.data_ptr() for k in kept} == {x.data_ptr(), w.data_ptr()}


def test_small_calls_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packing does not pay, nothing is measured; unless torch multiplies one at a time."""
    x, w = draw(2, 40, 128), draw(256, 128)
    monkeypatch.setattr(op.reference, "_has_products", lambda dtype: False)
    assert op._small(x[:, :1], w, False)
    assert op._small(x, w[:100], False)
    assert not op._small(x, w, False)
    assert not op._small(x[:1, :1].half(), w[:1].half(), False)


@native_only
@pytest.mark.parametrize("backend", [None, "reference", "native"])
def test_narrow(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tangents' products of operands rounded to bfloat16 (2^-8 each); y and its gradients are what
    they were.
    """
    monkeypatch.setenv("TANGENTFAST_TUNE", "0")  # the same products of y in both, to the last bit
    x, w, b = (draw(*s).requires_grad_() for s in ((70, 300), (200, 300), (200,)))
    dx, dw, db = draw(70, 300), draw(200, 300), draw(200)
    out = []
    for narrow in (False, True):
        y, (dy,) = linear_jvp(x, w, b, [LinearTangent(dx, dw, db)], backend, narrow=narrow)
        out.append((y, dy, *torch.autograd.grad(y.square().sum(), (x, w, b))))
    (y, dy, *grads), (same_y, rough, *same_grads) = out
    assert torch.equal(y, same_y)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))
    terms = dx.abs() @ w.detach().abs().t() + x.detach().abs() @ dw.abs().t()
    # The reference rounds the bias, the first product and the sum, too.
    assert ((rough - dy).abs() <= 2**-6.9 * terms + 2**-7 * (terms + db.abs())).all()
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, dy)


@native_only
def test_opcheck_and_arguments() -> None:
    products = torch.ops.tangentfast.products.default
    a, b = draw(5, 4), draw(4, 3)
    torch.library.opcheck(
        products, ([a, a], [b], [None, draw(3)], [0, 0, 0, 1, 1, 0, 1, 0, 0], False)
    )
    assert torch.equal(
        products([a], [b], [draw(3) * 0 + 2, None], [], False)[0], torch.full((5, 3), 2.0)
    )
    for wrong, error, message in [
        (([], [b], [None], []), ValueError, "lefts has 0 and rights has 1 entries"),
        (([a[0]], [b], [None], []), ValueError, r"lefts\[0\] has shape \[4\], expected a matrix"),
        (([a, a[1:]], [b], [None], []), ValueError, r"lefts\[1\] has shape \[4, 4\]"),
        (([a], [b[1:]], [None], []), ValueError, r"rights\[0\] has shape \[3, 3\], expected 4 row"),
        (([a], [b.half()], [None], []), TypeError, r"rights\[0\] has dtype Half"),
        (([a], [b], [b[0, :2]], []), ValueError, r"biases\[0\] has shape \[2\], expected \[3\]"),
        (([a], [b], [None], [0, 0]), ValueError, "terms has 2 entries, expected triples"),
        (([a], [b], [None], [0, 1, 0]), ValueError, r"terms holds \(0, 1, 0\), expected indices"),
    ]:
        with pytest.raises(error, match=message):
            products(*wrong, False)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_patches(dtype: torch.dtype) -> None:
    """As torch's convolution in values, gradients and layout."""
    x, w, b = (draw(*s).to(dtype) for s in ((2, 3, 35, 49), (5, 3, 16, 16), (5,)))
    row = LinearTangent(*(draw(*t.shape).to(dtype) for t in (x, w, b)))
    assert is_patches(x, w, 16, 0, 1, 1)
    assert is_patches(x, w, (16, 16), "valid", (1, 1), 1)
    for options in ((16, 1, 1, 1), (8, 0, 1, 1), (16, "same", 1, 1), (16, 0, 2, 1), (16, 0, 1, 3)):
        assert not is_patches(x, w, *options)  # type: ignore[arg-type]
    w.requires_grad_()
    y, (dy,) = patches_jvp(x, w, b, [row])
    exact = [t.detach().double() for t in (x, w, b)]
    exact[1].requires_grad_()
    plain, dplain = torch.func.jvp(
        lambda *a: F.conv2d(*a, stride=16), tuple(exact), tuple(t.double() for t in row)
    )
    limit = rounding(768, sums=2) if dtype == torch.float64 else SMALL[dtype]
    assert y.stride() == dy.stride() == plain.stride()  # type: ignore[union-attr]
    assert units([y, dy], [plain, dplain], dtype) <= (
        rounding(768, sums=2) if dtype == torch.float64 else 2
    )
    weight = draw(*y.shape).to(dtype)
    (grad,) = torch.autograd.grad(y, w, weight)
    (want,) = torch.autograd.grad(plain, exact[1], weight.double())
    assert units(grad, want, dtype) <= limit
