"""One training step of open_clip ViT-B/32, batch 16, float32: time and peak memory.

    pytest benchmarks/bench_step.py

The variants are interleaved and the ratios are medians over rounds, so that a disturbance of the
machine meets all of them. Memory is the peak of the process over its size at rest, measured in a
fresh process for each variant (Linux), twice: with MALLOC_MMAP_THRESHOLD_=65536, so that freed
tensors go back to the system and the peak is what the step needs, and with malloc's defaults,
where glibc cannot put a tensor into the hole that one of the same size left.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tangentfast as tf

pytest.importorskip("pytest_benchmark")
open_clip = pytest.importorskip("open_clip")

ROUNDS = 7
VARIANTS = ["ordinary", "torch.func.jvp", "tangentfast, all", "tangentfast, attention"]


def variant(name: str) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """The model, its trained parameters and a batch."""
    sys.path.insert(0, str(Path(__file__).parent))
    from baselines import FullNTK

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").visual.train()
    x = torch.randn(16, 3, 224, 224)
    if name == "ordinary":
        return model, list(model.parameters()), x
    if name == "torch.func.jvp":
        linear: Any = FullNTK(model)
        taus = linear.tau
    else:
        linear = tf.linearize(model, name.rpartition(" ")[2])
        taus = linear.tau
    for tau_name, tau in taus.items():
        generator = torch.Generator().manual_seed(len(tau_name) + tau.numel())
        with torch.no_grad():
            tau.normal_(std=1e-3, generator=generator)
    return linear, list(linear.parameters()), x


def run(name: str) -> Any:
    from baselines import step

    model, parameters, x = variant(name)
    return lambda: step(model, parameters, x)


def test_step(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {name: run(name) for name in VARIANTS}
    first = {name: once() for name, once in steps.items()}
    torch.testing.assert_close(
        first["tangentfast, all"], first["torch.func.jvp"], rtol=1e-4, atol=1e-5
    )
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}

    def round_() -> None:
        for name, once in steps.items():
            start = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(round_, rounds=ROUNDS)
    with capsys.disabled():
        print(f"\nViT-B/32, batch 16, float32, {torch.get_num_threads()} threads")
        for name in VARIANTS:
            over = [a / b for a, b in zip(seconds[name], seconds["ordinary"], strict=True)]
            faster = [b / a for a, b in zip(seconds[name], seconds["torch.func.jvp"], strict=True)]
            ratio, speed = statistics.median(over), statistics.median(faster)
            benchmark.extra_info[name] = {"× ordinary": ratio, "× faster than jvp": speed}
            print(
                f"{name:24s} {statistics.median(seconds[name]):6.2f} s  {ratio:5.2f} × ordinary "
                "step"
                f"  {speed:5.2f} × faster than torch.func.jvp"
            )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def peak(name: str, **environment: str) -> float:
        command = [sys.executable, __file__, name]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | environment
        )
        return float(json.loads(done.stdout.splitlines()[-1]))

    def measure() -> dict[str, tuple[float, float]]:
        return {n: (peak(n, MALLOC_MMAP_THRESHOLD_="65536"), peak(n)) for n in VARIANTS}

    peaks = benchmark.pedantic(measure, rounds=1)
    need, resident = peaks["ordinary"]
    with capsys.disabled():
        print("\npeak memory over the resting model: needed; resident with malloc's defaults")
        for name, (a, b) in peaks.items():
            benchmark.extra_info[name] = {"GB": a, "× ordinary": a / need, "resident GB": b}
            print(f"{name:24s} {a:5.2f} GB {a / need:5.2f} ×   {b:5.2f} GB {b / resident:5.2f} ×")


def _peak_of_two_steps(name: str) -> float:
    """GB by which the process grows beyond model, θ0, τ and their gradients."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(li.split()[1]) for li in lines if li.startswith(key)) / 1e6

    model, parameters, x = variant(name)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter).fill_(1.0)  # touched: memory that rests
    rest = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(2):
        for parameter in parameters:
            parameter.grad.zero_()  # type: ignore[union-attr]
        model(x).square().mean().backward()
    return status("VmHWM") - rest


if __name__ == "__main__":
    print(json.dumps(_peak_of_two_steps(sys.argv[1])))
