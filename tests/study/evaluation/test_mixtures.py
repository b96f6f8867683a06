"""Mixtures against tf.linearize at that τ, and against a model whose weights are added by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from evaluation_toys import (
    TensorSplit,
    ToyEncoder,
    TwoClasses,
    change,
    noise,
    points,
    transformer,
    vectors_of,
)
from torch import Tensor, nn

import tangentfast as tf
from tangentfast.study.evaluation import Mixtures, Request, accuracies, mixtures, predictions

ROWS = torch.tensor([[0, 0, 0], [1, 1, 1], [0.3, 0.3, 0.3], [0, 1, 0], [-2, 0.5, 0], [1, 1, 1]])


def features(values: Tensor, index: Tensor) -> Tensor:
    return values


def by_hand(
    encoder: ToyEncoder, vectors: list[tf.TaskVector], row: Tensor, tangent: bool
) -> nn.Module:
    tau = sum(c * vector for c, vector in zip(row.tolist(), vectors, strict=True))
    if tangent:
        return tf.linearize(encoder.module, at=tau)
    model = copy.deepcopy(encoder.module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += tau[name]
    return model


@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sweep_is_point_by_point(dtype: torch.dtype, tangent: bool, device: torch.device) -> None:
    encoder, split = transformer(dtype), noise(7)
    vectors = vectors_of(encoder, 3)
    mixed = Mixtures(encoder, vectors, tangent, device=str(device), batch=3)
    got = mixed.sweep(split, ROWS, features)
    assert got.shape == (6, 7, 16)
    assert got.dtype == dtype
    rounding = 1e-12 if dtype == torch.float64 else 2e-5 if tangent else 1e-4
    for row, at_row in zip(ROWS, got, strict=True):
        expected = by_hand(encoder, vectors, row, tangent)(split.pixels.to(dtype))
        torch.testing.assert_close(at_row, expected.detach(), rtol=rounding, atol=rounding)
    # The two models are not the same by far.
    other = Mixtures(encoder, vectors, not tangent, device=str(device)).sweep(split, ROWS, features)
    assert (got[1] - other[1]).abs().max() > 100 * rounding


@pytest.mark.parametrize("tangent", [True, False])
def test_reduce_sees_an_image_its_index_and_may_differ_by_row(tangent: bool) -> None:
    encoder, split = transformer(), noise(7)
    mixed = Mixtures(encoder, vectors_of(encoder, 3), tangent, batch=3)
    full = mixed.sweep(split, ROWS, features)
    weight = torch.arange(7.0)
    got = mixed.sweep(split, ROWS, lambda f, i: torch.stack([f.sum(1), weight[i] * f[:, 0]], 1))
    torch.testing.assert_close(got[..., 0], full.sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[..., 1], full[..., 0] * weight, rtol=1e-12, atol=1e-12)
    each = [lambda f, _, g=g: f[:, g] for g in range(len(ROWS))]
    got = mixed.sweep(split, ROWS, each)
    expected = torch.stack([full[g, :, g] for g in range(len(ROWS))])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tangent", [True, False])
def test_requests_together_are_requests_alone(tangent: bool) -> None:
    encoder, one, two = transformer(), noise(5), noise(4, seed=3)
    vectors = vectors_of(encoder, 3)
    requests = [Request(one, ROWS[:3], features), Request(two, ROWS[2:], features)]
    requests.append(Request(one, ROWS[3:], features))
    together = Mixtures(encoder, vectors, tangent, batch=3).sweeps(requests)
    for request, got in zip(requests, together, strict=True):
        alone = Mixtures(encoder, vectors, tangent, batch=3).sweep(*request)
        torch.testing.assert_close(got, alone, rtol=1e-12, atol=1e-12)


@pytest.fixture
def tangents(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tangents of every pass from here on; 0 for a plain one."""
    counts: list[int] = []
    jvp, call = tf.jvp, mixtures.Mixtures._pass

    def spy(*args, params, **kwargs):
        counts[-1] = len(params)
        return jvp(*args, params=params, **kwargs)

    def passed(*args):
        counts.append(0)
        return call(*args)

    monkeypatch.setattr(mixtures.tf, "jvp", spy)
    monkeypatch.setattr(mixtures.Mixtures, "_pass", passed)
    return counts


def test_linear_passes_are_as_few_as_the_span(tangents: list[int]) -> None:
    encoder, split = transformer(), noise(5)
    vectors = vectors_of(encoder, 3)
    mixed = Mixtures(encoder, vectors, True, batch=5)
    sums = torch.linspace(0, 1, 21)[:, None].expand(-1, 3)
    for rows, new in [
        (ROWS[:1], [0]),  # θ0 alone
        (sums, [1]),  # J Στ
        (-2 * sums, []),
        (torch.eye(3)[:1], [1]),
        (torch.eye(3), [1]),  # all three span what Στ and τ_1 span, and one direction more
        (ROWS, []),
    ]:
        del tangents[:]
        got = mixed.sweep(split, rows, features)
        assert tangents == new
        fresh = Mixtures(encoder, vectors, True).sweep(split, rows, features)
        torch.testing.assert_close(got, fresh, rtol=1e-12, atol=1e-12)
    del tangents[:]
    mixed.sweeps([Request(noise(5, seed=9), row[None], features) for row in torch.eye(3)])
    assert tangents == [1, 1, 1]
    del tangents[:]
    other = noise(5, seed=9)
    mixed.sweeps([Request(other, row[None], features) for row in torch.eye(3)])
    assert tangents == [3]


def test_kept_features_stay_within_the_budget(tangents: list[int]) -> None:
    encoder, one, two = transformer(), noise(5), noise(5, seed=3)
    vectors = vectors_of(encoder, 3)
    # f(x; θ0) and one tangent of one split: 2 tensors of 5 x 16 float64.
    mixed = Mixtures(encoder, vectors, True, keep_bytes=2 * 5 * 16 * 8)
    sums, both = torch.ones(1, 3), torch.eye(3)[:2]
    for split, rows, new in [
        (one, sums, [1]),
        (one, sums, []),
        (two, sums, [1]),  # the other goes
        (two, sums, []),
        (one, sums, [1]),
        (one, both, [2]),  # fits no more, nothing is kept
        (one, both, [2]),
    ]:
        del tangents[:]
        got = mixed.sweep(split, rows, features)
        assert tangents == new
        assert sum(saved.bytes for saved in mixed._saved.values()) <= mixed.keep_bytes
        fresh = Mixtures(encoder, vectors, True).sweep(split, rows, features)
        torch.testing.assert_close(got, fresh, rtol=1e-12, atol=1e-12)


def test_equal_mixtures_run_once() -> None:
    encoder, one, two = transformer(), noise(5), noise(4, seed=3)
    mixed = Mixtures(encoder, vectors_of(encoder, 3), False, batch=5)
    passes: list[int] = []
    mixed.module.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    mixed.sweeps([Request(one, ROWS, features), Request(two, ROWS[:2], features)])
    assert sorted(passes) == [4] * 2 + [5] * 5  # ROWS has five different rows


def bits(module: nn.Module) -> list[bytes]:
    return [p.detach().cpu().numpy().tobytes() for p in module.state_dict().values()]


@pytest.mark.parametrize("interrupted", [0, 1, 8])
def test_theta0_comes_back_bit_for_bit(interrupted: int) -> None:
    encoder = transformer(torch.float32)
    with torch.no_grad():
        encoder.module.patches.bias[0] = -0.0
        encoder.module.patches.bias[1] = 1e-30  # gone after a sum and a difference
    encoder.module.train()
    before = bits(encoder.module)
    mixed = Mixtures(encoder, vectors_of(encoder, 3), False, batch=2)
    calls: list[Tensor] = []

    def reduce(values: Tensor, index: Tensor) -> Tensor:
        calls.append(index)
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        mixed.sweep(noise(6), ROWS[1:], reduce)
    assert len(calls) == (interrupted or 15)
    assert bits(mixed.module) == before == bits(encoder.module)
    assert encoder.module.training
    assert not mixed.module.training


def test_predictions_and_accuracies() -> None:
    encoder = ToyEncoder(TwoClasses(0, 0, -6))
    split = points((5, 0, 1), (10, 0, 1), (20, 0, 1), labels=[1, 1, 0])
    for tangent in (True, False):
        mixed = Mixtures(encoder, [change(1, 0, 0)], tangent, batch=2)
        rows = torch.tensor([[0.0], [0.5], [1.0], [2.0]])
        got = predictions(mixed, split, nn.Identity(), rows)
        assert got.dtype == torch.int64
        assert got.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
        (share,) = accuracies(mixed, [(split, nn.Identity(), rows)])
        assert share.tolist() == [1 / 3, 0, 1 / 3, 2 / 3]


def test_head_is_used_in_evaluation_mode_and_left_alone() -> None:
    encoder = ToyEncoder(TwoClasses(0, 0, -6))
    mixed = Mixtures(encoder, [change(1, 0, 0)], True)
    head = nn.Sequential(nn.Dropout(0.99)).train()
    rows = torch.ones(50, 1)
    got = predictions(mixed, points((10, 0, 1)), head, rows)
    assert got.tolist() == [[1]] * 50
    assert head.training


@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.empty(0, 2), r"coefficients are \[0, 2\], expected \[G, 2\]: at least one row"),
        (torch.ones(3), r"coefficients are \[3\], expected \[G, 2\]"),
        (torch.ones(2, 3), r"coefficients are \[2, 3\], expected \[G, 2\]"),
        (
            torch.tensor([[0, 1], [torch.nan, 1]]),
            r"coefficients\[1\] is \[nan, 1.0\], expected finite",
        ),
        (torch.tensor([[0, torch.inf]]), r"coefficients\[0\] is \[0.0, inf\]"),
    ],
)
def test_coefficients_that_do_not_fit(rows: Tensor, message: str, tangent: bool) -> None:
    encoder = ToyEncoder(TwoClasses(0, 0, -6))
    mixed = Mixtures(encoder, [change(1, 0, 0), change(0, 1, 0)], tangent)
    with pytest.raises(ValueError, match=message):
        mixed.sweep(points((1, 2, 3)), rows, features)


@pytest.mark.parametrize("tangent", [True, False])
def test_sweeps_that_do_not_fit(tangent: bool) -> None:
    encoder = ToyEncoder(TwoClasses(0, 0, -6))
    mixed = Mixtures(encoder, [change(1, 0, 0)], tangent)
    row = torch.ones(1, 1)
    with pytest.raises(ValueError, match="the split has no images, expected at least one"):
        mixed.sweep(TensorSplit(torch.empty(0, 3, 1, 1), torch.empty(0)), row, features)
    with pytest.raises(ValueError, match="2 functions in reduce for 1 rows"):
        mixed.sweep(points((1, 2, 3)), row, [features] * 2)
    with pytest.raises(ValueError, match=r"reduce gave \[\] for 1 features, expected one entry"):
        mixed.sweep(points((1, 2, 3)), row, lambda f, _: f.sum())
    huge = Mixtures(encoder, [change(1e300, 0, 0)], tangent)
    with pytest.raises(
        FloatingPointError, match=r"coefficients \[1\.15\d+e\+18\] are not finite; exp"
    ):
        huge.sweep(points((9, 2, 3)), torch.tensor([[1], [2**60]]), features)
    shape = ToyEncoder(nn.Conv2d(3, 2, 1))
    wrong = Mixtures(shape, [dict(shape.module.named_parameters())], tangent)
    with pytest.raises(TypeError, match=r"encoder returned \[1, 2, 1, 1\], expected float feat"):
        wrong.sweep(points((1, 2, 3)), row, features)


@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([], "vectors should be a sequence of at least one, is none"),
        (change(1, 0, 0), "vectors should be a sequence of at least one, is one mapping"),
        (
            [change(1, 0, 0), {"v": torch.ones(3)}],
            r"vectors\[1\]\['v'\] is no parameter of the enc",
        ),
        ([change(1, 0)], r"vectors\[0\]\['w'\] has shape \(2,\), the encoder has \(3,\)"),
        ([change(1, 0, torch.nan)], r"vectors\[0\]\['w'\] has numbers that are not finite; fine-"),
    ],
)
def test_vectors_that_do_not_fit(vectors: object, message: str, tangent: bool) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Mixtures(ToyEncoder(TwoClasses(0, 0, -6)), vectors, tangent)


@pytest.mark.parametrize("tangent", [True, False])
def test_vector_of_another_base(tangent: bool) -> None:
    encoder, other = transformer(), transformer()
    with torch.no_grad():
        other.module.patches.bias += 1
    vectors = [*vectors_of(encoder, 1), *vectors_of(other, 1)]
    message = r"vectors\[1\] is a difference to SmallTransformer \[\w+\], and the encoder has other"
    with pytest.raises(ValueError, match=message):
        Mixtures(encoder, vectors, tangent)
    with pytest.raises(ValueError, match="batch is 0, expected at least 1"):
        Mixtures(encoder, vectors[:1], tangent, batch=0)
