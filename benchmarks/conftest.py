"""What a run leaves: raw seconds and the machine as JSON, and its ratios on the terminal."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest

import machine
from harness import SMOKE, ratio

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


def pytest_benchmark_update_json(
    config: Any, benchmarks: Any, output_json: dict[str, Any]
) -> None:
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
    """Ratios of every comparison, and how long each took of the whole."""
    write = terminalreporter.write_line
    for record in RECORDS:
        variants, facts = record["variants"], record["facts"]
        write(f"{record['suite']}: {record['name']} ({record['took']:.0f} s in all)")
        for name, figures in variants.items():
            if "seconds" not in figures:
                write(f"  {name:26s} {figures['bytes'] / 1e9:9.3f} GB")
                continue
            middle = statistics.median(figures["seconds"])
            against = ratio(variants, name, facts["against"])
            rate = ""
            if "work" in figures:
                rate = f"  {figures['work'] / middle / 1e9:7.1f} G{facts['unit']}/s"
            write(f"  {name:26s} {middle * 1e3:9.3f} ms {against:8.3f} × {facts['against']}{rate}")
    if RECORDS:
        total = time.perf_counter() - STARTED
        write(f"{os.cpu_count()} cores, {total:.0f} s in all")
