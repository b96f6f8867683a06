"""Float64 truth through ``torch.func.jvp``, and one measure of error for all dtypes.

Errors are relative errors in norm, in units of the rounding (eps) of the dtype computed in; what
they may be is derived (`rounding`), not tuned to the machine that a test was written on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tangentfast import LinearizedModel, linearize

# The most sums that follow one another in a rule: attention between its projections has the
# product with W_in, scores, the softmax's sum, the tangent's sum, the values and W_out.
SUMS = 6


def rounding(terms: int, sums: int = SUMS) -> float:
    """What `sums` sums of `terms` terms, one upon the other, may cost, in eps × ‖summands‖.

    A sum is off by Σ|terms| eps/2 n at the worst, and by λ √n in place of n but for a chance of
    2 exp(−λ²/2) (Higham & Mary 2019, A new approach to probabilistic rounding error analysis):
    λ = 4, since in norm over many entries even that does not happen to all of them. The size is
    that of the summands and not of the result, which may be the small rest of large numbers.
    """
    return sums * 4 * math.sqrt(max(terms, 1)) / 2


# One function of up to 64 numbers.
TOLERANCE = dict.fromkeys((torch.float64, torch.float32), rounding(64))

# A whole model (DESIGN.md, section 6): (output, each gradient), relative in norm.
CONTRACT = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 2e-5)}


@contextlib.contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Inside, torch takes no kernel that ``torch.func.jvp`` cannot differentiate."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), mock.patch.object(F, "grid_sample", plain_grid_sample):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_grid_sample = F.grid_sample


def plain_grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """``F.grid_sample`` of images in plain operations, for the mode that models use."""
    if input.dim() != 4 or mode != "bilinear" or padding_mode != "zeros" or align_corners:
        return _grid_sample(input, grid, mode, padding_mode, align_corners)
    n, _, height, width = input.shape
    x = (grid[..., 0] + 1) * width / 2 - 0.5  # [N, H', W']
    y = (grid[..., 1] + 1) * height / 2 - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    image = torch.arange(n, device=input.device).view(n, 1, 1)
    total: Any = 0
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = (top + i).long(), (left + j).long()
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = (1 - (y - top - i).abs()) * (1 - (x - left - j).abs()) * inside
        corner = input[image, :, row.clamp(0, height - 1), column.clamp(0, width - 1)]
        total = total + weight.unsqueeze(-1) * corner  # [N, H', W', C]
    return total.permute(0, 3, 1, 2)


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of any structure; a complex one as its two parts."""
    parts = [
        torch.view_as_real(t.resolve_conj()) if isinstance(t, Tensor) and t.is_complex() else t
        for t in tree_leaves(tree)
    ]
    return [t for t in parts if isinstance(t, Tensor) and t.is_floating_point()]


def relative(got: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """‖got − truth‖ / max(‖truth‖, scale); infinite where shapes, NaNs or infinities differ."""
    if got.shape != truth.shape:
        return float("inf")
    got, truth = got.detach().double(), truth.detach().double()
    odd = ~truth.isfinite()
    if not torch.equal(got[odd].nan_to_num(7.0), truth[odd].nan_to_num(7.0)):
        return float("inf")
    distance = torch.where(odd, 0, got - truth).norm().item()
    if distance == 0:
        return 0.0
    size = max(torch.where(odd, 0, truth).norm().item(), scale)
    return distance / size if size and distance == distance else float("inf")


def units(
    got: Any,
    truth: Any,
    dtype: torch.dtype | None = None,
    summands: Sequence[Any] = (),
) -> float:
    """The largest error over all floating tensors, in roundings of `dtype` (or of their own).

    `summands`, of the structure of `truth`: what it is the sum of. An error is measured against
    their norms, where those are larger than that of the sum.
    """
    parts = [floats(s) for s in summands]
    worst = 0.0
    for i, (a, b) in enumerate(zip(floats(got), floats(truth), strict=True)):
        size = sum(norm(part[i]) for part in parts)
        worst = max(worst, relative(a, b, size) / torch.finfo(dtype or a.dtype).eps)
    return worst


def norm(x: Tensor) -> float:
    """‖x‖ of the finite entries."""
    x = x.detach().double()
    return float(torch.where(x.isfinite(), x, 0).norm())


def torch_jvp(
    fn: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Any, Any]:
    """(y, dy) by ``torch.func.jvp``; `tangents` has one for each leaf of `args`, or None."""
    leaves, spec = tree_flatten(list(args))
    active = [i for i, t in enumerate(tangents) if t is not None]
    shape: dict[str, Any] = {}

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        values = list(leaves)
        for i, x in zip(active, xs, strict=True):
            values[i] = x
        out, shape["spec"] = tree_flatten(fn(*tree_unflatten(values, spec)))
        shape["rest"] = [Tensor if isinstance(y, Tensor) else y for y in out]
        return tuple(y for y in out if isinstance(y, Tensor))

    with differentiable_kernels():
        ys, dys = torch.func.jvp(
            call, tuple(leaves[i].detach() for i in active), tuple(tangents[i] for i in active)
        )

    def whole(tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        found = [next(rest) if y is Tensor else y for y in shape["rest"]]
        return tree_unflatten(found, shape["spec"])

    return whole(ys), whole(dys)


def torch_linearized(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], taus: Mapping[str, Tensor]
) -> list[Tensor]:
    """f(x; θ0) + J(x) τ by ``torch.func.jvp``, every floating tensor; differentiable by τ."""
    theta = {n: p.detach() for n, p in model.named_parameters()}

    def f(moved: dict[str, Tensor]) -> list[Tensor]:
        return floats(
            torch.func.functional_call(model, {**theta, **moved}, tuple(args), dict(kwargs))
        )

    with differentiable_kernels():
        ys, dys = torch.func.jvp(f, ({n: theta[n] for n in taus},), (dict(taus),))
    return [y + dy for y, dy in zip(ys, dys, strict=True)]


def random_tau(lin: LinearizedModel, size: float = 0.3) -> None:
    """A task vector in which every weight matters."""
    with torch.no_grad():
        for tau in lin.tau.values():
            tau.normal_().mul_(size * max(tau.shape[-1:], default=1) ** -0.5)


def model_errors(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    params: Any = "all",
    truth: nn.Module | None = None,
    zero: float = 1e-12,
) -> tuple[float, float, LinearizedModel]:
    """Largest relative error of the outputs and of the gradients, against `truth` (`model` itself).

    The loss is ⟨out, u⟩ for a random u. A gradient that is zero in exact arithmetic (a key's bias
    under softmax) is a rounding error in both: below `zero` × the largest gradient it is measured
    against that.
    """
    lin = linearize(model, params)
    random_tau(lin)
    out = floats(lin(*args, **kwargs))
    us = [torch.randn_like(o) for o in out]
    depending = [o.requires_grad for o in out]  # a constant, as a logit scale that is not trained
    torch.autograd.backward(*picked(depending, out, us))

    exact = model if truth is None else truth
    dtype = next(exact.parameters()).dtype
    args, kwargs = converted(args, dtype), converted(kwargs, dtype)
    taus = {n: t.detach().to(dtype).requires_grad_() for n, t in lin.tau.items()}
    ref = torch_linearized(exact, args, kwargs, taus)
    assert all(y.isfinite().all() for y in ref)
    assert [y.requires_grad for y in ref] == depending
    torch.autograd.backward(*picked(depending, ref, [u.to(dtype) for u in us]))

    largest = max(float(t.grad.norm()) for t in taus.values() if t.grad is not None)
    worst = 0.0
    for name, tau in taus.items():
        want = torch.zeros_like(tau) if tau.grad is None else tau.grad
        grad = lin.tau[name].grad
        scale = largest if want.norm() <= zero * largest else 0.0
        worst = max(worst, relative(torch.zeros_like(tau) if grad is None else grad, want, scale))
    return max(relative(a, b) for a, b in zip(out, ref, strict=True)), worst, lin


def converted(tree: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor of `tree` in `dtype`."""
    leaves, spec = tree_flatten(tree)
    moved = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    return tree_unflatten(moved, spec)


def picked(which: Sequence[bool], *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """The entries of each list where `which` is true."""
    return [[x for x, w in zip(xs, which, strict=True) if w] for xs in lists]
