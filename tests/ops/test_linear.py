"""linear_jvp: 16-bit operands on a CPU without 16-bit products, and patch embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from truth import units

from tangentfast.ops import linear
from tangentfast.ops.linear import linear_jvp
from tangentfast.ops.linear.patches import is_patches, patches_jvp


@pytest.fixture(params=[False, True], ids=["widened", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of machine."""
    monkeypatch.setattr(linear, "_has_products", lambda dtype: request.param)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_sixteen_bits(dtype: torch.dtype, bias: bool) -> None:
    """Outputs, tangents and gradients are within a few roundings of the float64 truth."""
    operands = [draw(4, 3, 33).to(dtype), draw(9, 33).to(dtype)] + [draw(9).to(dtype)] * bias
    rows: list[Any] = [tuple(draw(*t.shape).to(dtype) for t in operands)]
    rows = [(*row, None)[:3] for row in rows]
    rows += [(rows[0][0], None, None), (None, rows[0][1], rows[0][2]), None]
    weight = draw(4, 3, 9).to(dtype)

    def results(convert: Any) -> list[Tensor]:
        given = [convert(t).requires_grad_() for t in operands]
        tangents = [row and tuple(t if t is None else convert(t) for t in row) for row in rows]
        x, w, b = (*given, None)[:3]
        y, dys = linear_jvp(x.transpose(0, 1), w, b, [_turned(r) for r in tangents])
        assert dys[3] is None
        assert not any(dy.requires_grad for dy in dys[:3])
        grads = torch.autograd.grad(y, given, convert(weight).transpose(0, 1))
        return [y, *dys[:3], *grads]

    for got, exact in zip(
        results(lambda t: t.detach().clone()), results(Tensor.double), strict=True
    ):
        assert got.dtype == dtype
        assert units(got, exact, dtype) <= 2


def _turned(row: Any) -> Any:
    return row and (None if row[0] is None else row[0].transpose(0, 1), *row[1:])


def test_widened_saves_sixteen_bits() -> None:
    """Memory: nothing that is kept for the backward is in float32."""
    kept = []
    x, w = draw(8, 16).bfloat16().requires_grad_(), draw(4, 16).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        linear_jvp(x, w, None, [(x.detach(), None, None)])
    assert set(kept) <= {torch.bfloat16}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_patches(dtype: torch.dtype) -> None:
    """As torch's convolution in values, gradients and layout."""
    x, w, b = (draw(*s).to(dtype) for s in ((2, 3, 35, 49), (5, 3, 16, 16), (5,)))
    row = tuple(draw(*t.shape).to(dtype) for t in (x, w, b))
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
    assert y.stride() == dy.stride() == plain.stride()  # type: ignore[union-attr]
    assert units([y, dy], [plain, dplain], dtype) <= (100 if dtype == torch.float64 else 2)
    weight = draw(*y.shape).to(dtype)
    (grad,) = torch.autograd.grad(y, w, weight)
    (want,) = torch.autograd.grad(plain, exact[1], weight.double())
    assert units(grad, want, dtype) <= (100 if dtype == torch.float64 else 2)
