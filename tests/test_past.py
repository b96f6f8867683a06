"""Code that takes a tensor past torch's Python functions: it works, or it raises; in every mode."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules._functions import BackwardHookFunction

import tangentfast as tf
from tangentfast.dual import Dual
from tangentfast.trees import tensors

X, V = torch.randn(5, 4), torch.ones(5, 4)


class OverNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class WithJvp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return dx * 2


def cubic(x: Tensor) -> Tensor:
    return (torch.sin(x) * x * x).sum()


def written_in_place(x: Tensor) -> Tensor:
    """The handle is an object that was a plain tensor before."""
    y = torch.zeros(5, 4)
    y.copy_(x)
    return torch.vmap(torch.sin)(y)


def inner_gradient(x: Tensor) -> Tensor:
    x = x.requires_grad_()
    return torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)[0]


traced = torch.jit.trace(lambda x: torch.tanh(x) * 2, X)
PAST: dict[str, Callable[[Tensor], Any]] = {
    "func.grad": torch.func.grad(cubic),
    "func.vjp": lambda x: torch.func.vjp(torch.tanh, x)[1](V)[0],
    "func.jvp": lambda x: torch.func.jvp(torch.tanh, (x,), (V,))[1],
    "func.jacrev": torch.func.jacrev(torch.tanh),
    "func.jacfwd": torch.func.jacfwd(torch.tanh),
    "func.hessian": torch.func.hessian(cubic),
    "vmap": torch.vmap(torch.sin),
    "vmap of a written tensor": written_in_place,
    "vmap over a constant, x from outside": lambda x: torch.vmap(lambda row: row * x)(V),
    "traced function": lambda x: traced(x),
    "legacy constructor": lambda x: torch.FloatTensor(x) * 2,
    "as_subclass": lambda x: x.as_subclass(Tensor) * 2,
    "Parameter": lambda x: nn.Parameter(x) * 2,
    "Function over numpy": OverNumpy.apply,
    "Function over numpy, then more": lambda x: torch.tanh(OverNumpy.apply(x)) * x,
    "Function with a jvp": WithJvp.apply,
    "autograd.grad": inner_gradient,
    "autograd.functional": lambda x: torch.autograd.functional.vjp(
        torch.tanh, x.requires_grad_(), V, create_graph=True
    )[1],
    "dlpack": lambda x: torch.from_dlpack(x) * 2,
    "numpy": lambda x: torch.from_numpy(x.numpy()) * 2,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", PAST)
def test_jvp(name: str, grad: bool) -> None:
    x = X.clone()
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, TypeError, BufferError)):
        tf.jvp(PAST[name], (x,), tangents=(V,))
    # and no pass is left running
    assert torch.equal(tf.jvp(torch.neg, (x,), tangents=(V,))[1], -V)


class Inside(nn.Module):
    """x -> body(a(x)): the tangent comes from a parameter."""

    def __init__(self, body: Callable[[Tensor], Tensor]):
        super().__init__()
        self.a, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.a(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [n for n in PAST if n != "vmap over a constant, x from outside"])
def test_linearized(name: str, grad: bool) -> None:
    net = Inside(PAST[name])
    lin = tf.linearize(net)
    with torch.set_grad_enabled(grad):
        with pytest.raises((RuntimeError, TypeError, BufferError)):
            lin(X)
        with pytest.raises((RuntimeError, TypeError, BufferError)):
            tf.jvp(net, (X,), params={"a.weight": torch.ones(4, 4)})


@pytest.mark.parametrize("grad", [True, False])
def test_a_vmap_over_parameters(grad: bool) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: torch.tanh(self.a(row)))(x)

    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"torch\.func transform"):
        tf.linearize(Rows())(X)


def test_errors_name_operation_place_and_remedy() -> None:
    net = nn.Sequential(nn.Tanh(), Inside(torch.func.grad(cubic)))
    with pytest.raises(RuntimeError, match=r"aten\.sin.*module '1'.*torch\.func\.jvp"):
        tf.jvp(net, (X,), tangents=(V,))
    with pytest.raises(RuntimeError, match=r"grad in .* a backward inside the forward"):
        tf.jvp(inner_gradient, (X.clone(),), tangents=(V,))


@pytest.mark.parametrize("grad", [True, False])
def test_transforms_over_a_linearized_model_are_refused(grad: bool) -> None:
    """Derivatives by its inputs would leave out that of J; τ is trained by an ordinary backward."""
    net = nn.Linear(4, 2)
    lin = tf.linearize(net)
    taus = dict(lin.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(lin, p, (x,)).sum()

    tries = [
        lambda: torch.func.jvp(lin, (X,), (V,)),
        lambda: torch.func.grad(lambda x: lin(x).sum())(X),
        lambda: torch.vmap(lin)(X),
        lambda: torch.vmap(torch.func.grad(loss), (None, 0))(taus, X),
        lambda: torch.vmap(lambda x: tf.jvp(net, (x,), tangents=(1.0,))[1])(X),
    ]
    with torch.set_grad_enabled(grad):
        for attempt in tries:
            with pytest.raises(RuntimeError, match=r"torch\.func transform"):
                attempt()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode level"):
            lin(forward_ad.make_dual(X, V))


def test_what_the_backward_hooks_of_a_module_see() -> None:
    net = Inside(torch.tanh).double()
    seen: list[Any] = []
    net.a.register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    x = X.double()
    tf.linearize(net)(x).sum().backward()
    assert torch.allclose(seen[0], 1 - torch.tanh(net.a(x)) ** 2)
    assert BackwardHookFunction.apply.carries_duals
    (y,) = BackwardHookFunction.apply(x.clone().requires_grad_())  # plain tensors as ever
    assert y.grad_fn.name() == "BackwardHookFunctionBackward"


# --- structures


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Tensor
    n: int
    more: dict[str, Any]


class Slots:
    __slots__ = ("y",)

    def __init__(self, y: Tensor):
        self.y = y


class Words(dict[str, Any]):
    """A subclass that pytree does not know."""


class Several(list[Any]):
    pass


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda y: Frozen(y, 3, {"z": [y * 2]}),
    "slots": Slots,
    "namespace": lambda y: types.SimpleNamespace(y=y, inner=Slots(y * 2)),
    "distribution": lambda y: torch.distributions.Normal(y, torch.ones_like(y)),
    "dict subclass": lambda y: Words(y=y, z=[y]),
    "list subclass": lambda y: Several([y, (y * 2,)]),
    "named tuple": lambda y: torch.max(y, 0),
    "cycle": lambda y: (lambda s: (setattr(s, "self", s), s)[1])(types.SimpleNamespace(y=y)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_of_any_structure(name: str) -> None:
    net = Inside(STRUCTURES[name])
    lin = tf.linearize(net)
    for tau in lin.parameters():
        nn.init.ones_(tau)
    taus = {n: t.detach() for n, t in lin.tau.items()}
    out = lin(X)
    y, dy = tf.jvp(net, (X,), params=taus)
    assert type(out) is type(y) is type(dy)
    found = [[t for t in tensors(tree) if t.is_floating_point()] for tree in (out, y, dy)]
    assert len(found[0]) >= 1
    for a, b, c in zip(*found, strict=True):
        assert type(a) is Tensor
        assert type(b) is type(c) is Tensor
        torch.testing.assert_close(a, b + c)
        if name != "distribution":
            assert a.grad_fn is not None
    assert not any(isinstance(t, Dual) for tree in (out, y, dy) for t in tensors(tree))


def test_inputs_of_any_structure() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, batch: Any) -> Tensor:
            return self.a(batch.y)

    lin = tf.linearize(Takes())
    assert lin(Slots(X)).shape == (5, 4)
    with pytest.raises(RuntimeError, match="an input requires grad"):
        lin(Slots(X.clone().requires_grad_()))
    with torch.no_grad():
        lin(Slots(X.clone().requires_grad_()))


def test_what_an_opaque_output_keeps_is_refused_later() -> None:
    out = tf.linearize(Inside(lambda y: lambda: y))(X)
    with pytest.raises(RuntimeError, match="after its forward had finished"):
        out() + 1
