"""Dual numbers through the hooks of torch's own that mark where a backward begins or ends.

``register_full_backward_hook``, DDP and FSDP2 pass tensors through an autograd.Function that is the
identity. Such a function takes plain tensors, so duals are opened before it and closed after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tangentfast._torch import ddp_module, identity_functions
from tangentfast.dual import Dual, plain, wrap


def carry_duals() -> None:
    """Teach the identities of torch what to do with dual numbers, once each."""
    for function in identity_functions():
        if not hasattr(function.apply, "carries_duals"):
            function.apply = staticmethod(_carrying(function.apply))
    ddp = ddp_module()
    if ddp is not None and not hasattr(ddp._find_tensors, "carries_duals"):
        ddp._find_tensors = _finding_primals(ddp._find_tensors)


def _finding_primals(original: Callable[..., Any]) -> Callable[..., Any]:
    """find_unused_parameters walks the graph of what it finds: a handle has none."""

    def find_tensors(output: Any) -> list[Any]:
        return [plain(x) for x in original(output)]

    find_tensors.carries_duals = True  # type: ignore[attr-defined]
    return find_tensors


def _carrying(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        first = next((a for a in args if type(a) is Dual), None)
        if first is None:
            return original(*args)
        ys = original(*[plain(a) for a in args])
        given = [a for a in args if isinstance(a, Tensor)]
        closed = tuple(
            wrap(y, x.tangents, first.owner, args) if type(x) is Dual else y
            for x, y in zip(given, ys if isinstance(ys, tuple) else (ys,), strict=True)
        )
        return closed if isinstance(ys, tuple) else closed[0]

    apply.carries_duals = True  # type: ignore[attr-defined]
    return apply


def sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a module of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
