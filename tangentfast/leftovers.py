"""What the modules of a model keep from one forward to the next, which must be no dual number.

Some models keep what they computed from parameters (timm's LeViT its attention biases, in
evaluation mode). After a pass such things are as they were before it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from tangentfast import inplace
from tangentfast.anchor import theta0_of
from tangentfast.dual import Dual
from tangentfast.trees import tensors

INTERNAL = set(nn.Module().__dict__)  # what every module has


class Leftovers:
    """The attributes of all modules of `root` as they are now."""

    def __init__(self, root: nn.Module):
        self._root = root
        self._before = []
        for module in modules(root):
            own = module.__dict__
            containers = {}
            for name in own.keys() - INTERNAL:
                if isinstance(own[name], (dict, list, set)):
                    containers[name] = copy.copy(own[name])
            self._before.append((module, dict(own), containers, dict(module._buffers)))

    def restore(self) -> None:
        """Put back what holds a dual number now."""
        for module, attributes, containers, buffers in self._before:
            for name, value in list(module._buffers.items()):
                if type(value) is Dual:
                    self._put(module._buffers, name, buffers)
            for name, value in list(module.__dict__.items()):
                if name in INTERNAL or not any(type(x) is Dual for x in tensors(value)):
                    continue
                if name not in containers or attributes[name] is not value:
                    self._put(module.__dict__, name, attributes)
                elif isinstance(value, list):
                    value[:] = containers[name]
                else:
                    value.clear()
                    value.update(containers[name])

    def _put(self, into: dict[str, Any], name: str, before: dict[str, Any]) -> None:
        if name not in before:
            del into[name]
            return
        into[name] = before[name]
        for x in tensors(before[name]):
            if type(x) is Dual:  # a plain tensor, written in place
                inplace.lower(x)

    def check_read(self, name: str) -> None:
        """Refuse parameter `name`, which has a tangent and was not read, where it may be cached.

        Raises:
            RuntimeError: with the attribute, of its module or of one around that, which held
                floating tensors before.
        """
        path = name.split(".")[:-1]
        around = [self._root]
        for step in path:
            around.append(around[-1]._modules[step])  # type: ignore[arg-type]
        for module, attributes, containers, _ in self._before:
            if not any(module is m for m in around):
                continue
            known = {id(t) for t in (*theta0_of(module).values(), *module._buffers.values())}
            for attribute in attributes.keys() - INTERNAL:
                held = tensors(containers.get(attribute, attributes[attribute]))
                if any(x.is_floating_point() and id(x) not in known for x in held):
                    raise RuntimeError(
                        f"{name!r} was not read in this forward, and a {type(module).__name__} "
                        f"keeps tensors of an earlier one in {attribute!r}, which have no tangent. "
                        "Expected an empty cache: model.train() followed by model.eval() empties "
                        "those of timm."
                    )


def modules(root: nn.Module) -> Iterator[nn.Module]:
    """Every module of the tree once; at a fraction of the cost of ``root.modules()``."""
    seen, stack = {id(root)}, [root]
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
