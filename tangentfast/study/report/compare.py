"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .figures.runs import by_run
from .files import publish
from .page import compare_page, differences, illustrate
from .schema import Results, ResultsError, load
from .table import Table
from .tables import side_by_side

__all__ = ["compare"]


def names(runs: Sequence[Path], results: Sequence[Results]) -> list[str]:
    """A name for every run that no other has: its own, its folder's, or that with a number."""
    given = [r.name for r in results]
    if len(set(given)) < len(given):
        given = [run.resolve().name for run in runs]
    return [
        name if given.count(name) == 1 else f"{name} ({given[: i + 1].count(name)})"
        for i, name in enumerate(given)
    ]


def coverage(runs: Mapping[str, Results]) -> Table:
    """Regimes × runs: the seeds that each was run with."""
    labels: dict[str, str] = {}
    for results in runs.values():
        labels |= {name: regime.label for name, regime in results.regimes.items()}
    rows = []
    for name, label in labels.items():
        trials = [r.regimes[name].trials if name in r.regimes else None for r in runs.values()]
        seeds = [
            "not run" if of is None else ", ".join(str(trial.seed) for trial in of) or "none"
            for of in trials
        ]
        rows.append((label, *seeds, "yes" if len(set(seeds)) == 1 else "no"))
    columns = ("regime", *runs, "the same")
    return Table("seeds", "Seeds by regime", columns, tuple(rows))


def compare(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write tables, figures, compare.md and compare.html of `runs` to the folder `out`.

    Regimes that a run does not have are shown as not run, and published numbers beside the runs on
    the papers' eight data sets.

    Raises:
        ResultsError: Fewer than two runs, or one without a results.json of the expected shape.
        OSError: The files could not be written, and then none of them was.
    """
    if len(runs) < 2:
        raise ResultsError(f"compare: expected two runs or more, got {len(runs)}")
    results = [load(run) for run in runs]
    named = dict(zip(names(runs, results), results, strict=True))
    compared = [side_by_side(named), coverage(named)]
    if settings := differences(named):
        columns = ("setting", *named)
        compared.append(
            Table("settings", "Settings that differ", columns, tuple(settings), labels=len(columns))
        )
    pictures, drawn = illustrate(by_run(named))
    latex = {f"tables/{table.name}.tex": table.latex().encode("utf-8") for table in compared}
    return publish(out, drawn | latex | compare_page(named, compared, pictures))
