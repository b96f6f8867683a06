"""Parts of one tensor whose gradients come as parts of one tensor.

torch's backward of unbind stacks its gradients: a copy, and another where the stack is not in the
order that the product before wants. Those that attention gives lie beside each other already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.contract import plain


def unbind_packed(qkv: Tensor) -> tuple[Tensor, ...]:
    """``qkv.unbind(0)``, whose backward copies nothing where the gradients are parts of one tensor.

    Args:
        qkv: [3, ...].
    """
    if not qkv.requires_grad or not torch.is_grad_enabled() or plain(qkv):
        return qkv.unbind(0)
    parts: tuple[Tensor, ...] = _Unbind.apply(qkv)
    return parts


def together(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose ``unbind(0)`` these three are; None where they lie otherwise."""
    first, second, third = parts
    step = second.storage_offset() - first.storage_offset()
    if (
        step <= 0
        or third.storage_offset() - second.storage_offset() != step
        or not _lies(first) == _lies(second) == _lies(third)
    ):
        return None
    return first.as_strided((3, *first.shape), (step, *first.stride()))


def _lies(t: Tensor) -> tuple[Any, ...]:
    """Everything of how a tensor lies in memory but where it begins."""
    return t.untyped_storage().data_ptr(), t.shape, t.stride(), t.dtype, t.is_neg()


class _Unbind(torch.autograd.Function):
    """``x.unbind(0)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The parts, views of x."""
        return x.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """A view of the gradients, or their stack."""
        whole = None if torch.is_grad_enabled() else together(grads)
        return torch.stack(grads) if whole is None else whole
