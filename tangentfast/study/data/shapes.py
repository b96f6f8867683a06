"""Generated tasks of drawn shapes: which, how many, which way, signs and colours."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .canvas import Random, clutter, colours, hsv, paper

__all__ = [
    "COLOURS",
    "COUNTS",
    "DIRECTIONS",
    "SHAPES",
    "SIGNS",
    "draw_arrow",
    "draw_colour",
    "draw_count",
    "draw_shape",
    "draw_sign",
]


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners [n, 2] of a regular polygon; of a star, whose every second one is at `inner`."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y], 1) / 16


def _crescent() -> np.ndarray:
    outer = np.linspace(0.15 * np.pi, 1.85 * np.pi, 30)
    inner = outer[::-1]
    back = np.stack([0.72 * np.cos(inner) + 0.32, 0.66 * np.sin(inner)], 1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), back])


_ARM = 0.32
# Corners around the origin, the farthest at about 1.
SHAPES = {
    "circle": _regular(48),
    "triangle": _regular(3),
    "square": _regular(4),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "octagon": _regular(8),
    "star": _regular(10, 0.45),
    "cross": np.array(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
         (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
    "heart": _heart(),
    "crescent": _crescent(),
}  # fmt: skip
COUNTS = ("one", "two", "three", "four", "five")
# Clockwise from the top: class k points k eighths of a turn from north.
DIRECTIONS = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
_PLATES = {"triangle": 0.0, "circle": 0.0, "square": 0.125, "diamond": 0.0, "octagon": 0.0625}
SIGNS = tuple(f"{plate} with {mark}" for plate in _PLATES for mark in ("a bar", "a cross"))
# Hue in turns, saturation, value.
COLOURS = {
    "red": (0.0, 0.85, 0.85),
    "orange": (0.075, 0.9, 0.95),
    "yellow": (0.15, 0.85, 0.95),
    "green": (0.33, 0.8, 0.65),
    "turquoise": (0.48, 0.7, 0.8),
    "blue": (0.62, 0.85, 0.8),
    "violet": (0.76, 0.7, 0.7),
    "pink": (0.93, 0.45, 0.95),
    "brown": (0.07, 0.65, 0.45),
    "grey": (0.0, 0.0, 0.55),
}


def _place(
    corners: np.ndarray, centre: np.ndarray, radius: float, turns: float
) -> list[tuple[float, float]]:
    angle = 2 * np.pi * turns
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return [(float(x), float(y)) for x, y in radius * corners @ turn.T + centre]


def draw_shape(random: Random, label: int, size: int) -> Image.Image:
    """One shape, filled or in outline, of any size and turn, among smaller clutter."""
    ink, ground = colours(random)
    picture = paper(random, size, ground)
    draw = ImageDraw.Draw(picture)
    clutter(draw, random, size, lines=2, dots=3)
    centre = size * (0.5 + random.uniform(-0.15, 0.15, 2))
    corners = list(SHAPES.values())[label]
    points = _place(corners, centre, size * random.uniform(0.22, 0.38), random.uniform())
    if random.uniform() < 0.5:
        draw.polygon(points, ink)
    else:
        draw.line([*points, *points[:2]], ink, max(2, size // 22), joint="curve")
    return picture


def draw_count(random: Random, label: int, size: int) -> Image.Image:
    """As many discs as the class says, of several sizes, none touching another."""
    ink, ground = colours(random)
    picture = paper(random, size, ground)
    draw = ImageDraw.Draw(picture)
    placed: list[tuple[np.ndarray, float]] = []
    while len(placed) <= label:
        radius = size * random.uniform(0.08, 0.12)
        centre = random.uniform(radius, size - radius, 2)
        if all(np.hypot(*(centre - c)) > radius + r + size * 0.04 for c, r in placed):
            placed.append((centre, radius))
            draw.ellipse((*(centre - radius), *(centre + radius)), ink)
    return picture


def draw_arrow(random: Random, label: int, size: int) -> Image.Image:
    """An arrow that points where the class says, give or take 14 degrees."""
    ink, ground = colours(random)
    picture = paper(random, size, ground)
    draw = ImageDraw.Draw(picture)
    clutter(draw, random, size, lines=2, dots=2)
    shaft, head, length = random.uniform((0.07, 0.3, 0.4), (0.16, 0.5, 0.8)).tolist()
    neck = length - 1
    arrow = np.array(
        [(0, -1), (head, neck), (shaft, neck), (shaft, 1), (-shaft, 1), (-shaft, neck),
         (-head, neck)]
    )  # fmt: skip
    centre = size * (0.5 + random.uniform(-0.12, 0.12, 2))
    turns = label / len(DIRECTIONS) + random.uniform(-0.04, 0.04)
    draw.polygon(_place(arrow, centre, size * random.uniform(0.28, 0.42), turns), ink)
    return picture


def draw_sign(random: Random, label: int, size: int) -> Image.Image:
    """A plate with a rim and a mark, a little tilted: the class is the two together."""
    plate, mark = list(_PLATES)[label // 2], label % 2
    ink, face = colours(random)
    picture = paper(random, size, tuple(random.integers(256, size=3).tolist()))
    draw = ImageDraw.Draw(picture)
    clutter(draw, random, size, lines=2, dots=2)
    corners = SHAPES["square" if plate == "diamond" else plate]
    centre = size * (0.5 + random.uniform(-0.12, 0.12, 2))
    radius = size * random.uniform(0.24, 0.4)
    tilt = random.uniform(-0.04, 0.04)
    draw.polygon(_place(corners, centre, radius, _PLATES[plate] + tilt), ink)
    draw.polygon(_place(corners, centre, 0.75 * radius, _PLATES[plate] + tilt), face)
    stroke = np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
    for turns in (0.0, 0.25)[: mark + 1]:
        draw.polygon(_place(stroke, centre, 0.38 * radius, turns + tilt), ink)
    return picture


def draw_colour(random: Random, label: int, size: int) -> Image.Image:
    """The colour of the largest of several shapes, under a light that changes."""
    values = np.array(list(COLOURS.values()))
    light = random.uniform(0.85, 1.1)

    def tone(index: int) -> tuple[int, int, int]:
        hue, saturation, value = values[index]
        jitter = random.normal(0, (0.008, 0.04, 0.03))
        channels = np.clip((saturation + jitter[1], (value + jitter[2]) * light), 0, 1)
        return hsv(hue + jitter[0], *(channels * (saturation > 0, 1)).tolist())

    others = [k for k in range(len(values)) if k != label]
    picture = paper(random, size, tone(int(random.choice(others))))
    draw = ImageDraw.Draw(picture)
    shapes = list(SHAPES.values())
    radii = [random.uniform(0.1, 0.15) for _ in range(random.integers(1, 4))]
    for radius in radii:
        place = size * random.uniform(0.1, 0.9, 2)
        corners = shapes[random.integers(len(shapes))]
        other = tone(int(random.choice(others)))
        draw.polygon(_place(corners, place, size * radius, random.uniform()), other)
    centre = size * (0.5 + random.uniform(-0.2, 0.2, 2))
    largest = _place(SHAPES["circle"], centre, size * random.uniform(0.22, 0.32), 0.0)
    draw.polygon(largest, tone(label))
    return picture
