"""jvp: parameter tangents, input tangents, both; what it returns and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tangentfast as tf


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def directions(net: nn.Module, k: int) -> list[dict[str, Tensor]]:
    return [{n: torch.randn_like(p) for n, p in net.named_parameters()} for _ in range(k)]


def truth(
    net: nn.Module, x: Tensor, direction: dict[str, Tensor], dx: Tensor
) -> tuple[Tensor, Tensor]:
    base = {n: p.detach() for n, p in net.named_parameters()}
    return torch.func.jvp(
        lambda p, x: torch.func.functional_call(net, p, (x,)), (base, x), (direction, dx)
    )


@pytest.mark.parametrize("grad", [True, False])
def test_parameter_tangents(net: nn.Module, x: Tensor, grad: bool) -> None:
    several = directions(net, 3)
    with torch.set_grad_enabled(grad):
        out, tangents = tf.jvp(net, (x,), params=several)
        single = tf.jvp(net, (x,), params=tf.TaskVector(several[0]))[1]
    assert out.requires_grad == grad
    assert isinstance(tangents, list)
    torch.testing.assert_close(single, tangents[0], rtol=0, atol=0)
    for direction, tangent in zip(several, tangents, strict=True):
        y, dy = truth(net, x, direction, torch.zeros_like(x))
        torch.testing.assert_close(out, y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(tangent, dy, rtol=1e-12, atol=1e-13)
        assert not tangent.requires_grad


def test_a_mixture_costs_no_further_pass(net: nn.Module, x: Tensor) -> None:
    several = directions(net, 2)
    out, (a, b) = tf.jvp(net, (x,), params=several)
    lin = tf.linearize(net, at=0.3 * tf.TaskVector(several[0]) - 2 * tf.TaskVector(several[1]))
    torch.testing.assert_close(lin(x), out + 0.3 * a - 2 * b, rtol=1e-11, atol=1e-12)


def test_input_tangents_keep_the_graph_of_the_primal(net: nn.Module, x: Tensor) -> None:
    dx = torch.randn_like(x)
    x.requires_grad_()
    out, dout = tf.jvp(net, (x,), tangents=(dx,))
    still = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    _, dy = truth(net, x.detach(), still, dx)
    torch.testing.assert_close(dout, dy, rtol=1e-12, atol=1e-13)
    assert not dout.requires_grad
    out.square().sum().backward()
    wanted = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    for got, want in zip([x, *net.parameters()], wanted, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-12, atol=1e-13)


def test_mean_flow_identity() -> None:
    """u(z, t) with dz/dt = v: d/dt u(z(t), t), as mean-flow training takes it."""
    torch.manual_seed(0)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)).double()

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return self.net(torch.cat([z, t], -1))

    flow = Flow()
    z, v, t = torch.randn(7, 2).double(), torch.randn(7, 2).double(), torch.rand(7, 1).double()
    u, du = tf.jvp(flow, (z, t), tangents=(v, 1.0))
    h = 1e-5  # off by h² f''' and by eps / h: 1e-10 of sums of 16 terms
    numeric = (flow(z + h * v, t + h) - flow(z - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(du, numeric, rtol=1e-7, atol=1e-8)
    assert u.requires_grad


def test_both_kinds_add_up(net: nn.Module, x: Tensor) -> None:
    (direction,), dx = directions(net, 1), torch.randn_like(x)
    _, both = tf.jvp(net, (x,), params=direction, tangents=(dx,))
    torch.testing.assert_close(both, truth(net, x, direction, dx)[1], rtol=1e-12, atol=1e-13)


def test_functions_structures_and_constants() -> None:
    x = torch.randn(3).double()

    def f(x: Tensor, n: int, *, flag: bool = False) -> dict[str, object]:
        return {"y": x * n, "i": x.argmax(), "c": torch.ones(2), "s": "text", "flag": flag}

    out, dout = tf.jvp(f, (x, 2), tangents=(torch.ones_like(x), None), kwargs={"flag": True})
    assert torch.equal(out["y"], 2 * x)
    assert torch.equal(dout["y"], torch.full_like(x, 2))
    assert torch.equal(dout["c"], torch.zeros(2))  # depends on nothing that has a tangent
    assert out["flag"] is dout["flag"] is True
    assert type(out["y"]) is Tensor


def test_linearized_model_stands_for_its_network_at_the_base(net: nn.Module, x: Tensor) -> None:
    (direction,) = directions(net, 1)
    lin = tf.linearize(net, "0.*")
    for tau in lin.parameters():
        nn.init.normal_(tau)
    out, dout = tf.jvp(lin, (x,), params=direction)
    y, dy = truth(net, x, direction, torch.zeros_like(x))
    torch.testing.assert_close(out, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dout, dy, rtol=1e-12, atol=1e-13)


def test_nothing_is_left_on_the_callers_tensors(net: nn.Module, x: Tensor) -> None:
    tf.jvp(net, (x,), params=directions(net, 1), tangents=(1.0,))
    for t in [x, *net.parameters()]:
        assert type(t) in (Tensor, nn.Parameter)
        assert vars(t) == {}


def test_errors(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(TypeError, match="expected params or tangents"):
        tf.jvp(net, (x,))
    with pytest.raises(TypeError, match="inputs as a tuple, got Tensor"):
        tf.jvp(net, x, tangents=(1.0,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params needs a module, got function"):
        tf.jvp(lambda x: x, (x,), params={"w": x})
    with pytest.raises(ValueError, match=r"params\[0\]\['1.weight'\] is no parameter"):
        tf.jvp(net, (x,), params={"1.weight": x})
    with pytest.raises(
        ValueError, match=r"params\[1\]\['0.bias'\] has shape \(2,\), the parameter has \(6,\)"
    ):
        tf.jvp(net, (x,), params=[{}, {"0.bias": torch.zeros(2)}])
    with pytest.raises(ValueError, match="empty sequence"):
        tf.jvp(net, (x,), params=[])
    with pytest.raises(ValueError, match="2 tangents for 1 inputs"):
        tf.jvp(net, (x,), tangents=(x, x))
    with pytest.raises(
        ValueError, match=r"tangents\[0\] has shape \(4,\), inputs\[0\] has \(5, 4\)"
    ):
        tf.jvp(net, (x,), tangents=(x[0],))
    with pytest.raises(ValueError, match=r"inputs\[0\] is torch.int64; only a floating tensor"):
        tf.jvp(net, (torch.arange(3),), tangents=(1.0,))
    with pytest.raises(ValueError, match="one direction in params"):
        tf.jvp(net, (x,), params=directions(net, 2), tangents=(1.0,))


def test_a_tangent_that_no_rule_has_a_term_for_is_refused() -> None:
    """torch has no derivative by a running mean; a rule that passes over it would say 0."""
    x, mean = torch.randn(4, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*running_mean"):
        tf.jvp(lambda m: F.batch_norm(x, m, torch.ones(3)), (mean,), tangents=(1.0,))
