"""What the Triton ops ask of their operands, and of the device they are on.

As csrc/checks.h does for the C++ ones: a kernel that gets another shape or device reads memory that
is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

Given = Union["Tensor", Sequence["Tensor | None"], None]


def expect(
    op: str, device: torch.device, dtype: torch.dtype, **wanted: tuple[Given, Sequence[int]]
) -> None:
    """Each ``name=(tensor or tensors, shape)`` must have that shape, device and dtype.

    None fits anywhere. Several lists of tensors, one entry for each tangent, must be equally long.

    Raises:
        ValueError: one does not; the message names it.
    """
    lengths: dict[str, int] = {}
    for name, (given, shape) in wanted.items():
        if given is None or isinstance(given, Tensor):
            _expect(op, device, dtype, name, given, shape)
            continue
        lengths[name] = len(given)
        for k, t in enumerate(given):
            _expect(op, device, dtype, f"{name}[{k}]", t, shape)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: lists of tangents of different lengths {lengths}, expected equal.")


def _expect(
    op: str, device: torch.device, dtype: torch.dtype, name: str, t: Tensor | None,
    shape: Sequence[int],
) -> None:  # fmt: skip
    if t is None:
        return
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}.")
    if t.dtype != dtype or t.device != device:
        raise ValueError(f"{op}: {name} is {t.dtype} on {t.device}, expected {dtype} on {device}.")


def hopper(x: Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9.0 or later, with 227 KB of shared memory."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
