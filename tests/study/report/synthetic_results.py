"""Results of a study that never ran: plausible numbers, in the shape of results.json."""

from __future__ import annotations

import math
import random
from typing import Any

LABELS = {
    "nonlinear": "non-linear",
    "posthoc": "post-hoc linear",
    "ntk": "NTK-linear",
    "attention": "attention-only",
    "attention-tangent": "attention-only, tangent",
}
INTERFERENCE = {
    "nonlinear": 0.30, "posthoc": 0.22, "ntk": 0.12, "attention": 0.15, "attention-tangent": 0.10,
}  # fmt: skip
SINGLE = {
    "nonlinear": 0.92, "posthoc": 0.78, "ntk": 0.89, "attention": 0.91, "attention-tangent": 0.87,
}  # fmt: skip
TASKS = ("digits", "animals", "letters", "greek", "textures", "counting", "arrows", "signs")


def grid(low: float, high: float, count: int) -> list[float]:
    return [round(low + (high - low) * i / (count - 1), 6) for i in range(count)]


def xi(alphas: list[float], strength: float, tilt: float) -> list[list[float]]:
    """No error where one of the coefficients is 0; more along α1 than along α2."""
    return [
        [min(2.0, strength * min(abs(a), abs(b)) * (1 + tilt * abs(a))) for b in alphas]
        for a in alphas
    ]


def box(alphas: list[float], values: list[list[float]]) -> float:
    inside = [i for i, alpha in enumerate(alphas) if 0 <= alpha <= 1]
    return sum(values[i][j] for i in inside for j in inside) / len(inside) ** 2


def run(regime: str, seed: int, tasks: tuple[str, ...], base: dict[str, float]) -> dict[str, Any]:
    noise = random.Random(f"{regime} {seed}")
    loss, top = INTERFERENCE[regime], SINGLE[regime]
    single = {t: min(1.0, top + noise.uniform(-0.05, 0.05)) for t in tasks}
    alphas = grid(0.0, 1.0, 21)
    peak = 0.35 + noise.choice([0.0, 0.05])

    def curve(task: str) -> list[float]:
        best = single[task] * (1 - loss)
        return [
            base[task] + (best - base[task]) * math.exp(-(((a - peak) / 0.4) ** 2))
            - (base[task] if a > 0.9 and regime == "nonlinear" else 0.0) * 0.5
            for a in alphas
        ]  # fmt: skip

    curves = {task: curve(task) for task in tasks}
    i = min(range(21), key=lambda k: abs(alphas[k] - peak))
    test = {task: curves[task][i] for task in tasks}
    map_alphas = grid(-2.0, 2.0, 11)
    maps = []
    for pair, kind in (
        (tasks[:2], "prediction"),
        (tasks[-2:], "prediction"),
        (tasks[:2], "representation"),
    ):
        if len(pair) == 2:
            scale = 1.0 if kind == "prediction" else 2.6
            values = xi(map_alphas, scale * loss * noise.uniform(0.9, 1.1), 0.4)
            maps.append(
                {"tasks": list(pair), "kind": kind, "alphas": map_alphas,
                 "head": "prototype" if kind == "prediction" else "",
                 "xi": values, "box": box(map_alphas, values)}
            )  # fmt: skip
    cosine = [
        [
            1.0 if a == b else round(0.15 * loss + 0.02 * ((i * j) % 5 - 2), 4)
            for j, b in enumerate(tasks)
        ]
        for i, a in enumerate(tasks)
    ]
    subsets = [
        {"tasks": list(tasks[:n]), "alpha": 0.4,
         "absolute": top * (1 - loss * (n - 1) / 8) + noise.uniform(-0.02, 0.02),
         "normalized": 1 - loss * (n - 1) / 8 + noise.uniform(-0.02, 0.02)}
        for n in range(2, len(tasks) + 1) for _ in range(3)
    ]  # fmt: skip
    negated = {
        t: {"target_val": [base[t]] * 21, "control_val": [0.63] * 21, "alpha": 0.3, "reached": True,
            "target": base[t] * (0.2 + loss), "control": 0.6}
        for t in tasks
    }  # fmt: skip
    return {
        "seed": seed,
        "single": single,
        "addition": {
            "alphas": alphas, "val": curves, "val_single": single, "alpha": alphas[i], "test": test,
            "absolute": sum(test.values()) / len(tasks),
            "normalized": sum(test[t] / single[t] for t in tasks) / len(tasks),
            "at_one": sum(c[-1] for c in curves.values()) / len(tasks),
        },
        "negation": {
            "alphas": alphas, "tasks": negated, "control_base": 0.63, "threshold": 0.95,
            "control": 0.6,
            "target": sum(n["target"] for n in negated.values()) / len(tasks),
        },
        "disentanglement": maps,
        "cosine": cosine,
        "subsets": subsets,
    }  # fmt: skip


def results(
    tasks: tuple[str, ...] = TASKS,
    seeds: tuple[int, ...] = (0, 1, 2),
    regimes: tuple[str, ...] = tuple(LABELS),
) -> dict[str, Any]:
    """The content of a results.json."""
    noise = random.Random(0)
    base = {task: noise.uniform(0.3, 0.6) for task in tasks} | {"colours": 0.63}
    map_alphas = grid(-2.0, 2.0, 11)
    study = []
    for regime in regimes:
        for head, factor in (
            ("zero-shot", 1.1), ("prototype", 1.0), ("probe", 0.9), ("trained", 0.8),
            ("none (representation)", 2.6),
        ):  # fmt: skip
            if len(tasks) > 1:
                values = xi(map_alphas, INTERFERENCE[regime] * factor, 0.4)
                study.append(
                    {"regime": regime, "head": head, "tasks": list(tasks[:2]), "alphas": map_alphas,
                     "xi": values, "box": box(map_alphas, values)}
                )  # fmt: skip
    cost = {"nonlinear": 0.16, "ntk": 0.25, "attention": 0.12, "attention-tangent": 0.17}
    memory = {"nonlinear": 620, "ntk": 700, "attention": 500, "attention-tangent": 540}
    trained = {
        "nonlinear": 22_056_192,
        "ntk": 22_056_192,
        "attention": 7_077_888,
        "attention-tangent": 7_077_888,
    }
    return {
        "schema": 1, "name": "synthetic", "date": "2025-01-02T03:04:05+00:00", "seconds": 1234.5,
        "versions": {"tangentfast": "0.1.0", "torch": "2.10.0", "python": "3.11.2"},
        "machine": {"cpu": "a CPU", "device": "cpu", "threads": 2},
        "config": {
            "model": {"name": "vit", "pretrained": None},
            "train": {"lr": [1e-5, 1e-4], "seeds": list(seeds)},
        },
        "command": "tangentfast study run --preset small --out 'my <run>'",
        "model": {"name": "vit_small_patch14_dinov2", "library": "timm", "pretrained": "lvd142m",
                  "parameters": 22_056_192, "image_size": 56},
        "head": "prototype",
        "tasks": [
            {"name": t, "classes": 10, "train": 512, "val": 64, "test": 128,
             "source": "real" if t in TASKS[:2] else "generated"}
            for t in (*tasks, "colours")
        ],
        "control": "colours", "seeds": list(seeds), "base": base,
        "regimes": {
            name: {
                "label": LABELS[name],
                "lr": 1e-4,
                "lr_grid": {} if name == "posthoc" else {"1e-05": 0.8, "1e-04": 0.9, "1e-03": 0.7},
                "trained_parameters": trained.get(name),
                "seconds_per_step": cost.get(name),
                "peak_bytes": memory[name] * 2**20 if name in memory else None,
                "runs": [run(name, seed, tasks, base) for seed in seeds],
            }
            for name in regimes
        },
        "head_study": study,
    }  # fmt: skip
