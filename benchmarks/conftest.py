"""What the suite leaves: raw seconds and the machine as JSON, and its ratios on the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime
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
    now = datetime.now()
    output_json.clear()
    output_json |= {
        "date": str(now.date()),
        "time": now.strftime("%H:%M"),
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
        c = Comparison(*(record[key] for key in ("name", "suite", "facts", "variants")))
        write(f"{c.suite}: {c.name} ({record['took']:.0f} s in all)")
        for variant, measured in c.variants.items():
            if "bytes" in measured:
                write(f"  {variant:36s} {measured['bytes'] / 1e9:9.3f} GB")
                continue
            against = c.facts["against"]
            line = f"{c.seconds(variant) * 1e3:10.3f} ms {c.times(variant, against):8.3f}"
            rate = ""
            if "work" in measured:
                rate = f"  {c.rate(variant) / 1e9:7.1f} G{c.facts['unit']}/s"
            write(f"  {variant:36s} {line} × {against}{rate}")
    if RECORDS:
        write(f"{os.cpu_count()} cores, {time.perf_counter() - STARTED:.0f} s in all")
