"""Jacobian-vector products: one primal pass, K tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tangentfast.dual import Dual, make_dual
from tangentfast.linearize import LinearizedModel
from tangentfast.passes import Pass, running

Direction = Mapping[str, Tensor]


def jvp(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    *,
    params: Direction | Sequence[Direction] | None = None,
    tangents: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """``fn(*inputs)`` and its derivative along given directions.

    With `params`: J(x) τ_k for each of K directions τ_k in parameter space, all in one pass that
    computes the primal once. f_lin is linear in τ, so f(x; θ0) + Σ α_k J τ_k is the linearized
    model at any mixture α. With `tangents`: the derivative along a direction in input space, as
    consistency-model and mean-flow training needs it. With both: their sum, for one direction each.

    Args:
        fn: a function or module of torch operations; for `params` a module. A LinearizedModel
            stands for its network at θ0.
        inputs: its positional arguments.
        params: a TaskVector or mapping of parameter names to tensors of the parameters' shapes, or
            a sequence of K of them. A name that is missing stands for a zero and costs nothing.
        tangents: one entry an argument: a tensor of its shape, a number (that value in every
            element), or None (a zero, which costs nothing).
        kwargs: keyword arguments of `fn`, constants.

    Returns:
        ``(out, dout)``. `out` has the structure `fn` returns and keeps its autograd graph; `dout`
        has none. For a sequence of directions `dout` is a list of K. Floating-point tensors of
        `out` have a tangent of their shape (zeros where they depend on nothing that has one); other
        entries are passed through.

    Raises:
        ValueError: names, shapes or counts that do not fit. TypeError: nothing to differentiate
            along.
        RuntimeError, NotImplementedError: an operation that cannot be differentiated exactly.
    """
    if params is None and tangents is None:
        raise TypeError("jvp: expected params or tangents (or both), got neither.")
    if not isinstance(inputs, tuple):
        raise TypeError(f"jvp: expected inputs as a tuple, got {type(inputs).__name__}.")
    if isinstance(fn, LinearizedModel):
        fn = fn.model
    single = params is None or isinstance(params, Mapping)
    if isinstance(params, Mapping):
        directions: list[Direction] = [params]
    else:
        directions = [] if params is None else list(params)
    if params is not None and not directions:
        raise ValueError("jvp: params is an empty sequence; expected at least one direction.")
    if tangents is not None and len(directions) > 1:
        raise ValueError(
            "jvp: tangents go with one direction in params, got a sequence of several."
        )
    recording = torch.is_grad_enabled()
    if not recording:
        inputs, kwargs = tree_map(_detached, (inputs, dict(kwargs or {})))
    k = max(len(directions), 1)
    root = fn if isinstance(fn, nn.Module) else None
    pass_ = Pass(k, root, strict=not recording)
    call = fn
    with running(pass_):
        if directions:
            call = _with_parameters(fn, directions, pass_, recording)
        elif root is not None and not recording:
            call = _with_parameters(fn, [{}], pass_, recording)
        args = inputs if tangents is None else _with_tangents(inputs, tangents, pass_)
        out = call(*args, **(kwargs or {}))
    leaves, spec = tree_flatten(out)
    primals = [x.primal if type(x) is Dual else x for x in leaves]
    douts = [tree_unflatten([_tangent(x, i) for x in leaves], spec) for i in range(k)]
    return tree_unflatten(primals, spec), douts[0] if single else douts


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _tangent(x: Any, k: int) -> Any:
    if type(x) is Dual:
        dy = x.tangents[k]
        return torch.zeros_like(x.primal) if dy is None else dy
    return torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def _with_parameters(
    fn: Callable[..., Any], directions: list[Direction], pass_: Pass, recording: bool
) -> Callable[..., Any]:
    """`fn` with the parameters that have a tangent replaced by dual numbers."""
    if not isinstance(fn, nn.Module):
        raise TypeError(f"jvp: params needs a module, got {type(fn).__name__}.")
    named = dict(fn.named_parameters())
    for i, direction in enumerate(directions):
        for name, tangent in direction.items():
            if name not in named:
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] is no parameter of {type(fn).__name__}."
                )
            if tangent.shape != named[name].shape:
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] has shape {tuple(tangent.shape)}, "
                    f"the parameter has {tuple(named[name].shape)}."
                )
    replaced: dict[str, Tensor] = {}
    for name, parameter in named.items():
        primal = parameter if recording else parameter.detach()
        along = [d.get(name) for d in directions]
        if any(t is not None for t in along):
            # an alias: the handle's own primal must not be the caller's parameter object
            primal = primal.view_as(primal)
            along = [t if t is None else t.detach().to(primal.device, primal.dtype) for t in along]
            replaced[name] = make_dual(primal, along, pass_)
        elif not recording:
            replaced[name] = primal
    return lambda *args, **kwargs: torch.func.functional_call(fn, replaced, args, kwargs)


def _with_tangents(
    inputs: tuple[Any, ...], tangents: Sequence[Any], pass_: Pass
) -> tuple[Any, ...]:
    if len(tangents) != len(inputs):
        raise ValueError(
            f"jvp: {len(tangents)} tangents for {len(inputs)} inputs; expected one each."
        )
    args = []
    for i, (x, dx) in enumerate(zip(inputs, tangents, strict=True)):
        if dx is None:
            args.append(x)
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"jvp: inputs[{i}] is {kind}; only a floating tensor has a tangent.")
        if not isinstance(dx, Tensor):
            dx = torch.full_like(x, dx, requires_grad=False)
        if dx.shape != x.shape:
            raise ValueError(
                f"jvp: tangents[{i}] has shape {tuple(dx.shape)}, inputs[{i}] has {tuple(x.shape)}."
            )
        args.append(make_dual(x.view_as(x), [dx.detach().to(x.dtype)], pass_))
    return tuple(args)
