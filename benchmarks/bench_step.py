"""One training step of each regime: time and peak memory.

pytest benchmarks/bench_step.py --benchmark-only
pytest benchmarks -k "step and B/32 and float32 and not compiled" --benchmark-only
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import machine
import memory
import pytest
import torch
from harness import DEVICE, SMOKE, assert_close, compare, error, timed
from networks import images, network
from readings import instructions
from regimes import (
    ATTENTION,
    COMPILED,
    ORDINARY,
    OURS,
    OURS_ATTENTION,
    OURS_NARROW,
    PUBLISHED,
)
from steps import published, step
from torch import Tensor, nn

LINEAR = [ORDINARY, PUBLISHED, OURS, OURS_ATTENTION]
ALL = [ORDINARY, ATTENTION, PUBLISHED, OURS, OURS_ATTENTION]
GPU = DEVICE.type == "cuda"
# Without such products bfloat16 is no way to save time.
BFLOAT16 = GPU or {"avx512_bf16", "amx_bf16"} & set(instructions(machine.describe()))
NARROW = [OURS_NARROW] if BFLOAT16 or SMOKE else []
LONGEST = 8.0  # seconds of an ordinary step; beyond it a batch is made smaller

# network, dtype, batch, variants, seconds: at least one round, more where they fit
CPU_STEPS = [
    ("ViT-B/32", torch.float32, 16, ALL + NARROW, 95),
    ("ViT-B/32", torch.bfloat16, 16, LINEAR, 30),
    ("ViT-B/16", torch.float32, 8, [ORDINARY, PUBLISHED, OURS], 100),
    ("ViT-S/16", torch.float32, 4, LINEAR, 8),
]
# A batch that the published way's memory allows has a row of its own.
GPU_STEPS = [
    ("ViT-L/14", torch.bfloat16, 128, [ORDINARY, ATTENTION, OURS, OURS_ATTENTION], 25),
    ("ViT-L/14", torch.bfloat16, 32, LINEAR, 20),
    ("ViT-B/32", torch.float32, 64, LINEAR + NARROW, 12),
    ("ViT-B/16", torch.bfloat16, 64, LINEAR, 10),
    ("ViT-H/14", torch.bfloat16, 32, [ORDINARY, OURS], 10),
]
STEPS = GPU_STEPS if GPU else CPU_STEPS
IDS = [f"{name} {str(dtype)[6:]} {batch}" for name, dtype, batch, *_ in STEPS]


@lru_cache(1)
def built(name: str, dtype: torch.dtype) -> nn.Module:
    """One network at a time: the largest are a gigabyte."""
    return network(name, dtype)


@lru_cache
def fitting_batch(name: str, dtype: torch.dtype, batch: int) -> int:
    """`batch`, or less where the processor has no fast products of a 16-bit type."""
    if SMOKE:
        return 2
    if GPU or dtype == torch.float32:
        return batch
    one = timed(step(ORDINARY, built(name, dtype), images(1, dtype)))[0]
    return max(1, min(batch, int(LONGEST / one)))


# J τ with its products in bfloat16, against float32: each operand is rounded to 8 bits, a relative
# 2^-9 in the mean square, and errors of many layers add up like noise. Measured: 3e-3 to 4e-3.
NARROW_ERROR = 1e-3, 1e-2  # less than the first: the products were not in bfloat16


def check_narrow(network: nn.Module, x: Tensor) -> None:
    """J τ is off by the roundings of bfloat16, the gradients of ⟨f_lin, u⟩ by those of float32."""
    narrow = step(OURS_NARROW, network, x)
    exact = published(network, narrow.trained, x)
    outs = [narrow.model(x), exact.model(x)]
    u = torch.randn_like(outs[0])
    gradients = [
        torch.autograd.grad((out * u).sum(), list(one.trained.values()))
        for out, one in zip(outs, (narrow, exact), strict=True)
    ]
    assert_close(*gradients, "gradients beside bfloat16 tangents")
    with torch.no_grad():
        y = network(x)
    least, most = (0.0 if SMOKE else NARROW_ERROR[0]), NARROW_ERROR[1]
    off = error(outs[0] - y, outs[1] - y)
    assert least <= off <= most, f"bfloat16 tangents: {off:.1e} is not in [{least}, {most}]"


def check(network: nn.Module, x: Tensor, results: dict[str, Any]) -> None:
    """Outputs and every gradient, against NTK linearization as published."""
    if PUBLISHED in results:
        assert_close(results[OURS], results[PUBLISHED], "step, all parameters")
    else:
        one = step(OURS, network, x[:1])
        assert_close(one(), published(network, one.trained, x[:1])(), "step, all parameters")
    if OURS_NARROW in results:
        check_narrow(network, x[:2])
    if OURS_ATTENTION in results:
        one = x[:1]
        ours = step(OURS_ATTENTION, network, one)
        theirs = published(network, ours.trained, one)
        assert_close(ours(), theirs(), "step, attention")
    if ATTENTION in results:
        out, gradients = results[ATTENTION]
        expected = {name: results[ORDINARY][1][name] for name in gradients}
        assert_close((out, gradients), (results[ORDINARY][0], expected), "step, ordinary")


def facts(name: str, dtype: torch.dtype, batch: int, wanted: int) -> dict[str, Any]:
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "wanted batch": batch if SMOKE else wanted,
        "against": ORDINARY,
    }


@pytest.mark.parametrize(("name", "dtype", "wanted", "variants", "seconds"), STEPS, ids=IDS)
def test_step(
    name: str, dtype: torch.dtype, wanted: int, variants: list[str], seconds: float, benchmark: Any
) -> None:
    model, batch = built(name, dtype), fitting_batch(name, dtype, wanted)
    if batch < wanted and not SMOKE:
        variants = [ORDINARY, PUBLISHED, OURS]  # a slow dtype is no place for more
    x = images(batch, dtype)
    compare(
        benchmark,
        {variant: step(variant, model, x) for variant in variants},
        lambda results: check(model, x, results),
        seconds=seconds,
        **facts(name, dtype, batch, wanted),
    )


def test_adamw(benchmark: Any) -> None:
    """The step of the table's first row with its optimizer."""
    name, dtype, wanted, _, _ = STEPS[0]
    model, batch = network(name, dtype), fitting_batch(name, dtype, wanted)
    steps = {variant: step(variant, model, images(batch, dtype)) for variant in (ORDINARY, OURS)}
    truth = published(model, list(steps[OURS].trained), steps[OURS].x[:1])
    first = step(OURS, model, truth.x)
    assert_close(first(), truth(), "step, all parameters")
    # θ0 must not move under the linearized model: the ordinary step gets its own.
    steps[ORDINARY] = step(ORDINARY, network(name, dtype), steps[OURS].x)
    for one in steps.values():
        one.optimizer = torch.optim.AdamW(list(one.trained.values()), lr=1e-5)

    def moved(results: dict[str, Any]) -> None:
        for one in steps.values():
            assert one.optimizer is not None
            assert len(one.optimizer.state) == len(one.trained)

    compare(
        benchmark,
        steps,
        moved,
        seconds=24,
        optimizer="AdamW",
        **facts(name, dtype, batch, wanted),
    )


@pytest.mark.skipif(SMOKE, reason="a minute of compilation")
def test_compiled(benchmark: Any) -> None:
    """The published step through ``torch.compile``; ``-k "not compiled"`` leaves it out."""
    name, dtype, wanted, _, _ = STEPS[0]
    model, batch = built(name, dtype), fitting_batch(name, dtype, wanted)
    x = images(batch, dtype)
    steps = {variant: step(variant, model, x) for variant in (ORDINARY, COMPILED, OURS)}
    try:
        compile_seconds = timed(steps[COMPILED])[0]
    except Exception as error:  # whatever the compiler or its C++ compiler raises
        pytest.skip(f"torch.compile: {type(error).__name__}: {str(error)[:200]}")
    compare(
        benchmark,
        steps,
        lambda results: assert_close(results[OURS], results[COMPILED], "step, compiled"),
        seconds=34,
        **facts(name, dtype, batch, wanted) | {"compile seconds": compile_seconds},
    )


MEMORY = [[v for v in LINEAR if v in row[3]] for row in STEPS[:2]]
if not GPU:
    MEMORY = [LINEAR + NARROW, [ORDINARY, OURS], [ORDINARY, OURS]]


@pytest.mark.skipif(not memory.MEASURABLE, reason="peak memory: Linux or CUDA")
@pytest.mark.parametrize(
    ("row", "variants"), list(zip(STEPS, MEMORY, strict=False)), ids=IDS[: len(MEMORY)]
)
def test_memory(row: tuple[Any, ...], variants: list[str], benchmark: Any) -> None:
    name, dtype, wanted = row[:3]
    batch = fitting_batch(name, dtype, wanted)
    if batch < wanted and not SMOKE:
        pytest.skip(f"{dtype} is slow here; at batch {batch} memory is that of the weights")
    peaks = benchmark.pedantic(memory.peaks, (name, dtype, batch, variants), rounds=1)
    if SMOKE:  # below the resolution of a process's size
        peaks = {variant: max(peak, 1) for variant, peak in peaks.items()}
    assert all(peak > 0 for peak in peaks.values())
    benchmark.extra_info |= {
        "facts": facts(name, dtype, batch, wanted),
        "variants": {variant: {"bytes": peak} for variant, peak in peaks.items()},
    }
