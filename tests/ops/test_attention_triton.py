"""attention_jvp in Triton: interpreted, compiled ahead of time, and on a GPU if there is one."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, imitate_bfloat16, run_interpreted
from test_attention import CALLS, Call, packed
from torch import Tensor
from truth import CONTRACT, TOLERANCE, units

pytest.importorskip("triton")

from tangentfast.ops.attention import AttentionTangent, attention_jvp

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no CUDA device, and not interpreted")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, H, Hk, T, S, D, Dv, causal, mask: heads of 3 to 256, more rows and keys than a block has
SIZES = [
    (2, 1, 1, 50, 50, 64, 64, False, None),
    (1, 4, 2, 20, 35, 24, 24, False, "added"),
    (1, 2, 2, 70, 70, 16, 16, True, None),
    (1, 2, 1, 33, 40, 17, 9, False, "boolean"),
    (1, 1, 1, 20, 23, 80, 104, True, None),
    (1, 1, 1, 10, 20, 200, 256, False, "boolean"),
    (3, 1, 1, 1, 5, 3, 3, False, "added"),
]


@pytest.mark.skipif(INTERPRETED or GPU, reason="this is the process that runs them")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        imitate_bfloat16(monkeypatch)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES + CALLS * GPU, ids=str)
def test_truth(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    """16 bits: 1.25 times plain torch's error and one rounding; float32: what a model may have."""
    call = Call(size, dtype, DEVICE)
    truth = call.exact()
    theirs = call.results("reference")
    for i, ours in enumerate(call.results("triton")):
        assert ours.dtype == dtype
        limit = 1.25 * units(theirs[i], truth[i], dtype) + 1
        if dtype == torch.float32:
            limit = CONTRACT[dtype][i >= 5] / torch.finfo(dtype).eps
        assert units(ours, truth[i], dtype) <= limit


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


@runs
def test_mask_with_gradient() -> None:
    """Relative position biases are trained: the gradient reaches them."""
    q, k, v, bias = draw(2, 2, 6, 4), draw(2, 2, 6, 4), draw(2, 2, 6, 4), draw(2, 6, 6)
    bias.requires_grad_()
    dbias = torch.randn_like(bias)
    o, (do,) = attention_jvp(
        q, k, v, bias, 0.0, False, None, False, [AttentionTangent(dmask=dbias)], "triton"
    )
    want = torch.func.jvp(lambda b: (q @ k.mT / 2 + b).softmax(-1) @ v, (bias.detach(),), (dbias,))
    assert units([o, do], want) <= TOLERANCE[torch.float32]
    weight = torch.randn_like(o)
    (grad,) = torch.autograd.grad(o, bias, weight)
    adjoint = (grad * dbias).sum() - (weight * do).sum()
    size = (grad * dbias).abs().sum() + (weight * do).abs().sum()
    assert adjoint.abs() <= TOLERANCE[torch.float32] * torch.finfo(torch.float32).eps * size


@runs
def test_three_dimensions_and_ragged_strides() -> None:
    q, k, v = (draw(2, 8, 9).mT for _ in range(3))
    rows = [AttentionTangent(draw(2, 9, 8))]
    o, (do,) = attention_jvp(q, k, v, None, 0.0, True, None, False, rows, "triton")
    want, (dwant,) = attention_jvp(q, k, v, None, 0.0, True, None, False, rows, "reference")
    assert o.shape == do.shape == (2, 9, 8)  # type: ignore[union-attr]
    assert units([o, do], [want, dwant]) <= TOLERANCE[torch.float32]


@runs
def test_common_offset_of_scores() -> None:
    """What all keys share of ds has no part in do, and must not cost its digits."""
    q, k, v = (draw(1, 1, 40, 16).bfloat16() for _ in range(3))
    dq, shift = draw(1, 1, 40, 16).bfloat16(), draw(1, 1, 1, 16).bfloat16() * 4
    given = [q, k + shift, v + 4]

    def run(backend: str, convert: Any) -> Tensor:
        tangents = [AttentionTangent(convert(dq))]
        return attention_jvp(
            *map(convert, given), None, 0.0, False, None, False, tangents, backend
        )[1][0]  # type: ignore[return-value]

    truth = run("reference", Tensor.double)
    ours, plain = run("triton", Tensor.clone), run("reference", Tensor.clone)
    assert units(ours, truth, q.dtype) <= 1.25 * units(plain, truth, q.dtype) + 1


@runs
def test_nan_is_not_hidden() -> None:
    q, k, v = (draw(1, 1, 3, 4) for _ in range(3))
    q[0, 0, 1, 2] = math.nan
    dq = q.nan_to_num()
    o, (do,) = attention_jvp(
        q, k, v, None, 0.0, False, None, False, [AttentionTangent(dq)], "triton"
    )
    for t in (o, do):
        assert t[0, 0, 1].isnan().all()  # type: ignore[index]
        assert not t[0, 0, 0].isnan().any()  # type: ignore[index]


@runs
def test_bits_repeat() -> None:
    call = Call((1, 2, 1, 20, 35, 16, 16, False, "added"), torch.float32, DEVICE)
    for a, b in zip(call.results("triton"), call.results("triton"), strict=True):
        assert torch.equal(a, b)


@runs
def test_nothing_of_the_tangent_stays_alive() -> None:
    q, k, v = (draw(1, 2, 9, 4).requires_grad_() for _ in range(3))
    dq = draw(1, 2, 9, 4)
    o, dos = attention_jvp(q, k, v, None, 0.0, False, None, False, [AttentionTangent(dq)], "triton")
    alive = [weakref.ref(dq), weakref.ref(dos[0])]
    del dq, dos
    gc.collect()
    assert o.requires_grad
    assert [ref() for ref in alive] == [None, None]


@runs
def test_opcheck() -> None:
    op = torch.ops.tangentfast.attention_jvp_triton.default
    q, k, v, mask = draw(2, 2, 5, 8), draw(2, 1, 6, 8), draw(2, 1, 6, 3), draw(2, 2, 5, 6)
    rest = [[q], [None], [v], [None], True]
    first = draw(5, 2, 2, 8).permute(1, 2, 0, 3)  # sequence first: the output is, too
    for given in (q, first):
        torch.library.opcheck(op, (given, k, v, mask, False, 0.5, *rest))
    o, lse, _ = op(first, k, v, mask, False, 0.5, *rest)
    assert o.permute(2, 0, 1, 3).is_contiguous()
    back = torch.ops.tangentfast.attention_backward_triton.default
    torch.library.opcheck(back, (torch.ones_like(o), first, k, v, o, lse, mask, False, 0.5, False))
    torch.library.opcheck(back, (q, q, q, q, q, q[..., 0], None, False, 0.5, True))


@runs
@pytest.mark.parametrize("order", ["batch", "sequence"])
def test_packed(order: str) -> None:
    packed(order, True, torch.float32, "triton", DEVICE)


@runs
def test_bad_operands_launch_nothing() -> None:
    op = torch.ops.tangentfast.attention_jvp_triton.default
    q, k, v = draw(1, 4, 5, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 3)
    none = [[None], [None], [None], [None], True]
    with pytest.raises(ValueError, match=r"v has shape \(1, 2, 5, 3\), expected \(1, 2, 6, 3\)"):
        op(q, k, v[:, :, :5], None, False, 1.0, *none)
    with pytest.raises(ValueError, match=r"dq\[0\] is torch.float64"):
        op(q, k, v, None, False, 1.0, [q.double()], *none[1:])
    with pytest.raises(ValueError, match="q has 4 heads, expected a multiple of k's 3"):
        op(q, draw(1, 3, 6, 8), draw(1, 3, 6, 3), None, False, 1.0, *none)
    back = torch.ops.tangentfast.attention_backward_triton.default
    o, lse, _ = op(q, k, v, None, False, 1.0, [], [], [], [], True)
    with pytest.raises(ValueError, match=r"lse has shape \(1, 4, 4\), expected \(1, 4, 5\)"):
        back(o, q, k, v, o, lse[..., :4], None, False, 1.0, False)


@runs
def test_log_sum_exp_and_rows_that_see_nothing() -> None:
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 4)
    mask = torch.zeros(1, 1, 3, 5, device=DEVICE)
    mask[:, :, 1] = -math.inf
    o, lse, (do,) = torch.ops.tangentfast.attention_jvp_triton(
        q, k, v, mask, False, 0.5, [q], [k], [v], [None], True
    )
    assert not o[0, 0, 1].any()
    assert not do[0, 0, 1].any()
    want = (q @ k.mT / 2).logsumexp(-1)
    want[..., 1] = math.inf
    torch.testing.assert_close(lse, want)


@runs
def test_autocast_as_torch_does() -> None:
    q, k, v = (draw(1, 2, 5, 4) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        o, (do,) = attention_jvp(
            q, k, v, None, 0.0, False, None, False, [AttentionTangent(q, k, v)], "triton"
        )
        assert o.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert do.dtype == torch.bfloat16  # type: ignore[union-attr]
