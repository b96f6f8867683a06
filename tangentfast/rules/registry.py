"""The table that maps a torch function to its rule, and the few shapes a rule can have.

y = f(x_1, …, x_n) has the tangent dy = Σ_i (∂f/∂x_i) dx_i, the sum over the arguments that have
one. So a rule is ``forward(*args) -> (y, jvp_1, …)``, where `y` carries its ordinary autograd graph
and ``jvp_i(dx_i)`` is the term of the i-th argument: it is called only where that argument has a
tangent, and the terms are added up here. Three other forms are for speed and for structure:

- `jointly`: ``forward(*args) -> (y, jvp)`` with ``jvp(*dargs)``, where the terms are computed
  together; None stands for an argument without a tangent.
- `fused`: ``body(rows, *args) -> (y, dys)``, all K tangents in one pass over memory.
- `linear_in_first`, `jointly_linear`, `constant`, `composite`: what needs no formula at all.

A rule returns None for a call it was not written for; the fallback takes that.

After HIPS/autograd's ``numpy_jvps.py`` and JAX's ``ad.py``: structure before formulas.
"""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from tangentfast._torch import set_grad_enabled

Jvp = Callable[..., Any]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Target = Callable[..., Any] | str  # a function, or the name of all functions that are called so
Row = Sequence[Any] | None  # one tangent for each argument; None where none of them has one


class Inexact(RuntimeError):
    """Raised by a rule that could not be exact; the dispatcher adds operation and module."""


class Rule:
    """How one function acts on dual numbers.

    `apply`: ``(args, rows) -> (y, dys)`` or None, for the kinds `rule` and `fused`: `args` are the
    function's own positional arguments with every dual number replaced by its primal, `rows` holds
    K rows of tangents, `dys` the K tangents of `y`, each None or a tensor (or sequence) like `y`.

    `complex`: whether it holds for complex numbers too, the derivative being that of real and
    imaginary parts (``torch.func.jvp``'s); a call with complex numbers falls back where it does
    not. A formula that was written for real numbers has to be looked at before it says so: a square
    there may be a product with the conjugate.

    `parameters`: those that take an argument by position or name; none for a rule that takes its
    arguments by position.
    """

    __slots__ = ("apply", "complex", "defaults", "inplace", "keywords", "kind", "names", "required")

    def __init__(
        self,
        apply: Callable[..., Any],
        kind: str,
        complex: bool = True,
        parameters: Sequence[inspect.Parameter] = (),
    ):
        self.apply, self.kind, self.complex = apply, kind, complex
        self.keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)  # any, and needs none
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            parameters = ()
        self.names = tuple(p.name for p in parameters)
        self.defaults = tuple(p.default for p in parameters)
        self.required = sum(default is inspect.Parameter.empty for default in self.defaults)
        self.inplace = self.names.index("inplace") if "inplace" in self.names else -1

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any] | None:
        """All arguments by position; None for a call that the rule was not written for."""
        if not self.names:
            return args if self.keywords or not kwargs else None
        given = len(args)
        if given > len(self.names):
            return None
        if not kwargs:
            return (*args, *self.defaults[given:]) if given >= self.required else None
        rest, bound = dict(kwargs), list(args)
        for i in range(given, len(self.names)):
            if self.names[i] in rest:
                bound.append(rest.pop(self.names[i]))
            elif i >= self.required:
                bound.append(self.defaults[i])
            else:
                return None
        return None if any(value is not None for value in rest.values()) else bound


RULES: dict[Callable[..., Any], Rule] = {}
# Writes in place that are no function of torch without the underscore, by name: their rules give
# the K tangents of what was written, and nothing else.
WRITES: dict[str, Rule] = {}


def functions(*names: str) -> list[Callable[..., Any]]:
    """Every public function of these names: ``torch.f``, ``Tensor.f``, ``nn.functional.f``."""
    places = (torch, Tensor, F, torch.special, torch._C._nn)
    named = [
        getattr(place, name)
        for name in names
        for place in ((Tensor,) if name.startswith("__") else places)
        if hasattr(place, name)
    ]
    return list(dict.fromkeys(f for f in named if callable(f)))  # not torch.float, torch.cuda


def each(targets: Iterable[Target]) -> list[Callable[..., Any]]:
    """The functions that are meant by names and functions."""
    return [f for t in targets for f in (functions(t) if isinstance(t, str) else [t])]


def _parameters(of: Callable[..., Any] | str) -> list[inspect.Parameter]:
    """Those of a Python function, or of a text: ``"input src dim=0"``."""
    if not isinstance(of, str):
        return list(inspect.signature(of).parameters.values())
    parts = [part.partition("=") for part in of.split()]
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return [
        inspect.Parameter(name, kind, default=literal_eval(default) if default else required)
        for name, _, default in parts
    ]


def _registering(
    targets: Iterable[Target],
    form: Decorator,
    kind: str,
    complex: bool,
    parameters: str = "",
    itself: bool = False,
    skip: int = 0,
) -> Decorator:
    def decorate(written: Callable[..., Any]) -> Callable[..., Any]:
        for function in each(targets):
            own = partial(written, function) if itself else written
            named = _parameters(parameters or own)[skip:]
            RULES[function] = Rule(form(own), kind, complex, named)
        return written

    return decorate


def evaluate(jvp: Jvp, rows: Sequence[Row]) -> list[Any]:
    """One tangent for each row, without a graph; None where nothing has a tangent."""
    recording = is_grad_enabled()
    set_grad_enabled(False)
    try:
        return [None if row is None else jvp(*row) for row in rows]
    finally:
        set_grad_enabled(recording)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is the structural zero. Neither operand is written to."""
    if a is None:
        return b
    return a if b is None else a + b


def zero(_: Any) -> None:
    """The term of an argument that y does not move with."""


class _Uncovered(Exception):
    """An argument has a tangent and the rule no term for it."""


def _sum(jvps: Sequence[Jvp | None], *row: Any) -> Tensor | None:
    dy = None
    for i, dx in enumerate(row):
        if dx is not None:
            jvp = jvps[i] if i < len(jvps) else None
            if jvp is None:
                raise _Uncovered
            dy = add(dy, jvp(dx))
    return dy


def terms(*jvps: Jvp | None) -> Jvp:
    """Σ_i jvps[i](dx_i) over the arguments that have a tangent."""
    return partial(_sum, jvps)


def _by_terms(forward: Callable[..., Any]) -> Callable[..., Any]:
    def apply(args: Sequence[Any], rows: Sequence[Row]) -> tuple[Any, list[Any]] | None:
        answer = forward(*args)
        if answer is None:
            return None
        try:
            return answer[0], evaluate(terms(*answer[1:]), rows)
        except _Uncovered:
            return None

    return apply


def _together(forward: Callable[..., Any]) -> Callable[..., Any]:
    def apply(args: Sequence[Any], rows: Sequence[Row]) -> tuple[Any, list[Any]] | None:
        answer = forward(*args)
        return None if answer is None else (answer[0], evaluate(answer[1], rows))

    return apply


def _in_one_pass(body: Callable[..., Any]) -> Callable[..., Any]:
    return lambda args, rows: body(rows, *args)


def rule(
    *targets: Target, complex: bool = False, parameters: str = "", itself: bool = False
) -> Decorator:
    """Register ``forward(*args) -> (y, jvp_1, …)``.

    Its parameters have torch's names and defaults, or `parameters` says them: ``"input dim=-1"``.
    Where there is no `jvp_i`, or None, no derivative is known here: a call that gives the argument
    a tangent falls back. `itself`: it gets torch's function first, one of the `targets`.
    """
    return _registering(targets, _by_terms, "rule", complex, parameters, itself)


def jointly(
    *targets: Target, complex: bool = False, parameters: str = "", itself: bool = False
) -> Decorator:
    """Register ``forward(*args) -> (y, jvp)`` with ``jvp(*dargs)``, a tangent or None each."""
    return _registering(targets, _together, "rule", complex, parameters, itself)


def fused(*targets: Target, complex: bool = False, itself: bool = False) -> Decorator:
    """Register ``body(rows, *args) -> (y, dys)``, which gets all K rows of tangents at once."""
    return _registering(targets, _in_one_pass, "fused", complex, itself=itself, skip=1)


def composite(*targets: Target, itself: bool = False) -> Decorator:
    """Register a function of dual numbers that is written in terms of functions that have rules."""
    return _registering(targets, lambda body: body, "composite", True, itself=itself)


def write(*names: str) -> Decorator:
    """Register ``forward(*args) -> jvp`` for writes in place, by their names; see `WRITES`."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        def apply(args: Sequence[Any], rows: Sequence[Row]) -> list[Any]:
            return evaluate(forward(*args), rows)

        WRITES.update(dict.fromkeys(names, Rule(apply, "rule", True, _parameters(forward))))
        return forward

    return decorate


def linear_in_first(*targets: Target) -> None:
    """Functions linear in their first argument are their own JVP; the others are constants."""
    RULES.update({function: Rule(function, "linear") for function in each(targets)})


def jointly_linear(parameters: str, at: tuple[int, ...], *targets: Target) -> None:
    """Functions linear in the arguments at these places together: their own JVP.

    A tangent that is missing is a zero that takes no memory.
    """

    @jointly(*targets, complex=True, parameters=parameters, itself=True)
    def forward(function: Callable[..., Any], *args: Any) -> tuple[Any, Jvp]:
        def jvp(*row: Any) -> Any:
            moved = list(args)
            for i in at:
                moved[i] = filled(row[i], args[i])
            return function(*moved)

        return function(*args), jvp


def filled(dx: Any, x: Any) -> Any:
    """A tangent of x in full: zeros that take no memory in place of None."""
    if isinstance(x, (tuple, list)):
        return [filled(d, e) for d, e in zip(dx or [None] * len(x), x, strict=True)]
    if dx is not None:
        return dx
    return x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else 0


def constant(*targets: Target, complex: bool = True) -> None:
    """Functions whose derivative is zero wherever it exists; their result has no tangent."""
    RULES.update({function: Rule(function, "constant", complex) for function in each(targets)})


def metadata(*targets: Target) -> None:
    """Functions that ask for shape, dtype, device, hooks or autograd state; the primal answers."""
    RULES.update({function: Rule(function, "metadata") for function in each(targets)})


def forbidden(reason: str, *targets: Target) -> None:
    """Functions that would lose the tangent without a word; `reason` says why and what to do."""
    RULES.update(dict.fromkeys(each(targets), Rule(lambda: reason, "forbidden")))
