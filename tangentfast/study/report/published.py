"""Published numbers of the papers' eight data sets, and when a run may stand beside them.

Sources: OrthoReg, arXiv:2604.17078; TAK, arXiv:2602.17385. Accuracies of addition are tables of
those papers for CLIP's image encoders fine-tuned as by Ortiz-Jimenez et al. (arXiv:2305.12827) and
Jin et al. (arXiv:2407.07089); negation is at 95 % of the control's zero-shot accuracy.
"""

from __future__ import annotations

import re

from .schema import Results

__all__ = ["PUBLISHED", "RELATIVE", "SOURCES", "model"]

ORTHOREG, TAK = "OrthoReg, arXiv:2604.17078", "TAK, arXiv:2602.17385"
SOURCES = (ORTHOREG, TAK)
MODELS = {"vitb32": "ViT-B/32", "vitb16": "ViT-B/16", "vitl14": "ViT-L/14"}
# As torchvision and the hubs name them, in lower case and without punctuation.
TASKS = {
    "cars": ("cars", "stanfordcars"),
    "dtd": ("dtd",),
    "eurosat": ("eurosat",),
    "gtsrb": ("gtsrb",),
    "mnist": ("mnist",),
    "resisc45": ("resisc45",),
    "sun397": ("sun397",),
    "svhn": ("svhn",),
}

# Source, regime, measure: percent for ViT-B/32, ViT-B/16, ViT-L/14.
_ROWS: tuple[tuple[str, str, str, tuple[float | None, float | None, float | None]], ...] = (
    (ORTHOREG, "nonlinear", "absolute", (70.3, 75.4, 84.1)),
    (ORTHOREG, "nonlinear", "normalized", (77.6, None, 89.2)),
    (ORTHOREG, "ntk", "absolute", (74.7, 79.0, 86.2)),
    (ORTHOREG, "ntk", "normalized", (85.3, 87.5, 93.1)),
    (ORTHOREG, "attention", "absolute", (78.1, 80.7, 87.8)),
    (ORTHOREG, "attention", "normalized", (87.0, 87.6, 93.6)),
    (ORTHOREG, "ntk", "target", (11.5, 9.3, 8.4)),
    (ORTHOREG, "ntk", "control", (64.0, 66.8, 74.4)),
    (ORTHOREG, "attention", "target", (19.4, 19.2, 24.9)),
    (ORTHOREG, "attention", "control", (64.9, 67.8, 76.4)),
    (TAK, "nonlinear", "absolute", (73.5, 77.0, 84.5)),
    (TAK, "nonlinear", "normalized", (80.4, 82.9, 89.7)),
    (TAK, "ntk", "absolute", (78.8, 82.0, 88.0)),
    (TAK, "ntk", "normalized", (89.9, 90.9, 94.8)),
    (TAK, "attention", "absolute", (78.2, 80.4, 88.2)),
    (TAK, "attention", "normalized", (86.3, 87.1, 93.8)),
    (TAK, "ntk", "at_one", (76.7, 80.2, 88.0)),
    (TAK, "attention", "at_one", (22.5, 22.8, 66.2)),
)
# (source, model, regime, measure) -> fraction
PUBLISHED: dict[tuple[str, str, str, str], float] = {
    (source, model, regime, measure): value / 100
    for source, regime, measure, values in _ROWS
    for model, value in zip(MODELS.values(), values, strict=True)
    if value is not None
}
# Training of ViT-L/14 on Cars, OrthoReg's table 3: minutes and GB, here over those of non-linear.
_COST = {"ntk": (280.9 / 158.2, 68.0 / 42.6), "attention": (126.3 / 158.2, 36.6 / 42.6)}
RELATIVE: dict[tuple[str, str, str, str], float] = {
    (ORTHOREG, "ViT-L/14", regime, measure): ratio
    for regime, ratios in _COST.items()
    for measure, ratio in zip(("seconds", "memory"), ratios, strict=True)
}


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def model(results: Results) -> str | None:
    """The published model that `results` may be compared with: None unless it is one of the three
    and the tasks are the papers' eight."""
    if results.model.library != "open_clip":
        return None
    known = MODELS.get(_bare(results.model.name).removesuffix("quickgelu"))
    names = [_bare(task.name) for task in results.tasks]
    complete = len(names) == len(TASKS) and all(
        any(alias in names for alias in aliases) for aliases in TASKS.values()
    )
    return known if complete else None
