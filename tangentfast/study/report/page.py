"""report.html, one file that needs no server and no other file, and report.md, read in git."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .claims import CLAIMS, NAMES, VERDICTS, findings, verdict
from .figures import INK, Drawing, files
from .schema import Results
from .table import Table, markdown
from .tables import headline

__all__ = ["Picture", "compare_page", "differences", "illustrate", "report_pages"]

# The page's ink in a figure: an <img> keeps its own scope of colours, so the figure decides itself.
INKS = (
    f"<style>svg{{color:{INK}}}"
    "@media(prefers-color-scheme:dark){svg{color:#e3e6ea}}"
    "@media print{svg{color:#000}}</style>"
)


@dataclass(frozen=True)
class Picture:
    """A drawn figure: path of its PNG beside the page, title, caption, and the SVG itself."""

    path: str
    title: str
    caption: str
    svg: bytes

    @property
    def uri(self) -> str:
        """The SVG as a data URI, its ink following the reader's light or dark."""
        text = self.svg.decode("utf-8").replace(INK, "currentColor")
        end = text.index(">", text.index("<svg")) + 1
        data = base64.b64encode((text[:end] + INKS + text[end:]).encode("utf-8"))
        return "data:image/svg+xml;base64," + data.decode("ascii")


def illustrate(drawings: Iterable[Drawing]) -> tuple[list[Picture], dict[str, bytes]]:
    """Pictures for a page, and the files of the figures by path beside it."""
    pictures = []
    written: dict[str, bytes] = {}
    for drawing in drawings:
        formats = {f"figures/{name}": content for name, content in files(drawing).items()}
        written |= formats
        path = f"figures/{drawing.name}"
        svg = formats[f"{path}.svg"]
        pictures.append(Picture(f"{path}.png", drawing.title, drawing.caption, svg))
    return pictures, written


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tangentfast.study.report", "templates"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown
    return environment


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(**values)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted key, text)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, "–" if value is None else str(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, on what, and when."""
    model = results.model
    parameters = "" if model.parameters is None else f", {model.parameters / 1e6:.3g} M parameters"
    size = "" if model.image_size is None else f", {model.image_size} px"
    weights = "" if model.pretrained is None else f", {model.pretrained}"
    origin = f" ({model.library}{weights})" if model.library else ""
    rows = [
        ("model", f"{model.name}{origin}{parameters}{size}"),
        ("head", results.head),
        ("tasks", ", ".join(task.name for task in results.tasks)),
        ("control", results.control or "–"),
        ("seeds", ", ".join(map(str, results.seeds))),
        ("regimes", ", ".join(regime.label for regime in results.regimes.values())),
        ("machine", ", ".join(f"{key} {value}" for key, value in results.machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in results.versions.items())),
        ("date", results.date),
        ("time", _duration(results.seconds)),
    ]
    return [(key, value) for key, value in rows if value]


def report_pages(
    results: Results, tables: Sequence[Table], pictures: Sequence[Picture]
) -> dict[str, bytes]:
    """report.md and report.html, by name.

    Args:
        results: What was measured.
        tables: All tables; the one named `headline` comes first on the page.
        pictures: All figures.
    """
    values: dict[str, Any] = {
        "results": results,
        "headline": headline(results),
        "tables": [table for table in tables if table.name != "headline"],
        "pictures": pictures,
        "claims": [(claim, findings(results, claim)) for claim in CLAIMS],
        "verdict": verdict,
        "names": NAMES,
        "marks": VERDICTS,
        "facts": facts(results),
        "settings": list(flat(results.config)),
    }
    return {
        name: _render(f"{name}.jinja", **values).encode("utf-8")
        for name in ("report.md", "report.html")
    }


def differences(runs: Mapping[str, Results]) -> list[tuple[str, ...]]:
    """(key, value in each run) of the facts and settings that are not the same in all runs."""
    each = [dict(facts(r)) | dict(flat(r.config)) for r in runs.values()]
    keys = dict.fromkeys(key for values in each for key in values)
    rows = [(key, *(values.get(key, "–") for values in each)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def compare_page(
    runs: Mapping[str, Results], tables: Sequence[Table], pictures: Sequence[Picture]
) -> dict[str, bytes]:
    """compare.md and compare.html, by name."""
    values: dict[str, Any] = {"runs": runs, "tables": tables, "pictures": pictures}
    return {
        name: _render(f"{name}.jinja", **values).encode("utf-8")
        for name in ("compare.md", "compare.html")
    }
