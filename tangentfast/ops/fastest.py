"""Which of several ways to compute one result is the fastest: measured once, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
ROUNDS = 5


def cuda_seconds(run: Run) -> float:
    """The shortest of a few runs on the current stream, the first one (compilation) left out."""
    run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


class Fastest:
    """The table of what was measured, by a key that says all that time depends on."""

    def __init__(self, seconds: Callable[[Run], float] = cuda_seconds):
        self.seconds = seconds
        self.found: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, runs: Sequence[Run]) -> int:
        """The index of the fastest of `runs`, of which the first works everywhere.

        It is the first, and not remembered, where measuring is impossible (a CUDA graph is being
        captured) or unwanted (``torch.use_deterministic_algorithms``: the choice moves roundings).
        """
        known = self.found.get(key)
        if torch.are_deterministic_algorithms_enabled():
            return 0
        if known is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return 0
            times = [self.seconds(runs[0])]
            for run in runs[1:]:
                try:
                    times.append(self.seconds(run))
                except Exception:  # a tile too large for this GPU; each compiler has its own error
                    times.append(float("inf"))
            known = self.found[key] = times.index(min(times))
        return known
