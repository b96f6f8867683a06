"""How a step grows with batch, tokens and depth, and a forward with K.

    pytest benchmarks/bench_growth.py --benchmark-only

Small vision transformers, so that every axis is cheap; document.py fits the slopes.
"""

from __future__ import annotations

from typing import Any

import baselines
import pytest
import torch
from harness import DEVICE, SMOKE, assert_close, compare
from networks import directions, images, vit
from regimes import ORDINARY, OURS, OURS_ATTENTION, PUBLISHED
from steps import step

import tangentfast as tf

GPU = DEVICE.type == "cuda"
WIDTH = 64 if SMOKE else 768 if GPU else 192
BASE: dict[str, Any] = {"batch": 32 if GPU else 4, "size": 96, "depth": 4}
AXES: dict[str, list[int]] = {
    "batch": [n * BASE["batch"] // 4 for n in (2, 4, 8, 16)],
    "size": [64, 128, 192, 256],  # 16, 64, 144, 256 patches
    "depth": [2, 4, 8],
}
POINTS = [(axis, value) for axis, values in AXES.items() for value in values[: 2 if SMOKE else 9]]


@pytest.mark.parametrize(("axis", "value"), POINTS)
def test_growth(axis: str, value: int, benchmark: Any) -> None:
    """One training step of each regime."""
    here: dict[str, Any] = BASE | {axis: value}
    size = 32 if SMOKE else here["size"]
    model = vit(WIDTH, here["depth"], size)
    x = images(here["batch"], size=size)
    variants = [ORDINARY, PUBLISHED, OURS, OURS_ATTENTION]
    compare(
        benchmark,
        {variant: step(variant, model, x) for variant in variants},
        lambda results: assert_close(results[OURS], results[PUBLISHED], "step"),
        against=ORDINARY,
        seconds=0.8,
        axis="tokens" if axis == "size" else axis,
        value=(size // 16) ** 2 + 1 if axis == "size" else value,
        width=WIDTH,
        **here,
    )


@pytest.mark.parametrize("k", [1, 2] if SMOKE else [1, 2, 4, 8, 16])
def test_growth_of_tangents(k: int, benchmark: Any) -> None:
    """One forward with K tangents."""
    size = 32 if SMOKE else BASE["size"]
    model = vit(WIDTH, BASE["depth"], size)
    x, vectors = images(BASE["batch"], size=size), directions(model, k)

    def check(results: dict[str, Any]) -> None:
        expected = [dy for _, dy in results["torch.func.jvp"]]
        assert_close(results["tangentfast"][1], expected, "K tangents")

    with torch.no_grad():
        compare(
            benchmark,
            {
                "forward": lambda: model(x),
                "torch.func.jvp": lambda: [baselines.jvp(model, x, v) for v in vectors],
                "tangentfast": lambda: tf.jvp(model, (x,), params=vectors),
            },
            check,
            against="forward",
            seconds=0.8,
            axis="K",
            value=k,
            width=WIDTH,
            **BASE,
        )
