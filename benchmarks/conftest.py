"""What a run leaves: raw seconds and the machine as JSON, and its ratios on the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import machine
import pytest
from harness import SMOKE
from readings import Comparison

RECORDS: list[dict[str, Any]] = []
STARTED = time.perf_counter()


@pytest.fixture(autouse=True)
def record(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what `compare` and its kin noted in ``extra_info``, under the suite's name."""
    benchmark = request.getfixturevalue("benchmark")
    suite = request.module.__name__.removeprefix("bench_")
    benchmark.group = suite
    started = time.perf_counter()
    yield
    if "variants" in benchmark.extra_info:
        took = time.perf_counter() - started
        name = request.node.name.removeprefix("test_")
        RECORDS.append({"name": name, "suite": suite, "took": took, **benchmark.extra_info})


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # pytest-benchmark notes the host's name
    machine_info |= machine.describe()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Replace pytest-benchmark's file by ours: seconds of every round, no statistics."""
    output_json.clear()
    output_json |= {
        "date": str(date.today()),
        "commit": machine.commit(),
        "smoke": SMOKE,
        "seconds": time.perf_counter() - STARTED,
        "machine": machine.describe(),
        "benchmarks": RECORDS,
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Ratios of every comparison, and how long it took of the whole."""
    write = terminalreporter.write_line
    for record in RECORDS:
        found = Comparison(*(record[key] for key in ("name", "suite", "facts", "variants")))
        write(f"{found.suite}: {found.name} ({record['took']:.0f} s in all)")
        for variant, figures in found.variants.items():
            if "bytes" in figures:
                write(f"  {variant:30s} {figures['bytes'] / 1e9:9.3f} GB")
                continue
            against = found.facts["against"]
            line = f"{found.seconds(variant) * 1e3:10.3f} ms {found.times(variant, against):8.3f}"
            rate = ""
            if "work" in figures:
                rate = f"  {found.rate(variant) / 1e9:7.1f} G{found.facts['unit']}/s"
            write(f"  {variant:30s} {line} × {against}{rate}")
    if RECORDS:
        write(f"{os.cpu_count()} cores, {time.perf_counter() - STARTED:.0f} s in all")
