"""The arguments of a call on dual numbers: their primals, checked, and their tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast._torch import version
from tangentfast.dual import Dual, name_of, rebuild
from tangentfast.graph import origins
from tangentfast.passes import Pass
from tangentfast.rules.registry import Row

# Types of arguments that neither are tensors nor hold any.
_CONSTANTS = {int, float, bool, str, type(None), slice, type(...), torch.dtype, torch.device}


def opened(
    func: Callable[..., Any], args: Sequence[Any], pass_: Pass
) -> tuple[list[Any], list[Row]]:
    """The primals of the arguments, checked, and for each of the K tangents those of all."""
    # Loops, not comprehensions: every operation comes by here.
    none: Sequence[Any] = (None,) * pass_.k
    primals: list[Any] = []
    columns: list[Sequence[Any]] = []
    for x in args:
        column = none
        kind = type(x)
        if kind is Dual:
            primal = x.primal
            if x.owner is not pass_ or x.version != version(primal):
                _check_current(func, x, pass_)
            if none:
                column = x.tangents
            x = primal
        elif kind not in _CONSTANTS and not _holds_constants(x):
            if isinstance(x, (tuple, list)):
                column = [_tangent(x, k) for k in range(pass_.k)]
            x = primal_of(func, x, pass_)
        primals.append(x)
        columns.append(column)
    rows: list[Row] = []
    for row in zip(*columns):  # noqa: B905
        rows.append(row if any_tangent(row) else None)
    return primals, rows


def any_tangent(row: Sequence[Any]) -> bool:
    """Whether a row of tangents has one."""
    for dx in row:  # noqa: SIM110 (a generator costs more than the loop)
        if dx is not None:
            return True
    return False


def _holds_constants(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and _CONSTANTS.issuperset(map(type, x))


def primal_of(func: Callable[..., Any], x: Any, pass_: Pass) -> Any:
    """What an argument of `func`, or all within it, stands for; checked."""
    if type(x) is Dual:
        _check_current(func, x, pass_)
        return x.primal
    if isinstance(x, Tensor):
        if pass_.strict and x.requires_grad:
            return constant(x, pass_, name_of(func))
    elif isinstance(x, (tuple, list)) and not _holds_constants(x):
        return rebuild(x, [primal_of(func, e, pass_) for e in x])
    return x


def _tangent(x: Any, k: int) -> Any:
    """The k-th tangent of an argument; None where nothing in it has one."""
    if type(x) is Dual:
        return x.tangents[k]
    if isinstance(x, (tuple, list)):
        row = [_tangent(e, k) for e in x]
        return row if any_tangent(row) else None
    return None


def _check_current(func: Callable[..., Any], x: Dual, pass_: Pass) -> None:
    """Refuse a tangent of another forward, and one that a write has made wrong."""
    if not pass_.k:
        return  # the replay has no tangents that could be wrong
    if x.owner is not pass_:
        raise RuntimeError(
            f"{name_of(func)} got a tensor of an earlier, finished forward; its tangent "
            "belongs to that one. Detach what you keep between forwards (caches: "
            "use_cache=False)."
        )
    if x.version != version(x.primal):
        raise RuntimeError(
            f"{name_of(func)} in {pass_.where()} got a tensor whose memory was "
            "written in place through another tensor (a view, detach() or no_grad), so that "
            "its tangent is out of date. Clone it before that write."
        )


def any_complex(xs: Sequence[Any]) -> bool:
    """Whether there is a complex tensor among these, or within one of them."""
    for x in xs:
        if isinstance(x, Tensor):
            if x.is_complex():
                return True
        elif isinstance(x, (tuple, list)) and any_complex(x):
            return True
    return False


def constant(x: Tensor, pass_: Pass, what: str) -> Tensor:
    """A plain tensor that requires grad in a strict pass, cut off: it must depend on no tangent.

    `what` names the function that got it, or the output that it is once the forward has ended.

    Raises:
        RuntimeError: it was computed from one past the rules.
    """
    for leaf in origins(x, pass_.graph) if pass_.k else ():  # a replay repeats what was checked
        owner = None
        if type(leaf) is not Dual and pass_.root is not None and pass_.anchors is not None:
            owner = _owner(pass_.root, leaf)
        if owner is None and not lost(leaf, pass_):
            continue
        where = f" in {pass_.where()}" if pass_.active else ""
        if owner is not None and not hasattr(owner._parameters, "taus"):
            raise RuntimeError(
                f"{what}{where} met a parameter of {type(owner).__name__} that requires grad and "
                "has no τ. Expected the modules that were linearized: linearize again after "
                "replacing one, or freeze it."
            )
        raise RuntimeError(
            f"{what}{where} got a tensor that depends on the trained parameters but has lost its "
            "tangent. Expected every such tensor to be computed by torch functions in this "
            "forward. A custom autograd.Function or a tensor kept from an earlier forward does "
            "this: replace it by torch functions, or detach it."
        )
    return x.detach()


def lost(leaf: Tensor, pass_: Pass) -> bool:
    """Whether what was computed from `leaf` should have a tangent and has none."""
    return type(leaf) is Dual or id(leaf) in pass_.moving


def _owner(root: nn.Module, leaf: Tensor) -> nn.Module | None:
    """The module that `leaf` is a parameter of."""
    for module in root.modules():
        if any(parameter is leaf for parameter in dict.values(module._parameters)):
            return module
    return None
