"""The dual engine where it could go wrong without a word: writes in place, views, cuts, lost
tangents.

Each network either agrees with the float64 truth, in the output and in every gradient, in training
and in evaluation, or raises an error that says what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tangentfast as tf

N = 6


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(N, N))
        self.b = nn.Parameter(torch.randn(N))
        self.layer = nn.Linear(N, N)
        self.body = body
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def linearized(body: Callable[[Any, Tensor], Tensor]) -> tuple[Net, tf.LinearizedModel, Tensor]:
    net = Net(body)
    lin = tf.linearize(net)
    for tau in lin.parameters():
        nn.init.normal_(tau)
    return net, lin, torch.randn(4, N, dtype=torch.float64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


EXACT: dict[str, Callable[[Any, Tensor], Tensor]] = {}
REFUSED: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {}


def exact(body: Callable[[Any, Tensor], Tensor]) -> None:
    EXACT[body.__name__] = body


def refused(message: str) -> Callable[[Callable[[Any, Tensor], Tensor]], None]:
    def add(body: Callable[[Any, Tensor], Tensor]) -> None:
        REFUSED[body.__name__] = (message, body)

    return add


@exact
def element_writes(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y[:, 0] += s.b[0]
    y[:, 1] *= 2
    y[1] = s.b
    return y @ s.w


@exact
def write_to_view_read_base(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y[:2].mul_(3)
    y.t()[0].add_(s.b[:4])
    return y + s.b


@exact
def write_to_base_read_view(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    v = y[:2]
    y.mul_(s.b)
    return v.sum() + y.sum(0) @ s.w


@exact
def overlapping_views(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    a, b = y[:3], y[1:]
    a.add_(s.b)
    return b @ s.w


@exact
def constants_into_a_view(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y[0].zero_()
    y[1].fill_(2.0)
    y[2].copy_(x[0])
    y[y > 0.5] = 0
    return y @ s.w


@exact
def duals_into_a_plain_buffer(s: Any, x: Tensor) -> Tensor:
    out = zeros(4, N)
    out[:, ::2] = s.layer(x)[:, ::2]
    out[:, 1::2] = x[:, 1::2]
    return out @ s.w


@exact
def duals_into_a_view_of_a_plain_buffer(s: Any, x: Tensor) -> Tensor:
    out = zeros(4, N)
    out[1].copy_(s.b)
    out[2, :3] = s.b[:3]
    out.narrow(0, 3, 1).add_(s.layer(x)[:1])
    return out @ s.w


@exact
def inplace_activations(s: Any, x: Tensor) -> Tensor:
    y = F.relu(s.layer(x), inplace=True)
    y = F.hardswish(y @ s.w, True)
    return torch.sigmoid_(y @ s.w)


@exact
def inplace_operators(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y += s.b
    y -= 1
    y /= 3
    return y @ s.w


@exact
def scatters(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    index = torch.tensor([1, 1, 0, 2])
    a = zeros(4, N).index_add(0, index, y)
    return a.scatter(1, torch.zeros(4, N, dtype=torch.long), y) + a.index_fill(0, index[:1], s.b[0])


@exact
def detached_is_a_constant(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    return y * y.detach() + y.data


@exact
def branch_on_a_comparison(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    return y * 2 if (y > 0).any() else -y


@exact
def comparison_under_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    with torch.no_grad():
        keep = y > 0
    return y * keep


@exact
def op_without_a_rule(s: Any, x: Tensor) -> Tensor:
    return torch.logcumsumexp(s.layer(x), 1) * torch.cummax(s.layer(x), 1).values


@exact
def strided_view_without_a_rule(s: Any, x: Tensor) -> Tensor:
    return s.layer(x).t().as_strided((3, 2), (1, 6))


@exact
def one_parameter_twice(s: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, s.w), s.w.t()) + s.b * s.b


@exact
def iteration_and_unpacking(s: Any, x: Tensor) -> Tensor:
    a, b = s.layer(x).chunk(2, -1)
    return torch.cat([b, -a], -1) * s.b + sum(row * row for row in s.layer(x))


@exact
def broadcast_of_a_parameter(s: Any, x: Tensor) -> Tensor:
    return x + s.b + torch.where(x > 0, s.b, 0.0)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    net, lin, x = linearized(EXACT[name])
    out = lin(x)
    with torch.no_grad():
        evaluated = lin(x)
    with torch.inference_mode():
        inferred = lin(x)
    u = torch.randn_like(out)
    (out * u).sum().backward()
    base = {n: p.detach() for n, p in net.named_parameters()}
    tau = {n: t.detach().clone().requires_grad_() for n, t in lin.tau.items()}
    y, dy = torch.func.jvp(lambda p: torch.func.functional_call(net, p, (x,)), (base,), (tau,))
    torch.testing.assert_close(out, y + dy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evaluated, out.detach(), rtol=0, atol=0)
    torch.testing.assert_close(inferred, out.detach(), rtol=0, atol=0)
    assert dy.abs().max() > 1e-3
    wanted = torch.autograd.grad(((y + dy) * u).sum(), list(tau.values()), allow_unused=True)
    for (n, t), grad in zip(lin.tau.items(), wanted, strict=True):
        if grad is None:
            assert t.grad is None or t.grad.abs().max() == 0, n
        else:
            torch.testing.assert_close(t.grad, grad, rtol=1e-11, atol=1e-12)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@refused("custom autograd.Function in module 'layer'|custom autograd.Function in the model itself")
def custom_function(s: Any, x: Tensor) -> Tensor:
    return Doubled.apply(s.layer(x))


@refused("custom autograd.Function|lost its tangent")
def custom_function_without_torch_calls(s: Any, x: Tensor) -> Tensor:
    return Reversed.apply(s.layer(x)) @ s.w


@refused("use_reentrant=False")
def reentrant_checkpoint(s: Any, x: Tensor) -> Tensor:
    return checkpoint(s.layer, s.layer(x), use_reentrant=True)


@refused("runs under no_grad.*detach")
def value_under_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    with torch.no_grad():
        z = y * 2
    return y * z


@refused("runs under no_grad")
def write_under_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    with torch.no_grad():
        y.mul_(2)
    return y


@refused("written in place through another tensor")
def write_through_detached(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y.detach().mul_(2)
    return y * 1


@refused("another plain tensor shares")
def plain_buffer_with_an_alias(s: Any, x: Tensor) -> Tensor:
    out = zeros(4, N)
    alias = out.detach()
    out.copy_(s.layer(x))
    return out + alias


@refused("assigning .data")
def assignment_of_data(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y.data = y.detach() * 2
    return y


@refused("item in the model itself: a Python number has no tangent")
def python_number(s: Any, x: Tensor) -> Tensor:
    return s.layer(x) * s.b.sum().item()


@refused("__bool__ in the model itself")
def branch_on_a_value(s: Any, x: Tensor) -> Tensor:
    return s.layer(x) if s.b.sum() else x


@refused("numpy in the model itself")
def through_numpy(s: Any, x: Tensor) -> Tensor:
    return s.layer(x) * torch.from_numpy(s.b.detach().numpy() + s.b.numpy())


@refused("bessel_j0 in the model itself has no rule, and torch has no derivative of it")
def no_derivative(s: Any, x: Tensor) -> Tensor:
    return torch.special.bessel_j0(s.layer(x))


@refused("out= cannot carry a tangent")
def out_argument(s: Any, x: Tensor) -> Tensor:
    return torch.mul(s.layer(x), 2, out=zeros(4, N))


@refused("writes to an expanded tensor; clone")
def write_to_expanded(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)[:1].expand(4, N)
    y.add_(1)
    return y


@refused("without a functional form")
def shape_changed_in_place(s: Any, x: Tensor) -> Tensor:
    return s.layer(x).t_()


@refused("modified inplace|writes to a parameter in place")
def parameter_written(s: Any, x: Tensor) -> Tensor:
    s.w.mul_(2)
    return x @ s.w


@refused("deepcopy of a tensor that carries a tangent")
def deepcopied(s: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(s.layer(x))


@refused("call it on the model's outputs")
def backward_inside(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y.sum().backward()
    return y


@refused("max_norm rewrites the weight")
def embedding_max_norm(s: Any, x: Tensor) -> Tensor:
    return F.embedding(torch.tensor([0, 1]), s.w, max_norm=1.0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, training: bool) -> None:
    message, body = REFUSED[name]
    net, lin, x = linearized(body)
    before = copy.deepcopy(net.state_dict())
    with (
        pytest.raises((RuntimeError, NotImplementedError), match=message),
        torch.set_grad_enabled(training),
    ):
        lin(x)
    if name != "parameter_written":
        for key, value in net.state_dict().items():
            assert torch.equal(value, before[key]), key
    assert torch.isfinite(
        tf.linearize(Net(lambda s, x: s.layer(x)))(x)
    ).all()  # no pass left running


def test_no_tangent_without_a_trained_parameter_before_it() -> None:
    """Frozen parameters and all before the first trained one cost nothing: operations are "
    "counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.products += func.overloadpacket in (
                torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.mm,
            )  # fmt: skip
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(*[nn.Linear(N, N) for _ in range(4)])
    x = torch.randn(3, N)

    def products(params: Any) -> int:
        lin = tf.linearize(net, params)
        with Count() as count, torch.no_grad():
            lin(x)
        return count.products

    assert products("3.*") == 4 + 1  # x Ẇ of the last layer alone
    assert products("2.weight") == 4 + 2  # x Ẇ, then ẋ W of the last layer
    assert products("0.*") == 4 + 1 + 3
    assert products("all") == 4 + 1 + 3 * 2


def test_k_tangents_share_one_primal() -> None:
    net = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 2)).double()
    x = torch.randn(3, N, dtype=torch.float64)
    calls = []
    net[1].register_forward_hook(lambda *a: calls.append(1))
    directions = [
        {n: torch.randn_like(p) for n, p in net.named_parameters() if keep in n}
        for keep in ("", "0.", "2.bias")
    ]
    out, tangents = tf.jvp(net, (x,), params=directions)
    assert len(calls) == 1
    for direction, tangent in zip(directions, tangents, strict=True):
        single = tf.jvp(net, (x,), params=direction)
        torch.testing.assert_close(single[0], out, rtol=0, atol=0)
        torch.testing.assert_close(single[1], tangent, rtol=0, atol=0)


def test_a_tensor_kept_from_an_earlier_forward() -> None:
    kept: list[Tensor] = []

    def body(s: Any, x: Tensor) -> Tensor:
        y = s.layer(x)
        if kept:
            return y + kept[0]
        kept.append(y)
        return y

    _, lin, x = linearized(body)
    lin(x)
    with pytest.raises(RuntimeError, match="earlier, finished forward"):
        lin(x)
    with pytest.raises(RuntimeError, match="after its forward had finished"):
        kept[0] + 1
    assert kept[0].shape == (4, N)  # metadata may be asked


def test_activations_do_not_keep_tangents_alive() -> None:
    """What autograd saves is the primal: after the forward no handle is left."""
    import gc

    from tangentfast.dual import Dual

    _, lin, x = linearized(lambda s, x: torch.tanh(s.layer(torch.tanh(s.layer(x)))))
    gc.collect()
    before = sum(type(o) is Dual for o in gc.get_objects())
    out = lin(x)
    gc.collect()
    assert sum(type(o) is Dual for o in gc.get_objects()) == before
    out.sum().backward()


def test_random_writes_in_place_draw_once() -> None:
    x = torch.ones(64)
    y, dy = tf.jvp(lambda x: torch.dropout_(x.clone(), 0.5, True), (x,), tangents=(x,))
    assert torch.equal(y, dy)
    assert 0 < (y == 0).sum() < 64


def test_fallback_returns_any_structure() -> None:
    @torch.overrides.wrap_torch_function(lambda x: (x,))
    def pair(x: Tensor) -> tuple[Tensor, None, dict[str, Tensor]]:
        return x * x, None, {"i": x.argmax(), "z": x + 1}

    x = torch.tensor([1.0, 3.0])
    (y, none, rest), (dy, _, drest) = tf.jvp(pair, (x,), tangents=(1.0,))
    assert torch.equal(y, x * x)
    assert torch.equal(dy, 2 * x)
    assert none is None
    assert rest["i"] == 1
    assert torch.equal(drest["z"], torch.ones(2))
