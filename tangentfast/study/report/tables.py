"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from .measures import MEASURE, MEASURES, Spread, mean, merged, percent, rate, significant
from .published import PUBLISHED, RELATIVE, SOURCES
from .published import model as published_model
from .schema import Results, Trial
from .table import Table

__all__ = ["headline", "side_by_side", "tables"]

SPREAD = "Mean ± standard deviation over the seeds"


def headline(results: Results) -> Table:
    """Regimes × measures."""
    spreads = [[m.spread(regime) for m in MEASURES] for regime in results.regimes.values()]
    rows = [
        (regime.label, *(s.text(m.write) for m, s in zip(MEASURES, row, strict=True)))
        for regime, row in zip(results.regimes.values(), spreads, strict=True)
    ]
    best = frozenset(
        (i, j + 1)
        for j, measure in enumerate(MEASURES)
        for i, row in enumerate(spreads)
        if row[j].n and row[j].mean == measure.best(other[j] for other in spreads)
    )
    seeds = ", ".join(map(str, results.seeds))
    note = f"{SPREAD} {seeds}."
    base = mean(results.base[t.name] for t in results.tasks if t.name in results.base)
    if math.isfinite(base):
        note += f" Without fine-tuning the {len(results.tasks)} tasks have {percent(base)} %."
    if any(not math.isfinite(r.seconds_per_step) for r in results.regimes.values()):
        note += " A regime without a time per step takes the task vectors of another."
    return Table(
        "headline",
        "All regimes",
        ("regime", *(measure.heading for measure in MEASURES)),
        tuple(rows),
        best=best,
        note=note,
    )


def _by_task(
    results: Results,
    name: str,
    caption: str,
    value: Callable[[Trial, str], float],
    base: Mapping[str, float] | None,
    better: Callable[[Sequence[float]], float] | None = max,
) -> Table | None:
    """Tasks × regimes of an accuracy, with the mean over tasks as the last row."""
    tasks = [task.name for task in results.tasks]
    columns: list[list[Spread]] = []
    for regime in results.regimes.values():
        each = [[value(trial, task) for task in tasks] for trial in regime.trials]
        columns.append([Spread.over(column) for column in zip(*each, strict=True)])
        columns[-1].append(Spread.over([mean(row) for row in each]))
        if not each:
            columns[-1] = [Spread.over([])] * (len(tasks) + 1)
    if not any(spread.n for column in columns for spread in column):
        return None
    rows, best = [], set()
    for i, task in enumerate([*tasks, "mean"]):
        row = [column[i] for column in columns]
        first = []
        if base is not None:
            known = [base[t] for t in (tasks if task == "mean" else [task]) if t in base]
            first = [Spread.over([mean(known)]).text(percent)]
        means = [s.mean for s in row if s.n]
        best |= {
            (i, j + 1 + len(first))
            for j, s in enumerate(row)
            if better and len(means) > 1 and s.n and s.mean == better(means)
        }
        rows.append((task, *first, *(s.text(percent) for s in row)))
    headings = ["task", *(["no fine-tuning"] if base is not None else [])]
    headings += [regime.label for regime in results.regimes.values()]
    seeds = ", ".join(map(str, results.seeds))
    note = f"{SPREAD} {seeds}."
    return Table(name, caption, tuple(headings), tuple(rows), best=frozenset(best), note=note)


def _negated(key: str) -> Callable[[Trial, str], float]:
    def value(trial: Trial, task: str) -> float:
        negated = trial.negation.tasks.get(task) if trial.negation else None
        return getattr(negated, key) if negated else math.nan

    return value


def _negation(results: Results) -> list[Table | None]:
    """Accuracy on the negated task and on the control, by negated task."""
    target = _by_task(
        results, "negation-target", "Negation: accuracy on the negated task, %",
        _negated("target"), results.base, min,
    )  # fmt: skip
    control = _by_task(
        results, "negation-control", "Negation: accuracy on the control task, %",
        _negated("control"), None, None,
    )  # fmt: skip
    cases = [
        negated
        for regime in results.regimes.values()
        for trial in regime.trials
        if trial.negation
        for negated in trial.negation.tasks.values()
    ]
    unreached = sum(not negated.reached for negated in cases)
    if target and unreached:
        share = f"{unreached} of {len(cases)}"
        note = f" In {share} cases no α > 0 keeps the control, and nothing is negated."
        target = replace(target, note=target.note + note)
    return [target, control]


def pairs(results: Results) -> Table | None:
    """ξ over the search box, for every pair of tasks."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for name, regime in results.regimes.items():
        for trial in regime.trials:
            for pair_map in trial.disentanglement:
                row = (" + ".join(pair_map.tasks), pair_map.kind, pair_map.head)
                cells.setdefault(row, {}).setdefault(name, []).append(pair_map.box)
    caption = "ξ over the search box, by pair of tasks"
    return _xi(results, "disentanglement", caption, ("tasks", "kind", "head"), cells)


def head_study(results: Results) -> Table | None:
    """ξ of the representation, and under every head."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for head_map in results.head_study:
        row = (" + ".join(head_map.tasks), head_map.head)
        cells.setdefault(row, {}).setdefault(head_map.regime, []).append(head_map.box)
    return _xi(results, "heads", "ξ over the search box, by head", ("tasks", "head"), cells)


def _xi(
    results: Results, name: str, caption: str, labels: tuple[str, ...],
    cells: Mapping[tuple[str, ...], Mapping[str, list[float]]],
) -> Table | None:  # fmt: skip
    if not cells:
        return None
    rows = [
        (
            *row,
            *(Spread.over(values.get(r, [])).text(lambda v: f"{v:.3f}") for r in results.regimes),
        )
        for row, values in cells.items()
    ]
    headings = (*labels, *(regime.label for regime in results.regimes.values()))
    note = "Predictions: 0 to 2, the sum over both tasks. Representations: a divergence, no bound."
    return Table(name, caption, headings, tuple(rows), labels=len(labels), note=note)


def subsets(results: Results) -> Table | None:
    """Normalised accuracy over the number of merged tasks."""
    sizes = sorted(
        {
            len(s.tasks)
            for r in results.regimes.values()
            for trial in r.trials
            for s in trial.subsets
        }
    )
    rows = [
        (
            str(size),
            *(
                Spread.over(
                    [
                        mean(s.normalized for s in trial.subsets if len(s.tasks) == size)
                        for trial in regime.trials
                    ]
                ).text(percent)
                for regime in results.regimes.values()
            ),
        )
        for size in sizes
    ]
    headings = ("merged tasks", *(regime.label for regime in results.regimes.values()))
    caption = "Normalised accuracy by number of merged tasks, %"
    note = f"Means over the subsets of a size. {SPREAD}."
    return Table("subsets", caption, headings, tuple(rows), note=note) if rows else None


def learning_rates(results: Results) -> Table | None:
    """The grid, its validation accuracies, and the choice."""
    grid = sorted({r for regime in results.regimes.values() for r in regime.lr_grid}, key=float)
    if not grid:
        return None
    rows, best = [], set()
    for i, regime in enumerate(results.regimes.values()):
        chosen = [float(r) == regime.lr and r in regime.lr_grid for r in grid]
        best |= {(i, j + 1) for j, is_chosen in enumerate(chosen) if is_chosen}
        accuracies = [Spread.over([regime.lr_grid[r]] if r in regime.lr_grid else []) for r in grid]
        tried = sorted(map(float, regime.lr_grid))
        edge = len(tried) > 1 and regime.lr is not None and regime.lr in (tried[0], tried[-1])
        cells = [accuracy.text(percent) for accuracy in accuracies]
        rows.append((regime.label, *cells, "yes" if edge else "no" if tried else "–"))
    return Table(
        "learning-rates",
        "Single-task validation accuracy by learning rate, %",
        ("regime", *(rate(float(r)) for r in grid), "at the edge of the grid"),
        tuple(rows),
        best=frozenset(best),
        note="Bold: chosen, with the first seed.",
    )


def data(results: Results) -> Table:
    """The data sets."""
    rows = []
    for task in results.all_tasks:
        role = "control" if task.name == results.control else "task"
        base = Spread.over([results.base.get(task.name, math.nan)]).text(percent)
        numbers = (task.classes, task.train, task.val, task.test)
        rows.append((task.name, role, task.source, *map(str, numbers), base))
    columns = ("data set", "role", "images", "classes", "train", "val", "test", "no fine-tuning, %")
    return Table("data", "Data sets", columns, tuple(rows), labels=3)


def side_by_side(runs: Mapping[str, Results]) -> Table:
    """(measure, regime) × runs, and the published numbers of the models among them.

    Args:
        runs: Results by the name that heads their column.
    """
    models = {m: None for r in runs.values() if (m := published_model(r)) is not None}
    sources = [(source, model) for model in models for source in SOURCES]
    labels: dict[str, str] = {}
    for results in runs.values():
        labels |= {name: regime.label for name, regime in results.regimes.items()}
    rows: list[tuple[str, ...]] = []
    for measure in MEASURES:
        for name, label in labels.items():
            cells = [
                measure.spread(r.regimes[name]).text(measure.write)
                if name in r.regimes
                else "not run"
                for r in runs.values()
            ]
            published = [PUBLISHED.get((source, m, name, measure.key)) for source, m in sources]
            if any(c not in ("–", "not run") for c in cells) or any(published):
                reported = ["–" if v is None else measure.write(v) for v in published]
                rows.append((measure.heading, label, *cells, *reported))
    if sources:
        rows += _relative(runs, labels, sources)
    headings = [f"{source.split(',')[0]}, {model}" for source, model in sources]
    note = "Published: " + "; ".join(SOURCES) + "." if sources else ""
    columns = ("measure", "regime", *runs, *headings)
    caption = "Runs side by side"
    return Table("compare", caption, columns, tuple(rows), labels=2, note=note)


def _relative(
    runs: Mapping[str, Results], labels: Mapping[str, str], sources: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, ...]]:
    """Cost as a multiple of the non-linear regime's, as it is published."""
    for heading, key in (("time, × non-linear", "seconds"), ("memory, × non-linear", "memory")):
        measure = MEASURE[key]
        for name, label in labels.items():
            reported = [RELATIVE.get((source, m, name, key)) for source, m in sources]
            if not any(reported):
                continue
            cells = []
            for results in runs.values():
                means = [
                    measure.spread(results.regimes[regime]).mean
                    for regime in (name, "nonlinear")
                    if regime in results.regimes
                ]
                ratio = means[0] / means[1] if len(means) == 2 and means[1] else math.nan
                measured = Spread.over([ratio]).text(significant)
                cells.append(measured if name in results.regimes else "not run")
            yield heading, label, *cells, *("–" if v is None else significant(v) for v in reported)


def tables(results: Results) -> list[Table]:
    """Every table that `results` has the numbers for."""
    published = side_by_side({results.name: results}) if published_model(results) else None
    made = (
        headline(results),
        published,
        _by_task(
            results, "merged", "Merged accuracy at the chosen α by task, %", merged, results.base
        ),
        _by_task(
            results, "single", "Single-task accuracy, %",
            lambda trial, task: trial.single.get(task, math.nan), results.base,
        ),
        *_negation(results),
        pairs(results),
        head_study(results),
        subsets(results),
        learning_rates(results),
        data(results),
    )  # fmt: skip
    return [table for table in made if table is not None]
