"""Parts of one tensor whose gradients come as parts of one tensor.

torch's backward of unbind stacks its gradients: a copy, and another where the stack is not in the
order that the product before wants. Those that attention gives lie beside each other already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.contract import plain


def unbind_packed(x: Tensor) -> tuple[Tensor, ...]:
    """``x.unbind(0)``, the gradient of which is a view of its parts' where they lie as x does."""
    if not x.requires_grad or not torch.is_grad_enabled() or plain(x):
        return x.unbind(0)
    parts: tuple[Tensor, ...] = _Unbind.apply(x)
    return parts


def together(parts: Any) -> Tensor | None:
    """The tensor that ``unbind(0)`` would give these parts of; None where they are of none."""
    first = parts[0]
    if any(t is None for t in parts) or not all(same(first, t) for t in parts):
        return None
    starts = [t.storage_offset() for t in parts]
    step = starts[1] - starts[0] if len(parts) > 1 else 0
    if step <= 0 or starts != [starts[0] + i * step for i in range(len(parts))]:
        return None
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike but for where in their common memory they begin."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and (
        a.shape,
        a.stride(),
        a.dtype,
    ) == (b.shape, b.stride(), b.dtype)


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = None if torch.is_grad_enabled() else together(grads)
        return torch.stack(grads) if whole is None else whole
