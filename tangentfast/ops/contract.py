"""What an op is: a schema, a VJP of its primal, and a table of providers that may take a call.

A provider is one implementation on one kind of device. It says of a call that it takes it, or why
not; ``backend=`` and TANGENTFAST_BACKEND filter by name; of several that are left, the first is
taken, or the fastest where that depends on the machine (`ops.choice`). The last resort of every op
is its reference: torch's own functions, with their own graph.

K tangents are columns: for each argument x that may have one a list dx of K tensors or None, the
structural zero. Callers give them as K named tuples, or None for one that is zero altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tangentfast._torch import in_forward_ad, in_transform
from tangentfast.ops.backend import missing, wanted
from tangentfast.ops.choice import Choice

YES = ""  # a provider takes the call; anything else is the reason why it does not
Reason = str


def anything(*call: Any) -> Reason:
    """What a provider `supports` that takes every call."""
    return YES


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        backend: ``"native"``, ``"triton"`` or ``"reference"``: what ``backend=`` filters by.
        run: takes the op's arguments, tangents as columns.
        supports: takes what `Op.candidates` is given; `YES`, or the reason why not. It asks types,
            shapes and devices alone, never tangents, so that a block run again by checkpointing
            keeps what it kept the first time.
        op: the registered op that `run` calls; where that has no kernel, it is not there.
        way: which of several providers of one backend it is.
        unasked: the kinds of device on which it is taken without being named.
    """

    backend: str
    run: Callable[..., Any]
    supports: Callable[..., Reason] = anything
    op: str = ""
    way: str = ""
    unasked: tuple[str, ...] = ("cpu", "cuda")

    @cached_property
    def name(self) -> str:
        """As `info` has it."""
        return f"{self.backend} ({self.way})" if self.way else self.backend

    def missing(self, device: torch.device) -> Reason:
        """Why it is not there on `device`; empty where it is."""
        return missing(self.backend, self.op, device) if self.op else YES


class Op:
    """A row of the table: an op and its providers.

    Args:
        name: as its schema and its Python function have it.
        providers: the default first; the last resort is the first that is a reference.
        small: whether a call is so small that nothing but the reference pays, unless it is named.
    """

    def __init__(
        self,
        name: str,
        *providers: Provider,
        small: Callable[..., bool] = lambda *call: False,
    ):
        self.name, self.providers, self.small = name, providers, small
        self.reference = next(p for p in providers if p.backend == "reference")
        self.choice = Choice(name)
        self._orders: dict[Any, tuple[bool, tuple[Provider, ...]]] = {}
        OPS[name] = self

    def order(
        self, device: torch.device, backend: str | None = None
    ) -> tuple[bool, tuple[Provider, ...]]:
        """Whether a backend was named, and the providers that are there and pass that filter.

        Raises:
            ValueError: `backend` or TANGENTFAST_BACKEND is the name of no backend.
            RuntimeError: none of those that it names is there; the message says why.
        """
        source, names = wanted(backend)
        key = (device, names)
        known = self._orders.get(key)
        if known is None:
            known = self._orders[key] = bool(names), self._order(device, source, names)
        return known

    def listed(self, device: torch.device) -> tuple[Provider, ...]:
        """The providers written for a kind of device, there or not."""
        return tuple(p for p in self.providers if device.type in p.unasked)

    def _order(
        self, device: torch.device, source: str, names: Sequence[str]
    ) -> tuple[Provider, ...]:
        reasons = []
        for name in names:
            named = tuple(p for p in self.providers if p.backend == name)
            why = named[0].missing(device) if named else f"there is no {name} {self.name}"
            if not why:
                return named
            reasons.append(why)
        if names:
            raise RuntimeError(f"{source} is {','.join(names)!r}, but {'; '.join(reasons)}")
        return tuple(p for p in self.listed(device) if not p.missing(device)) or (self.reference,)

    def candidates(
        self, device: torch.device, backend: str | None, *call: Any
    ) -> tuple[Provider, ...]:
        """The providers that take a call, the default first; never empty."""
        named, order = self.order(device, backend)
        if len(order) > 1 and not named and self.small(*call):
            return (self.reference,)
        return tuple(p for p in order if not p.supports(*call)) or (self.reference,)

    def provider(self, device: torch.device, backend: str | None, *call: Any) -> Provider:
        """The first of those: for an op whose ways need no measurement."""
        for p in self.order(device, backend)[1]:
            if not p.supports(*call):
                return p
        return self.reference


# The table: `info` prints it.
OPS: dict[str, Op] = {}


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``tangentfast::<schema>``, with or without the extension that has kernels for it.

    `fake` gives its outputs without data, for torch.compile and opcheck.
    """
    name, _, rest = schema.partition("(")
    torch.library.define(f"tangentfast::{name}", f"({rest}")
    torch.library.register_fake(f"tangentfast::{name}", fake)
    op: Callable[..., Any] = getattr(torch.ops.tangentfast, name).default
    return op


def define_triton(schema: str, module: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``tangentfast::<name>_triton``: the function `name` of a module that imports Triton,
    which is imported when the op is first called.
    """
    name, _, rest = schema.partition("(")

    def call(*args: Any) -> Any:
        return getattr(import_module(module), name)(*args)

    op = define(f"{name}_triton({rest}", fake)
    torch.library.impl(f"tangentfast::{name}_triton", "default", call)
    return op


def plain(*tensors: Tensor | None) -> Reason:
    """No subclass that has rules of its own (DTensor), no ``torch.func`` transform and no
    forward-mode AD, which look inside an op.
    """
    if in_transform() or in_forward_ad():
        return "a torch.func transform or forward-mode AD looks inside"
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not Parameter:
            return f"{type(t).__name__} has rules of its own"
    return YES


NARROW = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (*NARROW, torch.float32, torch.float64)


def kernel_dtypes(x: Tensor, *parameters: Tensor | None) -> Reason:
    """Parameters like x, or float32 beside a 16-bit x; x of one of the four floating types."""
    dtype = x.dtype
    if dtype not in KERNEL_DTYPES:
        return f"no kernel computes in {dtype}"
    for p in parameters:
        same = p is None or p.dtype == dtype
        if not same and (p.dtype != torch.float32 or dtype not in NARROW):  # type: ignore[union-attr]
            return f"{p.dtype} beside {dtype}"  # type: ignore[union-attr]
    return YES


def columns(tangents: Sequence[Any], width: int) -> list[list[Tensor | None]]:
    """K named tuples (those that are not None) as `width` lists."""
    given = [t for t in tangents if t is not None]
    return (
        [list(column) for column in zip(*given, strict=True)]
        if given
        else [[] for _ in range(width)]
    )


def in_places(tangents: Sequence[Any], dys: Sequence[Tensor]) -> list[Tensor | None]:
    """The results of those that are not None in their places, and None in the others."""
    if len(dys) == len(tangents):
        return list(dys)
    rest = iter(dys)
    return [None if t is None else next(rest) for t in tangents]


class _Primal(torch.autograd.Function):
    """y with a VJP; its tangents leave by a list, past autograd."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], vjp: Callable[..., Any], dys: list[Tensor], *primals: Any
    ) -> Tensor:
        """y; `dys` gets its tangents."""
        y, tangents, saved = run(ctx.needs_input_grad[3:])
        dys += tangents
        ctx.save_for_backward(*saved)
        ctx.vjp = vjp
        ctx.set_materialize_grads(False)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every primal."""
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needs))
        return (None, None, None, *ctx.vjp(needs, grad, *ctx.saved_tensors))


def with_vjp(
    run: Callable[[Sequence[bool]], tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]],
    vjp: Callable[..., Sequence[Tensor | None]],
    *primals: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """y with the gradients that `vjp` gives, and its tangents, without any.

    Args:
        run: gets whether each primal needs a gradient; gives y, its tangents and what is kept for
            the backward, without a graph.
        vjp: gets the same, the gradient of y and what was kept; gives the gradient of every primal.
            It holds no tensor of its own. In torch's own differentiable functions, it can be
            differentiated once more.
        primals: what y depends on.
    """
    if not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in primals):
        with torch.no_grad():
            return run((False,) * len(primals))[:2]
    dys: list[Tensor] = []
    y = _Primal.apply(run, vjp, dys, *primals)
    return y, dys
