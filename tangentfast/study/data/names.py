"""What classes are called, and the prompts they are put into, where a data set says neither.

Prompts follow the scheme of CLIP (Radford et al. 2021, arXiv:2103.00020, section 3.1.4): several
sentences a data set that say what kind of picture it is, whose text features are averaged. The
wording is ours, so zero-shot accuracies differ a little from published ones.
"""

from __future__ import annotations

__all__ = ["EUROSAT", "GTSRB", "templates"]

EUROSAT = {
    "AnnualCrop": "fields of annual crops",
    "Forest": "forest",
    "HerbaceousVegetation": "shrubs and herbaceous vegetation",
    "Highway": "a highway or road",
    "Industrial": "industrial or commercial buildings",
    "Pasture": "pasture",
    "PermanentCrop": "an orchard or vineyard of permanent crops",
    "Residential": "homes in a residential area",
    "River": "a river",
    "SeaLake": "a lake or the sea",
}
GTSRB = (
    "speed limit 20 km/h",
    "speed limit 30 km/h",
    "speed limit 50 km/h",
    "speed limit 60 km/h",
    "speed limit 70 km/h",
    "speed limit 80 km/h",
    "end of the 80 km/h speed limit",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no passing",
    "no passing for trucks",
    "right of way at the next crossing",
    "priority road",
    "give way",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general danger, an exclamation mark",
    "dangerous bend to the left",
    "dangerous bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights ahead",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice and snow",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "straight ahead only",
    "straight ahead or right",
    "straight ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)

_DIGIT = ("the handwritten digit {}.", "a scan of the number {}, written by hand.", 'a "{}".')
_LETTER = ('the letter "{}".', 'a picture of the printed character "{}".')
_DEFAULT = ("a photo of a {}.", "a picture of {}.", "an image that shows {}.")
_TEMPLATES = {
    "cars": (
        "a photo of a {} car.",
        "a {} parked in the street.",
        "a picture of my new {}.",
        "the {}, seen from the side.",
    ),
    "dtd": (
        "a close-up of a {} texture.",
        "a photo of a {} pattern.",
        "a surface that looks {}.",
    ),
    "eurosat": (
        "a satellite image of {}.",
        "an aerial view of {}.",
        "{}, seen from space.",
    ),
    "gtsrb": (
        'a photo of the traffic sign "{}".',
        'a cropped close-up of a German road sign: "{}".',
        "a road sign that means {}.",
    ),
    "mnist": _DIGIT,
    "mnist5k": _DIGIT,
    "digits": _DIGIT,
    "resisc45": (
        "a satellite image of a {}.",
        "an aerial photo of a {}.",
        "a {}, seen from above.",
    ),
    "sun397": ("a photo of a {}.", "a place: the {}.", "a view of a {}."),
    "svhn": (
        'a photo of the house number "{}".',
        "a street photo of the digit {}.",
        'the number "{}" beside a door.',
    ),
    "imagenet": (
        "a photo of a {}.",
        "a close-up of a {}.",
        "a blurry photo of the {}.",
        "a photo of one {} among other things.",
        "a drawing of a {}.",
        "a bright photo of a small {}.",
        "a dark photo of a large {}.",
    ),
    "animals": ("the silhouette of a {}.", "a white {} on black ground."),
    "letters": _LETTER,
    "greek": ('the Greek letter "{}".', *_LETTER),
    "cyrillic": ('the Cyrillic letter "{}".', *_LETTER),
    "typefaces": ("two letters set in {}.", "a sample of the typeface {}."),
    "textures": ("a texture of {}.", "a pattern of {}, seen close."),
    "shapes": ("a drawing of a {}.", "a geometric figure: a {}."),
    "counting": ("{} discs.", "a drawing of {} dots."),
    "arrows": ("an arrow that points {}.", "a sign that says: go {}."),
    "signs": ("a traffic sign: a {}.", "a road sign in the shape of a {}."),
    "colours": ("a {} disc.", "a drawing of something large and {}."),
}


def templates(name: str) -> tuple[str, ...]:
    """The prompts of a task, each with one `{}` for the class; general ones for a folder."""
    return _TEMPLATES.get(name, _DEFAULT)
