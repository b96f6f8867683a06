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


@composite(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, itself=True)
def dropout(
    function: Callable[..., Any],
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Linear once the mask is drawn."""
    if not training or p == 0:
        return input
    mask = function(torch.ones_like(input), p, training)
    return input.mul_(mask) if inplace else input * mask


@composite(F.alpha_dropout, F.feature_alpha_dropout, itself=True)
def alpha_dropout(
    function: Callable[..., Any],
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Affine once the mask is drawn: what it makes of zeros is the shift, and tells the mask."""
    if not training or p == 0:
        return input
    shift = function(torch.zeros_like(input), p, training)
    scale = 0.0 if p == 1 else ((_ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    mask = (shift > 0).to(input.dtype) * scale
    return input.mul_(mask).add_(shift) if inplace else input * mask + shift


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
