"""tangentfast.study.train: resuming, decay, clipping, accumulation, order of images, by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")

from study import toys

import tangentfast as tf
from tangentfast.study.regimes import REGIMES
from tangentfast.study.train import (
    DivergedError,
    Finetuned,
    TrainOptions,
    finetune,
    sample_order,
)
from tangentfast.study.trainee import learning_rate


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny fine-tuning is the collection of garbage before memory is measured."""
    monkeypatch.setattr("tangentfast.study.memory.gc.collect", lambda: 0)


TRAINED = [name for name, regime in REGIMES.items() if regime.vectors_of is None]
OPTIONS = TrainOptions(steps=8, lr=1e-3, batch=16, warmup=2, weight_decay=0.0)


class Stopped(BaseException):
    """What a test raises in the middle, as Ctrl-C would."""


def tune(out: Path, options: TrainOptions = OPTIONS, regime: str = "ntk", **more: Any) -> Finetuned:
    encoder = more.pop("encoder", None) or toys.encoder()
    head = more.pop("head", None) or toys.Head(32, 4)
    task = more.pop("task", None) or toys.task()
    more = {"seed": 0, "device": "cpu"} | more
    return finetune(encoder, head, task, REGIMES[regime], options, out=out, **more)


def stop_at(step: int) -> Any:
    def advance(done: int, speed: float) -> None:
        if done == step:
            raise Stopped

    return advance


def same(a: tf.TaskVector, b: tf.TaskVector) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("regime", TRAINED)
@pytest.mark.parametrize("train_head", [False, True])
def test_interrupted_and_resumed_is_bit_for_bit(
    tmp_path: Path, regime: str, train_head: bool
) -> None:
    options = replace(OPTIONS, accumulate=2, weight_decay=0.1, decay="theta", train_head=train_head)
    whole = tune(tmp_path / "whole", options, regime)
    for step in (3, 6):  # twice, in one folder
        with pytest.raises(Stopped):
            tune(tmp_path / "parts", options, regime, advance=stop_at(step))
        assert (tmp_path / "parts" / "checkpoint.pt").exists()
        assert not (tmp_path / "parts" / "result.json").exists()
    seen: list[int] = []
    parts = tune(tmp_path / "parts", options, regime, advance=lambda step, speed: seen.append(step))
    assert seen == [7, 8]  # at the step where it stopped
    assert same(whole.vector, parts.vector)
    assert whole.val_accuracy == parts.val_accuracy
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    if train_head:
        assert whole.head is not None
        assert parts.head is not None
        assert torch.equal(whole.head["weight"], parts.head["weight"])
        assert not torch.equal(whole.head["weight"], toys.Head(32, 4).weight)
    assert sorted(f.name for f in (tmp_path / "parts").iterdir() if f.is_file()) == sorted(
        ["log.jsonl", "result.json", "vector.safetensors"] + ["head.safetensors"] * train_head
    )


def test_an_error_between_checkpoints_loses_no_step(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.head, self.calls, self.limit = toys.Head(32, 4), 0, limit

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > self.limit:
                raise RuntimeError("CUDA out of memory")
            return self.head(x)

    with pytest.raises(RuntimeError, match="out of memory"):
        tune(tmp_path / "a", head=Broken(5))
    seen: list[int] = []
    resumed = tune(
        tmp_path / "a", head=Broken(math.inf), advance=lambda step, speed: seen.append(step)
    )
    assert seen == [6, 7, 8]
    assert same(resumed.vector, tune(tmp_path / "b", head=Broken(math.inf)).vector)


def test_an_interrupt_in_an_update_goes_back_to_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(tmp_path / "whole")
    step, calls = torch.optim.AdamW.step, []

    def halfway(self: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(0)
        if len(calls) == 6:
            next(iter(self.param_groups[0]["params"])).data.zero_()
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", halfway)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "parts", checkpoint=0.0)
    seen: list[int] = []
    parts = tune(tmp_path / "parts", advance=lambda step, speed: seen.append(step))
    assert seen == [6, 7, 8]
    assert same(whole.vector, parts.vector)


def test_a_finished_one_is_read_and_a_damaged_one_done_again(tmp_path: Path) -> None:
    def never(step: int, speed: float) -> None:
        raise AssertionError

    first = tune(tmp_path)
    again = tune(tmp_path, advance=never)
    assert same(first.vector, again.vector)
    assert first.seconds_per_step == again.seconds_per_step
    (tmp_path / "vector.safetensors").write_bytes(b"damaged")
    assert same(first.vector, tune(tmp_path).vector)
    (tmp_path / "result.json").write_text("{")
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert same(first.vector, tune(tmp_path).vector)


def test_another_ones_folder_is_refused(tmp_path: Path) -> None:
    tune(tmp_path)
    for change in (
        {"seed": 1},
        {"regime": "attention"},
        {"options": replace(OPTIONS, lr=2e-3)},
        {"encoder": toys.encoder(seed=1)},
    ):
        with pytest.raises(ValueError, match=r"is of .* expected .* give another folder"):
            tune(tmp_path, **change)


@pytest.mark.parametrize("regime", TRAINED)
def test_one_step_of_adamw_by_hand(tmp_path: Path, regime: str) -> None:
    """From zero moments the first update is −η g/(|g| + ε): only gradient and decay matter."""
    encoder, head, task = toys.encoder(), toys.Head(32, 4), toys.task()
    options = replace(OPTIONS, steps=1, batch=8, accumulate=3, clip=1e-6, weight_decay=0.5)
    module = copy.deepcopy(encoder.module)
    names = [n for n, p in module.named_parameters()]
    if REGIMES[regime].params == "attention":
        names = [n for n in names if n.endswith(("qkv.weight", "attn.proj.weight"))]
    index = sample_order(7, 90, 0, 24)
    x = encoder.normalize(task.train.pixels[index])
    # At τ = 0 every regime has the network's own gradient.
    F.cross_entropy(head(module(x)), task.train.labels[index]).backward()
    named = dict(module.named_parameters())
    norm = torch.stack([named[n].grad.norm() for n in names]).norm()  # type: ignore[union-attr]
    theta0 = dict(encoder.module.named_parameters())
    atol = 3e-8 if REGIMES[regime].tangent else 2e-7  # θ is rounded to its own magnitude
    for decay in ("tau", "theta"):
        done = tune(
            tmp_path / decay, replace(options, decay=decay), regime, encoder=encoder, seed=7
        )
        assert list(done.vector) == names
        assert done.trained_parameters == sum(named[n].numel() for n in names)
        for name in names:
            g = named[name].grad * 1e-6 / norm  # near ε, so that the clipping shows
            expected = -1e-3 * g / (g.abs() + 1e-8)
            if decay == "theta":
                expected -= 1e-3 * 0.5 * theta0[name].detach()
            torch.testing.assert_close(done.vector[name], expected, atol=atol, rtol=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "tau" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert lines[0]["lr"] == 1e-3


@pytest.mark.parametrize("regime", TRAINED)
def test_decay_pulls_tau_or_theta(tmp_path: Path, regime: str) -> None:
    """With a strong decay and a still gradient, τ → 0 under "tau", θ → 0 under "theta"."""
    encoder = toys.encoder()
    options = replace(OPTIONS, steps=20, batch=4, lr=1e-6, weight_decay=2e5, warmup=0)
    theta0 = dict(encoder.module.named_parameters())
    pulled = tune(tmp_path / "theta", replace(options, decay="theta"), regime, encoder=encoder)
    still = tune(tmp_path / "tau", replace(options, decay="tau"), regime, encoder=encoder)
    for name in pulled.vector:
        # A product of 20 factors 1 − η_s λ.
        left = math.prod(1 - 2e5 * learning_rate(s, 20, 1e-6, 0) for s in range(20))
        expected = (left - 1) * theta0[name].detach()
        torch.testing.assert_close(pulled.vector[name], expected, atol=1e-4, rtol=1e-3)
        assert still.vector[name].abs().max() < 1e-4


@pytest.mark.parametrize("regime", TRAINED)
def test_it_learns_and_leaves_the_base_alone(tmp_path: Path, regime: str) -> None:
    encoder, head, task = toys.encoder(), toys.Head(32, 4), toys.task()
    before = {n: t.clone() for n, t in encoder.module.state_dict().items()}
    with torch.no_grad():
        right = head(encoder.module(encoder.normalize(task.val.pixels))).argmax(1)
    base = (right == task.val.labels).double().mean().item()
    done = tune(tmp_path, replace(OPTIONS, steps=40, lr=3e-3), regime, encoder=encoder)
    assert done.val_accuracy > max(0.8, base + 0.2)
    assert all(torch.equal(t, before[n]) for n, t in encoder.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in encoder.module.parameters())
    # val_accuracy is of the regime's own model at τ.
    if REGIMES[regime].tangent:
        model: nn.Module = tf.linearize(encoder.module, REGIMES[regime].params, at=done.vector)
    else:
        model = tf.merge_(copy.deepcopy(encoder.module), done.vector)  # type: ignore[type-var]
    with torch.no_grad():
        predicted = head(model(encoder.normalize(task.val.pixels))).argmax(1)
    assert done.val_accuracy == pytest.approx((predicted == task.val.labels).double().mean().item())
    assert done.samples_per_second == pytest.approx(16 / done.seconds_per_step)
    assert done.peak_bytes >= 0
    assert done.vector.base is not None
    assert done.vector.base.name == "tiny"


@pytest.mark.parametrize("regime", ["nonlinear", "ntk"])
def test_bfloat16_is_near_float32_and_tau_stays_wide(tmp_path: Path, regime: str) -> None:
    options = replace(OPTIONS, steps=4)
    wide = tune(tmp_path / "wide", options, regime)
    low = tune(tmp_path / "low", replace(options, precision="bfloat16"), regime)
    assert {t.dtype for t in low.vector.values()} == {torch.float32}
    assert not same(wide.vector, low.vector)
    for (_, a, _), (_, b, _) in zip(
        losses(tmp_path / "wide"), losses(tmp_path / "low"), strict=True
    ):
        assert a == pytest.approx(b, rel=0.02)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    class Head(toys.Head):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features) * math.nan

    with pytest.raises(DivergedError, match=r"loss of tints \(ntk, lr 0.001\) is nan at step 1;"):
        tune(tmp_path, head=Head(32, 4))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"posthoc trains nothing; expected .* nonlinear"):
        tune(tmp_path, regime="posthoc")
    with pytest.raises(ValueError, match="train_head: Identity has no parameters"):
        tune(tmp_path, replace(OPTIONS, train_head=True), head=nn.Identity())


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    with standins.largest_file(2000), pytest.raises(OSError, match="large"):
        tune(tmp_path, checkpoint=0.0)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["log.jsonl"]


def test_the_log_drops_steps_taken_again(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        tune(tmp_path, advance=stop_at(5))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 7, "lo')
    tune(tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 9))


def test_order_is_a_permutation_an_epoch_and_recomputable() -> None:
    whole = sample_order(3, 10, 0, 40)
    for epoch in whole.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(e.tolist()) for e in whole.split(10)}) == 4
    for start, count in ((0, 7), (7, 7), (13, 20), (39, 1), (10, 10)):
        assert torch.equal(sample_order(3, 10, start, count), whole[start : start + count])
    assert not torch.equal(sample_order(4, 10, 0, 40), whole)


def test_the_rate_by_hand() -> None:
    rates = [learning_rate(step, 10, 2.0, 4) for step in range(10)]
    cosine = [1 + math.cos(math.pi * i / 6) for i in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *cosine])
    assert learning_rate(0, 1, 2.0, 500) == 2.0  # no warm-up fits
    assert learning_rate(1, 4, 2.0, 500) == 2.0  # half of all
    assert learning_rate(0, 4, 2.0, 0) == 2.0
