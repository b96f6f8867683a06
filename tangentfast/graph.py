"""What a tensor was computed from, read off its autograd graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def origins(tensor: Tensor, seen: set[Any]) -> list[Tensor]:
    """The leaves that require grad behind `tensor`, but for those behind the nodes in `seen`.

    `seen` grows by every node visited, so that a graph is walked once however often it is asked.
    """
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    leaves, stack = [], [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        stack += [n for n, _ in node.next_functions if n is not None]
    return leaves
