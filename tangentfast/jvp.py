"""Jacobian-vector products: one primal pass, K tangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast import hooks
from tangentfast.arguments import constant, lost
from tangentfast.dual import Dual, make_dual, plain
from tangentfast.graph import origins
from tangentfast.leftovers import Leftovers
from tangentfast.linearize import LinearizedModel, places
from tangentfast.passes import Pass, check_no_transform, is_narrow, running
from tangentfast.substitute import substituted
from tangentfast.trees import tree_map

Direction = Mapping[str, Tensor]


@torch.compiler.disable  # dual numbers are not traced: the function runs as it is written
def jvp(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    *,
    params: Direction | Sequence[Direction] | None = None,
    tangents: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    tangent_dtype: torch.dtype | None = None,
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
        tangent_dtype: ``torch.bfloat16``: as in `linearize`.

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
    check_no_transform()
    recording = torch.is_grad_enabled()
    if not recording:
        inputs, kwargs = tree_map(Tensor.detach, (inputs, dict(kwargs or {})))
    k = max(len(directions), 1)
    root = fn if isinstance(fn, nn.Module) else None
    narrow = is_narrow(tangent_dtype, "jvp")
    pass_ = Pass(k, root, strict=not recording, narrow=narrow)
    table, moving = _duals_of(fn, directions, pass_, recording)
    hooks.carry_duals()
    leftovers = Leftovers(root) if root is not None else None
    try:
        with running(pass_), substituted(root, table, pass_.read):
            args = inputs if tangents is None else _with_tangents(inputs, tangents, pass_)
            out = fn(*args, **(kwargs or {}))
        del args, table
        for name, parameter in moving.items():
            if leftovers is not None and id(parameter) not in pass_.read:
                leftovers.check_read(name)
        out = tree_map(lambda x: _checked(x, pass_), out)
        douts = [tree_map(lambda x, i=i: _tangent(x, i), out) for i in range(k)]  # type: ignore[misc]
        out = tree_map(plain if recording else _detached, out)
    finally:
        if leftovers is not None and pass_.handles.alive():
            leftovers.restore()
    return out, douts[0] if single else douts


def _checked(x: Tensor, pass_: Pass) -> Tensor:
    """An output, if its graph leads to no handle: then it was computed from one past the rules."""
    primal = plain(x)
    if pass_.strict:
        return x if x is not primal or not x.requires_grad else constant(x, pass_, "jvp: an output")
    if primal.requires_grad and any(lost(leaf, pass_) for leaf in origins(primal, pass_.graph)):
        raise RuntimeError(
            "jvp: an output was computed from a tensor that had lost its tangent. Expected every "
            "operation to be a torch function in this call: a custom autograd.Function, a tensor "
            "kept from an earlier forward, or torch.autograd.functional does this. Replace it, or "
            "detach its result."
        )
    return x


def _detached(x: Tensor) -> Tensor:
    """The primal without a graph: the forward may have made a tensor of its own require grad."""
    primal: Tensor = plain(x)
    return primal.detach() if primal.requires_grad else primal


def _tangent(x: Tensor, k: int) -> Tensor:
    if type(x) is Dual:
        dy = x.tangents[k]
        return torch.zeros_like(x.primal) if dy is None else dy
    return torch.zeros_like(x) if x.is_floating_point() or x.is_complex() else x


def _duals_of(
    fn: Callable[..., Any], directions: list[Direction], pass_: Pass, recording: bool
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """What stands for the parameters of `fn` in the pass, by identity; and those with a tangent."""
    if not isinstance(fn, nn.Module):
        if directions:
            raise TypeError(f"jvp: params needs a module, got {type(fn).__name__}.")
        return {}, {}
    named = {name: (module, parameter) for name, module, _, parameter in places(fn)}
    for i, direction in enumerate(directions):
        for name, tangent in direction.items():
            if name not in named:
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] is no parameter of {type(fn).__name__}."
                )
            parameter = named[name][1]
            if tangent.shape != parameter.shape:
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] has shape {tuple(tangent.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}."
                )
            if isinstance(named[name][0], torch.jit.ScriptModule):
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] is read by code that torch.jit compiled, where it "
                    "cannot carry a tangent. Pass the original Python module."
                )
            if hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"jvp: params[{i}][{name!r}] is sharded, and is gathered only inside the "
                    "forward. Take derivatives along parameters before fully_shard, or linearize."
                )
    table: dict[int, Tensor] = {}
    moving: dict[str, Tensor] = {}
    for name, (_, parameter) in named.items():
        along = [d.get(name) for d in directions]
        primal: Tensor = (
            parameter if recording else nn.Parameter(parameter.detach(), requires_grad=False)
        )
        if any(t is not None for t in along):
            # an alias: the handle's own primal must not be the caller's parameter object
            primal = primal.view_as(primal)
            pass_.graph.add(primal.grad_fn)  # what leads to the parameter otherwise is out of date
            along = [t if t is None else t.detach().to(primal.device, primal.dtype) for t in along]
            table[id(parameter)] = dual = make_dual(primal, along, pass_)
            dual.parameter = parameter
            moving[name] = parameter
            pass_.moving.add(id(parameter))
        elif not recording and not hasattr(parameter, "full_tensor"):
            table[id(parameter)] = primal
    return table, moving


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
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"jvp: inputs[{i}] is {kind}; only a floating tensor has a tangent.")
        x = x.clone() if x.is_inference() else x.view_as(x)
        if not isinstance(dx, Tensor):
            dx = torch.full_like(x, dx, requires_grad=False)
        if dx.shape != x.shape:
            raise ValueError(
                f"jvp: tangents[{i}] has shape {tuple(dx.shape)}, inputs[{i}] has {tuple(x.shape)}."
            )
        args.append(make_dual(x, [dx.detach().to(x.dtype)], pass_))
    return tuple(args)
