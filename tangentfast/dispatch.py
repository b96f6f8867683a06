"""How a torch call on dual numbers is decided.

In this order: metadata, a write in place, the function's rule, the exact fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast import _torch, inplace
from tangentfast.dual import Dual, like, make_dual, name_of, plain, rebuild, wrap
from tangentfast.fallback import Underivable, fallback, random_state
from tangentfast.graph import origins
from tangentfast.passes import REPLAY, STRICT_REPLAY, Pass, current
from tangentfast.rules import RULES
from tangentfast.rules.registry import Inexact, Rule, evaluate

# Types of arguments that neither are tensors nor hold any.
_CONSTANTS = {int, float, bool, str, type(None), slice, type(...), torch.dtype, torch.device}


class _Arguments:
    """The arguments of one call, split into primals and tangents, and checked."""

    def __init__(self, pass_: Pass, func: Callable[..., Any]):
        self.pass_, self.func = pass_, func
        self.complex = False  # whether a tensor among them is

    def primal(self, x: Any) -> Any:
        kind = type(x)
        if kind is Dual:
            self.check(x)
            x = x.primal
            self.complex |= x.is_complex()
            return x
        if kind in _CONSTANTS:
            return x
        if isinstance(x, Tensor):
            self.complex |= x.is_complex()
            if self.pass_.strict and x.requires_grad:
                return constant(x, self.pass_, name_of(self.func))
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
        if x.version != _torch.version(x.primal):
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


def dispatch(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call `func` on dual numbers."""
    rule = RULES.get(func)
    if rule is not None and rule.kind == "metadata":
        answer = func(*_plain(args), **{n: plain(v) for n, v in kwargs.items()})
        # requires_grad_ returns its tensor
        return args[0] if args and answer is plain(args[0]) else answer
    pass_ = _pass_of(func, args, kwargs)
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
        call = inplace.bound(func, args, kwargs)
        if call is not None:
            return _write(func, func, call[0], {}, arguments, inplace_at=call[1])
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
        primals = [arguments.primal(a) for a in bound]
        found = None
        if rule.complex or not arguments.complex:
            found = rule.apply(primals, arguments.tangents(bound))
    except Inexact as error:
        raise RuntimeError(f"{name_of(func)} in {pass_.where()}: {error}") from None
    if found is None:
        return _fall_back(func, args, kwargs, pass_, arguments)
    y, dys = found
    return wrap(y, dys, pass_)


def _pass_of(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Pass:
    """This thread's pass, or on a thread of the model's own that of the arguments."""
    pass_ = current()
    if pass_ is None or pass_ is REPLAY:
        owners = [x.owner for x in _leaves((args, kwargs)) if type(x) is Dual]
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
    if pass_.active:
        pass_.check_no_transform(name_of(func))
    return pass_


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for x in tree:
            yield from _leaves(x)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _plain(args: Sequence[Any]) -> list[Any]:
    return [
        rebuild(a, [plain(e) for e in a]) if isinstance(a, (tuple, list)) else plain(a)
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
    further = any(type(x) is Dual for x in (*args[1:], *kwargs.values()))
    if (further and rule.kind == "linear") or (arguments.complex and not rule.complex):
        return _fall_back(func, args, kwargs, arguments.pass_, arguments)
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
    kwargs: dict[str, Any],
    pass_: Pass,
    arguments: _Arguments,
) -> Any:
    where = pass_.where()
    pass_.fallbacks[name_of(func), where] += 1
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        raise NotImplementedError(
            f"{name_of(func)} in {where} is an attribute of a newer torch, and not known on dual "
            "numbers. Ask detach() for it, or use an older torch."
        )
    try:
        y, dys = fallback(func, args, kwargs, pass_.k, Dual, arguments.primal)
    except Underivable as error:
        raise NotImplementedError(
            f"{name_of(func)} in {where} has no rule, and {error}. Replace it by torch functions "
            "that have a derivative, or train only parameters after it."
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
    target_primal = plain(target)
    primals = [arguments.primal(a) for a in args]
    primals[0] = (
        target_primal  # where it is plain and requires grad: itself, not its detached alias
    )
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


Dual.decide = dispatch
