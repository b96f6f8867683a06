"""Dual numbers (y, dy): tensors that carry K tangents through ordinary PyTorch code.

A `Dual` is a handle: an alias of its primal that intercepts every torch call through
``__torch_function__``, above autograd. Only primals are passed on, so that whatever autograd saves
is a plain tensor and a tangent dies with the last handle that carries it. A call is decided in this
order: metadata, a write in place, the function's rule, the exact fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast import inplace
from tangentfast.fallback import fallback, random_state
from tangentfast.inplace import version
from tangentfast.passes import Pass, current
from tangentfast.rules import RULES
from tangentfast.rules.registry import Inexact, Rule, evaluate


class Dual(Tensor):
    """A tensor with its tangents.

    `primal`: the plain tensor; `tangents`: K plain tensors, or None where one is zero.
    """

    primal: Tensor
    tangents: tuple[Tensor | None, ...]
    owner: Pass
    version: int

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError(
            "deepcopy of a tensor that carries a tangent is not supported; use clone()"
        )


def make_dual(primal: Tensor, tangents: Sequence[Tensor | None], pass_: Pass) -> Dual:
    """The handle of a plain `primal`; each tangent has its shape and dtype."""
    # In a strict pass the handle is a leaf of its own that requires grad: the mark by which a
    # result is recognised that was computed from it past the rules.
    handle = Tensor._make_subclass(Dual, primal, True) if pass_.strict else primal.as_subclass(Dual)
    handle.primal = primal
    handle.tangents = tuple(tangents)
    handle.owner = pass_
    handle.version = version(primal)
    if pass_.k:
        pass_.sharers.add(handle)
    return handle


def like(y: Tensor, dy: Tensor | None) -> Tensor | None:
    """`dy` with the shape and dtype of `y`: broadcast operands and autocast change them."""
    if dy is None:
        return None
    if dy.dtype != y.dtype:
        dy = dy.to(y.dtype)
    shape = y.shape
    return dy if dy.shape == shape else dy.expand(shape)


def wrap(y: Any, dys: Sequence[Any], pass_: Pass) -> Any:
    """Pair the results of a function with their tangents, tensor by tensor."""
    if isinstance(y, Tensor):
        return _wrap_tensor(y, dys, pass_)
    if isinstance(y, (tuple, list)):
        parts = [
            wrap(y[i], [None if dy is None else dy[i] for dy in dys], pass_) for i in range(len(y))
        ]
        return rebuild(y, parts)
    if isinstance(y, dict):
        return type(y)(
            {n: wrap(v, [None if dy is None else dy[n] for dy in dys], pass_) for n, v in y.items()}
        )
    return y


def _wrap_tensor(y: Tensor, dys: Sequence[Any], pass_: Pass) -> Tensor:
    if not y.is_floating_point():
        return y
    for known in pass_.sharers.of(y):
        if known.primal is y:
            return known  # the function returned its argument: contiguous(), dropout in eval mode
    if pass_.k and all(dy is None for dy in dys):
        if pass_.strict and y.requires_grad:
            y = y.detach()  # the derivative is zero; a graph would say otherwise to the checks
        return y
    return make_dual(y, [like(y, dy) for dy in dys], pass_)


# Types of arguments that neither are tensors nor hold any.
_CONSTANTS = {int, float, bool, str, type(None), slice, type(...), torch.dtype, torch.device}


class _Arguments:
    """The arguments of one call, split into primals and tangents, and checked."""

    def __init__(self, pass_: Pass, func: Callable[..., Any]):
        self.pass_, self.func = pass_, func

    def primal(self, x: Any) -> Any:
        kind = type(x)
        if kind is Dual:
            self.check(x)
            return x.primal
        if kind in _CONSTANTS:
            return x
        if isinstance(x, Tensor):
            if self.pass_.strict and x.requires_grad:
                raise RuntimeError(
                    f"{name_of(self.func)} in {self.pass_.where()} got a tensor that depends on "
                    "the trained parameters but has lost its tangent. Expected every such tensor "
                    "to be computed by torch functions in this forward. A custom "
                    "autograd.Function, a tensor kept from an earlier forward or an input that "
                    "requires grad does this: replace it by torch functions, or detach it."
                )
        elif isinstance(x, (tuple, list)) and not all(type(e) in _CONSTANTS for e in x):
            return rebuild(x, [self.primal(e) for e in x])
        return x

    def check(self, x: Dual) -> None:
        if not self.pass_.k:
            return  # the replay has no tangents that could be wrong
        if x.owner is not self.pass_:
            raise RuntimeError(
                f"{name_of(self.func)} got a tensor of an earlier, finished forward; its tangent "
                "belongs to that one. Detach what you keep between forwards (caches: "
                "use_cache=False)."
            )
        if x.version != version(x.primal):
            raise RuntimeError(
                f"{name_of(self.func)} in {self.pass_.where()} got a tensor whose memory was "
                "written in place through another tensor (a view, detach() or no_grad), so that "
                "its tangent is out of date. Clone it before that write."
            )

    def tangent(self, x: Any, k: int) -> Any:
        if type(x) is Dual:
            return x.tangents[k]
        if isinstance(x, (tuple, list)):
            return [self.tangent(e, k) for e in x]
        return None

    def tangents(self, args: Sequence[Any]) -> list[list[Any] | None]:
        """For each k the tangents of all arguments, or None where none has one."""
        nested = [i for i, a in enumerate(args) if isinstance(a, (tuple, list))]
        rows: list[list[Any] | None] = []
        for k in range(self.pass_.k):
            row = [a.tangents[k] if type(a) is Dual else None for a in args]
            for i in nested:
                row[i] = self.tangent(args[i], k)
            rows.append(row if _present(row) else None)
        return rows


def _present(row: Sequence[Any]) -> bool:
    for t in row:  # noqa: SIM110 (a generator costs more than the loop)
        if t is not None and (type(t) is not list or _present(t)):
            return True
    return False


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


def dispatch(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call `func` on dual numbers."""
    rule = RULES.get(func)
    pass_ = current()
    if rule is not None and rule.kind == "metadata":
        return func(*_plain(args), **{n: _plain_one(v) for n, v in kwargs.items()})
    if pass_ is None:
        raise RuntimeError(
            f"{name_of(func)} was called on a tensor that carries a tangent, after its forward "
            "had finished. Take tensors from the outputs of the linearized model, or detach them "
            "inside the forward (a hook that keeps activations, a cache: use_cache=False)."
        )
    if rule is not None and rule.kind == "forbidden":
        raise RuntimeError(f"{name_of(func)} in {pass_.where()}: {rule.apply()}")
    arguments = _Arguments(pass_, func)
    if pass_.k and not torch.is_grad_enabled() and (rule is None or rule.kind != "constant"):
        _refuse_no_grad(func, pass_)
    if kwargs.get("out") is not None:
        raise RuntimeError(
            f"{name_of(func)} in {pass_.where()}: out= cannot carry a tangent; "
            "assign the function's result instead."
        )
    written = inplace.functional_of(func)
    if written is not None:
        return _write(func, written, args, kwargs, arguments)
    if rule is None:
        return _fall_back(func, args, kwargs, pass_, arguments)
    if rule.kind in ("linear", "constant"):
        return _structural(func, rule, args, kwargs, arguments)
    bound = rule.bind(args, kwargs)
    if bound is None:
        return _fall_back(func, args, kwargs, pass_, arguments)
    if rule.kind == "composite":
        return rule.apply(*bound)
    if rule.inplace >= 0 and bound[rule.inplace]:
        bound[rule.inplace] = False
        return _write(func, func, bound, {}, arguments, inplace_at=rule.inplace)
    try:
        found = rule.apply([arguments.primal(a) for a in bound], arguments.tangents(bound))
    except Inexact as error:
        raise RuntimeError(f"{name_of(func)} in {pass_.where()}: {error}") from None
    if found is None:
        return _fall_back(func, args, kwargs, pass_, arguments)
    y, dys = found
    return wrap(y, dys, pass_)


def _plain_one(x: Any) -> Any:
    return x.primal if type(x) is Dual else x


def _plain(args: Sequence[Any]) -> list[Any]:
    return [
        rebuild(a, [_plain_one(e) for e in a]) if isinstance(a, (tuple, list)) else _plain_one(a)
        for a in args
    ]


def _structural(
    func: Callable[..., Any],
    rule: Rule,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    arguments: _Arguments,
) -> Any:
    """A function linear in its first argument, or one whose derivative is zero."""
    if not args:  # torch.softmax(input=x, dim=-1)
        kwargs = dict(kwargs)
        args = [kwargs.pop("input" if "input" in kwargs else next(iter(kwargs)))]
    primals = [arguments.primal(a) for a in args]
    options = {n: arguments.primal(v) for n, v in kwargs.items()}
    y = func(*primals, **options)
    if rule.kind == "constant":
        return y.detach() if isinstance(y, Tensor) else y
    dys = evaluate(
        lambda dx: func(dx, *primals[1:], **options),
        [row and [row[0]] for row in arguments.tangents(args[:1])],
    )
    return wrap(y, dys, arguments.pass_)


def _refuse_no_grad(func: Callable[..., Any], pass_: Pass) -> None:
    """Autograd takes what is computed under ``no_grad`` for a constant; the derivative is none."""
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name_of(func)} in {pass_.where()} runs under no_grad on a tensor that has a "
            "tangent: its gradient would be cut there and its tangent not. Use detach() for what "
            "should be a constant, or train only parameters after the no_grad block."
        )
    raise NotImplementedError(  # autograd.Function switches both modes off
        f"a custom autograd.Function in {pass_.where()} has no rule for tangents "
        f"({name_of(func)} in its forward met one). Replace it by torch functions; "
        "for torch.utils.checkpoint pass use_reentrant=False."
    )


def _fall_back(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pass_: Pass,
    arguments: _Arguments,
) -> Any:
    where = pass_.where()
    pass_.fallbacks[name_of(func), where] += 1
    try:
        y, dys = fallback(func, args, kwargs, pass_.k, Dual, arguments.primal)
    except RuntimeError as error:  # NotImplementedError is one
        if "forward" not in str(error) and "jvp" not in str(error):
            raise
        raise NotImplementedError(
            f"{name_of(func)} in {where} has no rule and no forward derivative ({error}). "
            "Replace it by torch functions that have one, or train only parameters after it."
        ) from error
    return wrap(y, dys, pass_)


def _write(
    func: Callable[..., Any],
    functional: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    arguments: _Arguments,
    inplace_at: int = -1,
) -> Any:
    """A write in place: the tangents of the functional form first, then the write to the primal."""
    pass_, target = arguments.pass_, args[0]
    target_primal = _plain_one(target)
    primals = [arguments.primal(a) for a in args]
    options = {n: arguments.primal(v) for n, v in kwargs.items()}
    tangents: Sequence[Tensor | None] = [None] * pass_.k
    if pass_.k:
        inplace.check(target, target_primal, Dual, name_of(func), pass_)
        before = _unwritten(args, primals, pass_)
        replay = random_state(target_primal.device)  # both forms draw the same numbers
        y = dispatch(functional, before, kwargs)
        replay()
        if type(y) is Dual:
            tangents = y.tangents
        if y.shape != target.shape:
            raise RuntimeError(f"{name_of(func)}: the target is smaller than the result; clone it")
    tangents = [like(target_primal, t) for t in tangents]
    if inplace_at >= 0:
        primals[inplace_at] = True
    func(*primals, **options)
    if pass_.k:
        inplace.commit(target, target_primal, tangents, Dual, pass_)
    return target


def _unwritten(args: Sequence[Any], primals: Sequence[Any], pass_: Pass) -> list[Any]:
    """The arguments without their graph: the functional form is needed for its tangents alone."""

    def bare(x: Any, primal: Any) -> Any:
        if type(x) is Dual:
            return make_dual(primal.detach(), x.tangents, pass_)
        if isinstance(x, (tuple, list)):
            return rebuild(x, [bare(e, p) for e, p in zip(x, primal, strict=True)])
        return primal.detach() if isinstance(primal, Tensor) else primal

    return [bare(x, p) for x, p in zip(args, primals, strict=True)]
