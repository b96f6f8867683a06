"""A generated task of textures: periodic and noisy fields, turned, scaled and coloured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .canvas import Random, colours

__all__ = ["TEXTURES", "draw_texture"]

Field = Callable[[np.ndarray, np.ndarray, Random], np.ndarray]


def _bricks(u: np.ndarray, v: np.ndarray, random: Random) -> np.ndarray:
    shifted = u / 2 + 0.5 * (np.floor(v) % 2)
    return ((shifted % 1 > 0.1) & (v % 1 > 0.2)).astype(float)


def _cells(u: np.ndarray, v: np.ndarray, random: Random) -> np.ndarray:
    points = random.uniform(-5, 5, (2, 40, 1, 1)).astype(np.float32)
    near = np.sqrt(np.partition((u - points[0]) ** 2 + (v - points[1]) ** 2, 1, axis=0)[:2])
    return (near[1] - near[0]).clip(0, 0.4) / 0.4  # dark at the walls between Voronoi cells


def _clouds(u: np.ndarray, v: np.ndarray, random: Random) -> np.ndarray:
    waves = random.normal(0, 2.2, (2, 12, 1, 1)).astype(np.float32)
    phases = random.uniform(0, 2 * np.pi, (12, 1, 1)).astype(np.float32)
    return np.sin(waves[0] * u + waves[1] * v + phases).sum(0) / 6 + 0.5


# Of coordinates in periods of the texture, [S, S] each; values about 0..1.
TEXTURES: dict[str, Field] = {
    "stripes": lambda u, v, random: (u % 1 < 0.5).astype(float),
    "checks": lambda u, v, random: (np.floor(u) + np.floor(v)) % 2,
    "dots": lambda u, v, random: (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32).astype(float),
    "bricks": _bricks,
    "waves": lambda u, v, random: ((v + 0.35 * np.sin(2 * np.pi * u / 1.5)) % 1 < 0.5) * 1.0,
    "zigzag": lambda u, v, random: ((v + np.abs(u % 1.4 - 0.7)) % 1 < 0.5).astype(float),
    "rings": lambda u, v, random: (np.hypot(u, v) % 1 < 0.5).astype(float),
    "mesh": lambda u, v, random: ((u % 1 < 0.22) | (v % 1 < 0.22)).astype(float),
    "cells": _cells,
    "clouds": _clouds,
}


def draw_texture(random: Random, label: int, size: int) -> Image.Image:
    """The texture of a class; a shade runs over it, and its two colours may be close."""
    periods, angle = random.uniform(2.5, 6.5), random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    x, y = x + np.float32(random.uniform(-0.25, 0.25)), y + np.float32(random.uniform(-0.25, 0.25))
    cosine, sine = np.float32(periods * np.cos(angle)), np.float32(periods * np.sin(angle))
    u, v = cosine * x + sine * y, cosine * y - sine * x
    field = list(TEXTURES.values())[label](u, v, random).astype(np.float32).clip(0, 1)
    ink, ground = (np.array(colour, np.float32) for colour in colours(random))
    step = np.float32(random.uniform(0.25, 1)) * (ink - ground)
    slope = random.normal(0, 60, (2, 3)).astype(np.float32)
    # Channel by channel: an array [S, S] at a time stays in the cache.
    channels = [ground[c] + step[c] * field + slope[0, c] * x + slope[1, c] * y for c in range(3)]
    return Image.fromarray(np.stack(channels, 2).clip(0, 255).astype(np.uint8))
