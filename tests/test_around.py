"""What people put around a linearized model: parents, averages, reloads, compilers; and inside."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tangentfast as tf


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def linearized(params: Any = "all") -> tf.LinearizedModel:
    lin = tf.linearize(net(), params)
    for tau in lin.parameters():
        nn.init.normal_(tau)
    return lin


X = torch.randn(3, 4)


@pytest.mark.parametrize("params", ["all", ["0.*"]])
def test_a_parent_sees_what_is_trained_and_saves_all(params: Any) -> None:
    lin = linearized(params)
    parent = nn.Sequential(lin, nn.Linear(2, 2))
    taus = list(lin.tau.values())
    assert [id(p) for p in parent.parameters()] == [id(p) for p in (*taus, *parent[1].parameters())]
    assert all(p.requires_grad for p in parent.parameters())
    names = {f"0.model.{n}" for n in (*lin.theta0, *(f"{t}_tau" for t in lin.tau))}
    assert names | {"1.weight", "1.bias"} == set(parent.state_dict())
    out = parent(X)
    changed = {n: 2 * v if "tau" in n else v for n, v in parent.state_dict().items()}
    parent.load_state_dict(changed)
    assert not torch.allclose(parent(X), out)
    parent.double()
    assert parent(X.double()).dtype == torch.float64


@pytest.mark.parametrize("params", ["all", ["0.*"]])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_stochastic_weight_averaging(params: Any, use_buffers: bool) -> None:
    lin = linearized(params)
    averaged = AveragedModel(lin, use_buffers=use_buffers)
    moving = AveragedModel(lin, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for _ in range(3):
        for tau in lin.parameters():
            nn.init.normal_(tau)
        averaged.update_parameters(lin)
        moving.update_parameters(lin)
        seen.append({n: t.detach().clone() for n, t in lin.tau.items()})
    for name, tau in averaged.module.tau.items():
        torch.testing.assert_close(tau.detach(), sum(s[name] for s in seen) / 3)
        first, second, third = (s[name] for s in seen)
        want = (0.5 * (0.5 * first + 0.5 * second)) + 0.5 * third
        torch.testing.assert_close(moving.module.tau[name].detach(), want)
    want = sum(tf.jvp(lin, (X,), params={n: t.detach() for n, t in averaged.module.tau.items()}))
    torch.testing.assert_close(averaged(X), want)


def test_moving_averages_of_state_dicts() -> None:
    utils = pytest.importorskip("timm.utils")
    lin = linearized()
    before = {n: t.detach().clone() for n, t in lin.tau.items()}
    ema = utils.ModelEmaV3(lin, decay=0.5)
    for tau in lin.parameters():
        nn.init.ones_(tau)
    ema.update(lin)
    for name, tau in ema.module.tau.items():
        torch.testing.assert_close(tau.detach(), 0.5 * before[name] + 0.5)
    ema.module(X)  # θ0 was averaged with itself


def test_functional_calls_of_a_linearized_model() -> None:
    """With another τ, and with another θ0: an expansion at that one."""
    lin = linearized()
    taus = {f"model.{n}_tau": torch.randn_like(t).requires_grad_() for n, t in lin.tau.items()}
    out = torch.func.functional_call(lin, taus, (X,))
    directions = {n: taus[f"model.{n}_tau"].detach() for n in lin.tau}
    torch.testing.assert_close(out, sum(tf.jvp(lin, (X,), params=directions)))
    out.sum().backward()
    assert all(t.grad is not None for t in taus.values())
    assert all(t.grad is None for t in lin.parameters())
    before = lin(X)
    moved = {f"model.{n}": 1.5 * p for n, p in lin.theta0.items()}
    other = net()
    other.load_state_dict({n: 1.5 * p for n, p in lin.theta0.items()})
    want = tf.linearize(other, at=lin.tau)(X)
    torch.testing.assert_close(torch.func.functional_call(lin, moved, (X,)), want)
    torch.testing.assert_close(lin(X), before, rtol=0, atol=0)


def test_values_of_theta0_are_compared() -> None:
    model = net()
    lin = tf.linearize(model, ["0.*"])
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    lin(X)  # the same values written again
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))  # the same values in another order
    uses: list[Callable[[], Any]] = [lambda: lin(X), lin.materialize, lin.task_vector]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"θ0 of '0\.weight' was changed in place"):
            use()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))
        lin(X)  # as it was
        model[2].bias[0] += 1e-6
    with pytest.raises(RuntimeError, match=r"θ0 of '2\.bias'"):
        lin(X)  # not trained, but part of f(x; θ0)


def test_a_loaded_theta0_is_the_base_of_the_vector() -> None:
    lin, other = linearized(), tf.linearize(nn.Sequential(*(copy.deepcopy(m) for m in net())))
    with torch.no_grad():
        for theta0 in other.theta0.values():
            theta0.add_(1)
    other._remember()
    before = lin.base
    lin.load_state_dict(lin.state_dict())
    assert lin.base == before
    nn.Sequential(lin).load_state_dict(nn.Sequential(other).state_dict())
    assert lin.base != before
    assert lin.base == tf.linearize(nn.Sequential(*other.materialize())).base
    lin(X)


@pytest.mark.filterwarnings("ignore")
def test_compilers() -> None:
    """Eager, whoever compiles what; tracing is not supported, wrong numbers are not either."""
    lin = linearized()
    want = lin(X)
    torch.testing.assert_close(torch.compile(lin, backend="eager")(X), want)
    model = net()
    compiled = tf.linearize(torch.compile(model, backend="eager"), at=lin.task_vector())
    assert list(compiled.tau) == list(lin.tau)
    torch.testing.assert_close(compiled(X), want)
    inner = net()
    inner[0] = torch.compile(inner[0], backend="eager")
    taus = {n: t.detach() for n, t in lin.tau.items()}
    inside = tf.linearize(inner)
    with torch.no_grad():
        for tau, value in zip(inside.parameters(), taus.values(), strict=True):
            tau.copy_(value)
    torch.testing.assert_close(inside(X), want)

    @torch.compile(backend="eager")
    def step(z: Tensor) -> Tensor:
        u, du = tf.jvp(model, (z,), tangents=(torch.ones_like(z),))
        return (u - du.detach()).square().mean()

    u, du = tf.jvp(model, (X,), tangents=(1.0,))
    loss = step(X)
    torch.testing.assert_close(loss, (u - du).square().mean())
    loss.backward()
    assert model[0].weight.grad is not None


def test_pickled_and_copied() -> None:
    lin = linearized()
    file = io.BytesIO()
    torch.save(lin, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(lin)):
        torch.testing.assert_close(twin(X), lin(X), rtol=0, atol=0)
        assert list(twin.tau) == list(lin.tau)
        twin(X).sum().backward()
        assert lin.tau["0.weight"].grad is None
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        lin._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="cannot be copied"):
        tf.linearize(nn.Sequential(nn.Linear(2, 2), NoCopy()))


class NoCopy(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this one is not copied")


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.w = nn.Parameter(torch.randn(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.fft.rfft(self.a(x)) * self.w
        return torch.fft.irfft(y, n=8), y


def test_complex_parameters_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Fourier().double(), X.double()
    lin = tf.linearize(model)
    assert "w" in lin.tau
    for tau in lin.parameters():
        nn.init.normal_(torch.view_as_real(tau.data) if tau.is_complex() else tau)
    base = {n: p.detach() for n, p in model.named_parameters()}
    taus = {n: t.detach().clone().requires_grad_() for n, t in lin.tau.items()}
    y, dy = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (base,), (taus,))
    want = [a + b for a, b in zip(y, dy, strict=True)]
    sum(t.abs().square().sum() for t in want).backward()
    out = lin(x)
    for got, exact in zip(out, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    sum(t.abs().square().sum() for t in out).backward()
    for name, tau in lin.tau.items():
        torch.testing.assert_close(tau.grad, taus[name].grad, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        for got, exact in zip(lin(x), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    vector = lin.task_vector()
    with pytest.raises(TypeError, match=r"cannot hold torch\.complex128"):
        vector.save(tmp_path / "wide.safetensors")
    assert not list(tmp_path.iterdir())
    narrow = tf.TaskVector({"w": vector["w"].to(torch.complex64)}, base=lin.base)
    try:
        narrow.save(tmp_path / "complex.safetensors")
    except TypeError as error:
        assert "torch.complex64" in str(error)  # noqa: PT017 (an old safetensors)
        return
    loaded = tf.TaskVector.load(tmp_path / "complex.safetensors")
    assert torch.equal(loaded["w"], narrow["w"])
    assert loaded.base == lin.base


def test_complex_vectors_are_merged_rightly_or_refused() -> None:
    w = torch.randn(6, dtype=torch.complex64)
    vector = tf.TaskVector({"w": torch.randn(6, dtype=torch.complex64)})
    for use, want in (
        (lambda: vector.norm(), vector["w"].abs().square().sum().sqrt()),
        (lambda: tf.gram([vector, vector])[0, 1], vector["w"].abs().square().sum()),
        (lambda: tf.merge_({"w": w.clone()}, [vector], 0.5)["w"], w + 0.5 * vector["w"]),
        (lambda: (2 * vector)["w"], 2 * vector["w"]),
    ):
        try:
            got = use()
        except (TypeError, ValueError):
            continue
        torch.testing.assert_close(torch.as_tensor(got).to(want.dtype), want)
