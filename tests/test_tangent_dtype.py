"""tangent_dtype=torch.bfloat16: J τ to a few 1e-3; the primal and every gradient as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tangentfast as tf

open_clip = pytest.importorskip("open_clip")
SIZE = dict(image_size=64, patch_size=16, width=256, layers=4, heads=4, mlp_ratio=4.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = open_clip.transformer.VisionTransformer(**SIZE, output_dim=64)
    return model


def tau_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(p) * 1e-3 for n, p in model.named_parameters()}


def step(lin: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = lin(x)
    return y.detach(), list(torch.autograd.grad(y, list(lin.parameters()), torch.ones_like(y)))


def test_only_the_tangent_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operand of a product is off by at most 2^-8: in four blocks of four layers J τ, a sum
    of many such terms with random signs, is off by a few of them, and by no less than a tenth.
    """
    monkeypatch.setenv("TANGENTFAST_TUNE", "0")  # the same products in both, to the last bit
    model = network()
    tau, x = tau_of(model), torch.randn(8, 3, 64, 64)
    exact = tf.linearize(model, at=tau)
    rough = tf.linearize(model, at=tau, tangent_dtype=torch.bfloat16)
    y, grads = step(exact, x)
    rounded, same = step(rough, x)
    primal = model(x).detach()
    error = ((rounded - y).norm() / (y - primal).norm()).item()
    assert 2**-8 / 10 < error < 2**-8 * 4, error
    # The gradient is the derivative at θ0, which has not moved.
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert rounded.dtype == torch.float32
    zero = tf.linearize(model, tangent_dtype=torch.bfloat16)
    assert torch.equal(zero(x), tf.linearize(model)(x))


def test_jvp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGENTFAST_TUNE", "0")
    model = network()
    x, some = torch.randn(4, 3, 64, 64), [tau_of(model) for _ in range(3)]
    y, dys = tf.jvp(model, (x,), params=some)
    same, rough = tf.jvp(model, (x,), params=some, tangent_dtype=torch.bfloat16)
    assert torch.equal(y, same)
    for a, b in zip(dys, rough, strict=True):
        assert 2**-8 / 10 < (a - b).norm() / a.norm() < 2**-8 * 4


def test_other_types_are_as_they_are() -> None:
    """A bfloat16 or float64 network knows nothing narrower."""
    for dtype in (torch.float64, torch.bfloat16):
        model = network().to(dtype)
        x, tau = torch.randn(2, 3, 64, 64).to(dtype), tau_of(model)
        plain = tf.linearize(model, at=tau)(x)
        assert torch.equal(plain, tf.linearize(model, at=tau, tangent_dtype=torch.bfloat16)(x))


def test_what_there_is_not() -> None:
    model = nn.Linear(2, 2)
    expected = "tangent_dtype is torch.float16, expected torch.bfloat16"
    with pytest.raises(ValueError, match=f"linearize: {expected}"):
        tf.linearize(model, tangent_dtype=torch.float16)
    with pytest.raises(ValueError, match=f"jvp: {expected}"):
        tf.jvp(model, (torch.ones(2),), params={}, tangent_dtype=torch.float16)
