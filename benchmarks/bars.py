"""What the suite must show: each bar, a threshold, and what is measured against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from readings import COPIES, Comparison, Results, instructions, kind
from regimes import COMPILED, ORDINARY, OURS, OURS_ATTENTION, OURS_NARROW, PUBLISHED

Reading = Callable[[Results], float | None]


@dataclass(frozen=True)
class Bar:
    """A threshold; `at_least` says on which side of it is good, `goal` what is hoped for."""

    what: str
    limit: float
    at_least: bool
    reading: Reading
    goal: float | None = None

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _steps(results: Results, model: str, dtype: str) -> list[Comparison]:
    """In the order they ran: the table's batch first."""
    steps = results.named("step")
    return [c for c in steps if (c.facts["model"], c.facts["dtype"]) == (model, dtype)]


def _step(model: str, dtype: str, variant: str, against: str) -> Reading:
    def reading(results: Results) -> float | None:
        both = [c for c in _steps(results, model, dtype) if variant in c and against in c]
        return both[0].times(variant, against) if both else None

    return reading


def _memory(model: str, dtype: str, variant: str) -> Reading:
    def reading(results: Results) -> float | None:
        peaks = (results.memory(c, variant, ORDINARY) for c in _steps(results, model, dtype))
        return next((value for value in peaks if value is not None), None)

    return reading


def _first(start: str, read: Callable[[Comparison], float], **facts: object) -> Reading:
    """Of the first comparison of a benchmark function that has these facts."""

    def reading(results: Results) -> float | None:
        for c in results.named(start):
            if all(c.facts[key] == value for key, value in facts.items()):
                return read(c)
        return None

    return reading


def _times(variant: str, against: str) -> Callable[[Comparison], float]:
    return lambda c: c.times(variant, against)


def _kernel(operation: str, dtype: str, read: Callable[[Comparison], float | None]) -> Reading:
    """Of an operation, at the largest of its sizes that can be read."""

    def reading(results: Results) -> float | None:
        values = [
            value
            for c in results.named("kernel")
            if (c.facts["operation"], c.facts["dtype"]) == (operation, dtype)
            and (value := read(c)) is not None
        ]
        return values[-1] if values else None

    return reading


def _over_flash(c: Comparison) -> float | None:
    theirs = "jvp_flash_attention"
    return c.times(theirs, "tangentfast") if theirs in c else None


def _rows(
    network: str,
    variant: str,
    step: float,
    goal: float | None = None,
    *,
    faster: float | None = None,
    memory: float | None = None,
) -> list[Bar]:
    """The bars of one row of the table of steps; `network` is a name and a dtype."""
    model, dtype = network.split()
    what = f"{network}, {variant.removeprefix('tangentfast, ')}"
    bars = [
        Bar(f"{what}: step, × ordinary", step, False, _step(model, dtype, variant, ORDINARY), goal)
    ]
    if faster is not None:
        reading = _step(model, dtype, PUBLISHED, variant)
        bars.append(Bar(f"{what}: × faster than `torch.func.jvp`", faster, True, reading))
    if memory is not None:
        reading = _memory(model, dtype, variant)
        bars.append(Bar(f"{what}: peak memory, × ordinary", memory, False, reading))
    return bars


def _merge(limit: float) -> Bar:
    share = _first("merge", lambda c: c.share("tangentfast", *COPIES), K=8)
    return Bar("merge_, K = 8: share of the copy ceiling", limit, True, share)


def _python(threads: int) -> Bar:
    return Bar(
        f"Python an op, ViT-Ti, batch 1, threads {threads}: step, × its own aten operations",
        1.25,
        False,
        _first("python", _times("tangentfast", "tangentfast, its own operations"), threads=threads),
    )


# An AMD CPU with AVX-512: our products have twice the rate of torch's (MKL there uses AVX2's).
AVX512_AMD = [
    *_rows("ViT-B/32 float32", OURS, 0.90, 0.80, faster=2.0, memory=1.05),
    *_rows("ViT-B/32 float32", OURS_NARROW, 0.75, 0.68, memory=1.05),
    *_rows("ViT-B/32 float32", OURS_ATTENTION, 0.66, 0.58, faster=2.5, memory=1.05),
    *_rows("ViT-B/16 float32", OURS, 0.95, 0.85, faster=2.0, memory=1.05),
]
# Every other CPU.
AVX2 = [
    *_rows("ViT-B/32 float32", OURS, 1.45, 1.35, faster=2.0, memory=1.05),
    *_rows("ViT-B/32 float32", OURS_ATTENTION, 1.00, 0.90, faster=2.5, memory=1.05),
    *_rows("ViT-B/16 float32", OURS, 1.50, 1.40, faster=2.0, memory=1.05),
]
# With instructions for products of bfloat16, 1.28 is the floor; without, torch's are very slow.
BFLOAT16 = _rows("ViT-B/32 bfloat16", OURS, 1.36, 1.28, faster=5.0, memory=1.05)
SLOW_BFLOAT16 = _rows("ViT-B/32 bfloat16", OURS, 1.10, faster=5.0, memory=1.05)
ONE_PASS = "tangentfast, one pass"
CPU = [
    Bar(
        "× faster than the compiled `torch.func.jvp` step",
        1.25,
        True,
        _first("compiled", _times(COMPILED, OURS)),
    ),
    Bar(
        "8 tangents in one pass, × 8 `torch.func.jvp` calls",
        0.60,
        False,
        _first("tangents", _times(ONE_PASS, "torch.func.jvp, K calls"), K=8),
    ),
    Bar(
        "8 tangents in one pass, × 8 calls of our own",
        0.60,
        False,
        _first("tangents", _times(ONE_PASS, "tangentfast, K calls"), K=8),
    ),
    Bar(
        "α sweep of 21 points: × faster than point by point",
        10.0,
        True,
        _first("alpha_sweep", _times("tangentfast, point by point", ONE_PASS)),
    ),
    _merge(0.90),
    _python(1),
    _python(2),
]
GPU = [
    *_rows("ViT-L/14 bfloat16", OURS, 1.67, faster=2.5, memory=1.15),
    *_rows("ViT-L/14 bfloat16", OURS_ATTENTION, 1.30, faster=2.5, memory=1.15),
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


def bars(results: Results) -> list[Bar]:
    """What must be shown on this kind of machine."""
    m = results.machine
    if m["gpu"]:
        return GPU
    amd = "AMD" in m.get("vendor", "").upper() + m["cpu"]
    float32 = AVX512_AMD if amd and kind(m) == ["avx512"] else AVX2
    fast = {"avx512_bf16", "amx_bf16"} & set(instructions(m))
    return [*float32, *(BFLOAT16 if fast else SLOW_BFLOAT16), *CPU]


def verdicts(results: Results) -> list[tuple[Bar, float]]:
    """The bars against which something was measured, and what."""
    read = [(bar, bar.reading(results)) for bar in bars(results)]
    return [(bar, value) for bar, value in read if value is not None]
