"""Tensors inside any structure: pytrees, subclasses of containers, dataclasses, other objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_ATOMS = (int, float, complex, bool, str, bytes, type(None), type, nn.Module, ModuleType)
_MOST = 10_000  # objects looked into: an argument may lead to half the program


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in `tree`."""
    collected: list[Tensor] = []
    _collect(tree, collected, set())
    return collected


def tree_map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with every tensor x replaced by f(x).

    Objects that hold a tensor are copied, not written to; those that hold none stay as they are.
    """
    return _map(f, tree, {})


def _collect(tree: Any, collected: list[Tensor], seen: set[int]) -> None:
    for x in tree_flatten(tree)[0]:
        if isinstance(x, Tensor):
            collected.append(x)
        elif not _atomic(x) and id(x) not in seen and len(seen) < _MOST:
            seen.add(id(x))
            for value in _inside(x).values():
                _collect(value, collected, seen)


def _map(f: Callable[[Tensor], Any], tree: Any, copies: dict[int, Any]) -> Any:
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return _mapped(f, tree, copies)
    return tree_unflatten([_mapped(f, x, copies) for x in leaves], spec)


def _mapped(f: Callable[[Tensor], Any], x: Any, copies: dict[int, Any]) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    if _atomic(x) or not tensors(x):
        return x
    if id(x) in copies:
        return copies[id(x)]
    if isinstance(x, tuple):  # a subclass, as torch.return_types are
        return type(x)([_map(f, e, copies) for e in x])
    copies[id(x)] = y = copy.copy(x)
    for (kind, name), value in _inside(x).items():
        new = _map(f, value, copies)
        if kind == "item":
            y[name] = new
        elif new is not value:
            object.__setattr__(y, name, new)  # frozen dataclasses, too
    return y


def _atomic(x: Any) -> bool:
    return isinstance(x, _ATOMS) or callable(x)


def _inside(x: Any) -> dict[tuple[str, Any], Any]:
    """What an object holds that pytree does not open: items, attributes and slots."""
    inside: dict[tuple[str, Any], Any] = {}
    if isinstance(x, dict):
        inside = {("item", k): v for k, v in x.items()}
    elif isinstance(x, (list, tuple)):
        inside = {("item", k): v for k, v in enumerate(x)}
    for name in [*getattr(x, "__dict__", ()), *_slots(type(x))]:
        if hasattr(x, name):
            inside["attribute", name] = getattr(x, name)
    return inside


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [n for n in names if n not in ("__dict__", "__weakref__")]
