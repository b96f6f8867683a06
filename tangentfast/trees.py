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


def tree_map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with every tensor x replaced by f(x).

    Objects that hold a tensor are copied, not written to; what holds none is returned as it is.
    """
    return _map(f, tree, {})


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in `tree`."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    tree_map(note, tree)
    return found


def _map(f: Callable[[Tensor], Any], tree: Any, seen: dict[int, Any]) -> Any:
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return _leaf(f, tree, seen)
    mapped = [_leaf(f, x, seen) for x in leaves]
    if all(a is b for a, b in zip(leaves, mapped, strict=True)):
        return tree
    return tree_unflatten(mapped, spec)


def _leaf(f: Callable[[Tensor], Any], x: Any, seen: dict[int, Any]) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, _ATOMS) or callable(x):
        return x
    if id(x) not in seen:
        seen[id(x)] = x  # met again inside itself, it stays
        if len(seen) <= _MOST:
            seen[id(x)] = _opened(f, x, seen)
    return seen[id(x)]


def _opened(f: Callable[[Tensor], Any], x: Any, seen: dict[int, Any]) -> Any:
    """An object that pytree does not open: subclasses of containers, attributes, slots."""
    if isinstance(x, tuple):  # a subclass: torch.Size, torch.return_types
        items = [_map(f, e, seen) for e in x]
        return x if all(a is b for a, b in zip(x, items, strict=True)) else type(x)(items)
    inside: dict[Any, Any] = {}
    if isinstance(x, dict):
        inside = {("item", k): v for k, v in x.items()}
    elif isinstance(x, list):
        inside = {("item", k): v for k, v in enumerate(x)}
    for name in [*getattr(x, "__dict__", ()), *_slots(x)]:
        if hasattr(x, name):
            inside["attribute", name] = getattr(x, name)
    mapped = {key: _map(f, value, seen) for key, value in inside.items()}
    changed = {key: value for key, value in mapped.items() if value is not inside[key]}
    if not changed:
        return x
    y = copy.copy(x)
    for (kind, name), value in changed.items():
        if kind == "item":
            y[name] = value
        else:
            object.__setattr__(y, name, value)  # frozen dataclasses, too
    return y


def _slots(x: Any) -> list[str]:
    names: list[str] = []
    for cls in type(x).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [n for n in names if n not in ("__dict__", "__weakref__")]
