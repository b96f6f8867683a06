"""attention_jvp: backends against the formula in float64, and against torch's own gradient."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from truth import TOLERANCE, rounding, units

from tangentfast.ops.attention import AttentionTangent, attention_jvp, packed_attention_jvp
from tangentfast.ops.backend import load_native

NATIVE = load_native()[0] is not None
native_only = pytest.mark.skipif(not NATIVE, reason="no native extension")
BACKENDS = ["reference", pytest.param("native", marks=native_only)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# N, H, Hk, T, S, D, Dv, causal, mask
CALLS = [
    (2, 3, 3, 50, 50, 64, 64, False, None),
    (1, 4, 2, 97, 131, 40, 40, False, "added"),
    (1, 2, 2, 77, 77, 64, 64, True, None),
    (2, 2, 1, 33, 300, 17, 9, False, "boolean"),
    (1, 2, 2, 40, 23, 80, 80, True, None),
    (3, 1, 1, 1, 5, 3, 3, False, "added"),
]


class Call:
    """Operands, a mask and K = 5 rows of tangents: all, each alone, none."""

    def __init__(self, size: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu"):
        n, h, hk, t, s, d, dv, self.causal, mask = size
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        # As the fused projections of a transformer lie: heads beside each other in a row.
        self.operands = [
            draw(n, rows, heads, width).transpose(1, 2).requires_grad_()
            for heads, rows, width in ((h, t, d), (hk, s, d), (hk, s, dv))
        ]
        self.mask = None
        if mask == "added":
            self.mask = draw(n, 1, t, s)
        if mask == "boolean":
            self.mask = (torch.rand(t, s, generator=generator) > 0.3).to(device)
            self.mask[3] = False  # a row that sees nothing
        dmask = draw(n, 1, t, s) if mask == "added" else None
        q, k, v = (draw(*x.shape) for x in self.operands)
        self.rows: list[Any] = [
            AttentionTangent(q, k, v, dmask), AttentionTangent(q), AttentionTangent(dk=k),
            AttentionTangent(dv=v), None,
        ]  # fmt: skip
        self.gqa = hk != h

    def __call__(self, backend: str) -> tuple[Tensor, list[Tensor | None]]:
        return attention_jvp(
            *self.operands, self.mask, 0.0, self.causal, None, self.gqa, self.rows, backend
        )

    def results(self, backend: str) -> list[Tensor]:
        """o, every do, and the gradients of q, k and v."""
        o, dos = self(backend)
        assert dos[4] is None
        weight = torch.linspace(-1, 1, o.numel()).view(o.shape).to(o)
        return [o, *dos[:4], *torch.autograd.grad(o, self.operands, weight)]  # type: ignore[list-item]

    def exact(self) -> list[Tensor]:
        """The same numbers in float64, by the reference."""
        other = object.__new__(Call)

        def wide(x: Any) -> Any:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().double() if floating else x

        other.operands = [wide(x).requires_grad_() for x in self.operands]
        other.mask, other.causal, other.gqa = wide(self.mask), self.causal, self.gqa
        other.rows = [row and AttentionTangent(*map(wide, row)) for row in self.rows]
        return other.results("reference")


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", CALLS, ids=str)
def test_native(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    """No farther from the truth than plain torch, and one rounding."""
    call = Call(size, dtype)
    truth = call.exact()
    theirs = call.results("reference")
    # The truth of float64 has the same precision: scores, the softmax and the values of 300 keys.
    slack = rounding(300, sums=3) if dtype == torch.float64 else 2
    for ours, plain, exact in zip(call.results("native"), theirs, truth, strict=True):
        assert ours.dtype == dtype
        assert units(ours, exact, dtype) <= 1.25 * units(plain, exact, dtype) + slack


def test_reference_is_torch_func_jvp() -> None:
    call = Call(CALLS[1], torch.float64)

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return ((q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)) @ v

    primals = (*(x.detach() for x in call.operands), call.mask)
    y, dy = torch.func.jvp(plain, primals, tuple(call.rows[0]))
    o, dos = call("reference")
    assert units([o, dos[0]], [y, dy]) <= TOLERANCE[torch.float64]


@native_only
def test_gradient() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5, dtype=torch.float64)
    rows = [AttentionTangent(*(torch.randn_like(x) for x in (q, k, v)))]

    def primal(*operands: Tensor) -> Tensor:
        return attention_jvp(*operands, mask, 0.0, False, 0.7, False, rows, "native")[0]

    assert torch.autograd.gradcheck(primal, (q, k, v))
    o, dos = attention_jvp(q, k, v, mask, 0.0, False, None, False, rows, "native")
    assert o.requires_grad
    assert not dos[0].requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_with_gradient(backend: str) -> None:
    """Relative position biases are trained: the gradient reaches them."""
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    dbias = torch.randn_like(bias)
    rows = [AttentionTangent(dmask=dbias)]
    o, (do,) = attention_jvp(q, k, v, bias, 0.0, False, None, False, rows, backend)
    want = torch.func.jvp(lambda b: (q @ k.mT / 2 + b).softmax(-1) @ v, (bias.detach(),), (dbias,))
    assert units([o, do], want) <= TOLERANCE[torch.float64]
    weight = torch.randn_like(o)
    (grad,) = torch.autograd.grad(o, bias, weight)
    adjoint = (grad * dbias).sum() - (weight * do).sum()
    size = (grad * dbias).abs().sum() + (weight * do).abs().sum()
    assert adjoint.abs() <= TOLERANCE[torch.float64] * torch.finfo(torch.float64).eps * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_dimensions_and_ragged_strides(backend: str) -> None:
    q, k, v = (torch.randn(2, 8, 9, dtype=torch.float64).mT for _ in range(3))
    rows = [AttentionTangent(torch.randn(2, 9, 8, dtype=torch.float64))]
    o, (do,) = attention_jvp(q, k, v, None, 0.0, True, None, False, rows, backend)
    dense = attention_jvp(
        q.contiguous(), k.contiguous(), v.contiguous(), None, 0.0, True, None, False, rows,
        "reference",
    )  # fmt: skip
    assert o.shape == do.shape == (2, 9, 8)  # type: ignore[union-attr]
    assert units([o, do], [dense[0], dense[1][0]]) <= TOLERANCE[torch.float64]


@native_only
def test_nan_is_not_hidden() -> None:
    """torch's fused kernel gives 0 for a row of NaN scores."""
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in range(3))
    q[0, 0, 1, 2] = math.nan
    o, (do,) = attention_jvp(
        q, k, v, None, 0.0, False, None, False, [AttentionTangent(q.nan_to_num())], "native"
    )
    for t in (o, do):
        assert t[0, 0, 1].isnan().all()  # type: ignore[index]
        assert not t[0, 0, 0].isnan().any()  # type: ignore[index]


@native_only
def test_bits_do_not_depend_on_threads() -> None:
    call = Call((1, 1, 1, 300, 300, 64, 64, True, None), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call("native"))
    finally:
        torch.set_num_threads(before)
    for o, dos in results[1:]:
        assert torch.equal(o, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(dos[:4], results[0][1][:4], strict=True))  # type: ignore[arg-type]


@native_only
def test_nothing_of_the_tangent_stays_alive() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    dq = torch.randn(1, 2, 9, 4)
    o, dos = attention_jvp(q, k, v, None, 0.0, False, None, False, [AttentionTangent(dq)], "native")
    alive = [weakref.ref(dq), weakref.ref(dos[0])]
    del dq, dos
    gc.collect()
    assert o.requires_grad
    assert [ref() for ref in alive] == [None, None]


@native_only
def test_opcheck_and_arguments() -> None:
    op = torch.ops.tangentfast.attention_jvp
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    mask = torch.randn(2, 4, 5, 6)
    rest = [[q], [None], [v], [None], True]
    torch.library.opcheck(op.default, (q, k, v, mask, False, 0.5, *rest))
    first = torch.randn(5, 2, 4, 8).permute(1, 2, 0, 3)  # sequence first: the output is, too
    torch.library.opcheck(op.default, (first, k, v, mask, False, 0.5, *rest))
    assert op(first, k, v, mask, False, 0.5, *rest)[0].permute(2, 0, 1, 3).is_contiguous()
    for wrong, error, message in [
        ((q[0], k, v, None), ValueError, "q, k, v have 3, 4, 4 dimensions, expected 4"),
        (
            (q, k[..., :7], v, None),
            ValueError,
            r"k has shape \[2, 2, 6, 7\], expected \[2, 2, 6, 8",
        ),
        ((q, k, v.double(), None), TypeError, "v has dtype Double, expected Float"),
        ((q, k, v, mask[:1]), ValueError, r"mask has shape \[1, 4, 5, 6\], expected \[2, 4, 5, 6"),
    ]:
        with pytest.raises(error, match=message):
            op(*wrong, False, 0.5, *rest)
    with pytest.raises(ValueError, match="dk has 0 entries, expected one per tangent, 1"):
        op(q, k, v, None, False, 0.5, [q], [], [v], [None], True)


@native_only
def test_autocast_as_torch_does() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        o, (do,) = attention_jvp(
            q, k, v, None, 0.0, False, None, False, [AttentionTangent(q, k, v)], "native"
        )
        assert o.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert do.dtype == torch.bfloat16  # type: ignore[union-attr]


def packed(order: str, causal: bool, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """One tensor for q, k and v, batch or sequence first, against three of their own."""
    shape = (3, 7, 3, 2, 5) if order == "batch" else (7, 3, 3, 2, 5)
    draws = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(3)]
    qkv, *dqkv = (t if order == "batch" else t.transpose(0, 1) for t in draws)
    mask = None if causal else torch.randn(3, 1, 7, 7, dtype=torch.float64).to(device, dtype)
    qkv.requires_grad_()
    o, dos = packed_attention_jvp(qkv, mask, causal, [dqkv[0], None, dqkv[1]], backend)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    rows = [AttentionTangent(*t.permute(2, 0, 3, 1, 4)) for t in dqkv]
    theirs = attention_jvp(
        q, k, v, mask, 0.0, causal, None, False, [rows[0], None, rows[1]], backend
    )
    assert dos[1] is None
    assert torch.equal(o, theirs[0])
    assert all(torch.equal(dos[i], theirs[1][i]) for i in (0, 2))  # type: ignore[arg-type]
    weight = torch.randn_like(o)
    (grad,) = torch.autograd.grad(o, qkv, weight)
    assert torch.equal(grad, torch.autograd.grad(theirs[0], qkv, weight)[0])
    if backend != "reference":
        assert grad.stride() == qkv.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", ["batch", "sequence"])
def test_packed(order: str, causal: bool, dtype: torch.dtype, backend: str) -> None:
    packed(order, causal, dtype, backend)


@native_only
def test_opcheck_of_the_backward() -> None:
    op = torch.ops.tangentfast.attention_backward
    qkv = torch.randn(5, 2, 3, 4, 8).transpose(0, 1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    o, lse, _ = torch.ops.tangentfast.attention_jvp(q, k, v, None, False, 0.5, [], [], [], [], True)
    for together in (False, True):
        torch.library.opcheck(op.default, (o, q, k, v, o, lse, None, False, 0.5, together))
    with pytest.raises(ValueError, match="packed is for q, k and v of one shape"):
        op(o, q, k[:, :, :3], v[:, :, :3], o, lse, None, False, 0.5, True)


@native_only
def test_no_second_derivative() -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    o, _ = attention_jvp(q, q, q, None, 0.0, False, None, False, [AttentionTangent(q)], "native")
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
