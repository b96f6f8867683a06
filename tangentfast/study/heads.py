"""Classification heads on an encoder's features: zero-shot, class means, linear probe.

A head maps features [..., D] to logits [..., C]. Its parameters are frozen while an encoder is
fine-tuned, so that all learning is in τ; `requires_grad_()` lets a head be trained as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Split, Task, templates
from .encoders import Encoder, encode

__all__ = [
    "HEADS",
    "CosineHead",
    "HeadKind",
    "LinearHead",
    "PrototypeHead",
    "build_head",
    "probe_head",
    "zero_shot_head",
]

HeadKind = Literal["zero-shot", "prototype", "probe"]
HEADS: tuple[HeadKind, ...] = ("zero-shot", "prototype", "probe")
# Strengths λ of the probe's penalty, on standardised features and a mean loss.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class CosineHead(nn.Module):
    """Logits scale · ⟨u(z), w_c⟩ with u(z) = (z − μ)/‖z − μ‖, the head of CLIP where μ = 0."""

    center: Tensor

    def __init__(self, weight: Tensor, center: Tensor | None = None, scale: float = 10.0) -> None:
        """A frozen head.

        Args:
            weight: float [C, D], rows of norm 1.
            center: μ, float [D]; by default 0.
            scale: the inverse temperature.
        """
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("center", weight.new_zeros(()) if center is None else center)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., D] → logits [..., C]."""
        return self.scale * F.normalize(features - self.center, dim=-1) @ self.weight.T


class PrototypeHead(CosineHead):
    """Cosine similarity to class means, times `scale`: the part CLIP's text head plays elsewhere.

    μ is the mean of all features, w_c the normalised mean of u over the images of class c. As with
    prototypical networks (Snell et al. 2017, arXiv:1703.05175), but fixed once computed.
    """

    def __init__(self, features: Tensor, labels: Tensor, scale: float = 10.0) -> None:
        """The head of one task.

        Args:
            features: float [N, D], those of the *base* network on the training split.
            labels: int64 [N], every class 0..max at least once.
            scale: the inverse temperature.

        Raises:
            ValueError: shapes that do not fit, or a class without an image.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"PrototypeHead: features should be [N, D] and labels [N], are "
                f"{list(features.shape)} and {list(labels.shape)}"
            )
        counts = labels.bincount()
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(f"PrototypeHead: every class needs an image, {empty} have none")
        center = features.mean(0)
        units = F.normalize(features - center, dim=1)
        sums = units.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, units)
        super().__init__(F.normalize(sums, dim=1), center, scale)


class LinearHead(nn.Linear):
    """Logits W z + b, frozen."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """The layer of weight [C, D] and bias [C]."""
        super().__init__(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        self.requires_grad_(False)
        self.weight.copy_(weight)
        self.bias.copy_(bias)


def zero_shot_head(encoder: Encoder, classes: Sequence[str], prompts: Sequence[str]) -> CosineHead:
    """The head that a text tower makes of the names of classes (arXiv:2103.00020, section 3.1).

    w_c is the mean over prompts of the normalised text features, normalised; the scale is the
    encoder's own.

    Args:
        encoder: one with a text tower.
        classes: C names.
        prompts: sentences with one `{}` for the name.

    Raises:
        ValueError: the encoder has no text tower.
    """
    if encoder.text is None:
        raise ValueError(
            f"a zero-shot head needs a text tower, {encoder.name} has none; take an open_clip "
            f"model, or the head 'prototype' or 'probe'"
        )
    rows = []
    for name in classes:
        features = encoder.text([prompt.format(name) for prompt in prompts])
        rows.append(F.normalize(F.normalize(features, dim=1).mean(0), dim=0))
    return CosineHead(torch.stack(rows), scale=encoder.logit_scale)


def probe_head(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int
) -> LinearHead:
    """Logistic regression on frozen features, its strength chosen by validation accuracy.

    Minimises mean cross-entropy + λ/2 ‖W‖² over W and b on standardised features in float64, λ over
    `PENALTIES` (the larger of equals); the standardisation is then folded into the layer.

    Args:
        train: features [N, D] and labels int64 [N].
        val: the same of the validation split.
        classes: C.
    """
    features, labels = train[0].double(), train[1]
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    best, best_accuracy = None, -1.0
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    for penalty in sorted(PENALTIES, reverse=True):  # each starts where the last one ended
        weight, bias = _logistic((features - mean) / std, labels, penalty, weight, bias)
        head = LinearHead(
            (weight / std).to(train[0].dtype),
            (bias - weight @ (mean / std)).to(train[0].dtype),
        )
        accuracy = (head(val[0]).argmax(-1) == val[1]).double().mean().item()
        if accuracy > best_accuracy:
            best, best_accuracy = head, accuracy
    if best is None:
        raise ValueError("probe_head: validation accuracy is not a number; is the split empty?")
    return best


def _logistic(
    features: Tensor, labels: Tensor, penalty: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimum, from a start: weight [C, D], bias [C]."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def build_head(
    kind: HeadKind, encoder: Encoder, task: Task, *, device: str = "cpu", batch: int = 64
) -> nn.Module:
    """The head of a task on the *base* encoder, frozen, on the CPU.

    Args:
        kind: `"zero-shot"` (needs a text tower, and no image), `"prototype"` or `"probe"`.
        encoder: its module is moved to `device` where images are encoded.
        task: its training split makes prototypes and probes, its validation split chooses λ.
        device: where to encode.
        batch: images at a time.

    Raises:
        ValueError: an unknown kind, or an encoder without a text tower.
    """
    if kind not in HEADS:
        raise ValueError(f"head should be among {list(HEADS)}, is {kind!r}")
    if kind == "zero-shot":
        return zero_shot_head(encoder, task.classes, templates(task.name))

    def features(split: Split) -> tuple[Tensor, Tensor]:
        return encode(encoder, split, device=device, batch=batch), split.labels

    if kind == "prototype":
        return PrototypeHead(*features(task.train))
    return probe_head(features(task.train), features(task.val), len(task.classes))
