"""Peak memory of training steps, in a process of its own.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py <<< \
        '["ViT-B/32", "float32", 16, ["ordinary", "tangentfast, all"]]'

Printed as JSON: variant -> bytes by which the process grows beyond what rests between steps
(network, τ, gradients). On a GPU that is what torch allocates. On Linux it is the resident size,
so that the variable must be set before the start: every tensor is then mapped by itself and goes
back to the system when it is freed, and the peak is what a step needs. With malloc's defaults it
also counts the holes that glibc leaves between tensors.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from harness import DEVICE
from networks import images, network
from steps import Step, step

MEASURABLE = DEVICE.type == "cuda" or sys.platform == "linux"


@cache
def _process() -> subprocess.Popen[str]:
    """One for all rows; it ends when its input does, with this process."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def peaks(name: str, dtype: torch.dtype, batch: int, variants: list[str]) -> dict[str, int]:
    """Peak bytes of each variant's step."""
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    row = [name, str(dtype).removeprefix("torch."), batch, variants]
    process.stdin.write(json.dumps(row) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"memory.py ended with {process.wait()}; its messages are above")
    peaks: dict[str, int] = json.loads(answer)
    return peaks


def _peak(once: Step) -> int:
    for parameter in once.trained.values():
        parameter.grad = torch.ones_like(parameter)  # touched: memory that rests
    # A whole step first: what libraries set up once, and our measurement of which way is the
    # fastest, made at the first step of a shape, are not counted.
    once.model(once.x).square().mean().backward()
    gc.collect()
    rest = _memory()
    _reset()
    once.model(once.x).square().mean().backward()
    return _memory("peak") - rest


def _memory(which: str = "now") -> int:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        allocated: int = (
            torch.cuda.max_memory_allocated() if which == "peak" else torch.cuda.memory_allocated()
        )
        return allocated
    key = "VmHWM" if which == "peak" else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _reset() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    for line in sys.stdin:
        name, dtype, batch, variants = json.loads(line)
        kind = getattr(torch, dtype)
        model, x = network(name, kind), images(batch, kind)
        measured = {}
        for variant in variants:
            model.zero_grad(set_to_none=True)
            measured[variant] = _peak(step(variant, model, x))
            gc.collect()
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
