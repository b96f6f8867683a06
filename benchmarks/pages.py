"""The tables of docs/benchmarks.md and of the README, from a run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from bars import verdicts
from readings import CEILING, COPIES, Comparison, Run, slope
from regimes import ATTENTION, COMPILED, ORDINARY, OURS, OURS_ATTENTION, PUBLISHED

LABELS = {
    ORDINARY: "ordinary, all parameters",
    ATTENTION: "ordinary, attention only (Jin et al.)",
    PUBLISHED: "NTK linearization, `torch.func.jvp`",
    COMPILED: "the same, `torch.compile`",
    OURS: "`linearize(model)`",
    OURS_ATTENTION: '`linearize(model, "attention")`',
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    lines = textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False)
    return lines + "\n\n"


def number(value: float | None) -> str:
    """Three significant digits; nothing where nothing was measured."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} µs"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def machine(run: Run) -> str:
    m = run.machine
    where = m["gpu"] or f"{m['cores']} cores of {m['cpu']}, {m['isa']}"
    return f"{where}, {m['threads']} threads, PyTorch {m['versions']['torch']}"


def page(run: Run, figures: Sequence[str]) -> str:
    """The whole document."""
    sections = [
        ("What the suite must show", _bars(run)),
        ("One training step", _steps(run)),
        ("The forward alone: K tangents in one pass", _tangents(run)),
        ("Mixtures of task vectors", _mixtures(run)),
        ("Operations", _kernels(run)),
        ("Merging", _merges(run)),
        ("Growth", _growth(run)),
        ("What Python adds", _overhead(run)),
    ]
    pictures = dict.fromkeys(figures)
    parts = [_head(run)]
    for title, text in sections:
        body = "".join(text)
        if body:
            anchor = [
                f"![Chart: {name.partition('-')[2].partition('.')[0]}](figures/{name})\n\n"
                for name in pictures
                if _goes(name, title)
            ]
            parts.append(f"## {title}\n\n" + "".join(anchor) + body.rstrip("\n") + "\n")
    return "\n".join(parts)


# Which section a figure stands in, by the end of its file name.
PLACES = {
    "steps": "One training step",
    "memory": "One training step",
    "tangents": "The forward alone: K tangents in one pass",
    "mixtures": "Mixtures of task vectors",
    "kernels": "Operations",
    "merge": "Merging",
    "growth": "Growth",
}


def _goes(name: str, title: str) -> bool:
    return PLACES[name.removesuffix(".svg").rpartition("-")[2]] == title


def _head(run: Run) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in run.machine["allocator"].items()) or "none"
    versions = run.machine["versions"]
    measured = f"""Measured on {run.date} at commit {run.commit}: {machine(run)}, backend
    {run.machine["backend"]}, tangentfast {versions["tangentfast"]}, Python
    {run.machine["python"]}, allocator settings: {settings}. The run took
    {run.seconds / 60:.1f} minutes. It is repeated by `make bench`, or in part by
    `pytest benchmarks -k "step and not compiled" --benchmark-only`; this page is generated from
    its JSON in [benchmarks/results](../benchmarks/results)."""
    method = """Every comparison first checks the results against the baseline's, then runs its
    variants in turn; a ratio is the median over the ratios of single rounds, a time the median over
    rounds. The baselines are written from the published methods
    ([benchmarks/baselines.py](../benchmarks/baselines.py)). A dash: not measured."""
    return "# Benchmarks\n\n" + prose(measured) + prose(method).rstrip("\n") + "\n"


def _bars(run: Run) -> Iterator[str]:
    rows = [
        [
            bar.what,
            f"{'≥' if bar.at_least else '≤'} {number(bar.limit)}",
            number(value),
            "met" if bar.met(value) else "missed",
        ]
        for bar, value in verdicts(run)
    ]
    if rows:
        yield table(["figure", "bar", "measured", ""], rows)


def step_table(run: Run, found: Comparison) -> str:
    """One step, regime by regime."""
    rows = []
    for variant in found.variants:
        over, memory = found.times(variant, ORDINARY), run.memory(found, variant, ORDINARY)
        faster = found.times(PUBLISHED, variant) if PUBLISHED in found else None
        rows.append(
            [
                LABELS[variant],
                *map(number, (over, faster, memory)),
                duration(found.seconds(variant)),
            ]
        )
    header = ["step", "× ordinary step", "× faster than `torch.func.jvp`"]
    return table([*header, "peak memory, × ordinary", "time"], rows)


def _steps(run: Run) -> Iterator[str]:
    found = run.named("step") + run.named("adamw") + run.named("compiled")
    if not found:
        return
    yield prose(
        """Forward, loss, backward; τ small and random. Counted in FLOPs of matrix products, a
        linearized step is 1.67 × the ordinary one for all parameters, 1.22 × for attention's four
        linear layers; it takes less where linear_jvp is faster than torch's products. Peak memory
        is what a step needs beyond weights, τ and gradients
        ([benchmarks/memory.py](../benchmarks/memory.py))."""
    )
    for step in found:
        facts, title = step.facts, f"**{step.title()}**"
        if "optimizer" in facts:
            title += f", with {facts['optimizer']}"
        if facts["batch"] < facts["wanted batch"]:
            title += f" (not {facts['wanted batch']}: {facts['dtype']} is slow on this machine)"
        if "compile seconds" in facts:
            title += f"; the first compiled step took {facts['compile seconds']:.0f} s"
        yield prose(f"{title}; rounds: {facts['rounds']}.") + step_table(run, step) + "\n"


def _tangents(run: Run) -> Iterator[str]:
    found = run.named("tangents")
    if not found:
        return
    one, calls, theirs = "tangentfast, one pass", "tangentfast, K calls", "torch.func.jvp, K calls"
    yield prose(
        f"""{found[0].title()}, no gradients: f(x; θ0) and J τ_k for K task vectors of all
        parameters. The floor of one pass against K calls of our own is (1 + 2K) / 3K."""
    )
    rows = [
        [
            str(c.facts["K"]),
            number(c.times(one, theirs)),
            number(c.times(one, calls)),
            number((1 + 2 * c.facts["K"]) / (3 * c.facts["K"])),
            duration(c.seconds(one)),
        ]
        for c in found
    ]
    header = ["K", "× K calls of `torch.func.jvp`", "× K calls of our own", "floor of that"]
    yield table([*header, "time"], rows)


def mixtures(run: Run) -> Iterator[tuple[str, Comparison]]:
    for start, title in (("alpha_sweep", "α sweep"), ("map", "map of two tasks")):
        found = run.first(start)
        if found is not None:
            yield f"{title}, {found.facts['points']} points", found


def _mixtures(run: Run) -> Iterator[str]:
    rows = []
    for title, found in mixtures(run):
        scale = found.facts["points"] / found.facts["sampled"]
        one = "tangentfast, one pass"
        faster = [
            scale * found.times(name, one) if name in found else None
            for name in ("tangentfast, point by point", "torch.func.jvp, point by point")
        ]
        sampled = f"{found.facts['sampled']} of {found.facts['points']}"
        rows.append([title, *map(number, faster), duration(found.seconds(one)), sampled])
    if rows:
        first = next(mixtures(run))[1]
        yield prose(
            f"""{first.title()}, no gradients. f_lin is linear in the coefficients: one pass with a
            tangent for each task vector, then a weighted sum for each point, against a forward of
            the linearized model for each point. Where only some points were evaluated one by one,
            their time is multiplied up."""
        )
        header = ["what", "× faster than our own, point by point"]
        header += ["× faster than `torch.func.jvp`, point by point", "time of all points"]
        yield table([*header, "points evaluated one by one"], rows)


def _kernels(run: Run) -> Iterator[str]:
    found = run.named("kernel")
    if not found:
        return
    yield prose(
        """Each operation through its rule, with a tangent for every tensor argument. Every large
        tensor is counted as read or written once; the ceiling is the best of several passes over
        memory, or a square matrix product, of the same amount of work in the same rounds
        ([benchmarks/ceilings.py](../benchmarks/ceilings.py)): at sizes that fit in a cache it is
        the cache's."""
    )
    rows = [
        [
            c.facts["operation"],
            " × ".join(map(str, c.facts["size"])),
            c.facts["dtype"],
            number(c.times("reference", "tangentfast")),
            number(c.times("torch.func.jvp", "tangentfast")),
            duration(c.seconds("tangentfast")),
            f"{number(c.rate('tangentfast') / 1e9)} G{c.facts['unit']}/s",
            percent(c.share("tangentfast")),
        ]
        for c in found
    ]
    header = ["operation", "size", "dtype", "× faster than the reference"]
    header += ["× faster than `torch.func.jvp`", "time", "rate", "share of the ceiling"]
    yield table(header, rows)


def _merges(run: Run) -> Iterator[str]:
    found = run.named("merge")
    if found:
        others = [
            name
            for name in found[0].variants
            if name != "tangentfast" and not name.startswith(CEILING)
        ]
        facts = found[0].facts
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
                *(number(c.times(name, "tangentfast")) for name in others),
                duration(c.seconds("tangentfast")),
                f"{number(c.rate('tangentfast') / 1e9)} GB/s",
                percent(c.share("tangentfast", *COPIES)),
                percent(c.share("tangentfast")),
            ]
            for c in found
        ]
        header = ["K", *(f"× faster than {name}" for name in others), "time", "rate"]
        yield table([*header, "share of the copy ceiling", "of the best pass"], rows)
    product = run.first("gram")
    if product is not None:
        rate = number(product.rate("tangentfast") / 1e9)
        yield "\n" + prose(
            f"""`gram` of {product.facts["K"]} such vectors:
            {number(product.times("dot loop", "tangentfast"))} × faster than a loop of dot products,
            {rate} GB/s, {percent(product.share("tangentfast"))} of the ceiling."""
        )


def _growth(run: Run) -> Iterator[str]:
    axes = list(run.axes())
    if not axes:
        return
    yield prose(
        f"""Plain vision transformers of width {axes[0][1][0].facts["width"]}. Least squares over
        each axis: what one more image, token or block costs, as a multiple of what it costs the
        ordinary step; for K what one more tangent costs, in forwards."""
    )
    rows = []
    for axis, found in axes:
        variants = list(found[0].variants)
        points = {v: [(c.facts["value"], c.seconds(v)) for c in found] for v in variants}
        base = found[0].seconds(variants[0]) if axis == "K" else slope(points[variants[0]])[1]
        for variant in variants:
            increment = slope(points[variant])[1]
            values = f"{points[variant][0][0]} to {points[variant][-1][0]}"
            first, last = (c.times(variant, variants[0]) for c in (found[0], found[-1]))
            if len(found) > 1:
                rows.append(
                    [axis, values, variant, number(increment / base), number(first), number(last)]
                )
    header = ["axis", "from, to", "variant", "slope"]
    yield table([*header, "× at the first value", "× at the last"], rows)


def _overhead(run: Run) -> Iterator[str]:
    found = run.first("overhead")
    if found is None:
        return
    bare = "same aten operations"
    operations = found.facts["operations"]
    extra = (found.times("tangentfast", bare) - 1) * found.seconds(bare) / operations
    yield prose(
        f"""{found.facts["model"]}, one image, no gradients: the linearized forward is {operations}
        aten operations. Run one after the other without the dual layer they take
        {duration(found.seconds(bare))}; the linearized forward takes
        {number(found.times("tangentfast", bare))} × that, {duration(max(extra, 0.0))} more per
        operation. `torch.func.jvp` takes {number(found.times("torch.func.jvp", bare))} ×, the
        ordinary forward {number(found.times("forward", bare))} ×."""
    )


def short(run: Run) -> str:
    """README's part: one step, and merging."""
    where = f"""On {machine(run)}; every figure, with plots, is in
    [docs/benchmarks.md](docs/benchmarks.md), and is measured anew by `make bench`."""
    parts = [prose(where).rstrip("\n") + "\n"]
    step = run.first("step")
    if step is not None:
        title = f"One training step (forward, loss, backward) of {step.title()}, interleaved:"
        parts.append(f"{title}\n\n" + step_table(run, step))
    lines = [
        f"- {bar.what}: {percent(value) if 'share' in bar.what else number(value)}"
        for bar, value in verdicts(run)
        if bar.what.split(":")[0].startswith(("8 tangents", "α sweep", "× faster", "merge_"))
    ]
    merge = [c for c in run.named("merge") if c.facts["K"] == 8]
    if merge:
        c = merge[0]
        lines.append(
            f"- `merge_` of 8 vectors of {c.facts['N'] / 1e6:.3g} M numbers: "
            f"{number(c.times('add_ loop', 'tangentfast'))} × faster than a loop of `add_`, "
            f"{number(c.times('sum, then apply', 'tangentfast'))} × faster than building the sum"
        )
    if lines:
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
