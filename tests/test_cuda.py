"""The linearized model on a GPU: exactness, mixed precision, CUDA graphs, kernels launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Call, Case
from checks import DIFFERENTIABLE, Function, calls, check_tangent
from models import MODELS
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from truth import CONTRACT, model_errors, random_tau

import tangentfast as tf
from tangentfast.dual import name_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class OnDevice(Case):
    """A case whose tensors are on the GPU."""

    def build(self, dtype: torch.dtype, strided: bool = False) -> tuple[Call, list[int]]:
        call, active = super().build(dtype, strided)
        return to_device(call), active


def to_device(tree: Any) -> Any:
    return tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, tree)


# One function of each name, and the cases of that one.
ONCE = {name_of(p.values[0]): p.values[0] for p in calls(CASES, *DIFFERENTIABLE)}
RULES = [p for p in calls(CASES, *DIFFERENTIABLE) if ONCE[name_of(p.values[0])] is p.values[0]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "case"), RULES)
def test_rule(function: Function, case: Case) -> None:
    check_tangent(function, OnDevice(**vars(case)))


@pytest.mark.parametrize(
    "name",
    ["open_clip.CLIP", "open_clip.CLIP.attentional_pool", "timm.vit_tiny_patch16_224",
     "hf.ViTModel.sdpa", "torchvision.VisionTransformer"],
)  # fmt: skip
def test_model(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    out, gradient, _ = model_errors(model.cuda(), to_device(args), to_device(kwargs))
    assert out <= CONTRACT[torch.float64][0]
    assert gradient <= CONTRACT[torch.float64][1]


class Block(nn.Module):
    """Attention and an MLP, as in every vision transformer, and sizes that no tile divides."""

    def __init__(self, width: int = 96, heads: int = 3) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 200), nn.GELU(), nn.Linear(200, width))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def network(depth: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).to("cuda", dtype)


def batch(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 37, 96, generator=generator).to("cuda", dtype)


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("params", ["all", "attention"])
def test_exact(params: str, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    out, gradient, _ = model_errors(
        model, (batch(dtype),), {}, params, truth=network(dtype=torch.float64)
    )
    assert out <= CONTRACT[dtype][0]
    assert gradient <= CONTRACT[dtype][1]


def step(lin: Any, x: Tensor) -> Tensor:
    out = lin(x)
    out.float().square().mean().backward()
    return out.detach()


def test_mixed_precision() -> None:
    """θ0 in bfloat16, once, beside a float32 τ; and autocast: both near the float32 gradients."""
    exact = tf.linearize(network())
    random_tau(exact)
    truth = step(exact, batch())
    for options, cast in (({"primal_dtype": torch.bfloat16}, False), ({}, True)):
        lin = tf.linearize(network(), at=exact.task_vector(), **options)  # type: ignore[arg-type]
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            out = step(lin, batch() if cast else batch(torch.bfloat16))
        assert (out.float() - truth).norm() <= 0.03 * truth.norm()
        for name, tau in lin.tau.items():
            assert tau.grad is not None
            assert tau.grad.dtype == torch.float32
            want = exact.tau[name].grad
            assert want is not None
            assert (tau.grad - want).norm() <= 0.05 * want.norm() + 1e-6


def test_captured_step() -> None:
    """A whole training step as a CUDA graph: replays give what the eager step gives."""
    lin, eager = tf.linearize(network()), tf.linearize(network())
    random_tau(lin)
    with torch.no_grad():
        for a, b in zip(eager.parameters(), lin.parameters(), strict=True):
            a.copy_(b)
    static = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            lin.zero_grad(set_to_none=True)
            step(lin, static)
    torch.cuda.current_stream().wait_stream(side)
    lin.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(lin, static)
    for seed in (2, 3):
        static.copy_(batch(seed=seed))
        graph.replay()
        eager.zero_grad(set_to_none=True)
        torch.testing.assert_close(out, step(eager, batch(seed=seed)), rtol=1e-5, atol=1e-6)
        for a, b in zip(lin.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def launches(run: Any) -> int:
    """Kernels that `run` launches."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def test_launch_lean() -> None:
    """One more block costs at most 1.8 × the kernels that it costs the ordinary step."""
    x = batch()

    def ordinary(depth: int) -> int:
        model = network(depth)
        return launches(lambda: step(model, x))

    def linearized(depth: int) -> int:
        lin = tf.linearize(network(depth))
        return launches(lambda: step(lin, x))

    assert linearized(3) - linearized(2) <= 1.8 * (ordinary(3) - ordinary(2))
