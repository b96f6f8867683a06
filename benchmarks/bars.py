"""What the suite must show: each bar, and where its figure is read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from readings import COPIES, Comparison, Run
from regimes import COMPILED, ORDINARY, OURS, OURS_ATTENTION, PUBLISHED

Reading = Callable[[Run], float | None]


@dataclass(frozen=True)
class Bar:
    """A figure with its limit; `at_least` says on which side of it is good."""

    what: str
    limit: float
    at_least: bool
    reading: Reading

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _step(model: str, dtype: str, variant: str, against: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = [c for c in _steps(run, model, dtype) if variant in c and against in c]
        return found[0].times(variant, against) if found else None

    return reading


def _memory(model: str, dtype: str, variant: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = [run.memory(c, variant, ORDINARY) for c in _steps(run, model, dtype)]
        return next((value for value in found if value is not None), None)

    return reading


def _steps(run: Run, model: str, dtype: str) -> list[Comparison]:
    """In the order they ran: the table's batch first."""
    found = run.named("step")
    return [c for c in found if (c.facts["model"], c.facts["dtype"]) == (model, dtype)]


def _kernel(operation: str, dtype: str, read: Callable[[Comparison], float | None]) -> Reading:
    """Of an operation, at the largest of its sizes that can be read."""

    def reading(run: Run) -> float | None:
        found = [
            value
            for c in run.named("kernel")
            if (c.facts["operation"], c.facts["dtype"]) == (operation, dtype)
            and (value := read(c)) is not None
        ]
        return found[-1] if found else None

    return reading


def _over_flash(c: Comparison) -> float | None:
    theirs = "jvp_flash_attention"
    return c.times(theirs, "tangentfast") if theirs in c else None


def _first(start: str, variant: str, against: str) -> Reading:
    def reading(run: Run) -> float | None:
        found = run.first(start)
        return None if found is None else found.times(variant, against)

    return reading


def _with(start: str, k: int, read: Callable[[Comparison], float]) -> Reading:
    def reading(run: Run) -> float | None:
        found = [c for c in run.named(start) if c.facts["K"] == k]
        return read(found[0]) if found else None

    return reading


def _rows(
    model: str, dtype: str, variant: str, step: float, faster: float, memory: float
) -> list[Bar]:
    what = f"{model} {dtype}, {variant.rpartition(' ')[2]}"
    return [
        Bar(f"{what}: step, × ordinary", step, False, _step(model, dtype, variant, ORDINARY)),
        Bar(
            f"{what}: × faster than `torch.func.jvp`",
            faster,
            True,
            _step(model, dtype, PUBLISHED, variant),
        ),
        Bar(f"{what}: peak memory, × ordinary", memory, False, _memory(model, dtype, variant)),
    ]


def _merge(limit: float) -> Bar:
    share = _with("merge", 8, lambda c: c.share("tangentfast", *COPIES))
    return Bar("merge_, K = 8: share of the copy ceiling", limit, True, share)


CPU_BARS = [
    *_rows("ViT-B/32", "float32", OURS, 1.50, 2.0, 1.10),
    *_rows("ViT-B/32", "float32", OURS_ATTENTION, 1.25, 2.5, 1.10),
    *_rows("ViT-B/32", "bfloat16", OURS, 1.10, 5.0, 1.10),
    *_rows("ViT-B/16", "float32", OURS, 1.50, 2.0, 1.10),
    Bar(
        "× faster than the compiled `torch.func.jvp` step",
        1.25,
        True,
        _first("compiled", COMPILED, OURS),
    ),
    Bar(
        "8 tangents in one pass, × 8 `torch.func.jvp` calls",
        0.60,
        False,
        _with("tangents", 8, lambda c: c.times("tangentfast, one pass", "torch.func.jvp, K calls")),
    ),
    Bar(
        "8 tangents in one pass, × 8 calls of our own",
        0.80,
        False,
        _with("tangents", 8, lambda c: c.times("tangentfast, one pass", "tangentfast, K calls")),
    ),
    Bar(
        "α sweep of 21 points: × faster than point by point",
        10.0,
        True,
        _first("alpha_sweep", "tangentfast, point by point", "tangentfast, one pass"),
    ),
    _merge(0.90),
]

GPU_BARS = [
    *_rows("ViT-L/14", "bfloat16", OURS, 1.67, 2.5, 1.15),
    *_rows("ViT-L/14", "bfloat16", OURS_ATTENTION, 1.30, 2.5, 1.15),
    _merge(0.85),
    *(
        Bar(
            f"{operation}: share of the copy ceiling",
            0.80,
            True,
            _kernel(operation, "bfloat16", lambda c: c.share("tangentfast", *COPIES)),
        )
        for operation in ("layer_norm", "gelu")
    ),
    Bar(
        "attention: × faster than `jvp_flash_attention`",
        1.0,
        True,
        _kernel("attention", "bfloat16", _over_flash),
    ),
]


def bars(run: Run) -> list[Bar]:
    """What a run on its kind of machine must show."""
    return GPU_BARS if run.machine["gpu"] else CPU_BARS


def verdicts(run: Run) -> list[tuple[Bar, float]]:
    """The bars whose figure was measured, and the figures."""
    read = [(bar, bar.reading(run)) for bar in bars(run)]
    return [(bar, value) for bar, value in read if value is not None]
