"""Writes in place on dual numbers: who shares the memory, and what their tangents become.

`Handles` knows all handles whose primals share one memory, by its root tensor (torch's ``_base``).
After a write through one of them the tangents of the others follow. Where a tensor that is not
known here shares the memory, the write is refused, or the reader notices by the version counter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentfast._torch import base, storage_uses, subclassed, version
from tangentfast.dual import Dual
from tangentfast.passes import Pass

# These change what the tensor is, not what it holds: nothing sensible can be said of tangents.
_REFUSED = {"set_", "resize_", "resize_as_", "t_", "transpose_", "unsqueeze_", "squeeze_"}
_REFUSED |= {"swapaxes_"}


@cache
def functional_of(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """``torch.f`` for a function ``f_`` that writes to its first argument; None for others."""
    name = getattr(func, "__name__", "")
    if (
        not name.endswith("_")
        or name.startswith("_")
        or name in ("requires_grad_", "share_memory_")
    ):
        return None
    if name not in _REFUSED:
        for namespace in (Tensor, torch, F):
            if hasattr(namespace, name) and hasattr(namespace, name[:-1]):
                return getattr(namespace, name[:-1])
    raise NotImplementedError(
        f"{name}: a write in place without a functional form cannot carry a tangent; "
        f"use {name[:-1]} and assign its result."
    )


@cache
def _inplace_at(func: Callable[..., Any]) -> tuple[inspect.Signature, int] | None:
    """The signature of a Python function with an argument `inplace`, and where that stands."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # not written in Python
        return None
    names = list(signature.parameters)
    return (signature, names.index("inplace")) if "inplace" in names else None


def bound(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], int] | None:
    """For a call with ``inplace=True`` its arguments by position with False there, and where."""
    place = _inplace_at(func)
    if place is None:
        return None
    call = place[0].bind(*args, **kwargs)
    call.apply_defaults()
    values = list(call.arguments.values())
    if not values[place[1]]:
        return None
    values[place[1]] = False
    return values, place[1]


def check(target: Tensor, primal: Tensor, name: str, pass_: Pass) -> None:
    """Refuse, before anything is written, what could not be followed."""
    if 0 in primal.stride() and any(
        s == 0 and n > 1 for s, n in zip(primal.stride(), primal.shape, strict=True)
    ):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes to an expanded tensor; clone it first."
        )
    root = base(primal)
    if isinstance(root, nn.Parameter):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes to a parameter in place; a pass on dual numbers "
            "leaves parameters as they are. Write to a clone."
        )
    if type(target) is Dual or type(root) is Dual or pass_.handles.of(root):
        return
    # A plain tensor takes a tangent. Its holders: itself, the base of a view, and the storage
    # object asked here. Any other holder would keep reading it as a constant.
    if storage_uses(primal) > 2 + (root is not primal):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes a tensor with a tangent into memory that another "
            "plain tensor shares, which would not see the tangent. Clone the target before it is "
            "shared."
        )


def commit(target: Any, primal: Tensor, tangents: Sequence[Tensor | None], pass_: Pass) -> None:
    """After the write: give `target` its tangents, and its sharers what became of theirs."""
    root = base(primal)
    if type(target) is not Dual:
        known = pass_.handles.of(root)
        if all(t is None for t in tangents) and not known:
            return  # constants were written to a constant
        if root is not target and not known:
            _upgrade(root, pass_)
        _upgrade(target, pass_)
        primal = target.primal
        root = base(primal)
    target.tangents = tuple(tangents)
    for handle in pass_.handles.of(root):
        if handle is not target:
            handle.tangents = tuple(
                _follow(root, primal, handle.primal, new, old)
                for new, old in zip(tangents, handle.tangents, strict=True)
            )
        handle.version = version(handle.primal)


def _upgrade(plain: Tensor, pass_: Pass) -> None:
    """Turn the tensor object that the caller holds into a dual number with no tangent yet."""
    primal = subclassed(Dual, plain, not plain.is_inference())
    try:
        torch.utils.swap_tensors(plain, primal)
    except RuntimeError:  # it has views or is one: the object becomes a handle without its marks
        primal = plain.as_subclass(Tensor)
        plain.__class__ = Dual
    plain.begin(primal, (None,) * pass_.k, pass_)  # type: ignore[attr-defined]


def lower(handle: Any) -> None:
    """Undo `_upgrade`: the object that the caller holds is plain again, with what was written."""
    primal = handle.primal
    handle.owner.handles.clear()  # its pass is over; torch swaps no tensor that is referred to
    if base(primal) is not primal:
        handle.__class__ = Tensor
        handle.__dict__.clear()
    else:
        torch.utils.swap_tensors(handle, primal)
        primal.__dict__.clear()  # it held itself
        handle.detach_()  # what was written came from this pass, which is over


def _follow(
    root: Tensor, written: Tensor, reader: Tensor, new: Tensor | None, old: Tensor | None
) -> Tensor | None:
    """The tangent of `reader` after `written`, of the same memory, took the tangent `new`."""
    if new is None and old is None:
        return None
    start = min(written.storage_offset(), reader.storage_offset())
    stop = max(_end(written), _end(reader))
    memory = torch.zeros(stop - start, dtype=root.dtype, device=root.device)

    def region(t: Tensor) -> Tensor:
        return memory.as_strided(t.shape, t.stride(), t.storage_offset() - start)

    if old is not None:
        region(reader).copy_(old)
    if new is not None:
        region(written).copy_(new)
    else:
        region(written).zero_()
    return region(reader).clone()


def _end(t: Tensor) -> Any:
    if t.numel() == 0:
        return t.storage_offset()
    return (
        1 + t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    )
