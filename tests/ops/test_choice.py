"""Choice by measurement: once a shape class, alike on all ranks, and not where it may not be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tangentfast.ops import choice
from tangentfast.ops.choice import Choice

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    name: str
    took: float


A, B, C = Way("a", 3.0), Way("b", 1.0), Way("c", 2.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways were run to measure them."""
    monkeypatch.setattr(choice, "seconds", lambda run, device: run())
    monkeypatch.delenv("TANGENTFAST_TUNE", raising=False)
    return []


def run_of(measured: list[str]):  # type: ignore[no-untyped-def]
    def run(way: Way) -> float:
        measured.append(way.name)
        return way.took

    return run


def test_once_a_shape_class(measured: list[str]) -> None:
    choose, run = Choice("op"), run_of(measured)
    assert [choose("key", CPU, [A, B, C], run) for _ in range(3)] == [B] * 3
    assert measured[:6] == list("aabbcc")  # a first run is no sample
    assert set(measured[6:]) == {"b"}  # the others are hopeless
    assert len(measured) == 6 + choice.ROUNDS - 1
    assert choose("key", CPU, [A, C], run) == C  # others to choose from
    assert choose("other", CPU, [A], run) == A
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    count = len(measured)
    choose("key", CPU, [A, B, C], run)
    torch.set_num_threads(before)
    assert len(measured) > count
    assert choose.lines()[0] == "op key: b, faster than 3.00 x a, 2.00 x c"


def test_what_fails_is_not_taken(measured: list[str]) -> None:
    def run(way: Way) -> float:
        if way is B:
            raise RuntimeError("out of shared memory")
        return way.took

    assert Choice("op")("key", CPU, [A, B, C], run) == C


def test_a_fixed_default(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose, run = Choice("op"), run_of(measured)

    class Onlooker(TorchDispatchMode):
        pass

    torch.use_deterministic_algorithms(True)
    try:
        assert choose("key", CPU, [A, B], run) == A
    finally:
        torch.use_deterministic_algorithms(False)
    with Onlooker():  # a tracer would record the measurement
        assert choose("key", CPU, [A, B], run) == A
    monkeypatch.setenv("TANGENTFAST_TUNE", "0")
    assert choose("key", CPU, [A, B], run) == A
    assert not measured
    assert not choose.chosen
    monkeypatch.delenv("TANGENTFAST_TUNE")
    assert choose("key", CPU, [A, B], run) == B
    with Onlooker():
        assert choose("key", CPU, [A, B], run) == B  # what is known


def test_no_graph_and_no_random_numbers() -> None:
    x = torch.randn(3, requires_grad=True)
    seen = []

    def run(way: Way) -> None:
        seen.append((x * 2).requires_grad)
        time.sleep(way.took / 1000)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert Choice("op")("key", CPU, [A, B], run) == B
    assert not any(seen)
    assert torch.equal(before, torch.get_rng_state())


RANKS = """
import sys, time, torch
import torch.distributed as dist
from dataclasses import dataclass
from tangentfast.ops.choice import Choice
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

@dataclass(frozen=True)
class Way:
    name: str
    took: float

# each rank by itself would choose another
ways = [Way("a", 0.02 - 0.019 * rank), Way("b", 0.001 + 0.019 * rank)]
choose = Choice("op")
cpu, run = torch.device("cpu"), lambda way: time.sleep(way.took)
chosen = [choose(f"key {i}", cpu, ways, run).name for i in (1, 2)]
dist.barrier()
print(chosen)
"""


def test_ranks_choose_alike(tmp_path: object) -> None:
    environment = {**os.environ}
    environment.pop("TANGENTFAST_TUNE", None)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), f"{tmp_path}/store"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for rank in (0, 1)
    ]
    said = [run.communicate(timeout=120) for run in runs]
    assert all(run.returncode == 0 for run in runs), said
    chosen = [out.splitlines()[-1] for out, _ in said]  # older torch says before how it connected
    assert chosen[0] == chosen[1]
    assert chosen[0] in ("['a', 'a']", "['b', 'b']", "['a', 'b']", "['b', 'a']")
