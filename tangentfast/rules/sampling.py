"""Sampling an image at points: linear in the image, and smooth in the points.

torch's backward by the points sums over the channels. Given every channel as an image of its own it
does not, and what it returns for a gradient of ones is the slope of each sample along each axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.rules.registry import Jvp, rule

MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
PADDING = {"zeros": 0, "border": 1, "reflection": 2}
aten = torch.ops.aten


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> tuple[Tensor, Jvp, Jvp]:
    """input [N, C, *image], grid [N, *points, 2 or 3], y [N, C, *points]."""
    options = (interpolation_mode, padding_mode, align_corners)
    y = torch.grid_sampler(input, grid, *options)
    slopes: list[Tensor] = []  # [N, C, *points, 2 or 3], made for the first tangent of the grid

    def moved(dgrid: Tensor) -> Tensor:
        if not slopes:
            slopes.append(_slopes(input.to(y.dtype), grid.to(y.dtype), options))
        return (slopes[0] * dgrid.unsqueeze(1)).sum(-1)

    return y, lambda dinput: torch.grid_sampler(dinput, grid, *options), moved


def _slopes(input: Tensor, grid: Tensor, options: tuple[int, int, bool]) -> Tensor:
    n, c = input.shape[:2]
    alone = input.detach().reshape(n * c, 1, *input.shape[2:])
    points = grid.detach().repeat_interleave(c, 0)
    backward = aten.grid_sampler_2d_backward if grid.dim() == 4 else aten.grid_sampler_3d_backward
    ones = input.new_ones(n * c, 1, *grid.shape[1:-1])
    _, slopes = backward(ones, alone, points, *options, [False, True])
    return slopes.view(n, c, *grid.shape[1:])


@rule(F.grid_sample)
def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> tuple[Tensor, Jvp, Jvp] | None:
    if mode not in MODES or padding_mode not in PADDING:
        return None  # torch has an error for it
    return grid_sampler(input, grid, MODES[mode], PADDING[padding_mode], bool(align_corners))
