"""How task vectors lie to each other in weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

import tangentfast as tf


def gram(vectors: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Inner products ⟨τ_s, τ_t⟩ of T task vectors, [T][T]; a name that one lacks counts as zero.

    Raises:
        TypeError, ValueError: as `tangentfast.gram`.
    """
    values: list[list[float]] = tf.gram(vectors).tolist()
    return values


def cosine(vectors: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Cosines ⟨τ_s, τ_t⟩ / (‖τ_s‖ ‖τ_t‖) of T task vectors, [T][T], in −1..1.

    Raises:
        ValueError: a vector is zero, and has no angle to any.
        TypeError: as `tangentfast.gram`.
    """
    products = tf.gram(vectors).cpu()
    norms = products.diagonal().sqrt()
    if not norms.all():
        zero = (norms == 0).nonzero().flatten().tolist()
        raise ValueError(f"cosine: vectors {zero} are zero, expected fine-tuned ones: train longer")
    values: list[list[float]] = (products / norms / norms[:, None]).clamp(-1, 1).tolist()
    return values
