"""One network in fine-tuning: what is trained in which regime, and what a step of it does."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tangentfast as tf
from tangentfast.fingerprint import Base

from .files import replacing
from .regimes import Regime

if TYPE_CHECKING:
    from .data import Split
    from .encoders import Encoder

__all__ = ["TrainOptions", "Trainee", "learning_rate"]


@dataclass(frozen=True)
class TrainOptions:
    """How to fine-tune; the defaults are the papers' where they agree.

    Attributes:
        steps: of the optimizer, at least 1.
        lr: the peak of the learning rate.
        batch: images that are processed at once.
        accumulate: batches to a step.
        weight_decay: λ of AdamW, decoupled: a step of rate η subtracts η λ times what decays.
        decay: what decays: ``"tau"``, or ``"theta"``, which is θ0 + τ in every regime.
        warmup: steps of linear warm-up, at most half of all; then a cosine to zero.
        clip: the largest norm of the gradient.
        label_smoothing: of the cross-entropy.
        precision: of θ0 and activations. τ, θ and the optimizer stay as the encoder's parameters.
        train_head: train the head too, with the same rate; it decays by itself.
    """

    steps: int
    lr: float
    batch: int = 128
    accumulate: int = 1
    weight_decay: float = 0.1
    decay: Literal["tau", "theta"] = "theta"
    warmup: int = 500
    clip: float = 1.0
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    train_head: bool = False


class Trainee:
    """A network in training with its head and optimizer; θ0 and the given head stay as they are.

    Attributes:
        trained: by the encoder's own names: τ in a tangent regime, θ in another.
        theta0: θ0 of the same names.
        base: what τ is a difference to.
        steps: begun updates; equal to those done outside of `step`.

    Raises:
        ValueError: the head is to be trained and has no parameters.
    """

    def __init__(
        self, encoder: Encoder, head: nn.Module, regime: Regime, options: TrainOptions, device: str
    ) -> None:
        self.encoder, self.options, self.regime = encoder, options, regime
        self.device = torch.device(device)
        self.steps = 0
        self.low = torch.bfloat16 if options.precision == "bfloat16" else None
        self.trained: Mapping[str, nn.Parameter]
        if regime.tangent:
            network = tf.linearize(encoder.module, regime.params, primal_dtype=self.low)
            self.network: nn.Module = network
            self.trained = network.tau
        else:
            self.network = copy.deepcopy(encoder.module)
            tf.train_only(self.network, regime.params)
            named = dict(self.network.named_parameters())
            self.trained = {n: p for n, p in named.items() if p.requires_grad}
        self.network.eval()
        theta0 = dict(encoder.module.named_parameters())
        self.theta0 = {name: theta0[name].detach() for name in self.trained}
        self.base = Base.of(encoder.name, self.theta0)
        self.head = copy.deepcopy(head).requires_grad_(options.train_head)
        parameters = list(self.head.parameters()) if options.train_head else []
        if options.train_head and not parameters:
            raise ValueError(
                f"train_head: {type(head).__name__} has no parameters, expected some to train; "
                "freeze the head, or take another"
            )
        self.parameters = [*self.trained.values(), *parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )

    def features(self, images: Tensor) -> Tensor:
        """Of images uint8 [N, 3, S, S]: float [N, D], at least float32."""
        x = self.encoder.normalize(images.to(self.device, non_blocking=True))
        if self.regime.tangent:
            y = self.network(x if self.low is None else x.to(self.low))
        else:
            with torch.autocast(self.device.type, torch.bfloat16, self.low is not None):
                y = self.network(x)
        wide: Tensor = y.to(torch.promote_types(y.dtype, torch.float32))
        return wide

    def step(self, batches: Iterator[tuple[Tensor, Tensor]], rate: float) -> tuple[float, float]:
        """One step of the optimizer; the loss before it, and its gradient's norm unclipped.

        Args:
            batches: images uint8 [B, 3, S, S] and labels int64 [B]; `accumulate` are taken.
            rate: the learning rate.
        """
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for _ in range(self.options.accumulate):
            images, labels = next(batches)
            logits = self.head(self.features(images))
            loss = F.cross_entropy(
                logits,
                labels.to(self.device, non_blocking=True),
                label_smoothing=self.options.label_smoothing,
            )
            (loss / self.options.accumulate).backward()
            total += loss.detach() / self.options.accumulate
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        value = total.item()
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._decay(rate * self.options.weight_decay)
        return value, norm.item()

    @torch.no_grad()
    def _decay(self, amount: float) -> None:
        """What AdamW leaves out: it decays what is trained, τ in tangent space and else θ."""
        if not amount or self.options.decay == ("tau" if self.regime.tangent else "theta"):
            return
        sign = -1.0 if self.regime.tangent else 1.0  # τ decays with θ0 + τ, θ with θ − θ0
        for name, parameter in self.trained.items():
            if parameter.grad is not None:  # as AdamW: what is never used stays
                parameter.add_(self.theta0[name], alpha=sign * amount)

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Share of a split's images whose largest logit is their label's."""
        right = 0
        for index in torch.arange(len(split)).split(self.options.batch):
            logits = self.head(self.features(split.images(index)))
            right += int((logits.argmax(-1).cpu() == split.labels[index]).sum())
        return right / len(split)

    def vector(self) -> tf.TaskVector:
        """τ: a copy on the CPU, with the fingerprint of θ0."""
        tau = {
            name: p.detach().clone() if self.regime.tangent else p.detach() - self.theta0[name]
            for name, p in self.trained.items()
        }
        return tf.TaskVector(tau, base=self.base, selection=self.regime.params).to("cpu")

    def head_state(self) -> dict[str, Tensor] | None:
        """The trained head's tensors on the CPU; None where it is frozen."""
        if not self.options.train_head:
            return None
        return {name: t.detach().cpu().clone() for name, t in self.head.state_dict().items()}

    def save(self, path: Path, **more: Any) -> None:
        """Write all that the next step depends on, and `more`, complete or not at all."""
        state = {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "head": self.head_state(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as file:
            try:
                torch.save(state | more, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's word for a full disk
                    raise error.__context__ from None
                raise

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """Go back to what `save` wrote after so many steps."""
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        if self.options.train_head:
            self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = steps


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then a cosine to zero.

    As in the papers' code: η (s + 1) / w for s < w, then η/2 (1 + cos π (s − w) / (S − w)). Where
    fewer than 2 w steps are taken, w is half of them.
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
