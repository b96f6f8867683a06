"""FSDP2: dual numbers through the hooks of ``fully_shard``.

Before a sharded block runs, FSDP2 passes its inputs through an autograd.Function that is the
identity and marks where the block's backward ends. Such a function takes plain tensors and returns
plain tensors, so the duals are opened before that hook and closed after it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tangentfast.dual import Dual, wrap
from tangentfast.passes import current


def _sharded(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was applied to."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def keep_duals(model: nn.Module) -> bool:
    """Add the two hooks to every sharded module, once each; whether there is one."""
    sharded = _sharded(model)
    for module in sharded:
        if "_opens_duals" not in module.__dict__:
            module.__dict__["_opens_duals"] = True
            tangents: list[list[Any]] = []  # a stack: the same block may be called inside itself
            module.register_forward_pre_hook(_opener(tangents), prepend=True, with_kwargs=True)
            module.register_forward_pre_hook(_closer(tangents), with_kwargs=True)
    return bool(sharded)


def _opener(stack: list[list[Any]]) -> Any:
    def open_duals(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        stack.append([x.tangents if type(x) is Dual else None for x in leaves])
        return tree_unflatten([x.primal if type(x) is Dual else x for x in leaves], spec)

    return open_duals


def _closer(stack: list[list[Any]]) -> Any:
    def close_duals(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        pass_, tangents = current(), stack.pop()
        closed = [
            x if t is None or pass_ is None else wrap(x, t[: pass_.k], pass_)
            for x, t in zip(leaves, tangents, strict=True)
        ]
        return tree_unflatten(closed, spec)

    return close_duals
