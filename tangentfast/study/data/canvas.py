"""What all generated images are made of: papers, inks, clutter and grain, drawn with Pillow."""

from __future__ import annotations

import colorsys
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Colour", "Random", "clutter", "colours", "font", "grain", "hsv", "paper"]

Colour = tuple[int, int, int]
Random = np.random.Generator

# Least difference of the summed RGB values of ink and paper: below it, shapes are hard to see.
CONTRAST = 280


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """The colour of a hue in turns, a saturation and a value in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def colours(random: Random) -> tuple[Colour, Colour]:
    """An ink and a paper that differ enough to be told apart."""
    while True:
        ink, ground = random.integers(256, size=(2, 3)).tolist()
        if abs(sum(ink) - sum(ground)) >= CONTRAST:
            return tuple(ink), tuple(ground)


def paper(random: Random, size: int, colour: Colour) -> Image.Image:
    """A sheet of `size` pixels in about `colour`: lighter here, darker there."""
    spots = random.normal(0, 10, (4, 4, 3)) + np.array(colour)
    sheet = Image.fromarray(spots.clip(0, 255).astype(np.uint8))
    return sheet.resize((size, size), Image.Resampling.BICUBIC)


def clutter(draw: ImageDraw.ImageDraw, random: Random, size: int, lines: int, dots: int) -> None:
    """Up to so many thin lines and small dots of any colour, anywhere: none tells of the class."""
    for _ in range(random.integers(lines + 1)):
        ends = random.uniform(0, size, 4).tolist()
        draw.line(ends, tuple(random.integers(256, size=3).tolist()), max(1, size // 60))
    for _ in range(random.integers(dots + 1)):
        x, y = random.uniform(0, size, 2)
        r = random.uniform(0.015, 0.035) * size
        colour = tuple(random.integers(256, size=3).tolist())
        draw.ellipse((x - r, y - r, x + r, y + r), colour)


def grain(random: Random, image: Image.Image, deviation: float) -> np.ndarray:
    """The pixels of `image` with normal noise: uint8 [S, S, 3]."""
    pixels = np.asarray(image, np.float32)
    noise = random.standard_normal(pixels.shape, np.float32) * np.float32(deviation)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=512)
def font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib carries, by the stem of its file."""
    import matplotlib

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    return ImageFont.truetype(str(file), pixels)
