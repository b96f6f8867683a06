"""linear_jvp in Triton: interpreted, on a GPU if there is one; and the choice by measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, imitate_bfloat16, run_interpreted
from torch import Tensor
from truth import TOLERANCE, rounding, units

pytest.importorskip("triton")

from tangentfast.ops.linear import LinearTangent, linear_jvp
from tangentfast.ops.linear.op import LINEAR

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no CUDA device, and not interpreted")
FLOAT32 = TOLERANCE[torch.float32]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# x [2, M, D], weight [E, D]: no tile divides them; a tile; less than a tile
SIZES = [(33, 70, 40), (64, 64, 128), (3, 5, 7)] + [(771, 1024, 4096)] * GPU


@pytest.mark.skipif(INTERPRETED or GPU, reason="this is the process that runs them")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        imitate_bfloat16(monkeypatch)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def results(
    operands: list[Tensor], rows: list[Any], weight: Tensor, convert: Any, backend: str
) -> list[Tensor]:
    """y, every dy, and the gradients of x, weight and bias."""
    x, w, b = given = [convert(t).requires_grad_() for t in operands]
    rows = [LinearTangent(*(t if t is None else convert(t) for t in row)) for row in rows]
    y, dys = linear_jvp(x, w, b, rows, backend)
    assert not any(dy.requires_grad for dy in dys)  # type: ignore[union-attr]
    return [y, *dys, *torch.autograd.grad(y, given, convert(weight))]  # type: ignore[list-item]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truth(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64: float32 to the rounding of its sums; 16 bits as torch, and one rounding."""
    m, d, e = size
    operands = [draw(2, m, d), draw(e, d) / d**0.5, draw(e)]
    operands = [t.to(dtype) for t in operands]
    tangents = [torch.randn_like(t) for t in operands]
    rows = [tangents, (None, tangents[1], None), (tangents[0], None, tangents[2])]
    weight = draw(2, m, e).to(dtype)
    truth = results(operands, rows, weight, Tensor.double, "reference")
    theirs = results(operands, rows, weight, Tensor.clone, "reference")
    ours = results(operands, rows, weight, Tensor.clone, "triton")
    for own, plain, exact in zip(ours, theirs, truth, strict=True):
        assert own.dtype == dtype
        limit = rounding(max(2 * m, d, e), sums=1)
        if dtype != torch.float32:
            limit = units(plain, exact, dtype) + 1
        assert units(own, exact, dtype) <= limit


@runs
def test_ragged_strides() -> None:
    x, w = draw(20, 30).t(), draw(40, 50).t()[:, :20]
    dx, dw = draw(30, 40)[:, ::2], draw(50, 20)
    y, (dy,) = linear_jvp(x, w, None, [LinearTangent(dx, dw)], "triton")
    want = F.linear(dx.double(), w.double()) + F.linear(x.double(), dw.double())
    assert units([y, dy], [F.linear(x.double(), w.double()), want], torch.float32) <= FLOAT32


@runs
def test_opcheck() -> None:
    op = torch.ops.tangentfast.linear_jvp_triton.default
    x, w, b = draw(5, 8), draw(6, 8), draw(6)
    torch.library.opcheck(op, (x, w, b, [x, None], [w, w], [b, None], 0))


@runs
def test_bad_operands_launch_nothing() -> None:
    op = torch.ops.tangentfast.linear_jvp_triton.default
    x, w = draw(5, 8), draw(6, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(6, 7\), expected \(6, 8\)"):
        op(x, w[:, :7], None, [], [], [], 0)
    with pytest.raises(ValueError, match=r"dx\[0\] is torch.float64 on .*, expected torch.float32"):
        op(x, w, None, [x.double()], [None], [None], 0)
    with pytest.raises(ValueError, match="different lengths"):
        op(x, w, None, [x], [], [None], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_choice_is_remembered_and_not_made_while_capturing() -> None:
    known = LINEAR.choice.chosen
    LINEAR.choice.chosen = {}
    try:
        x, w = draw(2048, 512).bfloat16(), draw(2048, 512).bfloat16()
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x @ w.t()  # cuBLAS takes its workspace
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            linear_jvp(x, w, None, [LinearTangent(x, w)])
        assert not LINEAR.choice.chosen
        linear_jvp(x, w, None, [LinearTangent(x, w)])
        linear_jvp(x[:2047], w, None, [LinearTangent(x[:2047], w)])
        assert len(LINEAR.choice.chosen) <= 2
    finally:
        LINEAR.choice.chosen = known
