"""Multi-head self-attention by its own rule: every mask and layout, and nothing copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case import C, Case, R, inf
from checks import check, directions, in_dtype, reference, tangentfast_jvp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from truth import CONTRACT, model_errors, units

import tangentfast as tf
from tangentfast import _torch
from tangentfast.ops.backend import load_native

native_only = pytest.mark.skipif(load_native()[0] is None, reason="no native extension")
T, N, E, H = 5, 3, 8, 2
late = torch.zeros(N, T, dtype=torch.bool)
late[1, 3:] = True
past = torch.ones(T, T, dtype=torch.bool).triu(1)
own = torch.rand(N * H, T, T, generator=torch.Generator().manual_seed(0)) > 0.7
own.diagonal(dim1=1, dim2=2).fill_(False)


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -inf)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"attn_mask": past},
    "added": {"attn_mask": added(past)},
    "trained": {"attn_mask": R(T, T)},
    "of_each_head": {"attn_mask": own},
    "added_to_each_head": {"attn_mask": R(N * H, T, T)},
    "padding": {"key_padding_mask": late},
    "added_padding": {"key_padding_mask": added(late)},
    "both": {"key_padding_mask": late, "attn_mask": past},
    "both_added": {"key_padding_mask": added(late), "attn_mask": R(N * H, T, T)},
    "causal": {"attn_mask": past, "is_causal": True},
    "causal_padding": {"attn_mask": past, "key_padding_mask": late, "is_causal": True},
}


def self_attention(
    x: Tensor, *weights: Any, batch_first: bool = False, training: bool = False, **options: Any
) -> Any:
    x = x.transpose(0, 1) if batch_first else x
    w, b, out, out_bias = weights
    options = {"need_weights": False, **options}
    y, attended = F.multi_head_attention_forward(
        x, x, x, E, H, w, b, None, None, False, 0.5, out, out_bias, training, **options
    )
    return y if attended is None else (y, attended)


WEIGHTS = (R(3 * E, E), R(3 * E), R(E, E), R(E))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's body is not run."""
    monkeypatch.delattr(_torch, "multi_head_attention_forward")


def case(masks: dict[str, Any], layout: str) -> Case:
    if layout == "unbatched":
        masks = {
            n: m if not isinstance(m, (Tensor, R)) or n != "key_padding_mask" else m[1]
            for n, m in masks.items()
        }
        return C(R(T, E), *WEIGHTS, **masks)
    return (
        C(R(N, T, E), *WEIGHTS, batch_first=True, **masks)
        if layout == "batch_first"
        else C(R(T, N, E), *WEIGHTS, **masks)
    )


LAYOUTS = ["batch_first", "sequence_first", "unbatched"]
CALLS = [
    pytest.param(case(masks, layout), id=f"{name}-{layout}")
    for name, masks in MASKS.items()
    for layout in LAYOUTS
    if layout != "unbatched" or ("each_head" not in name and name != "both_added")
]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("call", CALLS)
def test_truth(call: Case) -> None:
    """Against ``torch.func.jvp``: all tangents, each alone, K of them, and the adjoint."""
    check(self_attention, call)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_biases(layout: str) -> None:
    call = case({}, layout)
    check(self_attention, C(call.args[0], R(3 * E, E), None, R(E, E), None, **call.kwargs))


@pytest.mark.usefixtures("packed")
def test_dropout() -> None:
    """Draws what torch draws."""
    check(self_attention, C(R(N, T, E), *WEIGHTS, batch_first=True, training=True))


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bit(layout: str, dtype: torch.dtype) -> None:
    call, active = case({"attn_mask": past}, layout).build(dtype)
    row = directions(call, active)
    y, (dy,) = tangentfast_jvp(self_attention, call, [row])
    exact = in_dtype(torch.float64, call, dtype)
    truth = reference(self_attention, exact, in_dtype(torch.float64, row, dtype))
    theirs = reference(self_attention, call, row)
    for ours, plain, want in zip((y, dy), theirs, truth, strict=True):
        assert units(ours, want, dtype) <= 1.25 * units(plain, want, dtype) + 1


@pytest.mark.parametrize(
    "options",
    [{"need_weights": True}, {"need_weights": True, "average_attn_weights": False}],
    ids=["weights", "weights_of_each_head"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_by_torch_body(layout: str, options: dict[str, Any]) -> None:
    check(self_attention, case(options, layout))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "Need attn_mask if specifying the is_causal hint"),
        ({"attn_mask": past[:4]}, "The shape of the 2D attn_mask is"),
        ({"attn_mask": past.long()}, "only bool and floating types of attn_mask are supported"),
        ({"key_padding_mask": late[:, :4]}, "Expected key_padded_mask"),
    ],
    ids=["causal", "shape", "dtype", "padding"],
)
def test_refused_as_torch_does(options: dict[str, Any], message: str) -> None:
    call, active = case(options, "sequence_first").build(torch.float64)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        tangentfast_jvp(self_attention, call, [directions(call, active)])


class Block(nn.Module):
    """Attention as vision transformers call it, and as their text towers do."""

    def __init__(self, batch_first: bool, masked: bool, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(E, E)
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.mask = past if masked else None
        self.recompute = recompute

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)


def block(*args: Any, dtype: torch.dtype = torch.float64) -> tuple[Block, Tensor]:
    model = Block(*args).to(dtype)
    shape = (N, T, E) if model.attention.batch_first else (T, N, E)
    return model, torch.randn(shape, dtype=dtype)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    "params", ["all", "attention", ["attention.out_proj.weight"], ["attention.in_proj_bias"]]
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_module(params: Any, batch_first: bool, recompute: bool) -> None:
    """Outputs and gradients of nn.MultiheadAttention, with weights that are not trained."""
    model, x = block(batch_first, True, recompute)
    truth = block(batch_first, True)[0]
    output, gradient, _ = model_errors(model, (x,), {}, params, truth)
    assert output <= CONTRACT[torch.float64][0]
    assert gradient <= CONTRACT[torch.float64][1]


class Counted(TorchDispatchMode):
    """How often each aten function was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


COPIES = ("copy_", "clone", "_to_copy", "cat", "stack", "zeros", "zero_", "fill_", "new_zeros",
          "select_backward", "slice_backward", "add", "add_")  # fmt: skip


def copies(run: Callable[[], Tensor]) -> dict[str, int]:
    """Those of a forward and its backward."""
    with Counted() as counted:
        run().backward()
    return {n: counted.calls[f"aten::{n}"] for n in COPIES if counted.calls[f"aten::{n}"]}


@native_only
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_nothing_is_copied(batch_first: bool, masked: bool) -> None:
    model, x = block(batch_first, masked)
    lin = tf.linearize(model)
    with torch.no_grad():
        for tau in lin.parameters():
            tau.normal_()
    outputs = []

    def run() -> Tensor:
        outputs.append(lin(x))
        return outputs[-1].sum()

    run().backward()  # gradients that are there are added to
    lin.zero_grad()
    made = copies(run)
    if masked:  # the mask as a summand, widened once
        made = {n: k for n, k in made.items() if n not in ("copy_", "_to_copy", "fill_", "zero_")}
    assert made == {"add": 1}  # y + dy
    assert outputs[-1].is_contiguous()


@native_only
def test_slices_of_one_projection() -> None:
    """timm's way to call the fused function."""

    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            qkv = self.qkv(x).reshape(n, t, 3, H, E // H).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            o = F.scaled_dot_product_attention(q, k, v)
            return self.proj(o.transpose(1, 2).reshape(n, t, E))

    model, x = Timm().double(), torch.randn(N, T, E, dtype=torch.float64)
    output, gradient, lin = model_errors(model, (x,), {})
    assert output <= CONTRACT[torch.float64][0]
    assert gradient <= CONTRACT[torch.float64][1]
    lin.zero_grad()
    assert copies(lambda: lin(x).sum()) == {"add": 1}
