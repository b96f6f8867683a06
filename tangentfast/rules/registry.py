"""The table that maps a torch function to its rule, and the few shapes a rule can have.

A rule is ``apply(args, dargs) -> (y, dys)``: `args` are the function's own positional arguments
with every dual number replaced by its primal; `dargs` holds, for each of the K tangents, the list
of tangents in the same positions (None where an argument has none), or None where no argument has
one; `dys` are the K tangents of `y`, each None or a tensor (or sequence) like `y`. A rule that
computes everything in one pass over memory is written in that form. All others are written as
``forward(*args) -> (y, jvp)``, where `y` carries its ordinary autograd graph and ``jvp(*dargs)``
gives one tangent. Either may return None for a call it was not written for; the fallback takes
that.

After HIPS/autograd's ``numpy_jvps.py`` and JAX's ``ad.py``: structure before formulas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast._torch import set_grad_enabled

Jvp = Callable[..., Any]


class Inexact(RuntimeError):
    """Raised by a rule that could not be exact; the dispatcher adds operation and module."""


class Rule:
    """How one function acts on dual numbers.

    `complex`: whether it holds for complex numbers too, the derivative being that of real and
    imaginary parts (``torch.func.jvp``'s); a call with complex numbers falls back where it does
    not. A formula that was written for real numbers has to be looked at before it says so: a square
    there may be a product with the conjugate.
    """

    __slots__ = ("apply", "complex", "defaults", "inplace", "keywords", "kind", "parameters")

    def __init__(
        self,
        apply: Callable[..., Any],
        signature: Callable[..., Any] | None,
        kind: str,
        complex: bool | None = None,
    ):
        self.apply = apply
        self.kind = kind
        self.complex = kind not in ("rule", "fused") if complex is None else complex
        self.parameters: tuple[str, ...] = ()
        self.defaults: tuple[Any, ...] = ()
        self.keywords = False  # takes any, and needs none of them
        if signature is not None:
            found = list(inspect.signature(signature).parameters.values())
            self.keywords = any(p.kind is p.VAR_KEYWORD for p in found)
            named = [p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
            if any(p.kind is p.VAR_POSITIONAL for p in found):
                named = []  # by position only
            self.parameters = tuple(p.name for p in named)
            self.defaults = tuple(p.default for p in named)
        self.inplace = self.parameters.index("inplace") if "inplace" in self.parameters else -1

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """All arguments by position; None for a call that the rule was not written for."""
        if self.parameters and len(args) > len(self.parameters):
            return None
        bound = list(args)
        if self.keywords:
            return bound
        if not kwargs:
            return bound + list(self.defaults[len(args) :])
        rest = dict(kwargs)
        for i in range(len(args), len(self.parameters)):
            if self.parameters[i] not in rest and i >= len(self.defaults):
                break  # a required argument of another name
            bound.append(rest.pop(self.parameters[i], self.defaults[i] if self.defaults else None))
        return None if any(value is not None for value in rest.values()) else bound


RULES: dict[Callable[..., Any], Rule] = {}


def functions(*names: str) -> list[Callable[..., Any]]:
    """Every public function of these names: ``torch.f``, ``Tensor.f``, ``nn.functional.f``."""
    rooms = (torch, Tensor, F, torch.special, torch._C._nn)
    found = [
        getattr(room, name)
        for name in names
        for room in ((Tensor,) if name.startswith("__") else rooms)
        if hasattr(room, name)
    ]
    return list(dict.fromkeys(f for f in found if callable(f)))  # not torch.float, torch.cuda


def _register(targets: Iterable[Callable[..., Any] | str], rule: Rule) -> None:
    for target in targets:
        for function in functions(target) if isinstance(target, str) else [target]:
            RULES[function] = rule


def evaluate(jvp: Jvp, dargs: Sequence[Sequence[Any] | None]) -> list[Any]:
    """One tangent for each entry of `dargs`, without a graph; None where nothing has a tangent."""
    recording = torch.is_grad_enabled()
    set_grad_enabled(False)
    try:
        return [None if d is None else jvp(*d) for d in dargs]
    finally:
        set_grad_enabled(recording)


def rule(
    *targets: Callable[..., Any] | str, complex: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``forward(*args) -> (y, jvp)``; its parameter names are those of the function."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        def apply(
            args: Sequence[Any], dargs: Sequence[Sequence[Any] | None]
        ) -> tuple[Any, list[Any]] | None:
            found = forward(*args)
            return None if found is None else (found[0], evaluate(found[1], dargs))

        _register(targets, Rule(apply, forward, "rule", complex))
        return forward

    return decorate


def fused(
    *targets: Callable[..., Any] | str, complex: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``body(tangents, *args) -> (y, dys)``, which gets all K rows of tangents at once."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        rule = Rule(lambda args, dargs: body(dargs, *args), body, "fused", complex)
        rule.parameters, rule.defaults = rule.parameters[1:], rule.defaults[1:]
        rule.inplace -= rule.inplace >= 0
        _register(targets, rule)
        return body

    return decorate


def composite(*targets: Callable[..., Any] | str) -> Callable[[Any], Any]:
    """Register a function of dual numbers that is written in terms of functions that have rules."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        _register(targets, Rule(body, body, "composite"))
        return body

    return decorate


def linear_in_first(*targets: Callable[..., Any] | str) -> None:
    """Functions linear in their first argument are their own JVP; the other arguments are
    constants.
    """
    for target in targets:
        for function in functions(target) if isinstance(target, str) else [target]:
            RULES[function] = Rule(function, None, "linear")


def constant(*targets: Callable[..., Any] | str, complex: bool = True) -> None:
    """Functions whose derivative is zero wherever it exists; their result has no tangent."""
    for target in targets:
        for function in functions(target) if isinstance(target, str) else [target]:
            RULES[function] = Rule(function, None, "constant", complex)


def metadata(*targets: Callable[..., Any] | str) -> None:
    """Functions that ask for shape, dtype, device, hooks or autograd state; the primal answers."""
    for target in targets:
        for function in functions(target) if isinstance(target, str) else [target]:
            RULES[function] = Rule(function, None, "metadata")


def forbidden(reason: str, *targets: Callable[..., Any] | str) -> None:
    """Functions that would lose the tangent without a word; `reason` says why and what to do."""

    def refuse() -> str:
        return reason

    _register(targets, Rule(refuse, None, "forbidden"))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is the structural zero. Neither operand is written to."""
    if a is None:
        return b
    return a if b is None else a + b
