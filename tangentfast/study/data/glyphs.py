"""Generated tasks of writing: letters of three alphabets, and the typeface they are set in."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from .canvas import Random, clutter, colours, font, paper

__all__ = ["ALPHABETS", "FACES", "draw_typeface", "letter_drawer"]

ALPHABETS = {
    "letters": "ABCDEFGHIJ",
    "greek": "αβγδεθλμπφψω",
    "cyrillic": "БГДЖЗИЛФЦШЭЯ",
}
# All of them have the glyphs of all three alphabets.
_ANY = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic",
)  # fmt: skip
FACES = {
    "DejaVu Sans": "DejaVuSans",
    "DejaVu Sans Mono": "DejaVuSansMono",
    "DejaVu Serif": "DejaVuSerif",
    "DejaVu Sans Oblique": "DejaVuSans-Oblique",
    "STIX Italic": "STIXGeneralItalic",
    "Computer Modern Typewriter": "cmtt10",
    "Computer Modern Bold": "cmb10",
}


def letter_drawer(alphabet: str) -> Callable[[Random, int, int], Image.Image]:
    """Draws the letter of a class in any face, size, colour and tilt."""

    def draw(random: Random, label: int, size: int) -> Image.Image:
        face = _ANY[random.integers(len(_ANY))]
        pixels = int(random.uniform(0.55, 0.85) * size)
        return _write(random, size, alphabet[label], face, pixels, tilt=10, shift=0.08)

    return draw


def draw_typeface(random: Random, label: int, size: int) -> Image.Image:
    """Two letters of the Latin alphabet in the typeface of a class."""
    face = list(FACES.values())[label]
    text = "".join(random.choice(list("ABDEGHKMQRSabdefghkmnqrstuy"), 2))
    pixels = int(random.uniform(0.5, 0.65) * size)
    return _write(random, size, text, face, pixels, tilt=5, shift=0.06)


def _write(
    random: Random, size: int, text: str, face: str, pixels: int, *, tilt: float, shift: float
) -> Image.Image:
    ink, ground = colours(random)
    mask = Image.new("L", (size, size))
    x, y = size * (0.5 + random.uniform(-shift, shift, 2))
    ImageDraw.Draw(mask).text((x, y), text, 255, font(face, pixels), anchor="mm")
    mask = mask.rotate(random.uniform(-tilt, tilt), Image.Resampling.BICUBIC)
    picture = paper(random, size, ground)
    clutter(ImageDraw.Draw(picture), random, size, lines=2, dots=2)
    picture.paste(ink, mask=mask)
    return picture
