"""Losses whose kernels torch can differentiate once only, in plain torch functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.rules.registry import Jvp, composite, rule


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _how(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """`reduction`, or what two older arguments say instead."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


@composite(F.multi_margin_loss)
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum over the classes i but t of weight_t max(0, margin - x_t + x_i)^p / classes."""
    input = input.reshape(1) if input.dim() == 0 else input
    index = target.reshape(input.shape[:-1]).unsqueeze(-1)
    short = (margin - input.gather(-1, index) + input).clamp_min(0).pow(p)
    if weight is not None:
        short = short * weight[index]
    losses = short.scatter(-1, index, 0).sum(-1) / input.shape[-1]
    return _reduced(losses, _how(size_average, reduce, reduction))


@composite(F.multilabel_margin_loss)
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum over labels t and other classes i of max(0, 1 - x_t + x_i) / classes; -1 ends labels."""
    if input.dim() == 0:
        input, target = input.reshape(1), target.reshape(1)
    named = (target >= 0).cumprod(-1).bool()
    index = target.clamp_min(0)
    labelled = torch.zeros_like(target).scatter_add(-1, index, named.long()) > 0
    short = (1 - input.gather(-1, index).unsqueeze(-1) + input.unsqueeze(-2)).clamp_min(0)
    counted = named.unsqueeze(-1) & ~labelled.unsqueeze(-2)
    losses = torch.where(counted, short, 0).sum((-2, -1)) / input.shape[-1]
    return _reduced(losses, _how(size_average, reduce, reduction))


@rule(F.ctc_loss)
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> tuple[Tensor, Jvp]:
    """A sample's loss is a number: its JVP is the product with its gradient.

    torch's gradient takes log_probs for the logarithms of probabilities, along changes that leave
    them such, as log_softmax makes them.
    """
    lengths = (targets, input_lengths, target_lengths, blank)
    y = F.ctc_loss(log_probs, *lengths, reduction, zero_infinity)

    def jvp(dx: Tensor) -> Tensor:
        with torch.enable_grad():
            x = log_probs.detach().requires_grad_()
            total = F.ctc_loss(x, *lengths, "none", zero_infinity).sum()
        (gradient,) = torch.autograd.grad(total, x)
        losses = (gradient * dx).sum((0, -1))
        if reduction == "mean":
            losses = losses / torch.as_tensor(target_lengths, device=dx.device).clamp_min(1)
        return _reduced(losses, reduction)

    return y, jvp
