"""What tangentfast is compared with, written from the published methods; each names its source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Vector = Mapping[str, Tensor]


class FullNTK:
    """NTK linearization, ``torch.func.jvp`` and backward through it.

    Ortiz-Jimenez et al. (2023), arXiv:2305.12827, section 4: f(x; θ0) + J(x) τ by one
    Jacobian-vector product. Attention runs on the math backend, the only one with a forward
    derivative. `names` are the trained parameters, by default all.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None):
        self.model = model
        self.base = {n: p.detach() for n, p in model.named_parameters()}
        names = list(self.base) if names is None else list(names)
        self.tau = {n: torch.zeros_like(self.base[n], requires_grad=True) for n in names}

    def __call__(self, x: Tensor) -> Tensor:
        y, dy = jvp(self.model, x, self.tau, self.base)
        return y + dy


def jvp(
    model: nn.Module, x: Tensor, tau: Vector, base: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """f(x; θ0) and J(x) τ by ``torch.func.jvp`` over ``torch.func.functional_call``.

    The documented way, https://docs.pytorch.org/functorch/stable/notebooks/jacobians_hessians.html.
    """
    base = {n: p.detach() for n, p in model.named_parameters()} if base is None else base
    with sdpa_kernel(SDPBackend.MATH):
        result: Any = torch.func.jvp(
            lambda p: torch.func.functional_call(model, {**base, **p}, (x,)),
            ({n: base[n] for n in tau},),
            (dict(tau),),
        )
    y, dy = result
    return y, dy


def function_jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], dprimals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One torch function by ``torch.func.jvp``."""
    with sdpa_kernel(SDPBackend.MATH):
        result: Any = torch.func.jvp(function, tuple(primals), tuple(dprimals))
    y, dy = result
    return y, dy


def flash_jvp(primals: Sequence[Tensor], dprimals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention by the PyPI package ``jvp_flash_attention``, called as its page says."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    result: Any = torch.func.jvp(JVPAttn.fwd_dual, tuple(primals), tuple(dprimals))
    y, dy = result
    return y, dy


# Merging. Ilharco et al. (2023), arXiv:2212.04089, section 2: θ = θ0 + Σ_k α τ_k.


def add_loop(base: Vector, vectors: Sequence[Vector], alpha: float) -> None:
    """One in-place axpy for each vector and parameter."""
    for vector in vectors:
        for name, tensor in vector.items():
            base[name].add_(tensor, alpha=alpha)


def foreach_loop(base: Vector, vectors: Sequence[Vector], alpha: float) -> None:
    """The same with torch's multi-tensor axpy."""
    for vector in vectors:
        torch._foreach_add_(list(base.values()), list(vector.values()), alpha=alpha)


def sum_then_apply(base: Vector, vectors: Sequence[Vector], alpha: float) -> None:
    """The sum of all vectors as a new vector, scaled and added: the paper's formula, word by word.

    Task vectors are dictionaries with an ``__add__`` that makes a new one, as in the paper's
    reference scripts.
    """
    total: Vector = vectors[0]
    for vector in vectors[1:]:
        total = {name: total[name] + vector[name] for name in total}
    for name, tensor in total.items():
        base[name].copy_(base[name] + alpha * tensor)


def numpy_loop(base: Vector, vectors: Sequence[Vector], alpha: float) -> None:
    """The same loop on numpy arrays that share the tensors' memory."""
    for vector in vectors:
        for name, tensor in vector.items():
            array = base[name].numpy()
            array += alpha * tensor.numpy()
