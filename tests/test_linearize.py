"""LinearizedModel as an ordinary module: optimizers, accumulation, autocast, checkpointing, state
dicts.
"""

from __future__ import annotations

import copy
import io
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tangentfast as tf


class Output(NamedTuple):
    logits: Tensor
    index: Tensor
    name: str


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.0)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)
        self.recompute = recompute

    def block(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        return h + self.drop(self.attention(n, n, n)[0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = checkpoint(self.block, h, use_reentrant=False) if self.recompute else self.block(h)
        return self.last(h.mean(1))


@pytest.fixture
def net() -> Net:
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def at_random(lin: tf.LinearizedModel) -> tf.LinearizedModel:
    for tau in lin.parameters():
        nn.init.normal_(tau, std=0.1)
    return lin


def test_starts_at_the_model_itself(net: Net, x: Tensor) -> None:
    net.eval()
    lin = tf.linearize(net)
    # kernels of our own round in another order than torch's
    torch.testing.assert_close(lin(x), net(x), rtol=1e-13, atol=1e-14)
    assert not lin.training
    assert tf.linearize(net.train()).training


def test_original_stays_usable_and_shares_memory(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval()))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    out = net(x)
    out.sum().backward()
    assert all(p.grad is not None and torch.equal(p, before[n]) for n, p in net.named_parameters())
    lin(x).sum().backward()
    assert type(net.first) is nn.Linear
    theta0 = lin.theta0
    assert all(theta0[n].data_ptr() == p.data_ptr() for n, p in net.named_parameters())
    assert all(theta0[n].grad is None for n in before)


def test_tau_parameters_and_names(net: Net) -> None:
    lin = tf.linearize(net, ["first.*", "norm.bias"])
    assert list(lin.tau) == ["first.weight", "first.bias", "norm.bias"]
    assert [id(p) for p in lin.parameters()] == [id(t) for t in lin.tau.values()]
    assert {n for n, _ in lin.named_parameters()} == {f"model.{n}_tau" for n in lin.tau}
    assert all(t.requires_grad and t.is_leaf for t in lin.parameters())


def test_training_in_tangent_space_is_training_of_a_linear_model(net: Net, x: Tensor) -> None:
    """SGD on τ and SGD on the same problem written with explicit Jacobians take the same path."""
    lin = tf.linearize(net.eval(), ["last.*", "attention.out_proj.weight"])
    names = list(lin.tau)
    base = {n: p.detach() for n, p in net.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(net, {**base, **p}, (x,)))(
        {n: base[n] for n in names}
    )
    f0, target = net(x).detach(), torch.randn(4, 3, dtype=torch.float64)
    tau = {n: torch.zeros_like(base[n]) for n in names}
    optimizer = torch.optim.SGD(lin.parameters(), lr=0.05, momentum=0.9)
    momentum = {n: torch.zeros_like(base[n]) for n in names}
    for _ in range(5):
        optimizer.zero_grad()
        ((lin(x) - target) ** 2).sum().backward()
        torch.nn.utils.clip_grad_norm_(lin.parameters(), 1e6)
        optimizer.step()
        out = f0 + sum((jacobians[n] * tau[n]).flatten(2).sum(-1) for n in names)
        for n in names:
            grad = torch.tensordot(2 * (out - target), jacobians[n], 2)
            momentum[n] = 0.9 * momentum[n] + grad
            tau[n] = tau[n] - 0.05 * momentum[n]
    for n in names:
        torch.testing.assert_close(lin.tau[n].detach(), tau[n], rtol=1e-10, atol=1e-12)


def test_linear_in_tau(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval()))
    with torch.no_grad():
        f0 = net(x)
        once = lin(x) - f0
        for tau in lin.parameters():
            tau.mul_(-3)
        torch.testing.assert_close(lin(x) - f0, -3 * once, rtol=1e-11, atol=1e-12)


def test_gradient_accumulation(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval()))
    lin(x).sum().backward()
    whole = {n: t.grad.clone() for n, t in lin.tau.items() if t.grad is not None}
    lin.zero_grad()
    for part in x.split(1):
        lin(part).sum().backward()
    for n, grad in whole.items():
        torch.testing.assert_close(lin.tau[n].grad, grad, rtol=1e-11, atol=1e-12)


def test_checkpointing_inside_the_model(x: Tensor) -> None:
    """With dropout: the block is run again in backward, on primals alone, with the same mask."""
    results = []
    for recompute in (False, True):
        lin = at_random(tf.linearize(Net(recompute).double().train()))
        torch.manual_seed(3)
        out = lin(x)
        out.square().sum().backward()
        results.append((out.detach(), [t.grad for t in lin.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def test_dropout_is_the_same_function_for_primal_and_tangent(x: Tensor) -> None:
    net = Net().double().train()
    lin = tf.linearize(net)
    torch.manual_seed(5)
    f0 = net(x)
    torch.manual_seed(5)
    torch.testing.assert_close(lin(x), f0, rtol=1e-13, atol=1e-14)  # seeds mean the same
    at_random(lin)
    base = {n: p.detach() for n, p in net.named_parameters()}

    def at(scale: float) -> Tensor:
        torch.manual_seed(5)
        shifted = {n: base[n] + scale * lin.tau[n].detach() for n in base}
        return torch.func.functional_call(net, shifted, (x,))

    numeric = (at(1e-6) - at(-1e-6)) / 2e-6  # off by eps / 1e-6 = 2e-10 of sums of 100 terms
    torch.manual_seed(5)
    torch.testing.assert_close(lin(x) - f0, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, x: Tensor) -> None:
    net = Net().eval()
    x = x.float()
    lin = at_random(tf.linearize(net))
    exact = lin(x)
    (grad,) = torch.autograd.grad(exact.sum(), [lin.tau["attention.in_proj_weight"]])
    with torch.autocast("cpu", dtype):
        out = lin(x)
        assert out.dtype == net(x).dtype
    out.float().sum().backward()
    # Six products in a row round two operands and a result each; backward does it once more.
    eps = 6 * 3 * torch.finfo(dtype).eps / 2
    assert (out.float() - exact).norm() < eps * exact.norm()
    cast = lin.tau["attention.in_proj_weight"].grad
    assert cast is not None
    assert cast.dtype == torch.float32
    assert (cast - grad).norm() < 2 * eps * grad.norm()


class Casts(TorchDispatchMode):
    """Shapes of what is cast to bfloat16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("params", ["all", "attention"])
def test_autocast_casts_the_base_once(params: str, x: Tensor) -> None:
    """Every step casts τ, which has changed; the first one θ0, too; a changed θ0 is cast anew."""
    lin, x = tf.linearize(Net().eval(), params), x.float()
    weights = [m for m in lin.theta0.values() if m.dim() == 2]
    counts = []
    for step in range(4):
        if step == 3:
            lin.load_state_dict({k: 1.5 * v for k, v in lin.state_dict().items()})
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            out = lin(x)
        out.float().sum().backward()
        counts.append([casts.shapes.count(tuple(w.shape)) for w in weights])
    assert counts[1] == counts[2]
    assert counts[0] == counts[3]
    saved = [a - b for a, b in zip(counts[0], counts[1], strict=True)]
    # What comes before the first trained layer is an ordinary network, and torch's own business.
    first = params == "all"
    assert saved == [first, 1, 1, 1]
    fresh = tf.linearize(Net().eval(), params)
    fresh.load_state_dict(lin.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, fresh(x))


@pytest.mark.parametrize("name", ["matmul", "mm", "mv", "dot", "outer", "inner", "kron"])
def test_autocast_leaves_alone_what_torch_does(name: str) -> None:
    """Types and values of every product are those of the network itself."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = name in ("dot", "outer")
            self.weight = nn.Parameter(torch.randn(5) if flat else torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(torch, name)(self.weight, x)

    net = Product()
    x = torch.randn(5) if name in ("mv", "dot", "outer") else torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = tf.linearize(net)(x), net(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_primal_dtype(x: Tensor) -> None:
    """θ0 in bfloat16 beside a float32 τ: the linearized bfloat16 network, gradients in float32."""
    net, x = Net().eval(), x.bfloat16()
    lin = at_random(tf.linearize(net, primal_dtype=torch.bfloat16))
    narrow = copy.deepcopy(net).bfloat16()
    plain = tf.linearize(narrow, at=lin.task_vector())
    assert {tau.dtype for tau in lin.parameters()} == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    out, expected = lin(x), plain(x)
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    for name, tau in lin.tau.items():
        assert tau.grad is not None
        assert tau.grad.dtype == torch.float32
        assert torch.equal(tau.grad.bfloat16(), plain.tau[name].grad)  # type: ignore[arg-type]
    assert lin.task_vector().base == tf.linearize(net).task_vector().base
    assert next(iter(lin.materialize().parameters())).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"primal_dtype is torch.int8, expected a floating one"):
        tf.linearize(net, primal_dtype=torch.int8)


def test_outputs_of_any_structure(x: Tensor) -> None:
    class Structured(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
            y = super().forward(x) * scale
            return {"a": Output(y, y.argmax(-1), "name"), "b": [y.sum(), x, None, 3]}

    lin = at_random(tf.linearize(Structured().double().eval()))
    plain = at_random(tf.linearize(Net().double().eval()))
    with torch.no_grad():
        for tau, other in zip(plain.parameters(), lin.parameters(), strict=True):
            tau.copy_(other)
    out = lin(x, scale=2.0)
    torch.testing.assert_close(out["a"].logits, 2 * plain(x))
    torch.testing.assert_close(out["b"][0], 2 * plain(x).sum())
    assert out["a"].index.dtype == torch.int64
    assert out["a"].name == "name"
    assert out["b"][2:] == [None, 3]
    assert type(out["a"].logits) is Tensor


def test_output_that_does_not_depend_on_tau(net: Net, x: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x * 2

    _, unrelated = tf.linearize(Twice().double())(x)
    assert torch.equal(unrelated, x * 2)
    assert not unrelated.requires_grad


def test_tied_parameters(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 5)
            self.b = nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net = Tied().double()
    lin = at_random(tf.linearize(net))
    assert list(lin.tau) == ["a.weight", "a.bias", "b.bias"]
    out = lin(x)
    base = {n: p.detach() for n, p in net.named_parameters()}
    tau = {n: t.detach() for n, t in lin.tau.items()}
    y, dy = torch.func.jvp(lambda p: torch.func.functional_call(net, p, (x,)), (base,), (tau,))
    torch.testing.assert_close(out, y + dy, rtol=1e-12, atol=1e-13)
    model = lin.materialize()
    assert model.b.weight is model.a.weight
    torch.testing.assert_close(model.a.weight, net.a.weight + lin.tau["a.weight"])


def test_materialize(net: Net, x: Tensor) -> None:
    net.norm.weight.requires_grad_(False)
    lin = at_random(tf.linearize(net.eval(), "attention"))
    model = lin.materialize()
    assert type(model) is Net
    assert type(model.attention) is nn.MultiheadAttention
    assert list(model.state_dict()) == list(net.state_dict())
    wanted = {n: p + lin.tau[n] if n in lin.tau else p for n, p in net.named_parameters()}
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, wanted[n])
        assert p.requires_grad == (n != "norm.weight")
        assert p.data_ptr() != dict(net.named_parameters())[n].data_ptr()
    torch.testing.assert_close(model(x), torch.func.functional_call(net, wanted, (x,)))
    lin(x)  # the linearized model is as it was


def test_task_vector_and_start_at_it(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval(), "attention", name="tiny"))
    vector = lin.task_vector()
    assert vector.base is not None
    assert vector.base.name == "tiny"
    assert vector.selection == "attention"
    torch.testing.assert_close(tf.linearize(net, "attention", at=vector)(x), lin(x), rtol=0, atol=0)
    torch.testing.assert_close(tf.linearize(net, at=vector)(x), lin(x), rtol=1e-12, atol=1e-13)
    vector["attention.out_proj.weight"].zero_()  # a copy
    assert lin.tau["attention.out_proj.weight"].abs().sum() > 0


def test_state_dict_round_trip(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval()))
    saved = copy.deepcopy(lin.state_dict())
    out = lin(x)
    other = tf.linearize(Net().double().eval())
    other.load_state_dict(saved)
    torch.testing.assert_close(other(x), out, rtol=0, atol=0)


def test_pickle_and_deepcopy(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval()))
    copied = copy.deepcopy(lin)
    torch.testing.assert_close(copied(x), lin(x), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(lin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), lin(x), rtol=0, atol=0)
    loaded(x).sum().backward()
    assert all(t.grad is not None for t in loaded.parameters())
    torch.save(net.state_dict(), io.BytesIO())  # a pass leaves nothing on the caller's tensors
    torch.save(lin(x).detach(), io.BytesIO())


def test_to_moves_both_and_leaves_the_original(net: Net, x: Tensor) -> None:
    lin = at_random(tf.linearize(net.eval())).to(torch.float32)
    assert all(p.dtype == torch.float32 for p in (*lin.theta0.values(), *lin.parameters()))
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert lin(x.float()).dtype == torch.float32


def test_train_and_eval(net: Net, x: Tensor) -> None:
    lin = tf.linearize(net)
    assert lin.eval().model.drop.training is False
    assert net.drop.training  # modes are not shared
    assert lin.train().model.drop.training


def test_report(net: Net, x: Tensor) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(super().forward(x), 1)

    lin = tf.linearize(Odd().double())
    assert "fallback: none" in lin.report()
    lin(x)
    assert "logcumsumexp in the model itself, 1 ×" in lin.report()
    total = sum(p.numel() for p in net.parameters())
    assert (
        f"trained: {total:,} of {total:,} parameters in {len(lin.tau)} tensors (all)"
        in lin.report()
    )


# --- what cannot be exact raises ---


def test_base_changed_in_place(net: Net, x: Tensor) -> None:
    lin = tf.linearize(net)
    with torch.no_grad():
        net.norm.weight.add_(1)
    with pytest.raises(
        RuntimeError, match=r"θ0 of 'norm.weight' was changed in place after linearize"
    ):
        lin(x)


def test_base_changed_by_merge(net: Net, x: Tensor) -> None:
    lin = tf.linearize(net)
    tf.merge_(net, {"last.bias": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match=r"θ0 of 'last.bias'"):
        lin(x)


def test_gradient_to_the_input(net: Net, x: Tensor) -> None:
    lin = tf.linearize(net)
    with pytest.raises(RuntimeError, match=r"an input requires grad.*detach"):
        lin(x.requires_grad_())
    with torch.no_grad():
        assert not lin(x).requires_grad


def test_double_backward(net: Net, x: Tensor) -> None:
    lin = tf.linearize(net)
    with pytest.raises(RuntimeError, match=r"double backward \(create_graph=True\)"):
        torch.autograd.grad(
            lin(x).sum(), list(lin.parameters()), create_graph=True, allow_unused=True
        )


def test_batch_norm_in_training_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    lin = tf.linearize(net)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(
        RuntimeError, match=r"batch_norm in module '1' \(.*\): train-mode.*eval mode"
    ):
        lin(x)
    lin.eval()(x).sum().backward()


def test_recurrent_layers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"LSTM '0' reads trained parameters through '_flat_weights'"
    ):
        tf.linearize(nn.Sequential(nn.LSTM(3, 3)))
    assert tf.linearize(nn.ModuleList([nn.LSTM(3, 3), nn.Linear(2, 2)]), "1.*").tau


def test_tensor_computed_from_parameters_outside_forward() -> None:
    """It is a constant where it is used, and an error where it hides the only use of θ0."""

    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.squared + (0 if self.hides else super().forward(x))

    net = Squared(3, 3)
    net.squared, net.hides = net.weight * 2, False
    lin, x = at_random(tf.linearize(net)), torch.randn(2, 3)
    torch.testing.assert_close(lin(x) - net(x), F.linear(x, lin.tau["weight"], lin.tau["bias"]))
    net.hides = True
    with pytest.raises(RuntimeError, match=r"'weight' was not read.* in 'squared'"):
        tf.linearize(net)(x)


def test_parametrized_modules() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()).double()
    lin = at_random(tf.linearize(net))
    x = torch.randn(2, 4, dtype=torch.float64)
    base = {n: p.detach() for n, p in net.named_parameters()}

    def at(h: float) -> Tensor:  # torch's weight norm has no forward derivative
        shifted = {n: base[n] + h * lin.tau[n].detach() for n in base}
        return torch.func.functional_call(net, shifted, (x,))

    numeric = (at(1e-5) - at(-1e-5)) / 2e-5  # off by 1e-10 f''' and by eps / 1e-5
    torch.testing.assert_close(lin(x) - net(x), numeric, rtol=1e-8, atol=1e-9)


def test_arguments_of_linearize(net: Net) -> None:
    with pytest.raises(ValueError, match=r"at\['first.weight'\] is not among the 2 parameters"):
        tf.linearize(net, "attention", at={"first.weight": torch.zeros(8, 5)})
    with pytest.raises(
        ValueError, match=r"at\['last.bias'\] has shape \(4,\), the parameter has \(3,\)"
    ):
        tf.linearize(net, at={"last.bias": torch.zeros(4)})
    with pytest.raises(TypeError, match="got LinearizedModel"):
        tf.linearize(tf.linearize(net))


def test_one_pass_at_a_time(net: Net) -> None:
    outer = nn.Sequential(tf.linearize(net), nn.Linear(3, 3)).double()
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    outer(x).sum().backward()  # a linearized model is a module like any other
    assert outer[0].tau["last.bias"].grad is not None
    with pytest.raises(RuntimeError, match="one pass at a time"):
        tf.jvp(outer, (x,), tangents=(1.0,))
