"""The exact fallback: differentiate one call with ``torch.func.jvp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_TENSOR = object()  # where a tensor goes in a structure


def random_state(device: torch.device) -> Callable[[], None]:
    """A function that brings the random generator of `device` back to where it is now."""
    if device.type == "cuda":
        seen = torch.cuda.get_rng_state(device)
        return lambda: torch.cuda.set_rng_state(seen, device)
    seen = torch.get_rng_state()
    return lambda: torch.set_rng_state(seen)


def fallback(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    k: int,
    dual: type,
    primal: Callable[[Any], Any],
) -> tuple[Any, list[Any]]:
    """y, with its graph, and its K tangents.

    The function is evaluated once for the first tangent, primal and tangent together, and again for
    each further one with the random state of the first, so that a random function stays one
    function. Raises what ``torch.func.jvp`` raises where the function has no forward derivative.
    """
    leaves, spec = tree_flatten((tuple(args), kwargs))
    plain = [primal(x) for x in leaves]
    duals = [i for i, x in enumerate(leaves) if type(x) is dual]

    def call(values: list[Any]) -> Any:
        a, kw = tree_unflatten(values, spec)
        return func(*a, **kw)

    y: Any = None
    dys: list[Any] = []
    replay = random_state(
        next((x.device for x in plain if isinstance(x, Tensor)), torch.device("cpu"))
    )
    for j in range(k):
        active = [i for i in duals if leaves[i].tangents[j] is not None]
        if not active:
            dys.append(None)
            continue
        replay()
        with torch.set_grad_enabled(y is None):
            found, dy = _jvp(call, plain, active, [leaves[i].tangents[j] for i in active])
        y = found if y is None else y
        dys.append(dy)
    return (call(plain) if y is None else y), dys


def _jvp(
    call: Callable[[list[Any]], Any], plain: list[Any], active: list[int], tangents: list[Tensor]
) -> tuple[Any, Any]:
    structure: dict[str, Any] = {}

    def tensors_of(*xs: Tensor) -> tuple[Tensor, ...]:
        values = list(plain)
        for i, x in zip(active, xs, strict=True):
            values[i] = x
        leaves, structure["spec"] = tree_flatten(call(values))
        structure["leaves"] = [_TENSOR if isinstance(y, Tensor) else y for y in leaves]
        return tuple(y for y in leaves if isinstance(y, Tensor))

    ys, dys = torch.func.jvp(  # type: ignore[misc]
        tensors_of, tuple(plain[i] for i in active), tuple(tangents)
    )
    return _fill(structure, ys), _fill(structure, [dy.detach() for dy in dys], tangent=True)


def _fill(structure: dict[str, Any], tensors: Sequence[Tensor], tangent: bool = False) -> Any:
    rest = iter(tensors)
    leaves = [next(rest) if y is _TENSOR else (None if tangent else y) for y in structure["leaves"]]
    return tree_unflatten(leaves, structure["spec"])
