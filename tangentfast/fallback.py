"""The exact fallback: differentiate one call with torch, and believe it only once it is checked.

By ``torch.func.jvp`` where the function has a forward derivative, and as the derivative of its VJP,
which is linear in u: J v = ∂/∂u ⟨Jᵀ u, v⟩, where it has none. Some functions of torch return a
forward derivative that is not that of their backward (zero, mostly) without an error; so the first
call of each kind is held against the adjoint identity ⟨u, J w⟩ = ⟨Jᵀ u, w⟩ with w = Jᵀ u, and where
the two disagree, against differences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tangentfast._torch import compiled_by_jit
from tangentfast.dual import Dual

_TENSOR = object()  # where a tensor goes in a structure
_MOST = 4096  # kinds of calls remembered

Call = Callable[[list[Any]], Any]
# (call, its plain arguments, which of them have a tangent, these) -> (y with its graph, dy)
Derivative = Callable[[Call, list[Any], list[int], list[Tensor]], tuple[Any, Any]]


class Underivable(NotImplementedError):
    """Torch has no derivative of this call, or one that is not that of its backward."""


def random_state(device: torch.device, generators: Sequence[Any] = ()) -> Callable[[], None]:
    """A function that brings the random generators of `device` back to where they are now."""
    cuda = device.type == "cuda"
    seen = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    states = [(g, g.get_state()) for g in generators]

    def replay() -> None:
        if cuda:
            torch.cuda.set_rng_state(seen, device)
        else:
            torch.set_rng_state(seen)
        for generator, state in states:
            generator.set_state(state)

    return replay


def fallback(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    k: int,
    primal: Callable[[Any], Any],
) -> tuple[Any, list[Any]]:
    """y, with its graph, and its K tangents.

    The function is evaluated once for the first tangent, primal and tangent together, and again for
    each further one with the random state of the first, so that a random function stays one
    function.

    Raises:
        Underivable: there is no derivative, or none that can be believed.
    """
    leaves, spec = tree_flatten((tuple(args), kwargs))
    values = [primal(x) for x in leaves]
    duals = [i for i, x in enumerate(leaves) if type(x) is Dual]
    device = next((x.device for x in values if isinstance(x, Tensor)), torch.device("cpu"))
    replay = random_state(device, [x for x in values if isinstance(x, torch.Generator)])

    def call(values: list[Any]) -> Any:
        replay()
        a, kw = tree_unflatten(values, spec)
        return func(*a, **kw)

    y: Any = None
    dys: list[Any] = []
    for j in range(k):
        active = [i for i in duals if leaves[i].tangents[j] is not None]
        if not active:
            dys.append(None)
            continue
        derivative = _derivative(func, call, values, active)
        with torch.set_grad_enabled(y is None):
            value, dy = derivative(call, values, active, [leaves[i].tangents[j] for i in active])
        y = value if y is None else y
        dys.append(dy)
    return (call(values) if y is None else y), dys


_known: dict[Hashable, Derivative] = {}


def _derivative(
    func: Callable[..., Any], call: Call, values: list[Any], active: list[int]
) -> Derivative:
    """How this kind of call is differentiated: tried and checked the first time."""
    kind = (func, tuple(active), *(_kind(x) for x in values))
    if kind not in _known:
        known = _tried(call, values, active)
        if compiled_by_jit(func):  # its derivative changes from call to call
            return known
        if len(_known) >= _MOST:
            _known.clear()
        _known[kind] = known
    return _known[kind]


def _kind(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return x.dtype, x.dim(), x.device.type, x.numel() == 0, x.is_contiguous()
    plain = isinstance(x, (int, float, str, bool, type(None)))
    return (type(x).__name__, x) if plain else type(x).__qualname__


def _tried(call: Call, values: list[Any], active: list[int]) -> Derivative:
    xs, ys, places = _separate(call, values, active)
    if not places:
        return _constant(call, values, active, xs)
    if any(y.layout is not torch.strided for y in ys):
        raise Underivable("a sparse result cannot carry a tangent")
    us = [_random_like(y) for y in ys]
    reasons = []
    ws: list[Tensor] | None = None
    try:
        grads = torch.autograd.grad(ys, xs, us, allow_unused=True)
        ws = [torch.zeros_like(x) if w is None else w for x, w in zip(xs, grads, strict=True)]
    except RuntimeError as error:
        reasons.append(f"its backward: {error}")
    disputed = False
    for derivative in (_by_jvp, _by_vjp):
        along = [_random_like(x) for x in xs] if ws is None else ws
        try:
            with torch.no_grad():
                leaves = tree_flatten(derivative(call, values, active, along)[1])[0]
        except RuntimeError as error:
            reasons.append(str(error))
            continue
        dys = [
            torch.zeros_like(y) if leaves[i] is None else leaves[i]
            for i, y in zip(places, ys, strict=True)
        ]
        if ws is not None and not disputed and _adjoint(us, dys, ws):
            return derivative
        if _as_differences(call, values, active, places, along, dys):
            return derivative
        disputed = True
        finite = all(dy.isfinite().all() for dy in dys)
        reasons.append("it is not the limit of differences" if finite else "it is not finite")
    raise Underivable("torch has no derivative of it (" + "; ".join(reasons) + ")")


def _constant(call: Call, values: list[Any], active: list[int], xs: list[Tensor]) -> Derivative:
    """Torch knows no derivative: because it is zero, or because nobody has written it."""
    leaves = tree_flatten(call(values))[0]
    floats = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and _is_smooth(y)]
    zeros = [torch.zeros_like(leaves[i]) for i in floats]
    along = [_random_like(x) for x in xs]
    if floats and not _as_differences(call, values, active, floats, along, zeros):
        raise Underivable("torch has no derivative of it")
    return _by_jvp


def _is_smooth(y: Tensor) -> bool:
    return y.is_floating_point() or y.is_complex()


def _adjoint(us: list[Tensor], dys: list[Tensor], ws: list[Tensor]) -> bool:
    """Whether ⟨u, J w⟩ = ⟨w, w⟩ for w = Jᵀ u."""
    left = sum(map(_inner, us, dys))
    right = sum(map(_inner, ws, ws))
    size = right + sum(
        (_inner(u, u) * _inner(dy, dy)) ** 0.5 for u, dy in zip(us, dys, strict=True)
    )
    # What torch gets wrong is wrong by its whole size; a badly conditioned call is not wrong.
    eps = max(torch.finfo(u.dtype).eps for u in us)
    noise = (100 * eps) ** 2 * sum(map(_inner, us, us))  # where J is zero but for rounding
    return abs(left - right) <= eps ** (1 / 3) * size + noise


def _as_differences(
    call: Call,
    values: list[Any],
    active: list[int],
    places: list[int],
    along: list[Tensor],
    dys: list[Tensor],
) -> bool:
    """Whether J w is the central difference along w, in float64."""
    step = 1e-6

    def moved(sign: int) -> list[Tensor]:
        wide = [_wide(x) for x in values]
        for i, w in zip(active, along, strict=True):
            wide[i] = wide[i] + sign * step * _wide(w)
        leaves = tree_flatten(call(wide))[0]
        return [leaves[i] for i in places]

    try:
        with torch.no_grad():
            slopes = [(a - b) / (2 * step) for a, b in zip(moved(1), moved(-1), strict=True)]
    except RuntimeError:
        return False
    distance = sum(_inner(s - d, s - d) for s, d in zip(slopes, dys, strict=True)) ** 0.5
    size = sum(map(_inner, slopes, slopes)) ** 0.5
    eps = max(torch.finfo(d.dtype).eps for d in dys)
    return distance <= max(1e-4, eps ** (1 / 2)) * size


def _wide(x: Any) -> Any:
    if not isinstance(x, Tensor) or not _is_smooth(x):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def _random_like(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    wide = torch.complex128 if y.is_complex() else torch.float64
    return torch.randn(y.shape, generator=generator, dtype=wide).to(y.device, y.dtype)


def _inner(a: Tensor, b: Tensor) -> float:
    """Re ⟨a, b⟩ in float64."""
    return float((_wide(a).conj() * _wide(b)).sum().real)


def _separate(
    call: Call, values: list[Any], active: list[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The call on leaves of its own: these, the outputs that depend on them, and their places."""
    values = list(values)
    for i in active:
        values[i] = values[i].detach().requires_grad_()
    with torch.enable_grad():
        leaves = tree_flatten(call(values))[0]
    places = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]
    return [values[i] for i in active], [leaves[i] for i in places], places


def _by_vjp(
    call: Call, values: list[Any], active: list[int], tangents: list[Tensor]
) -> tuple[Any, Any]:
    y = call(values)
    xs, ys, places = _separate(call, values, active)
    with torch.enable_grad():
        us = [torch.zeros_like(y, requires_grad=True) for y in ys]
        ws = torch.autograd.grad(ys, xs, us, create_graph=True, allow_unused=True)
        moved = [(w, v) for w, v in zip(ws, tangents, strict=True) if w is not None]
        if not all(w.requires_grad for w, _ in moved):
            raise Underivable("torch has no derivative of its backward")
        inner: Any = sum((w * v.conj()).sum().real for w, v in moved)
    jvps = torch.autograd.grad(inner, us, allow_unused=True) if moved else [None] * len(us)
    leaves, spec = tree_flatten(y)
    dys: list[Any] = [None] * len(leaves)
    for i, dy in zip(places, jvps, strict=True):
        dys[i] = dy
    return y, tree_unflatten(dys, spec)


def _by_jvp(
    call: Call, values: list[Any], active: list[int], tangents: list[Tensor]
) -> tuple[Any, Any]:
    structure: dict[str, Any] = {}

    def tensors_of(*xs: Tensor) -> tuple[Tensor, ...]:
        moved = list(values)
        for i, x in zip(active, xs, strict=True):
            moved[i] = x
        leaves, structure["spec"] = tree_flatten(call(moved))
        structure["leaves"] = [_TENSOR if isinstance(y, Tensor) else y for y in leaves]
        return tuple(y for y in leaves if isinstance(y, Tensor))

    ys, dys = torch.func.jvp(  # type: ignore[misc]
        tensors_of, tuple(values[i] for i in active), tuple(tangents)
    )
    return _fill(structure, ys), _fill(structure, [dy.detach() for dy in dys], tangent=True)


def _fill(structure: dict[str, Any], tensors: Sequence[Tensor], tangent: bool = False) -> Any:
    rest = iter(tensors)
    leaves = [next(rest) if y is _TENSOR else (None if tangent else y) for y in structure["leaves"]]
    return tree_unflatten(leaves, structure["spec"])
