"""θ0 however a forward reads it, and what a forward leaves behind in the modules.

Each network has a plain twin that computes the same function, for which ``torch.func.jvp`` is the
truth. Afterwards the caller's model must be what it was, object by object.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tangentfast as tf
from tangentfast.dual import Dual
from tangentfast.trees import tensors


class Net(nn.Module):
    """The plain twin: b(tanh(a(x))) + ‖c‖²."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)
        self.c = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.kept: dict[str, Any] = {}
        self.listed: list[Any] = []
        self.last: Any = None
        self.register_buffer("buffer", torch.zeros(3, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + sum(c.square() for c in self.c)


READERS: dict[str, type[Net]] = {}


def reader(cls: type[Net]) -> type[Net]:
    READERS[cls.__name__] = cls
    return cls


@reader
class NamedParameters(Net):
    def forward(self, x: Tensor) -> Tensor:
        p = dict(self.named_parameters())
        h = torch.tanh(F.linear(x, p["a.weight"], p["a.bias"]))
        return F.linear(h, *self.b.parameters()) + sum(c.square() for c in self.c.parameters())


@reader
class UnderscoreParameters(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.a._parameters["weight"], self.a._parameters.get("bias")))
        weight, bias = self.b.__dict__["_parameters"].values()
        return F.linear(h, weight, bias) + sum(c.square() for _, c in self.c._parameters.items())


@reader
class StateDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        p = self.state_dict(keep_vars=True)
        h = torch.tanh(F.linear(x, p["a.weight"], p["a.bias"]))
        return F.linear(h, p["b.weight"], p["b.bias"]) + p["c.0"] ** 2 + p["c.1"] ** 2


@reader
class FunctionalCall(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.func.functional_call(self.a, dict(self.a.named_parameters()), (x,)))
        own = {"weight": self.b.weight * 1.0}
        return torch.func.functional_call(self.b, own, (h,)) + sum(c * c for c in self.c)


@reader
class Sliced(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.a.weight, nn.Parameter)
        return self.b(torch.tanh(self.a(x))) + self.c[:1][0] ** 2 + self.c[1:][0] ** 2


@reader
class Threads(Net):
    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            h = list(pool.map(lambda rows: torch.tanh(self.a(rows)), x.chunk(2)))
        return self.b(torch.cat(h)) + sum(c.square() for c in self.c)


@reader
class Caching(Net):
    """Keeps duals in a dictionary, a list, an attribute and two buffers."""

    def forward(self, x: Tensor) -> Tensor:
        if "weight" not in self.kept:
            self.kept["weight"] = self.b.weight * 1
        self.listed.append(self.a.bias)
        self.last = self.a.weight + 0
        self.buffer.copy_(self.kept["weight"])
        h = torch.tanh(F.linear(x, self.last, self.listed[-1]))
        y = F.linear(h, self.buffer.clone(), self.b.bias)
        self.buffer = self.b.weight * 2
        return y + sum(c.square() for c in self.c)


@reader
class Hooks(Net):
    """Hooks of every kind, none of which changes anything."""

    def __init__(self) -> None:
        super().__init__()
        for module in (self, self.a, self.b):
            module.register_full_backward_hook(lambda *_: None)
            module.register_full_backward_pre_hook(lambda *_: None)
            module.register_forward_hook(lambda module, args, out: out)
            module.register_forward_pre_hook(lambda module, args: args)


@reader
class MadeToRequireGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = (x * 1).requires_grad_()  # as peft's enable_input_require_grads does
        return super().forward(x + torch.zeros(4, dtype=x.dtype, requires_grad=True) * 2)


@reader
class LeafInACheckpoint(Net):
    """T5's attention masks: a leaf that requires grad, there again when the block is recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            mask = torch.zeros(4, dtype=x.dtype, requires_grad=True)
            return F.linear(x + mask, self.a.weight * (1 + mask), self.a.bias)

        h = torch.tanh(checkpoint(block, x, use_reentrant=False))
        return self.b(h) + sum(c.square() for c in self.c)


class Twice(nn.Module):
    """One module under two names, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.again = self.a
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.again(torch.tanh(self.a(x)))))


class Snapshot:
    """Every object of a model that a call must leave alone."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.seen = self.objects()
        self.values = copy.deepcopy(model.state_dict())

    def objects(self) -> list[Any]:
        found: list[Any] = []
        for module in self.model.modules():
            found += [type(module), module.training, type(module._parameters)]
            found += [(n, id(p), p.requires_grad) for n, p in module._parameters.items()]
        return found

    def check(self) -> None:
        assert self.objects() == self.seen
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.values[name]), name
        for module in self.model.modules():
            assert not any(type(x) is Dual for x in tensors(vars(module)))
            assert all(type(b) is Tensor for b in module._buffers.values())


def truth(net: nn.Module, x: Tensor, tau: dict[str, Tensor], dx: Tensor | None) -> tuple[Any, Any]:
    net = copy.deepcopy(net)  # functional_call damages a module that has two names
    base = {n: p.detach() for n, p in net.named_parameters()}

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, {**base, **p}, (x,))

    return torch.func.jvp(f, ({n: base[n] for n in tau}, x), (tau, 0 * x if dx is None else dx))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def pair(make: Callable[[], nn.Module], twin: Callable[[], nn.Module]) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    net, plain = make().double().eval(), twin().double().eval()
    plain.load_state_dict(net.state_dict())
    return net, plain, torch.randn(4, 4, dtype=torch.float64)


PAIRS = {**{name: (cls, Net) for name, cls in READERS.items()}, "Twice": (Twice, Twice)}


@pytest.mark.parametrize("name", PAIRS)
def test_linearized(name: str) -> None:
    net, plain, x = pair(*PAIRS[name])
    before = Snapshot(net)
    lin = tf.linearize(net)
    for tau in lin.parameters():
        nn.init.normal_(tau)
    taus = {n: t.detach().clone().requires_grad_() for n, t in lin.tau.items()}
    y, dy = truth(plain, x, taus, None)
    grads = torch.autograd.grad((y + dy).square().sum(), list(taus.values()))
    for _ in range(2):  # the second forward meets what the first has left
        lin.zero_grad()
        out = lin(x)
        close(out, y + dy)
        out.square().sum().backward()
        for tau, grad in zip(lin.parameters(), grads, strict=True):
            close(tau.grad, grad)
        with torch.no_grad():
            close(lin(x), (y + dy).detach())
    before.check()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_jvp(name: str, grad: bool) -> None:
    net, plain, x = pair(*PAIRS[name])
    before = Snapshot(net)
    tau = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    dx = torch.randn_like(x)
    _, along_parameters = truth(plain, x, tau, None)
    _, along_inputs = truth(plain, x, {}, dx)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            y, dy = tf.jvp(net, (x,), params=tau)
            close(dy, along_parameters)
            assert y.requires_grad is grad
            close(tf.jvp(net, (x,), params=[tau, {}])[1][0], along_parameters)
            before.check()
        close(tf.jvp(net, (x,), tangents=(dx,))[1], along_inputs)
        before.check()


def test_pruned_and_the_older_weight_norm() -> None:
    """Attributes that a hook computes from parameters before each forward."""
    net, _, x = pair(Net, Net)
    prune.random_unstructured(net.a, "weight", 0.3)
    lin = tf.linearize(net)
    for tau in lin.parameters():
        nn.init.normal_(tau)
    out, mask = lin(x), net.a.weight_mask
    plain = Net().double()
    plain.load_state_dict({
        n.removesuffix("_orig"): p * mask if n.endswith("_orig") else p
        for n, p in net.named_parameters()
    })  # fmt: skip
    tau = {n.removesuffix("_orig"): t.detach() for n, t in lin.tau.items()}
    tau["a.weight"] = tau["a.weight"] * mask
    close(out, sum(truth(plain, x, tau, None)))


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    net, _, x = pair(Caching, Net)
    net.b.register_forward_pre_hook(fail)
    net.register_forward_hook(fail)
    before = Snapshot(net)
    tau = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(KeyError, match="in the middle"):
            tf.jvp(net, (x,), params=tau)
        before.check()
        gc.collect()  # the traceback of the error holds the tensors of that pass
        with torch.set_grad_enabled(grad), pytest.raises(KeyError, match="in the middle"):
            tf.linearize(net)(x)
        before.check()


@pytest.mark.parametrize("where", ["kept", "listed", "last"])
def test_a_cache_from_an_earlier_forward_is_refused(where: str) -> None:
    """In it a parameter would have no tangent. Parameters that are merely unused are no reason."""

    class Stale(Net):
        def forward(self, x: Tensor) -> Tensor:
            known = getattr(self, where)
            if not known if where != "last" else known is None:
                new = self.a.weight * 2
                if where == "kept":
                    self.kept["w"] = new
                elif where == "listed":
                    self.listed.append(new)
                else:
                    self.last = new
            known = getattr(self, where)
            weight = {"kept": lambda: known["w"], "listed": lambda: known[0], "last": lambda: known}
            return F.linear(x, weight[where]())

    net, _, x = pair(Stale, Net)
    tau = {"a.weight": torch.randn(5, 4)}
    want = tf.jvp(net, (x,), params=tau)[1]
    assert want.norm() > 0
    with torch.no_grad():
        net(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=where):
            tf.jvp(net, (x,), params=tau)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=where):
            tf.linearize(net)(x)


def test_an_unused_parameter_is_no_reason_to_refuse() -> None:
    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    net, _, x = pair(Unused, Net)
    assert tf.jvp(net, (x,), params={"b.bias": torch.ones(3)})[1].norm() == 0
    lin = tf.linearize(net)
    lin(x).sum().backward()
    assert lin.tau["b.bias"].grad is None


def test_a_cache_with_a_graph_is_refused_wherever_it_is_used() -> None:
    """Also where its parameter is read for something else."""

    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.last is None:
                self.last = self.a.weight * 2
            return F.linear(x, self.last) + F.linear(x, self.a.weight)

    net, _, x = pair(Half, Net)
    net(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="lost its tangent"):
            tf.jvp(net, (x,), params={"a.weight": torch.ones(5, 4)})


def test_recurrent_layers_keep_their_list() -> None:
    net = nn.LSTM(4, 3).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    tau = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    _, dy = truth(net, x, tau, None)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(tf.jvp(net, (x,), params=tau)[1][0], dy[0])
    assert all(a is b for a, b in zip(net._flat_weights, net.parameters(), strict=True))


def test_submodules_keep_their_mode() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.BatchNorm1d(64)).train()
    net[1:].eval()
    lin = tf.linearize(net)
    assert [m.training for m in lin.model] == [True, False, False]
    assert lin.training
    assert (lin(torch.ones(2, 4)) != 0).all()
    assert [m.training for m in lin.materialize()] == [True, False, False]


def test_a_replaced_module_is_refused() -> None:
    lin = tf.linearize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    lin.model[1] = nn.Linear(4, 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="has no τ"):
            lin(torch.randn(2, 4))


def test_a_scripted_part_is_a_constant() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    net = nn.Sequential(nn.Linear(4, 4), script, nn.Linear(4, 2)).double()
    plain = nn.Sequential(net[0], nn.Sequential(nn.Linear(4, 4), nn.Tanh()), net[2]).double()
    plain[1].load_state_dict(script.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    lin = tf.linearize(net, ["0.*", "2.*"])
    assert len(list(lin.parameters())) == 4
    for tau in lin.parameters():
        nn.init.normal_(tau)
    want = sum(truth(plain, x, {n: t.detach() for n, t in lin.tau.items()}, None))
    for _ in range(4):  # torch compiles anew at the second and third call
        close(lin(x), want)
        with torch.no_grad():
            close(lin(x), want)
    with pytest.raises(ValueError, match=r"compiled by torch\.jit"):
        tf.linearize(net)
    with pytest.raises(ValueError, match=r"torch\.jit compiled"):
        tf.jvp(net, (x,), params={"1.0.weight": torch.zeros(4, 4)})
