"""Functions of random numbers, drawn once and as torch draws them, so that seeds mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.rules.registry import Jvp, composite, rule

aten = torch.ops.aten
_ALPHA = 1.7580993408473766  # scale times alpha of SELU, Klambauer et al. 2017


def _dropout(function: Callable[..., Any]) -> None:
    """Linear once the mask is drawn."""

    @composite(function)
    def dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        mask = function(torch.ones_like(input), p, training)
        return input.mul_(mask) if inplace else input * mask


for _function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout):
    _dropout(_function)


def _alpha_dropout(function: Callable[..., Any]) -> None:
    """Affine once the mask is drawn: what it makes of zeros is the shift, and tells the mask."""

    @composite(function)
    def alpha_dropout(
        input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        shift = function(torch.zeros_like(input), p, training)
        scale = 0.0 if p == 1 else ((_ALPHA**2 * p + 1) * (1 - p)) ** -0.5
        mask = (shift > 0).to(input.dtype) * scale
        return input.mul_(mask).add_(shift) if inplace else input * mask + shift


for _function in (F.alpha_dropout, F.feature_alpha_dropout):
    _alpha_dropout(_function)


@rule(F.rrelu)
def rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Jvp]:
    slopes = torch.empty_like(input)
    options = (lower, upper, training)
    y = aten.rrelu_with_noise(input, slopes, *options)
    return y, lambda dx: aten.rrelu_with_noise_backward(dx, input, slopes, *options, False)
