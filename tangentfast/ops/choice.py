"""Which of several ways to compute one result is the fastest: measured once, then remembered.

The first call of a shape class runs every candidate a few times, outside autograd, and remembers
the fastest for the process. The default, the first of the candidates, is taken and nothing is
remembered where measuring is impossible (a CUDA graph is being captured, torch.compile or a tracer
looks on) or unwanted: TANGENTFAST_TUNE=0, or ``torch.use_deterministic_algorithms``, since the
choice moves roundings. The ranks of a distributed run choose alike: the first that meets a shape
class measures for all.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from tangentfast._torch import in_dispatch_mode, process_group_store

Run = Callable[[], Any]


class Named(Protocol):
    """A candidate."""

    @property
    def name(self) -> str:
        """As the report has it."""


P = TypeVar("P", bound=Named)
ROUNDS = 3
HOPELESS = 1.5  # a candidate whose first run is so much slower is not run again


@dataclass(frozen=True)
class Chosen:
    """What was measured: the name taken, and the seconds of every candidate."""

    name: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        best = self.seconds.get(self.name)
        if best is None:
            return f"{self.name}, as another rank measured"
        others = [f"{s / best:.2f} x {n}" for n, s in self.seconds.items() if n != self.name]
        return f"{self.name}, faster than " + ", ".join(others)


def seconds(run: Run, device: torch.device) -> float:
    """One run on the current stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        took: float = start.elapsed_time(end) / 1000
        return took
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


class Choice:
    """What was measured for one op, by shape class."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.chosen: dict[tuple[Any, ...], Chosen] = {}

    def __call__(
        self, key: Hashable, device: torch.device, providers: Sequence[P], run: Callable[[P], Any]
    ) -> P:
        """The fastest of `providers`, of which the first is the default and works everywhere.

        Args:
            key: everything that time depends on, alike on all ranks; without the device's index.
            device: where they run.
            run: calls one of them. On large operands it does a part of the work.
        """
        if len(providers) == 1 or torch.are_deterministic_algorithms_enabled():
            return providers[0]
        if os.environ.get("TANGENTFAST_TUNE") == "0":
            return providers[0]
        names = tuple(p.name for p in providers)
        whole = (key, device.type, torch.get_num_threads(), names)
        known = self.chosen.get(whole)
        if known is None:
            if not _measurable(device):
                return providers[0]
            runs: dict[str, Run] = {p.name: partial(run, p) for p in providers}
            known = _agree(f"{self.op} {whole!r}", lambda: _measure(device, runs))
            self.chosen[whole] = known
        return providers[names.index(known.name)] if known.name in names else providers[0]

    def lines(self) -> list[str]:
        """What was measured, a line for each shape class."""
        return [f"{self.op} {whole[0]}: {c}" for whole, c in self.chosen.items()]


def _measurable(device: torch.device) -> bool:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not (capturing or torch.compiler.is_compiling() or in_dispatch_mode())


def _measure(device: torch.device, runs: dict[str, Run]) -> Chosen:
    """The shortest of a few rounds in turn, after a first that compiles and warms."""
    best: dict[str, float] = {}
    with torch.no_grad():
        for name, run in runs.items():
            try:
                seconds(run, device)
                best[name] = seconds(run, device)
            except Exception:  # a tile too large for this GPU; each compiler has its own error
                best[name] = float("inf")
        least = min(best.values())
        for _ in range(ROUNDS - 1):
            for name in [n for n, took in best.items() if took <= HOPELESS * least]:
                best[name] = min(best[name], seconds(runs[name], device))
    return Chosen(min(best, key=best.__getitem__), best)


def _agree(key: str, measure: Callable[[], Chosen]) -> Chosen:
    """What the first rank to ask measured."""
    store = process_group_store()
    if store is None:
        return measure()
    name = f"tangentfast/{hashlib.sha256(key.encode()).hexdigest()}"
    if store.add(f"{name}/asked", 1) > 1:
        return Chosen(store.get(name).decode(), {})  # waits until it is there
    chosen = Chosen("", {})  # no candidate, so the default, if measuring is interrupted
    try:
        chosen = measure()
    finally:
        store.set(name, chosen.name)
    return chosen
