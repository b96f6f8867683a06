"""Small models of five libraries in six modes, against ``torch.func.jvp`` in float64.

Each mode also leaves the caller's model as it was: the same parameter objects and values, the same
modes, no dual number kept anywhere, and the same output of an ordinary forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import from_others
import from_timm
import from_transformers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from truth import CONTRACT, converted, floats, relative, torch_jvp

import tangentfast as tf
from tangentfast.dual import Dual

ZOO = from_others.ZOO | from_timm.ZOO | from_transformers.ZOO

# Their own code computes a softmax, a norm or a position in float32, in a float64 model too.
FLOAT32_INSIDE = {
    "timm.efficientvit_b0",
    *(
        f"transformers.{name}ForCausalLM"
        for name in (
            "Bloom",
            "DeepseekV3",
            "Gemma2",
            "Llama",
            "Mamba",
            "Mixtral",
            "Qwen2",
            "Qwen3Moe",
        )
    ),
}


class Specimen:
    """One model and its call, with its true derivatives along a τ and along its inputs."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.made, args, kwargs = ZOO[name]()
        self.args, self.kwargs = positional(self.made, args, kwargs)
        self.exact = exactly(self.made)
        self.tau = {n: 0.1 * torch.randn_like(p) for n, p in self.made.named_parameters()}
        self.limits, self.zero = CONTRACT[next(self.made.parameters()).dtype], 1e-12
        if name in FLOAT32_INSIDE:
            self.limits, self.zero = (1e-6, 3e-6), 1e-6
        if self.limits == CONTRACT[torch.float32]:
            self.zero = 1e-6

    @cached_property
    def moved(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor | None]]:
        """A call with floating inputs, and a direction for each; ids become their embeddings."""
        args, kwargs = self.args, dict(self.kwargs)
        if not floats(args):
            ids = kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = self.made.get_input_embeddings()(ids).detach()
            args, kwargs = positional(self.made, (), kwargs)
        directions = [torch.randn_like(x) if floats(x) else None for x in args]
        return args, kwargs, directions

    @cached_property
    def along_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        exact = copy.deepcopy(self.exact)  # functional_call may leave its tensors behind
        args, kwargs = converted((self.args, self.kwargs), torch.float64)
        names, theta = list(self.tau), dict(exact.named_parameters())

        def call(*values: Tensor) -> Any:
            replaced = dict(zip(names, values, strict=True))
            return floats(torch.func.functional_call(exact, replaced, args, kwargs))

        return torch_jvp(call, [theta[n] for n in names], [self.tau[n].double() for n in names])

    @cached_property
    def linearized(self) -> list[Tensor]:
        y, dy = self.along_parameters
        return [a + b for a, b in zip(y, dy, strict=True)]

    @cached_property
    def along_inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        exact = copy.deepcopy(self.exact)
        args, kwargs, directions = converted(self.moved, torch.float64)
        return torch_jvp(lambda *xs: floats(exact(*xs, **kwargs)), args, directions)

    def check(self, got: Any, want: list[Tensor]) -> None:
        assert all(y.isfinite().all() for y in want)
        assert max(map(relative, floats(got), want, [1e-3] * len(want))) <= self.limits[0]

    def check_gradients(self, got: list[Tensor | None], want: list[Tensor | None]) -> None:
        """One that is zero in exact arithmetic is a rounding error of the largest."""
        largest = max(float(g.norm()) for g in want if g is not None)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                scale = largest if b.norm() <= self.zero * largest else 0.0
                assert relative(a, b, scale) <= self.limits[1]


def positional(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with every floating input among the positional arguments."""
    front, rest = list(args), dict(kwargs)
    for i, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if i < len(args):
            continue
        if not floats(rest):
            break
        front.append(rest.pop(parameter.name, parameter.default))
    return tuple(front), rest


def exactly(model: nn.Module) -> nn.Module:
    """A copy in float64, of plain operations alone: no checkpoints, no grouped products."""
    exact = copy.deepcopy(model).double().eval().requires_grad_()  # some freeze their backbone
    for module in exact.modules():
        module._forward_hooks.clear()  # one makes embeddings require grad; torch.func refuses
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


def outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return floats(model(*args, **kwargs))


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which objects a model is made of (buffers aside: ConViT makes its own anew in forward)."""
    found: list[tuple[Any, ...]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = module._parameters.items()
        found.append((name, id(module), module.training))
        found += [(n, id(p), p.requires_grad) for n, p in own if p is not None]
    return found


def kept(model: nn.Module) -> list[Tensor]:
    """Every tensor that a module holds beside its parameters and buffers."""
    own = ("_parameters", "_buffers", "_modules")
    values = [v for m in model.modules() for n, v in vars(m).items() if n not in own]
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    objects, values = state(model), copy.deepcopy(model.state_dict())
    yield
    assert state(model) == objects
    now = model.state_dict()
    assert now.keys() == values.keys()
    assert all(torch.equal(now[n], v) for n, v in values.items() if isinstance(v, Tensor))
    assert not any(type(t) is Dual for t in kept(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module", params=ZOO)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return Specimen(request.param)


@pytest.fixture
def model(specimen: Specimen) -> Iterator[nn.Module]:
    """A copy for one mode, which must come back as it was."""
    model = copy.deepcopy(specimen.made)
    with unchanged(model):
        yield model
    after = outputs(model, specimen.args, specimen.kwargs)
    fresh = outputs(copy.deepcopy(specimen.made), specimen.args, specimen.kwargs)
    assert all(map(torch.equal, after, fresh))


def test_linearize_in_training(specimen: Specimen, model: nn.Module) -> None:
    """The gradient is Jᵀu: the true one is that of the original network in float64."""
    s = specimen
    lin = tf.linearize(model, at=s.tau)
    out = floats(lin(*s.args, **s.kwargs))
    s.check(out, s.linearized)
    exact = copy.deepcopy(s.exact)
    plain = floats(exact(*converted(s.args, torch.float64), **converted(s.kwargs, torch.float64)))
    us = [torch.randn_like(y) for y in plain]
    found = gradients(out, us, list(lin.tau.values()))
    s.check_gradients(found, gradients(plain, us, list(exact.parameters())))


def test_linearize_without_grad(specimen: Specimen, model: nn.Module) -> None:
    """Twice: the second batch meets what the first one left in the model."""
    lin = tf.linearize(model, at=specimen.tau)
    specimen.check(outputs(lin, specimen.args, specimen.kwargs), specimen.linearized)
    specimen.check(outputs(lin, specimen.args, specimen.kwargs), specimen.linearized)


GRAD = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


@GRAD
def test_jvp_along_parameters(specimen: Specimen, model: nn.Module, grad: bool) -> None:
    s = specimen
    with torch.set_grad_enabled(grad):
        found = tf.jvp(model, s.args, params=s.tau, kwargs=s.kwargs)
    for got, want in zip(found, s.along_parameters, strict=True):
        s.check(got, want)
    graph(s, model, found[0], s.args, s.kwargs, grad)


@GRAD
def test_jvp_along_inputs(specimen: Specimen, model: nn.Module, grad: bool) -> None:
    args, kwargs, directions = specimen.moved
    with torch.set_grad_enabled(grad):
        found = tf.jvp(model, args, tangents=directions, kwargs=kwargs)
    for got, want in zip(found, specimen.along_inputs, strict=True):
        specimen.check(got, want)
    graph(specimen, model, found[0], args, kwargs, grad)


def graph(
    specimen: Specimen, model: nn.Module, out: Any, args: Any, kwargs: Any, grad: bool
) -> None:
    """The output has the graph of an ordinary forward, or none."""
    if not grad:
        assert not any(y.requires_grad for y in floats(out))
        return
    plain = copy.deepcopy(specimen.made)
    want = floats(plain(*args, **kwargs))
    us = [torch.randn_like(y) for y in want]
    ours, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, plain))
    specimen.check_gradients(gradients(floats(out), us, ours), gradients(want, us, theirs))


def gradients(
    out: list[Tensor], us: list[Tensor], parameters: list[nn.Parameter]
) -> list[Tensor | None]:
    """∂/∂parameters of ⟨out, us⟩."""
    loss = sum((y * u.to(y.dtype)).sum() for y, u in zip(out, us, strict=True) if y.requires_grad)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@pytest.mark.parametrize(
    "name",
    [
        "timm.levit_128s", "timm.tiny_vit_5m_224", "timm.efficientformer_l1",
        "timm.efficientformerv2_s0", "timm.efficientvit_m0", "transformers.LevitModel",
    ],
)  # fmt: skip
def test_what_an_ordinary_forward_has_kept(name: str) -> None:
    """In evaluation mode these compute biases once: from θ0, without a tangent."""
    s = Specimen(name)
    model = s.made
    outputs(model, s.args, s.kwargs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(RuntimeError, match=r"keeps tensors of an earlier one"):
                tf.jvp(model, s.args, params=s.tau, kwargs=s.kwargs)
            with pytest.raises(RuntimeError, match=r"keeps tensors of an earlier one"):
                tf.linearize(model)(*s.args, **s.kwargs)
    model.train()
    model.eval()  # as the message says
    lin = tf.linearize(model, at=s.tau)
    s.check(outputs(lin, s.args, s.kwargs), s.linearized)
    for got, want in zip(tf.jvp(model, s.args, params=s.tau), s.along_parameters, strict=True):
        s.check(got, want)
