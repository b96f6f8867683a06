"""Self-attention in models: layouts, masks, what falls to torch's body, and no copy."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from truth import CONTRACT, model_errors, random_tau

import tangentfast as tf
from tangentfast import _torch
from tangentfast.ops.attention import unbind_packed
from tangentfast.ops.backend import load_native

N, T, E = 3, 5, 8
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.zeros(N, T, dtype=torch.bool)
PADDING[1, 3:] = True
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "boolean": {"attn_mask": CAUSAL.roll(1, 0)},
    "added": {"attn_mask": torch.linspace(-1, 1, T * T, dtype=torch.float64).view(T, T)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
}
LAYOUTS = ("batch first", "sequence first", "transposed")


class Block(nn.Module):
    """Attention within its residual; `transposed`: a sequence-first view of batch-first memory."""

    def __init__(self, layout: str = "batch first", width: int = E, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.attention = nn.MultiheadAttention(width, 2, batch_first="batch" in layout, **options)
        for p in self.attention.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        turn = self.layout != "batch first" and x.dim() == 3
        x = x.transpose(0, 1) if turn else x
        if self.layout == "sequence first":
            x = x.contiguous()
        y = x + self.attention(x, x, x, **{"need_weights": False, **options})[0]
        return y.transpose(0, 1) if turn else y


class Biased(Block):
    """With a mask that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(T, T))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, attn_mask=self.mask)


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, T, E), generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def body() -> Any:
    """Counts the calls that fall to torch's own body."""
    with mock.patch.object(
        _torch, "multi_head_attention_forward", wraps=_torch.multi_head_attention_forward
    ) as wrapped:
        yield wrapped


def check(block: nn.Module, x: Tensor, params: Any = "all", **options: Any) -> None:
    output, gradient, _ = model_errors(block.double(), (x,), options, params)
    limits = CONTRACT[torch.float64]
    assert output <= limits[0]
    assert gradient <= limits[1]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_masks(layout: str, mask: str, body: Any) -> None:
    check(Block(layout), inputs(), **MASKS[mask])
    assert not body.called


def test_unbatched(body: Any) -> None:
    check(Block(), inputs(T, E))
    check(Block(), inputs(T, E), key_padding_mask=PADDING[1], attn_mask=CAUSAL)
    check(Block(), inputs(T, E), attn_mask=torch.stack([CAUSAL, CAUSAL.roll(1, 0)]))
    assert not body.called


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "params",
    ["*.in_proj_weight", "*.in_proj_bias", "*.out_proj.weight", "*.out_proj.bias", "*.in_proj_*"],
)
def test_frozen_parameters(params: str, layout: str, body: Any) -> None:
    check(nn.Sequential(Block(layout)), inputs(), [params])
    check(nn.Sequential(Block(layout, bias=False)), inputs(), ["*weight"])
    assert not body.called


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_torchs_body_computes(options: Any, body: Any) -> None:
    check(Block(**options), inputs(), need_weights=not options)
    check(Biased(), inputs())
    assert body.call_count == 2


def test_dropout_is_torchs(body: Any) -> None:
    block = Block(dropout=0.5).double()
    lin = tf.linearize(block.train())
    torch.manual_seed(3)
    got = lin(inputs())
    torch.manual_seed(3)
    torch.testing.assert_close(got, block(inputs()))
    assert body.called
    body.reset_mock()
    lin.eval()(inputs())
    assert not body.called


@pytest.mark.parametrize("count", [1, 3])
def test_tangents(count: int, body: Any) -> None:
    """K at a time are the K alone."""
    block, x = Block().double(), inputs()
    some = [{n: torch.randn_like(p) for n, p in block.named_parameters()} for _ in range(count)]
    y, dys = tf.jvp(block, (x,), params=some)
    torch.testing.assert_close(y, block(x))
    for tau, dy in zip(some, dys, strict=True):
        torch.testing.assert_close(dy, tf.jvp(block, (x,), params=[tau])[1][0])
    assert not body.called


def test_checkpointed(body: Any) -> None:
    class Outer(nn.Module):
        def __init__(self, again: bool):
            super().__init__()
            self.block, self.again = Block().double(), again

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)

    results = []
    for again in (False, True):
        lin = tf.linearize(Outer(again))
        torch.manual_seed(0)
        random_tau(lin)
        y = lin(inputs())
        results.append([y, *torch.autograd.grad(y.square().sum(), list(lin.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not body.called


class Copies(TorchDispatchMode):
    """How often memory is copied or filled, by operation."""

    NAMES = ("copy_", "clone", "_to_copy", "fill_", "zero_", "zeros", "zeros_like", "cat", "stack",
             "slice_backward", "select_backward")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.NAMES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(load_native()[0] is None, reason="torch's own attention copies")
@pytest.mark.parametrize("params", ["all", "attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_copied(layout: str, params: str) -> None:
    """In a step over a large enough block: the rows of every product are those of memory."""
    lin = tf.linearize(nn.Sequential(Block(layout, 128), Block(layout, 128)), params)
    random_tau(lin)
    x = torch.randn(4, 20, 128)
    if layout == "sequence first":
        x = torch.randn(20, 4, 128).transpose(0, 1)
    with Copies() as copies:
        y = lin(x)
        torch.autograd.grad(y, list(lin.parameters()), torch.ones_like(y))
    assert not copies.counts


class Packed(nn.Module):
    """As timm has it; `use` computes attention from q, k and v [N, H, T, D]."""

    def __init__(self, use: Any, width: int = E):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, e = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, 2, e // 2).permute(2, 0, 3, 1, 4)
        o: Tensor = self.use(*qkv.unbind(0))
        y: Tensor = self.proj(o.transpose(1, 2).reshape(n, t, e))
        return x + y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "use",
    [
        attend,
        lambda q, k, v: attend(q, k, v) + attend(v, q, k),
        lambda q, k, v: attend(q, k, v) * k.sigmoid(),
        lambda q, k, v: attend(q, k, k),
        lambda q, k, v: attend(q.detach(), k, v),
        lambda q, k, v: q + 2 * v,
    ],
)
def test_parts_of_one_tensor(use: Any) -> None:
    """Their gradients are views of one where attention alone made them, and right where not."""
    check(Packed(use), inputs())


@pytest.mark.skipif(load_native()[0] is None, reason="torch's own attention copies")
def test_parts_of_one_tensor_are_not_copied() -> None:
    lin = tf.linearize(nn.Sequential(Packed(attend, 128), Packed(attend, 128)))
    random_tau(lin)
    with Copies() as copies:
        y = lin(torch.randn(4, 20, 128))
        torch.autograd.grad(y, list(lin.parameters()), torch.ones_like(y))
    assert not copies.counts


def test_gradient_of_the_gradient_of_parts() -> None:
    x = torch.randn(3, 2, 2, 4, 2, dtype=torch.float64, requires_grad=True)

    def cubes(x: Tensor) -> Tensor:
        q, k, v = unbind_packed(x)
        return q**3 + k * v

    assert torch.autograd.gradgradcheck(cubes, (x,))
