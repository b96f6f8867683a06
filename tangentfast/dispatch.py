"""How a torch call on dual numbers is decided.

In this order: metadata, a write in place, the function's rule, the exact fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.utils._pytree import tree_leaves

from tangentfast import _torch, inplace
from tangentfast._torch import in_transform
from tangentfast.arguments import any_complex, any_tangent, opened, primal_of
from tangentfast.dual import Dual, like, make_dual, name_of, plain, rebuild, wrap
from tangentfast.fallback import Underivable, fallback, random_state
from tangentfast.passes import REPLAY, STRICT_REPLAY, Pass, current
from tangentfast.rules import RULES
from tangentfast.rules.registry import WRITES, Inexact, Row, Rule

Options = dict[str, Any]  # keyword arguments


def _dispatch(
    cls: type, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
) -> Any:
    """Call `func` on dual numbers."""
    rule = RULES.get(func)
    if rule is None:
        return _without_rule(func, args, kwargs or {})
    return _BY_KIND[rule.kind](func, rule, args, kwargs or {})


def _metadata(func: Callable[..., Any], rule: Rule, args: Sequence[Any], kwargs: Options) -> Any:
    if len(args) == 1 and not kwargs and type(args[0]) is Dual:
        answer = func(args[0].primal)
    else:
        answer = func(*_plain(args), **{n: plain(v) for n, v in kwargs.items()})
    # requires_grad_ returns its tensor
    return args[0] if args and answer is plain(args[0]) else answer


def _forbidden(func: Callable[..., Any], rule: Rule, args: Sequence[Any], kwargs: Options) -> Any:
    pass_ = _entered(func, args, kwargs, moving=False)
    raise RuntimeError(f"{name_of(func)} in {pass_.where()}: {rule.apply()}")


def _structural(func: Callable[..., Any], rule: Rule, args: Sequence[Any], kwargs: Options) -> Any:
    """A function linear in its first argument, or one whose derivative is zero."""
    pass_ = _entered(func, args, kwargs, moving=rule.kind == "linear")
    if not args:  # torch.softmax(input=x, dim=-1)
        kwargs = dict(kwargs)
        args = [kwargs.pop("input" if "input" in kwargs else next(iter(kwargs)))]
    primals, rows = opened(func, args, pass_)
    options = {n: primal_of(func, v, pass_) for n, v in kwargs.items()} if kwargs else kwargs
    if (rule.kind == "linear" and _further(rows, kwargs)) or (
        not rule.complex and any_complex((*primals, *options.values()))
    ):
        return _fall_back(func, args, kwargs, pass_)
    y = func(*primals, **options)
    if rule.kind == "constant":
        return y.detach() if isinstance(y, Tensor) else y
    # Only floating numbers require grad, and the first argument has them all: nothing is recorded.
    dys = [None if row is None else func(row[0], *primals[1:], **options) for row in rows]
    return wrap(y, dys, pass_, args)


def _further(rows: Sequence[Row], kwargs: Options) -> bool:
    """Whether any argument but the first has a tangent."""
    for row in rows:
        if row is not None and (row[0] is None or any_tangent(row[1:])):
            return True
    return bool(kwargs) and any(type(x) is Dual for x in kwargs.values())


def _by_rule(func: Callable[..., Any], rule: Rule, args: Sequence[Any], kwargs: Options) -> Any:
    pass_ = _entered(func, args, kwargs)
    bound = rule.bind(args, kwargs)
    if bound is None:
        return _fall_back(func, args, kwargs, pass_)
    if rule.inplace >= 0 and bound[rule.inplace]:
        bound = list(bound)
        bound[rule.inplace] = False
        return _write(func, func, bound, {}, pass_, inplace_at=rule.inplace)
    answer = None
    try:
        primals, rows = opened(func, bound, pass_)
        if rule.complex or not any_complex(primals):
            answer = rule.apply(primals, rows)
    except Inexact as error:
        raise RuntimeError(f"{name_of(func)} in {pass_.where()}: {error}") from None
    if answer is None:
        return _fall_back(func, args, kwargs, pass_)
    y, dys = answer
    return wrap(y, dys, pass_, bound)


def _composite(func: Callable[..., Any], rule: Rule, args: Sequence[Any], kwargs: Options) -> Any:
    pass_ = _entered(func, args, kwargs)
    bound = rule.bind(args, kwargs)
    return _fall_back(func, args, kwargs, pass_) if bound is None else rule.apply(*bound)


def _without_rule(func: Callable[..., Any], args: Sequence[Any], kwargs: Options) -> Any:
    pass_ = _entered(func, args, kwargs)
    functional = WRITES.get(getattr(func, "__name__", "")) or inplace.functional_of(func)
    if functional is not None:
        return _write(func, functional, args, kwargs, pass_)
    call = inplace.bound(func, args, kwargs)
    if call is not None:
        return _write(func, func, call[0], {}, pass_, inplace_at=call[1])
    return _fall_back(func, args, kwargs, pass_)


_BY_KIND: dict[str, Callable[..., Any]] = {
    "metadata": _metadata,
    "forbidden": _forbidden,
    "linear": _structural,
    "constant": _structural,
    "rule": _by_rule,
    "fused": _by_rule,
    "composite": _composite,
}


def _entered(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Options, moving: bool = True
) -> Pass:
    """The pass of a call, which has to be one that tangents can follow where they are `moving`.

    It is this thread's, or on a thread of the model's own that of the arguments.
    """
    pass_ = current()
    if pass_ is None or pass_ is REPLAY:
        owners = [x.owner for x in tree_leaves((args, kwargs)) if type(x) is Dual]
        if pass_ is None:
            pass_ = next((owner for owner in owners if owner.active), None)
        elif any(owner.strict for owner in owners):
            pass_ = STRICT_REPLAY
    if pass_ is None:
        raise RuntimeError(
            f"{name_of(func)} was called on a tensor that carries a tangent, after its forward "
            "had finished. Take tensors from the outputs of the linearized model, or detach them "
            "inside the forward (a hook that keeps activations, a cache: use_cache=False)."
        )
    if pass_.active and in_transform():
        pass_.check_no_transform(name_of(func))
    if moving and pass_.k and not is_grad_enabled():
        _refuse_no_grad(func, pass_)
    if kwargs and kwargs.get("out") is not None:
        raise RuntimeError(
            f"{name_of(func)} in {pass_.where()}: out= cannot carry a tangent; "
            "assign the function's result instead."
        )
    return pass_


def _plain(args: Sequence[Any]) -> list[Any]:
    return [
        rebuild(a, [plain(e) for e in a]) if isinstance(a, (tuple, list)) else plain(a)
        for a in args
    ]


def _refuse_no_grad(func: Callable[..., Any], pass_: Pass) -> None:
    """Autograd takes what is computed under ``no_grad`` for a constant; the derivative is none."""
    if _torch.forward_grad_enabled() or torch.is_inference_mode_enabled():
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
    kwargs: Options,
    pass_: Pass,
) -> Any:
    where = pass_.where()
    pass_.fallbacks[name_of(func), where] += 1
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        raise NotImplementedError(
            f"{name_of(func)} in {where} is an attribute of a newer torch, and not known on dual "
            "numbers. Ask detach() for it, or use an older torch."
        )
    try:
        y, dys = fallback(func, args, kwargs, pass_.k, lambda x: primal_of(func, x, pass_))
    except Underivable as error:
        raise NotImplementedError(
            f"{name_of(func)} in {where} has no rule, and {error}. Replace it by torch functions "
            "that have a derivative, or train only parameters after it."
        ) from error
    return wrap(y, dys, pass_, tree_leaves((args, kwargs)))


def _write(
    func: Callable[..., Any],
    functional: Callable[..., Any] | Rule,
    args: Sequence[Any],
    kwargs: Options,
    pass_: Pass,
    inplace_at: int = -1,
) -> Any:
    """A write in place: the tangents of what is written first, then the write to the primal."""
    target = args[0]
    target_primal = plain(target)
    primals = [primal_of(func, x, pass_) for x in args]
    # where it is plain and requires grad: itself, not its detached alias
    primals[0] = target_primal
    options = {n: primal_of(func, v, pass_) for n, v in kwargs.items()}
    tangents: Sequence[Tensor | None] = ()
    if pass_.k:
        inplace.check(target, target_primal, name_of(func), pass_)
        if isinstance(functional, Rule):
            bound = functional.bind(args, kwargs)
            if bound is None:
                raise NotImplementedError(
                    f"{name_of(func)} in {pass_.where()} got {', '.join(kwargs)} by name; pass the "
                    "arguments of a write in place by position."
                )
            tangents = functional.apply(*opened(func, bound, pass_))
        else:
            tangents = _tangents_of(func, functional, args, primals, kwargs, pass_)
        tangents = [like(target_primal, t) for t in tangents]
    if inplace_at >= 0:
        primals[inplace_at] = True
    func(*primals, **options)
    if pass_.k:
        inplace.commit(target, target_primal, tangents, pass_)
    return target


def _tangents_of(
    func: Callable[..., Any],
    functional: Callable[..., Any],
    args: Sequence[Any],
    primals: Sequence[Any],
    kwargs: Options,
    pass_: Pass,
) -> Sequence[Tensor | None]:
    """Those of what `func` will write, by the function that writes the same to new memory."""

    def bare(x: Any, primal: Any) -> Any:  # without its graph: the tangents alone are needed
        if type(x) is Dual:
            return make_dual(primal.detach(), x.tangents, pass_)
        if isinstance(x, (tuple, list)):
            return rebuild(x, [bare(e, p) for e, p in zip(x, primal, strict=True)])
        return primal.detach() if isinstance(primal, Tensor) else primal

    before = [bare(x, p) for x, p in zip(args, primals, strict=True)]
    replay = random_state(primals[0].device)  # both forms draw the same numbers
    y = _dispatch(Dual, functional, (), before, kwargs)
    replay()
    if y.shape != primals[0].shape:
        raise RuntimeError(f"{name_of(func)}: the target is smaller than the result; clone it")
    return y.tangents if type(y) is Dual else [None] * pass_.k


Dual.__torch_function__ = classmethod(_dispatch)  # type: ignore[assignment]
