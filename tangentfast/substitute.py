"""A module that has other tensors for its parameters, for a while, wherever it keeps them.

Unlike ``torch.func.functional_call`` by module object and not by name, so that a module that stands
under two names comes out as it was; and with a note of what was read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast.anchor import theta0_of
from tangentfast.leftovers import INTERNAL, modules
from tangentfast.trees import tensors, tree_map


class _Substitutes(dict[str, Any]):
    """The ``_parameters`` of a module; notes in `read` which originals were asked for."""

    def __init__(self, originals: dict[str, Any], table: dict[int, Tensor], read: set[int]):
        super().__init__({name: table.get(id(p), p) for name, p in originals.items()})
        self.originals, self.read = originals, read

    def __getitem__(self, name: str) -> Any:
        self.read.add(id(self.originals.get(name)))
        return dict.__getitem__(self, name)

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


@contextlib.contextmanager
def substituted(root: nn.Module | None, table: dict[int, Tensor], read: set[int]) -> Iterator[None]:
    """Inside, each parameter p of a module in `root` is ``table[id(p)]``, where that is there.

    `read` gets the identities of the parameters that were read.
    """
    undo: list[tuple[nn.Module, str, Any]] = []

    def put(module: nn.Module, attribute: str, value: Any) -> None:
        undo.append((module, attribute, module.__dict__[attribute]))
        module.__dict__[attribute] = value

    try:
        for module in modules(root) if table and root is not None else ():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            originals = theta0_of(module)
            if any(id(p) in table for p in originals.values()):
                put(module, "_parameters", _Substitutes(originals, table, read))
            for attribute, value in list(module.__dict__.items()):  # the list of a recurrent layer
                if attribute not in INTERNAL and isinstance(value, (list, tuple, dict)):
                    replaced = {id(x) for x in tensors(value)} & table.keys()
                    if replaced:
                        read |= replaced
                        put(module, attribute, tree_map(lambda x: table.get(id(x), x), value))
        yield
    finally:
        for module, attribute, value in reversed(undo):
            module.__dict__[attribute] = value
