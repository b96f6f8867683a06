"""docs/benchmarks.md and README's part of it, from the results of several machines side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bars import Bar, bars, verdicts
from readings import CEILING, COPIES, Comparison, Results, instructions, slope
from regimes import (
    ATTENTION,
    COMPILED,
    ORDINARY,
    OURS,
    OURS_ATTENTION,
    OURS_NARROW,
    PUBLISHED,
)
from text import duration, number, percent, prose, table

LABELS = {
    ORDINARY: "ordinary, all parameters",
    ATTENTION: "ordinary, attention only (Jin et al.)",
    PUBLISHED: "NTK linearization, `torch.func.jvp`",
    COMPILED: "the same, `torch.compile`",
    OURS: "`linearize(model)`",
    OURS_ATTENTION: '`linearize(model, "attention")`',
    OURS_NARROW: "`linearize(model, tangent_dtype=torch.bfloat16)`",
}
ONE_PASS = "tangentfast, one pass"
Several = Sequence[Results]


def times(c: Comparison, variant: str, against: str) -> float | None:
    """A ratio of times, where both were measured."""
    return c.times(variant, against) if variant in c and against in c else None


def together(
    every: Several, starts: Sequence[str], key: Callable[[Comparison], Any]
) -> dict[Any, list[tuple[Results, Comparison]]]:
    """The comparisons of one thing on every machine beside each other, in their order."""
    groups: dict[Any, list[tuple[Results, Comparison]]] = {}
    for start in starts:
        for results in every:
            for c in results.named(start):
                groups.setdefault((start, key(c)), []).append((results, c))
    return groups


def page(every: Several, figures: Mapping[str, Sequence[str]]) -> str:
    """The whole document; `figures` are the charts of every machine's folder."""
    parts = [_head(every)]
    for title, (body, charts) in SECTIONS.items():
        text = "".join(body(every))
        if text:
            shown = "".join(
                f"![Chart: {chart}, {results.label}](figures/{name})\n\n"
                for chart in charts
                for results in every
                for name in figures[results.folder]
                if name == f"{results.folder}-{chart}.svg"
            )
            parts.append(f"## {title}\n\n{shown}{text.rstrip()}\n")
    return "\n".join(parts)


def machines(every: Several) -> str:
    """Where and when everything was measured."""
    rows = []
    for results in every:
        m = results.machine
        settings = ", ".join(f"{k}={v}" for k, v in m["allocator"].items()) or "none"
        versions = [m["versions"]["torch"], m["versions"]["tangentfast"], m["python"]]
        where = [results.label, m["cpu"], ", ".join(instructions(m)), str(m["threads"])]
        minutes = f"{results.seconds / 60:.1f}"
        rows.append(
            [*where, m["backend"], *versions, settings, results.date, results.commit, minutes]
        )
    header = ["machine", "CPU", "instruction sets", "threads", "backend", "PyTorch", "tangentfast"]
    return table([*header, "Python", "allocator", "date", "commit", "minutes"], rows)


def _head(every: Several) -> str:
    measured = """`make bench` measures everything anew, `pytest benchmarks -k "step and not
    compiled" --benchmark-only` a part. This page is generated from the newest results of every
    machine in [benchmarks/results](../benchmarks/results)."""
    early = " and ".join(r.label for r in every if not r.time)
    slow = f"On {early} that round was a sample too, where it was slow." if early else ""
    method = f"""Every comparison first runs its variants once and checks the results against the
    baseline's; what the library measures to choose its ways, and all that is set up once, falls
    there. {slow} Then it runs them in turn; a ratio is the median over the ratios of single rounds,
    a time the median over rounds. The baselines are written from the published methods
    ([benchmarks/baselines.py](../benchmarks/baselines.py)). A dash: not measured."""
    return "# Benchmarks\n\n" + prose(measured) + machines(every) + "\n" + prose(method)[:-1]


def _verdict(bar: Bar, value: float) -> str:
    goal = f", goal {number(bar.goal)}" if bar.goal is not None else ""
    word = "met" if bar.met(value) else "missed"
    close = number(value) == number(bar.limit)
    shown = f"{value:.3f}" if close else number(value)
    return f"{shown} {word} ({'≥' if bar.at_least else '≤'} {number(bar.limit)}{goal})"


def _bars(every: Several) -> Iterator[str]:
    columns = [{bar.what: (bar, value) for bar, value in verdicts(r)} for r in every]
    most = sorted(every, key=lambda r: -len(bars(r)))  # whose order is that of the table
    rows = {
        what: [_verdict(*c[what]) if what in c else "–" for c in columns]
        for what in dict.fromkeys(bar.what for r in most for bar in bars(r))
        if any(what in c for c in columns)
    }
    counts = [f"{sum(b.met(v) for b, v in c.values())} of {len(c)} met" for c in columns]
    if rows:
        yield prose(
            """Measured, whether its bar is met, the bar, and the goal where there is one. Bars
            differ with the kind of CPU ([benchmarks/bars.py](../benchmarks/bars.py)), and are
            held against older results too."""
        )
        yield table(
            ["", *(r.label for r in every)],
            [*([what, *cells] for what, cells in rows.items()), ["all", *counts]],
        )


def step_table(pairs: Sequence[tuple[Results, Comparison]]) -> str:
    """One step, regime by regime, on every machine."""
    rows = []
    for variant in LABELS:
        for results, c in pairs:
            if variant in c:
                ratios = [c.times(variant, ORDINARY), times(c, PUBLISHED, variant)]
                ratios.append(results.memory(c, variant, ORDINARY))
                seconds = duration(c.seconds(variant))
                rows.append([LABELS[variant], results.label, *map(number, ratios), seconds])
    header = ["step", "machine", "× ordinary step", "× faster than `torch.func.jvp`"]
    return table([*header, "peak memory, × ordinary", "time"], rows)


def _steps(every: Several) -> Iterator[str]:
    def asked(c: Comparison) -> tuple[Any, ...]:
        f = c.facts
        return f["model"], f["wanted batch"], f["dtype"], f.get("optimizer", "")

    groups = together(every, ["step", "adamw", "compiled"], asked)
    if groups:
        yield prose(
            """Forward, loss, backward; τ small and random. Counted in FLOPs of matrix products, a
            linearized step is 1.67 × the ordinary one for all parameters, 1.22 × for attention's
            four linear layers; it takes less where our products are faster than torch's. With
            bfloat16 tangents y and every gradient stay those of float32, and J τ is off by about
            4e-3, which is checked here before anything is timed. Peak memory is what a step needs
            beyond weights, τ and gradients ([benchmarks/memory.py](../benchmarks/memory.py))."""
        )
    for (_, (model, batch, dtype, optimizer)), pairs in groups.items():
        title = f"**{model}, batch {batch}, {dtype}**" + f", with {optimizer}" * bool(optimizer)
        notes = []
        for results, c in pairs:
            note = f"{results.label}: rounds {c.facts['rounds']}"
            if c.facts["batch"] < batch:
                note += f", batch {c.facts['batch']} ({dtype} is slow there)"
            if "compile seconds" in c.facts:
                note += f", the first compiled step took {c.facts['compile seconds']:.0f} s"
            notes.append(note)
        yield prose(f"{title}. {'; '.join(notes)}.") + step_table(pairs) + "\n"


def _tangents(every: Several) -> Iterator[str]:
    calls, theirs = "tangentfast, K calls", "torch.func.jvp, K calls"
    rows, title = [], ""
    for (_, k), pairs in together(every, ["tangents"], lambda c: c.facts["K"]).items():
        for results, c in pairs:
            title = title or c.title()
            ratios = [c.times(ONE_PASS, theirs), c.times(ONE_PASS, calls), (1 + 2 * k) / (3 * k)]
            seconds = duration(c.seconds(ONE_PASS))
            rows.append([str(k), results.label, *map(number, ratios), seconds])
    if rows:
        yield prose(
            f"""{title}, no gradients: f(x; θ0) and J τ_k for K task vectors of all parameters. The
            floor of one pass against K calls of our own is (1 + 2K) / 3K."""
        )
        header = ["K", "machine", "× K calls of `torch.func.jvp`", "× K calls of our own"]
        yield table([*header, "floor of that", "time"], rows)


def mixtures(results: Results) -> Iterator[tuple[str, Comparison]]:
    for start, title in (("alpha_sweep", "α sweep"), ("map", "map of two tasks")):
        c = results.first(start)
        if c is not None:
            yield f"{title}, {c.facts['points']} points", c


def _mixtures(every: Several) -> Iterator[str]:
    rows, model = [], ""
    for results in every:
        for title, c in mixtures(results):
            model = model or c.title()
            scale = c.facts["points"] / c.facts["sampled"]
            ratios = [
                None if name not in c else scale * c.times(name, ONE_PASS)
                for name in ("tangentfast, point by point", "torch.func.jvp, point by point")
            ]
            sampled = f"{c.facts['sampled']} of {c.facts['points']}"
            seconds = duration(c.seconds(ONE_PASS))
            rows.append([title, results.label, *map(number, ratios), seconds, sampled])
    if rows:
        yield prose(
            f"""{model}, no gradients. f_lin is linear in the coefficients: one pass with a tangent
            for each task vector, then a weighted sum for each point, against a forward of the
            linearized model for each point. Where only some points were evaluated one by one, their
            time is multiplied up."""
        )
        header = ["what", "machine", "× faster than our own, point by point"]
        header += ["× faster than `torch.func.jvp`, point by point", "time of all points"]
        yield table([*header, "points evaluated one by one"], sorted(rows, key=lambda r: r[0][-1]))


def _kernels(every: Several) -> Iterator[str]:
    def what(c: Comparison) -> tuple[str, ...]:
        size = " × ".join(map(str, c.facts["size"]))
        return c.facts["operation"], size, c.facts["dtype"]

    rows = [
        [
            *key,
            results.label,
            number(c.times("reference", "tangentfast")),
            number(c.times("torch.func.jvp", "tangentfast")),
            duration(c.seconds("tangentfast")),
            f"{number(c.rate('tangentfast') / 1e9)} G{c.facts['unit']}/s",
            percent(c.share("tangentfast")),
        ]
        for (_, key), pairs in together(every, ["kernel"], what).items()
        for results, c in pairs
    ]
    if rows:
        yield prose(
            """Each operation through its rule, with a tangent for every tensor argument. Every
            large tensor is counted as read or written once; the ceiling is the best of several
            passes over memory, or a square matrix product, of the same amount of work in the same
            rounds ([benchmarks/ceilings.py](../benchmarks/ceilings.py)): at sizes that fit in a
            cache it is the cache's."""
        )
        header = ["operation", "size", "dtype", "machine", "× faster than the reference"]
        header += ["× faster than `torch.func.jvp`", "time", "rate", "share of the ceiling"]
        yield table(header, rows)


def _merges(every: Several) -> Iterator[str]:
    groups = together(every, ["merge"], lambda c: c.facts["K"])
    pairs = [pair for group in groups.values() for pair in group]
    if pairs:
        names = dict.fromkeys(name for _, c in pairs for name in c.variants)
        others = [n for n in names if n != "tangentfast" and not n.startswith(CEILING)]
        facts = pairs[0][1].facts
        yield prose(
            f"""`merge_` of K vectors of {facts["N"] / 1e6:.3g} M {facts["dtype"]} numbers in
            {facts["tensors"]} tensors. Counted: K + 2 streams, each vector and the base read once
            and the base written once. The ceilings are the best copy of the same rounds (``copy_``,
            memcpy), and the best of all passes over memory (in-place axpy and reading alone,
            besides); a write-allocate is not counted."""
        )
        rows = [
            [
                str(c.facts["K"]),
                results.label,
                *(number(times(c, name, "tangentfast")) for name in others),
                duration(c.seconds("tangentfast")),
                f"{number(c.rate('tangentfast') / 1e9)} GB/s",
                percent(c.share("tangentfast", *COPIES)),
                percent(c.share("tangentfast")),
            ]
            for results, c in pairs
        ]
        header = ["K", "machine", *(f"× faster than {name}" for name in others), "time", "rate"]
        yield table([*header, "share of the copy ceiling", "of the best pass"], rows)
    for results in every:
        c = results.first("gram")
        if c is not None:
            rate = number(c.rate("tangentfast") / 1e9)
            yield "\n" + prose(
                f"""{results.label}: `gram` of {c.facts["K"]} such vectors is
                {number(c.times("dot loop", "tangentfast"))} × faster than a loop of dot products,
                {rate} GB/s, {percent(c.share("tangentfast"))} of the ceiling."""
            )


def _growth(every: Several) -> Iterator[str]:
    rows: list[list[str]] = []
    for results in every:
        for axis, along in results.axes():
            variants = list(along[0].variants)
            points = {v: [(c.facts["value"], c.seconds(v)) for c in along] for v in variants}
            base = along[0].seconds(variants[0]) if axis == "K" else slope(points[variants[0]])[1]
            for variant in variants:
                increment = slope(points[variant])[1]
                values = f"{points[variant][0][0]} to {points[variant][-1][0]}"
                ends = [c.times(variant, variants[0]) for c in (along[0], along[-1])]
                if len(along) > 1:
                    ratios = map(number, (increment / base, *ends))
                    rows.append([axis, values, variant, results.label, *ratios])
    if rows:
        width = next(iter(every[0].axes()))[1][0].facts["width"]
        yield prose(
            f"""Plain vision transformers of width {width}. Least squares over each axis: what one
            more image, token or block costs, as a multiple of what it costs the ordinary step; for
            K what one more tangent costs, in forwards."""
        )
        order = {tuple(row[:3]): i for i, row in reversed(list(enumerate(rows)))}
        header = ["axis", "from, to", "variant", "machine", "slope", "× at the first value"]
        yield table([*header, "× at the last"], sorted(rows, key=lambda r: order[tuple(r[:3])]))


def _python(every: Several) -> Iterator[str]:
    rows = []
    for results in every:
        for start, what in (("overhead", "forward"), ("python", "training step")):
            for c in results.named(start):
                own, count = c.facts["against"], c.facts["operations"]
                count = count["tangentfast"] if isinstance(count, dict) else count
                ratio = c.times("tangentfast", own)
                ordinary = times(c, ORDINARY, f"{ORDINARY}, its own operations")
                more = duration(max(ratio - 1, 0.0) * c.seconds(own) / count)
                cells = [results.label, str(c.facts.get("threads", results.machine["threads"]))]
                cells += [str(count), duration(c.seconds(own)), number(ratio), more]
                rows.append([f"{c.facts['model']}, {what}", *cells, number(ordinary)])
    if rows:
        yield prose(
            """One image. The operations of aten, and of our own kernels, that a linearized step
            hands to torch, replayed one after the other without the Python that asks for them
            ([benchmarks/bench_python.py](../benchmarks/bench_python.py)), against the step itself;
            the ordinary step against its own in the same way."""
        )
        header = ["what", "machine", "threads", "operations", "their time", "linearized, × that"]
        yield table([*header, "more an operation", "ordinary, × its own"], rows)


# Title: its text, and its charts.
SECTIONS: dict[str, tuple[Callable[[Several], Iterator[str]], tuple[str, ...]]] = {
    "What the suite must show": (_bars, ()),
    "One training step": (_steps, ("steps", "memory")),
    "The forward alone: K tangents in one pass": (_tangents, ("tangents",)),
    "Mixtures of task vectors": (_mixtures, ("mixtures",)),
    "Operations": (_kernels, ("kernels",)),
    "Merging": (_merges, ("merge",)),
    "Growth": (_growth, ("growth",)),
    "What Python adds": (_python, ()),
}
SHORT = ("8 tangents", "α sweep", "× faster", "merge_")  # how README's bars begin


def short(every: Several) -> str:
    """README's part: one step, and the bars that are no step's."""
    where = [
        f"{r.label} (PyTorch {r.machine['versions']['torch']}, {r.date}, commit {r.commit})"
        for r in every
    ]
    parts = [
        prose(
            f"""On {"; ".join(where)}. All numbers and charts are in
            [docs/benchmarks.md](docs/benchmarks.md); `make bench` measures them anew."""
        )
    ]
    firsts = [(r, c) for r in every if (c := r.first("step")) is not None]
    if firsts:
        title = firsts[0][1].title()
        parts.append(f"One training step (forward, loss, backward) of {title}, interleaved:\n\n")
        parts.append(step_table([(r, c) for r, c in firsts if c.title() == title]) + "\n")
    columns = [{b.what: (b, v) for b, v in verdicts(r) if b.what.startswith(SHORT)} for r in every]
    rows: dict[str, list[str]] = {}
    for what in dict.fromkeys(what for c in columns for what in c):
        show = percent if "share" in what else number
        rows[what] = [show(c[what][1]) if what in c else "–" for c in columns]
    for other, words in (("add_ loop", "a loop of `add_`"), ("sum, then apply", "the sum")):
        cells = []
        for r in every:
            eight = [c for c in r.named("merge") if c.facts["K"] == 8]
            cells.append(number(times(eight[0], other, "tangentfast") if eight else None))
        if set(cells) != {"–"}:
            rows[f"`merge_` of 8 vectors: × faster than {words}"] = cells
    if rows:
        header = ["", *(r.label for r in every)]
        parts.append(table(header, [[what, *cells] for what, cells in rows.items()]))
    return "".join(parts)
