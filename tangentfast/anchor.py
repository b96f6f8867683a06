"""Anchored parameters: θ0 as it is, tied to the τ that is trained.

A linearized module keeps θ0 under its own name and τ beside it (``weight`` and ``weight_tau``), so
that sharding, moving and saving the module treat both alike. However θ0 is read during a pass (as
an attribute, by ``parameters()``, in ``_parameters``), what comes is the dual number (θ0, τ): its
primal is an identity whose backward delivers the gradient to τ. Outside a pass it is plain θ0.
What is trained is τ alone: a walk over the parameters of the model, or of one it is part of, meets
no θ0. A module itself (``recurse=False``, its state dict, ``to``) has both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast.dual import Dual, make_dual
from tangentfast.passes import Anchors, Pass, current

SUFFIX = "_tau"


class Anchor(torch.autograd.Function):
    """θ0, whose gradient goes to τ: f_lin is linear in τ, so ∂L/∂τ = J(θ0)ᵀ ∂L/∂f_lin."""

    @staticmethod
    def forward(ctx: Any, theta0: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        ctx.dtype = tau.dtype
        return theta0.view_as(theta0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: D102
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward (create_graph=True) through a linearized model is not "
                "supported: its backward is that of the network at θ0, which is not the second "
                "derivative. Use torch.func.jvp on the original model."
            )
        return None, grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype)


class Parameters(dict[str, Any]):
    """The ``_parameters`` of a linearized module: what is read of it depends on the pass."""

    def __init__(self, entries: dict[str, Any], taus: dict[str, str], anchors: Anchors):
        super().__init__(entries)
        self.taus = taus  # the names of τ by those of θ0
        self.anchors = anchors
        self.whole = False  # whether θ0 and τ are both shown
        self.put: set[str] = set()  # the names for which a forward has put another tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return Parameters, (dict(dict.items(self)), self.taus, self.anchors)

    def __getitem__(self, name: str) -> Any:
        theta0 = dict.__getitem__(self, name)
        if name not in self.taus or self.whole or type(theta0) is Dual:
            return theta0
        pass_ = self.anchors.pass_of_this_thread()
        if pass_ is None or name in self.put:
            return theta0
        pass_.check_no_transform(name)
        dual = _dual(theta0, dict.__getitem__(self, self.taus[name]), pass_)
        dual.place = id(self), name
        return dual

    def __setitem__(self, name: str, value: Any) -> None:
        # The forward may call a module with other tensors, as torch.func.functional_call does, and
        # puts back what it had read here: θ0. Sharding puts parameters.
        if type(value) is Dual and value.place == (id(self), name):
            value = value.parameter
        if isinstance(value, nn.Parameter) and type(value) is not Dual:
            self.put.discard(name)
        elif self.anchors.pass_of_this_thread() is not None:
            self.put.add(name)
        dict.__setitem__(self, name, value)

    def get(self, name: str, default: Any = None) -> Any:  # noqa: D102
        return self[name] if name in self else default  # noqa: SIM401 (that would be itself)

    def __iter__(self) -> Iterator[str]:
        if self.whole:
            yield from dict.keys(self)
            return
        inside, taus = self.anchors.pass_of_this_thread() is not None, set(self.taus.values())
        yield from [name for name in dict.keys(self) if (name in taus) is not inside]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> Any:  # noqa: D102
        return list(self)

    def values(self) -> Any:  # noqa: D102
        return [self[name] for name in self]

    def items(self) -> Any:  # noqa: D102
        return [(name, self[name]) for name in self]


def _dual(theta0: Tensor, tau: Tensor, pass_: Pass) -> Dual:
    pass_.read.add(id(theta0))
    primal = Anchor.apply(theta0, tau) if pass_.recording else theta0
    tangent = tau.detach()
    if tangent.dtype != theta0.dtype:
        tangent = tangent.to(theta0.dtype)
    dual = make_dual(primal, [tangent] * pass_.k, pass_)
    dual.parameter = theta0
    return dual


class _Linearized(nn.Module):
    """What a linearized module does to itself, it does to θ0 and τ."""

    _parameters: Parameters

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        before, self._parameters.whole = self._parameters.whole, True
        try:
            yield
        finally:
            self._parameters.whole = before

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with self._whole():
            return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any) -> None:
        # Within a forward its duals are asked for, by code that keeps the variables.
        with self._whole() if current() is None else contextlib.nullcontext():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._whole():
            super()._load_from_state_dict(*args)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if recurse or self._parameters.anchors.pass_of_this_thread() is not None:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        with self._whole():
            own = list(super().named_parameters(prefix, recurse, remove_duplicate))
        yield from own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (type(self)._linearized_from,), self.__dict__  # type: ignore[attr-defined]


@cache
def _linearized(cls: Any) -> Any:
    body = {"_linearized_from": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Linearized, cls), body)


def _restore(cls: Any) -> nn.Module:
    module: nn.Module = object.__new__(_linearized(cls))
    return module


def anchor(module: nn.Module, taus: dict[str, nn.Parameter], anchors: Anchors) -> None:
    """Put τ beside parameters of `module` (its own names); all its others are frozen."""
    names = {name: name + SUFFIX for name in taus}
    for name in names.values():
        if hasattr(module, name):
            raise ValueError(
                f"linearize: {type(module).__name__} has an attribute {name!r} already; "
                "expected that name to be free for τ. Was the model linearized before?"
            )
    entries = {**module._parameters, **{names[name]: tau for name, tau in taus.items()}}
    cls: Any = type(module)
    module._parameters = Parameters(entries, names, anchors)
    module.__class__ = _linearized(cls)


def anchored(module: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(θ0, τ) by the names of the module's own parameters; empty where nothing is trained."""
    own = module._parameters
    if not isinstance(own, Parameters):
        return {}
    return {n: (dict.__getitem__(own, n), dict.__getitem__(own, t)) for n, t in own.taus.items()}


def theta0_of(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters as they were before `anchor`, without their τ."""
    own = module._parameters
    if not isinstance(own, Parameters):
        return dict(own.items())
    taus = set(own.taus.values())
    return {name: p for name, p in dict.items(own) if name not in taus}


def release(module: nn.Module, settle: Callable[[Tensor, Tensor], nn.Parameter]) -> None:
    """Undo `anchor`: each parameter becomes ``settle(θ0, τ)`` and the class is the original one."""
    if not isinstance(module._parameters, Parameters):
        return
    settled = {name: settle(*pair) for name, pair in anchored(module).items()}
    module._parameters = {**theta0_of(module), **settled}
    module.__class__ = type(module)._linearized_from  # type: ignore[attr-defined]
