"""Dual numbers (y, dy): tensors that carry K tangents through ordinary PyTorch code.

A `Dual` is a handle: an alias of its primal that intercepts every torch call through
``__torch_function__``, above autograd; `dispatch` decides what becomes of it, and sets that method.
Only primals are passed on, so that whatever autograd saves is a plain tensor and a tangent dies
with the last handle that carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tangentfast._torch import subclassed, version
from tangentfast.passes import Pass


class Dual(Tensor):
    """A tensor with its tangents.

    `primal`: the plain tensor; `tangents`: K plain tensors, or None where one is zero; `owner`: the
    pass it belongs to; `version`: that of its memory when the tangents were right.
    """

    primal: Tensor
    tangents: tuple[Tensor | None, ...]
    owner: Pass
    version: int
    parameter: Tensor | None = None  # that it stands for, and
    place: tuple[int, str] | None = None  # where it was read

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An operation that came past ``__torch_function__``, where the tangent cannot follow."""
        dual = next((a for a in args if type(a) is Dual), None)
        raise RuntimeError(
            f"{func} in {dual.owner.where() if dual is not None else 'a linearized model'} got a "
            "tensor that carries a tangent past torch's Python functions: a torch.func transform "
            "(grad, vjp, vmap, ...), a scripted or traced function, or a legacy constructor does "
            "this. Replace it by ordinary torch functions in this forward, or apply torch.func.jvp "
            "to the original function, which composes with the other transforms."
        )

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The primal's; None for a parameter, which is a leaf to whoever asks."""
        return self.primal.grad_fn if self.parameter is None else None

    @property
    def _is_param(self) -> bool:  # type: ignore[override]
        """What isinstance(x, nn.Parameter) asks of a subclass of Tensor."""
        return self.parameter is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError(
            "deepcopy of a tensor that carries a tangent is not supported; use clone()"
        )

    def begin(self, primal: Tensor, tangents: Sequence[Tensor | None], pass_: Pass) -> None:
        """Give the handle what it stands for."""
        self.primal = primal
        self.tangents = tuple(tangents)
        self.owner = pass_
        self.version = version(primal)
        if pass_.k:
            pass_.handles.add(self)


def make_dual(primal: Tensor, tangents: Sequence[Tensor | None], pass_: Pass) -> Dual:
    """The handle of a plain `primal`; each tangent has its shape and dtype."""
    # A leaf that requires grad: what is computed from the handle itself, past the rules, has a
    # graph that leads to it. Torch marks no inference tensor.
    handle: Dual = subclassed(Dual, primal, not primal.is_inference())
    handle.begin(primal, tangents, pass_)
    return handle


def plain(x: Any) -> Any:
    """The primal of a dual number; anything else as it is."""
    return x.primal if type(x) is Dual else x


def like(y: Tensor, dy: Tensor | None) -> Tensor | None:
    """`dy` with the shape and dtype of `y`: broadcast operands and autocast change them."""
    if dy is None:
        return None
    if dy.dtype != y.dtype:
        dy = dy.to(y.dtype)
    return dy if dy.shape == y.shape else dy.expand(y.shape)


def wrap(y: Any, dys: Sequence[Any], pass_: Pass, given: Sequence[Any]) -> Any:
    """Pair the results of a function of the arguments `given` with their tangents."""
    if not isinstance(y, Tensor):
        return _wrap_each(y, dys, pass_, given)
    for x in given:
        if type(x) is Dual and x.primal is y:
            return x  # the function returned its argument: contiguous(), dropout in eval mode
    if not (y.is_floating_point() or y.is_complex()):
        return y
    moves = not pass_.k  # in a replay, which has no tangents, everything may
    tangents = []
    for dy in dys:
        if dy is not None:
            moves = True
            dy = like(y, dy)
        tangents.append(dy)
    if moves:
        return make_dual(y, tangents, pass_)
    if pass_.strict and y.requires_grad:
        y = y.detach()  # the derivative is zero; a graph would say otherwise to the checks
    return y


def _wrap_each(y: Any, dys: Sequence[Any], pass_: Pass, given: Sequence[Any]) -> Any:
    def wrapped(key: Any) -> Any:
        return wrap(y[key], [None if dy is None else dy[key] for dy in dys], pass_, given)

    if isinstance(y, (tuple, list)):
        return rebuild(y, [wrapped(i) for i in range(len(y))])
    if isinstance(y, dict):
        return type(y)({name: wrapped(name) for name in y})
    return y


def rebuild(old: Any, items: list[Any]) -> Any:
    """A list or (named) tuple like `old` with other items."""
    if isinstance(old, tuple) and hasattr(old, "_fields"):
        return type(old)(*items)
    return type(old)(items)


def name_of(func: Callable[..., Any]) -> str:
    """How messages call `func`."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):
        return f"Tensor.{getattr(func.__self__, '__name__', name)}"  # type: ignore[attr-defined]
    return name
