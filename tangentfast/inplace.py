"""Writes in place on dual numbers: who shares the memory, and what their tangents become.

All handles whose primals share one memory are registered at its root tensor (torch's ``_base``).
After a write through one of them the tangents of the others follow. Where a tensor that is not
known here shares the memory, the write is refused, or the reader notices by the version counter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    **dict.fromkeys(
        ("zero_", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_"),
        _forget,
    ),
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


def version(tensor: Tensor) -> int:
    """The counter of writes in place to the memory of `tensor` (0 where torch keeps none)."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor
        return 0


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
        group = self._by_root.setdefault(id(root_of(handle.primal)), {})
        ref = _Ref(handle, _Ref.leave)
        ref.group = group
        group[id(ref)] = ref

    def of(self, tensor: Tensor) -> list[Any]:
        """The live handles that share memory with `tensor`."""
        root = root_of(tensor)
        group = self._by_root.get(id(root))
        if not group:
            return []
        handles = [ref() for ref in group.values()]
        # an id may be that of a tensor that died; its handles had another root
        return [h for h in handles if h is not None and root_of(h.primal) is root]


def root_of(tensor: Tensor) -> Tensor:
    """The tensor whose memory `tensor` is a view of; itself if it is no view."""
    base = tensor._base
    return tensor if base is None else base


def check(target: Tensor, primal: Tensor, dual: type, name: str, pass_: Any) -> None:
    """Refuse, before anything is written, what could not be followed."""
    if 0 in primal.stride() and any(
        s == 0 and n > 1 for s, n in zip(primal.stride(), primal.shape, strict=True)
    ):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes to an expanded tensor; clone it first."
        )
    root = root_of(primal)
    if isinstance(root, nn.Parameter):
        raise RuntimeError(
            f"{name} in {pass_.where()} writes to a parameter in place; a pass on dual numbers "
            "leaves parameters as they are. Write to a clone."
        )
    if type(target) is dual or type(root) is dual or pass_.sharers.of(root):
        return
    # A plain tensor takes a tangent. Its holders: itself, the base of a view, and the storage
    # object asked here. Any other holder would keep reading it as a constant.
    storage = primal.untyped_storage()
    known = 2 + (root is not primal)
    if torch._C._storage_Use_Count(storage._cdata) > known:
        raise RuntimeError(
            f"{name} in {pass_.where()} writes a tensor with a tangent into memory that another "
            "plain tensor shares, which would not see the tangent. Clone the target before it is "
            "shared."
        )


def commit(
    target: Any, primal: Tensor, tangents: Sequence[Tensor | None], dual: type, pass_: Any
) -> None:
    """After the write: give `target` its tangents, and its sharers what became of theirs."""
    root = root_of(primal)
    if type(target) is not dual:
        known = pass_.sharers.of(root)
        if all(t is None for t in tangents) and not known:
            return  # constants were written to a constant
        if root is not target and not known:
            _upgrade(root, dual, pass_)
        _upgrade(target, dual, pass_)
    target.tangents = tuple(tangents)
    for handle in pass_.sharers.of(root):
        if handle is not target:
            handle.tangents = tuple(
                _follow(root, primal, handle.primal, new, old)
                for new, old in zip(tangents, handle.tangents, strict=True)
            )
        handle.version = version(handle.primal)


def _upgrade(plain: Tensor, dual: type, pass_: Any) -> None:
    """Turn the tensor object that the caller holds into a dual number with no tangent yet."""
    alias = plain.as_subclass(Tensor)
    plain.__class__ = dual
    plain.primal = alias  # type: ignore[attr-defined]
    plain.tangents = (None,) * pass_.k  # type: ignore[attr-defined]
    plain.owner = pass_  # type: ignore[attr-defined]
    plain.version = alias._version  # type: ignore[attr-defined]
    pass_.sharers.add(plain)


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
