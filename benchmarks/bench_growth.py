"""How a step grows with batch, tokens and depth, and a forward with K; and what Python adds per op.

    pytest benchmarks/bench_growth.py --benchmark-only

Small vision transformers, so that every axis is cheap; document.py fits the slopes.
"""

from __future__ import annotations

from typing import Any

import baselines
import pytest
import torch
from harness import DEVICE, SMOKE, assert_close, compare
from networks import directions, images, network, vit
from regimes import ORDINARY, OURS, OURS_ATTENTION, PUBLISHED
from steps import step
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Tape(TorchDispatchMode):
    """The aten operations of a piece of code, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def test_overhead(benchmark: Any) -> None:
    """ViT-Ti, one image: the linearized forward against its own aten operations, one by one.

    What is between the two is the Python of the dual layer.
    """
    model = network("ViT-Ti/16")
    x, vector = images(1), directions(model, 1)[0]
    linear = tf.linearize(model, at=vector)
    with torch.no_grad():
        tape = _Tape()
        with tape:
            expected = linear(x)
        assert len(tape.calls) > 0

        def check(results: dict[str, Any]) -> None:
            assert_close(results["tangentfast"], sum(results["torch.func.jvp"]), "overhead")
            assert_close(results["tangentfast"], expected, "the taped forward")

        compare(
            benchmark,
            {
                "tangentfast": lambda: linear(x),
                "torch.func.jvp": lambda: baselines.jvp(model, x, vector),
                "forward": lambda: model(x),
                "same aten operations": tape.replay,
            },
            check,
            against="same aten operations",
            seconds=5.0,
            rounds=15,
            model="ViT-Ti/16",
            operations=len(tape.calls),
        )
