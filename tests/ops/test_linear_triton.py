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

from tangentfast.ops import fastest as timing
from tangentfast.ops.fastest import Fastest
from tangentfast.ops.linear import linear_jvp, tuned

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
    operands: list[Tensor], rows: list[Any], weight: Tensor, convert: Any, backend: str, kind: str
) -> list[Tensor]:
    """y, every dy, and the gradients of x, weight, bias and residual."""
    x, w, b, r = given = [convert(t).requires_grad_() for t in operands]
    rows = [tuple(t if t is None else convert(t) for t in row) for row in rows]
    y, dys = linear_jvp(x, w, b, rows, backend, kind=kind, residual=r)
    assert not any(dy.requires_grad for dy in dys)  # type: ignore[union-attr]
    return [y, *dys, *torch.autograd.grad(y, given, convert(weight))]  # type: ignore[list-item]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["", "gelu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truth(size: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    """Against float64: float32 to the rounding of its sums; 16 bits as torch, and one rounding."""
    m, d, e = size
    operands = [draw(2, m, d), draw(e, d) / d**0.5, draw(e), draw(2, m, e)]
    operands = [t.to(dtype) for t in operands]
    tangents = [torch.randn_like(t) for t in operands]
    rows = [tangents, (None, tangents[1], None, None), (tangents[0], None, tangents[2], None),
            (None, None, None, tangents[3])]  # fmt: skip
    weight = draw(2, m, e).to(dtype)
    truth = results(operands, rows, weight, Tensor.double, "reference", kind)
    theirs = results(operands, rows, weight, Tensor.clone, "reference", kind)
    ours = results(operands, rows, weight, Tensor.clone, "triton", kind)
    for own, plain, exact in zip(ours, theirs, truth, strict=True):
        assert own.dtype == dtype
        limit = rounding(max(2 * m, d, e), sums=1)
        if dtype != torch.float32:
            limit = units(plain, exact, dtype) + 1
        assert units(own, exact, dtype) <= limit


@runs
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid"])
def test_activations(kind: str) -> None:
    operands = [draw(40, 16) * 3, draw(24, 16), draw(24), draw(40, 24)]
    rows = [[torch.randn_like(t) for t in operands]]
    weight = draw(40, 24)
    truth = results(operands, rows, weight, Tensor.double, "reference", kind)
    ours = results(operands, rows, weight, Tensor.clone, "triton", kind)
    assert all(units(a, b, torch.float32) <= FLOAT32 for a, b in zip(ours, truth, strict=True))


@runs
def test_ragged_strides() -> None:
    x, w = draw(20, 30).t(), draw(40, 50).t()[:, :20]
    dx, dw = draw(30, 40)[:, ::2], draw(50, 20)
    y, (dy,) = linear_jvp(x, w, None, [(dx, dw, None)], "triton")
    want = F.linear(dx.double(), w.double()) + F.linear(x.double(), dw.double())
    assert units([y, dy], [F.linear(x.double(), w.double()), want], torch.float32) <= FLOAT32


@runs
def test_opcheck() -> None:
    op = torch.ops.tangentfast.linear_jvp_triton.default
    x, w, b, r = draw(5, 8), draw(6, 8), draw(6), draw(5, 6)
    for kind in ("", "silu"):
        torch.library.opcheck(op, (x, w, b, r, [x, None], [w, w], [b, None], [r, r], kind, True, 0))


@runs
def test_bad_operands_launch_nothing() -> None:
    op = torch.ops.tangentfast.linear_jvp_triton.default
    x, w = draw(5, 8), draw(6, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(6, 7\), expected \(6, 8\)"):
        op(x, w[:, :7], None, None, [], [], [], [], "", False, 0)
    with pytest.raises(ValueError, match=r"dx\[0\] is torch.float64 on .*, expected torch.float32"):
        op(x, w, None, None, [x.double()], [None], [None], [None], "", False, 0)
    with pytest.raises(ValueError, match="different lengths"):
        op(x, w, None, None, [x], [], [None], [None], "", False, 0)
    with pytest.raises(ValueError, match="kind is 'relu', expected gelu"):
        op(x, w, None, None, [], [], [], [], "relu", True, 0)


def test_epilogues_elsewhere() -> None:
    """Without the kernel the same comes of one operation after the other; and what is refused."""
    x, w, r = torch.randn(4, 5), torch.randn(3, 5), torch.randn(4, 3)
    y, (dy, none) = linear_jvp(x, w, None, [(x, w, None, r), None], "reference", kind="silu",
                               residual=r)  # fmt: skip
    want = torch.func.jvp(lambda x, w, r: F.silu(x @ w.t()) + r, (x, w, r), (x, w, r))
    assert units([y, dy], want) <= FLOAT32
    assert none is None
    with pytest.raises(ValueError, match=r"residual has shape \(3, 4\), y has \(4, 3\)"):
        linear_jvp(x, w, None, [], residual=r.t())
    with pytest.raises(ValueError, match="kind is 'relu'"):
        linear_jvp(x, w, None, [], kind="relu")


def test_fastest_is_measured_once() -> None:
    measured: list[Any] = []

    def seconds(run: Any) -> float:
        measured.append(run())
        return {"a": 3.0, "b": 1.0, "c": 2.0}[measured[-1]]

    fastest = Fastest(seconds)
    ways = [lambda: "a", lambda: "b", lambda: "c"]
    assert [fastest("key", ways) for _ in range(3)] == [1, 1, 1]
    assert measured == ["a", "b", "c"]
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest("key", ways) == fastest("new", ways) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert "new" not in fastest.found

    def too_large() -> str:
        raise RuntimeError("out of shared memory")

    assert fastest("other", [lambda: "a", too_large, lambda: "c"]) == 2
    with pytest.raises(RuntimeError, match="shared memory"):  # torch's own way must work
        fastest("first", [too_large, lambda: "a"])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_choice_is_remembered_and_not_made_while_capturing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuned, "fastest", Fastest(timing.cuda_seconds))
    x, w = draw(2048, 512).bfloat16(), draw(2048, 512).bfloat16()
    rows = [(x, w, None)]
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x @ w.t()  # cuBLAS takes its workspace
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        linear_jvp(x, w, None, rows)
    assert not tuned.fastest.found
    linear_jvp(x, w, None, rows)
    linear_jvp(x[:2047], w, None, [(x[:2047], w, None)])
    assert len(tuned.fastest.found) <= 2
