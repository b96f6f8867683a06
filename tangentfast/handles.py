"""Who reads which memory: the live dual numbers of one pass."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor

from tangentfast._torch import base


class Handles:
    """The handles of one pass, by the memory their primals read: the root they are views of.

    Every operation adds one, and only a write in place asks for them: they are sorted then.
    """

    def __init__(self) -> None:
        self._unsorted: list[ref[Any]] = []
        self._by_root: dict[int, list[ref[Any]]] = {}
        self._sorted = 0  # how many have been
        self._limit = 1024  # of all, before the dead among them are dropped

    def add(self, handle: Any) -> None:
        """Remember `handle` for as long as it lives."""
        self._unsorted.append(ref(handle))
        if len(self._unsorted) + self._sorted > self._limit:
            self._unsorted = [r for r in self._all() if r() is not None]
            self._forget_order()
            self._limit = 1024 + 2 * len(self._unsorted)

    def clear(self) -> None:
        """Forget every handle."""
        self._unsorted.clear()
        self._forget_order()

    def alive(self) -> bool:
        """Whether any handle is still held by anyone."""
        return any(r() is not None for r in self._all())

    def of(self, tensor: Tensor) -> list[Any]:
        """The live handles that share memory with `tensor`."""
        unsorted, self._unsorted = self._unsorted, []  # another thread may add to it meanwhile
        for r in unsorted:
            if (handle := r()) is not None:
                self._by_root.setdefault(id(base(handle.primal)), []).append(r)
        self._sorted += len(unsorted)
        root = base(tensor)
        handles = [r() for r in self._by_root.get(id(root), ())]
        # an id may be that of a tensor that died; its handles had another root
        return [h for h in handles if h is not None and base(h.primal) is root]

    def _all(self) -> list[ref[Any]]:
        return [*self._unsorted, *(r for group in self._by_root.values() for r in group)]

    def _forget_order(self) -> None:
        self._by_root.clear()
        self._sorted = 0
