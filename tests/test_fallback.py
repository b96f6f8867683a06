"""The exact fallback: what torch says of a derivative is checked, and there is a second way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tangentfast as tf
from tangentfast import fallback

torch.manual_seed(0)
SQUARE = torch.randn(3, 3, dtype=torch.float64)
INDEX = torch.tensor([[0, 1, 0], [1, 1, 0]])
SOURCE, WEIGHT = torch.randn(2, 3).double(), torch.randn(5, 3).double()


def differences(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-6) -> Tensor:
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


# torch.func.jvp is zero, or wrong, without an error; or has no forward derivative at all.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter_reduce prod": lambda x: x.scatter_reduce(0, INDEX, SOURCE, "prod"),
    "index_reduce": lambda x: SQUARE.index_reduce(0, torch.tensor([0, 2, 0]), x, "amax"),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, SQUARE.sign()),
    "multilabel_soft_margin": lambda x: F.multilabel_soft_margin_loss(x, SQUARE.sign()),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 0),
    "linalg.inv": torch.linalg.inv,
    "householder": lambda x: torch.linalg.householder_product(x, SQUARE[0].abs()),
}


if torch.__version__ >= "2.11":  # older ones can differentiate distances once
    FUNCTIONS["cdist"] = lambda x: torch.cdist(x, SOURCE)
    FUNCTIONS["cdist by the second"] = lambda x: torch.cdist(SOURCE, x)
    FUNCTIONS["pdist"] = F.pdist
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    CHUNKED = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=2)
    FUNCTIONS["linear_cross_entropy"] = lambda x: F.linear_cross_entropy(
        x, WEIGHT, torch.tensor([0, 1, 2]), options=CHUNKED
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative(name: str) -> None:
    f, v = FUNCTIONS[name], torch.randn(3, 3, dtype=torch.float64)
    x = SQUARE.clone()
    want = differences(f, x, v)
    assert want.norm() > 0
    for _ in range(2):  # checked at the first call, remembered at the second
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y, dy = tf.jvp(f, (x,), tangents=(v,))
            torch.testing.assert_close(y, f(x))
            torch.testing.assert_close(dy, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_several_tangents_and_the_graph(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(SQUARE.clone())

        def forward(self) -> Tensor:
            return FUNCTIONS[name](self.w * 1)

    net, vs = Net(), torch.randn(3, 3, 3, dtype=torch.float64)
    y, dys = tf.jvp(net, (), params=[{"w": v} for v in vs])
    for v, dy in zip(vs, dys, strict=True):
        torch.testing.assert_close(
            dy, differences(FUNCTIONS[name], SQUARE, v), rtol=1e-6, atol=1e-8
        )
    y.sum().backward()
    lin = tf.linearize(net)
    lin().sum().backward()
    torch.testing.assert_close(lin.tau["w"].grad, net.w.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [torch.special.bessel_j0, torch.special.airy_ai])
@pytest.mark.parametrize("grad", [True, False])
def test_no_derivative(function: Callable[[Tensor], Tensor], grad: bool) -> None:
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(NotImplementedError, match="has no rule, and torch has no derivative of it"),
    ):
        tf.jvp(function, (SQUARE,), tangents=(1.0,))


def test_a_derivative_of_zero() -> None:
    """Torch takes the target for a constant; the losses depend on its sign alone."""
    target = SQUARE.sign()
    for loss in (F.hinge_embedding_loss, lambda x, y: F.cosine_embedding_loss(x, x, y[0])):
        _, dy = tf.jvp(loss, (SQUARE, target), tangents=(None, 1.0))
        assert dy == 0


def test_a_derivative_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="it is not finite"):
        tf.jvp(lambda x: F.lp_pool1d(x, 1.5, 2), (-SQUARE.abs(),), tangents=(1.0,))


def test_a_wrong_forward_derivative_is_never_believed() -> None:
    """A function whose JVP is planted to be wrong by a thousandth of its size, and one of zero."""

    class Planted(torch.autograd.Function):
        factor = 1.0
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0].cos()

        @staticmethod
        def jvp(ctx: Any, dx: Tensor) -> Tensor:
            return Planted.factor * dx * ctx.saved_tensors[0].cos()

    x, v = SQUARE, torch.randn(3, 3, dtype=torch.float64)
    for factor in (0.0, 0.999, 1.0):
        Planted.factor = factor

        @torch.overrides.wrap_torch_function(lambda x: (x,))
        def planted(x: Tensor) -> Tensor:
            return Planted.apply(x)

        _, dy = tf.jvp(planted, (x,), tangents=(v,))
        torch.testing.assert_close(dy, v * x.cos(), rtol=1e-12, atol=0)


def test_a_wrong_backward_and_a_wrong_jvp_are_refused() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 3

        @staticmethod
        def jvp(ctx: Any, dx: Tensor) -> Tensor:
            return dx * 2

    wrong = torch.overrides.wrap_torch_function(lambda x: (x,))(lambda x: Wrong.apply(x))
    with pytest.raises(NotImplementedError, match="not the limit of differences"):
        tf.jvp(wrong, (SQUARE,), tangents=(1.0,))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_MOST", 3)
    for i in range(10):
        tf.jvp(lambda x, i=i: torch.renorm(x, 2, 0, 1.0 + i), (SQUARE,), tangents=(1.0,))
    assert len(fallback._known) <= 3


def test_random_functions_draw_once_and_as_torch_does() -> None:
    """Checks and further tangents must not move the caller's random numbers, nor a generator's."""

    @torch.overrides.wrap_torch_function(lambda x, generator: (x,))
    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        return x.sin() * torch.rand(3, 3, generator=generator) + torch.rand(3, 3)

    def run(f: Callable[[Tensor, torch.Generator], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        y = f(SQUARE, generator)
        return y, torch.rand(1, generator=generator), torch.rand(1)

    plain = run(noisy)
    dual = run(lambda x, g: tf.jvp(noisy, (x, g), tangents=(1.0, None))[0])
    for a, b in zip(plain, dual, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_error_of_the_call_itself_is_torchs_own() -> None:
    with pytest.raises(RuntimeError, match="same number of columns"):
        tf.jvp(lambda x: torch.cdist(x, torch.zeros(2, 5).double()), (SQUARE,), tangents=(1.0,))
