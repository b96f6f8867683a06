"""The report of a run: tables, figures and one page, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compare import compare
from .figures import draw
from .files import publish
from .measures import MEASURES
from .page import illustrate, report_pages
from .schema import Results, ResultsError, load
from .tables import tables

__all__ = ["ResultsError", "compare", "show", "write"]


def write(run: Path) -> list[Path]:
    """Write the report of the run folder `run`, and return the files, report.html first.

    report.html has everything in one page; report.md the same for reading in git; tables/*.tex and
    figures/*.{png,svg} are for papers.

    Raises:
        ResultsError: No results.json of the expected shape in `run`.
        OSError: The files could not be written; those of an earlier report are then left whole.
    """
    results = load(run)
    all_tables = tables(results)
    pictures, drawn = illustrate(draw(results))
    pages = report_pages(results, all_tables, pictures)
    latex = {f"tables/{table.name}.tex": table.latex().encode("utf-8") for table in all_tables}
    return publish(run, drawn | latex | pages)


def show(results: Results | Mapping[str, Any]) -> None:
    """Print the headline to the terminal: measures × regimes.

    Args:
        results: The content of a results.json.

    Raises:
        ResultsError: It has not the expected shape.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not isinstance(results, Results):
        results = load(results)
    title = Text(f"{results.name}: {results.model.name}")
    printed = Table("", title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for regime in results.regimes.values():
        printed.add_column(Text(regime.label.replace("-", "-\n")), justify="right", overflow="fold")
    for measure in MEASURES:
        spreads = [measure.spread(regime) for regime in results.regimes.values()]
        best = measure.best(spreads)
        cells = [
            Text(s.text(measure.write), style="bold" if s.n and s.mean == best else "")
            for s in spreads
        ]
        printed.add_row(measure.heading, *cells)
    Console().print(printed)
