"""Writes in place on dual numbers: who shares the memory, and what their tangents become.

All handles whose primals share one memory are registered at its root tensor (torch's ``_base``).
After a write through one of them the tangents of the others follow. Where a tensor that is not
known here shares the memory, the write is refused, or the reader notices by the version counter.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangentfast._torch import base, storage_uses, subclassed, version


def _assign(x: Tensor, index: Any, value: Any) -> Tensor:
    """x with x[index] = value: the functional form of ``__setitem__``."""
    raise NotImplementedError  # only ever called through its rule


def _overwrite(x: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    """`value` in the shape and dtype of x: the functional form of ``copy_``."""
    raise NotImplementedError  # only ever called through its rule


def _forget(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x filled with constants: the functional form of ``zero_`` and of random fills."""
    raise NotImplementedError  # only ever called through its rule


def _fill(x: Tensor, value: Any) -> Tensor:
    """x filled with a number or a 0-dimensional tensor: the functional form of ``fill_``."""
    raise NotImplementedError  # only ever called through its rule


FORMS: dict[str, Callable[..., Any]] = {
    "__setitem__": _assign,
    "copy_": _overwrite,
    "fill_": _fill,
    **dict.fromkeys(("zero_", "uniform_", "normal_", "bernoulli_", "random_"), _forget),
    **dict.fromkeys(("exponential_", "geometric_", "cauchy_", "log_normal_"), _forget),
}
# These change what the tensor is, not what it holds: nothing sensible can be said of tangents.
_REFUSED = {
    "set_",
    "resize_",
    "resize_as_",
    "t_",
    "transpose_",
    "unsqueeze_",
    "squeeze_",
    "swapaxes_",
}


@cache
def functional_of(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The functional form of a function that writes to its first argument; None for others."""
    name = getattr(func, "__name__", "")
    if name in FORMS:
        return FORMS[name]
    if (
        not name.endswith("_")
        or name.startswith("_")
        or name in ("requires_grad_", "share_memory_")
    ):
        return None
    if name not in _REFUSED:
        for room in (Tensor, torch, F):
            if hasattr(room, name) and hasattr(room, name[:-1]):
                return getattr(room, name[:-1])
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
    found = _inplace_at(func)
    if found is None:
        return None
    call = found[0].bind(*args, **kwargs)
    call.apply_defaults()
    values = list(call.arguments.values())
    if not values[found[1]]:
        return None
    values[found[1]] = False
    return values, found[1]


class _Ref(weakref.ref[Any]):
    """A weak reference that leaves its group when the handle dies."""

    __slots__ = ("group",)
    group: dict[int, _Ref]

    def leave(self) -> None:
        self.group.pop(id(self), None)


class Sharers:
    """The handles of one pass, by the memory their primals read: the root they are views of."""

    def __init__(self) -> None:
        self._by_root: dict[int, dict[int, _Ref]] = {}

    def add(self, handle: Any) -> None:
        """Remember `handle` for as long as it lives."""
        group = self._by_root.setdefault(id(base(handle.primal)), {})
        ref = _Ref(handle, _Ref.leave)
        ref.group = group
        group[id(ref)] = ref

    def clear(self) -> None:
        """Forget every handle."""
        for group in self._by_root.values():
            group.clear()

    def alive(self) -> bool:
        """Whether any handle is still held by anyone."""
        return any(self._by_root.values())

    def of(self, tensor: Tensor) -> list[Any]:
        """The live handles that share memory with `tensor`."""
        root = base(tensor)
        group = self._by_root.get(id(root))
        if not group:
            return []
        handles = [ref() for ref in group.values()]
        # an id may be that of a tensor that died; its handles had another root
        return [h for h in handles if h is not None and base(h.primal) is root]


def check(target: Tensor, primal: Tensor, dual: Any, name: str, pass_: Any) -> None:
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
    if type(target) is dual or type(root) is dual or pass_.sharers.of(root):
        return
    # A plain tensor takes a tangent. Its holders: itself, the base of a view, and the storage
    # object asked here. Any other holder would keep reading it as a constant.
    if storage_uses(primal) > 2 + (root is not primal):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes a tensor with a tangent into memory that another "
            "plain tensor shares, which would not see the tangent. Clone the target before it is "
            "shared."
        )


def commit(
    target: Any, primal: Tensor, tangents: Sequence[Tensor | None], dual: Any, pass_: Any
) -> None:
    """After the write: give `target` its tangents, and its sharers what became of theirs."""
    root = base(primal)
    if type(target) is not dual:
        known = pass_.sharers.of(root)
        if all(t is None for t in tangents) and not known:
            return  # constants were written to a constant
        if root is not target and not known:
            _upgrade(root, dual, pass_)
        _upgrade(target, dual, pass_)
        primal = target.primal
        root = base(primal)
    target.tangents = tuple(tangents)
    for handle in pass_.sharers.of(root):
        if handle is not target:
            handle.tangents = tuple(
                _follow(root, primal, handle.primal, new, old)
                for new, old in zip(tangents, handle.tangents, strict=True)
            )
        handle.version = version(handle.primal)


def _upgrade(plain: Tensor, dual: Any, pass_: Any) -> None:
    """Turn the tensor object that the caller holds into a dual number with no tangent yet."""
    primal = subclassed(dual, plain, not plain.is_inference())
    try:
        torch.utils.swap_tensors(plain, primal)
    except RuntimeError:  # it has views or is one: the object becomes a handle without its marks
        primal = plain.as_subclass(Tensor)
        plain.__class__ = dual
    plain.begin(primal, (None,) * pass_.k, pass_)  # type: ignore[attr-defined]


def lower(handle: Any) -> None:
    """Undo `_upgrade`: the object that the caller holds is plain again, with what was written."""
    primal = handle.primal
    handle.owner.sharers.clear()  # its pass is over; torch swaps no tensor that is referred to
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
