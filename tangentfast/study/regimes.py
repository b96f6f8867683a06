"""The five ways to fine-tune that are compared: what is trained, and as which model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["REGIMES", "Regime"]


@dataclass(frozen=True)
class Regime:
    """How task vectors are made, and the model in which they are evaluated.

    Attributes:
        name: its key in `REGIMES`, in configurations and in results.
        label: how tables and figures call it.
        params: what is trained, a selection of `tangentfast.linearize` and `train_only`.
        tangent: whether the model is f(x; θ0) + J τ rather than f(x; θ0 + τ).
        vectors_of: the regime whose task vectors are evaluated, where nothing is trained.
    """

    name: str
    label: str
    params: Literal["all", "attention"]
    tangent: bool
    vectors_of: str | None = None


# Non-linear, post-hoc and NTK-linear: Ortiz-Jimenez et al. 2023, arXiv:2305.12827; attention-only:
# Jin et al. 2024, arXiv:2407.07089; the last is both together.
REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("nonlinear", "non-linear", "all", tangent=False),
        Regime("posthoc", "post-hoc linear", "all", tangent=True, vectors_of="nonlinear"),
        Regime("ntk", "NTK-linear", "all", tangent=True),
        Regime("attention", "attention-only", "attention", tangent=False),
        Regime("attention-tangent", "attention-only, tangent", "attention", tangent=True),
    )
}
