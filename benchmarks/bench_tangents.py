"""The forward alone: K tangents in one pass, and every mixture of task vectors for free.

    pytest benchmarks/bench_tangents.py --benchmark-only

f_lin is linear in the mixing coefficients, so that one pass with K tangents gives an α sweep, or a
map over two coefficients; the other way evaluates the linearized model once for each point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import baselines
import pytest
import torch
from harness import DEVICE, SMOKE, assert_close, compare
from networks import directions, images, network
from torch import Tensor, nn

import tangentfast as tf

GPU = DEVICE.type == "cuda"
NAME = "ViT-L/14" if GPU else "ViT-B/32"
BATCH = 32 if GPU else 1
ALPHAS = [i / 20 for i in range(21)]
MAP = [i / 14 for i in range(15)]
SAMPLED = 15  # points of the map that are really evaluated one by one
FACTS: dict[str, Any] = {"model": NAME, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _forward_alone() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def problem() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The network and eight task vectors."""
    model = network(NAME)
    return model, directions(model, 8)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_tangents(k: int, benchmark: Any) -> None:
    model, vectors = problem()
    x, some = images(BATCH), vectors[:k]

    def check(results: dict[str, Any]) -> None:
        expected = [dy for _, dy in results["torch.func.jvp, K calls"]]
        assert_close(results["tangentfast, one pass"][1], expected, "K tangents")
        assert_close([dy for _, dy in results["tangentfast, K calls"]], expected, "K calls")

    compare(
        benchmark,
        {
            "tangentfast, one pass": lambda: tf.jvp(model, (x,), params=some),
            "tangentfast, K calls": lambda: [tf.jvp(model, (x,), params=v) for v in some],
            "torch.func.jvp, K calls": lambda: [baselines.jvp(model, x, v) for v in some],
        },
        check,
        against="torch.func.jvp, K calls",
        seconds=2.0 * k,
        rounds=5,
        K=k,
        batch=BATCH,
        **FACTS,
    )


def by_points(vectors: Sequence[dict[str, Tensor]], points: Sequence[Sequence[float]]) -> Any:
    """A linearized model whose τ is set to the mixture of each point in turn."""
    model, x = problem()[0], images(BATCH)
    linear = tf.linearize(model)

    def call() -> list[Tensor]:
        outs = []
        for point in points:
            for name, tau in linear.tau.items():
                torch.mul(vectors[0][name], point[0], out=tau.data)
                for alpha, vector in zip(point[1:], vectors[1:], strict=True):
                    tau.data.add_(vector[name], alpha=alpha)
            outs.append(linear(x))
        return outs

    return call


def by_points_published(
    vectors: Sequence[dict[str, Tensor]], points: Sequence[Sequence[float]]
) -> Any:
    """The same through ``torch.func.jvp``: one for each point, along the mixture."""
    model, x = problem()[0], images(BATCH)

    def mixture(point: Sequence[float]) -> dict[str, Tensor]:
        return {
            name: torch.stack([a * v[name] for a, v in zip(point, vectors, strict=True)]).sum(0)
            for name in vectors[0]
        }

    return lambda: [sum(baselines.jvp(model, x, mixture(point))) for point in points]


def in_one_pass(vectors: Sequence[dict[str, Tensor]], points: Sequence[Sequence[float]]) -> Any:
    """One pass with a tangent for each vector, and a weighted sum for each point."""
    model, x = problem()[0], images(BATCH)

    def call() -> list[Tensor]:
        out, douts = tf.jvp(model, (x,), params=vectors)
        return [
            out + sum(a * dout for a, dout in zip(point, douts, strict=True)) for point in points
        ]

    return call


def test_alpha_sweep(benchmark: Any) -> None:
    """21 mixing coefficients of one task vector."""
    vectors, points = problem()[1][:1], [(alpha,) for alpha in ALPHAS[:: 10 if SMOKE else 1]]

    def check(results: dict[str, Any]) -> None:
        for name in results:
            assert_close(results[name], results["torch.func.jvp, point by point"], name)

    compare(
        benchmark,
        {
            "tangentfast, one pass": in_one_pass(vectors, points),
            "tangentfast, point by point": by_points(vectors, points),
            "torch.func.jvp, point by point": by_points_published(vectors, points),
        },
        check,
        against="torch.func.jvp, point by point",
        seconds=14,
        rounds=5,
        points=len(points),
        sampled=len(points),
        batch=BATCH,
        **FACTS,
    )


def test_map(benchmark: Any) -> None:
    """A 15 × 15 map over the coefficients of two task vectors.

    Every point costs the same, so that one row is evaluated point by point, and recorded as such:
    document.py multiplies it up.
    """
    vectors = problem()[1][:2]
    points = list(itertools.product(MAP, MAP))
    sampled = points[:: len(points) // 3] if SMOKE else points[7 * 15 : 7 * 15 + SAMPLED]

    def check(results: dict[str, Any]) -> None:
        every = dict(zip(points, results["tangentfast, one pass"], strict=True))
        expected = by_points_published(vectors, sampled[:1])()
        assert_close([every[sampled[0]]], expected, "map, one pass")
        expected = results["tangentfast, point by point"]
        assert_close([every[p] for p in sampled], expected, "map, every point")

    compare(
        benchmark,
        {
            "tangentfast, one pass": in_one_pass(vectors, points),
            "tangentfast, point by point": by_points(vectors, sampled),
        },
        check,
        against="tangentfast, point by point",
        seconds=9,
        rounds=5,
        points=len(points),
        sampled=len(sampled),
        batch=BATCH,
        **FACTS,
    )
