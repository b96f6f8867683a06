"""Peak memory of a piece of work: what torch allocates on a GPU, the resident size on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Counts from its making: the growth over what was there then.

    Freed memory that glibc keeps would be used again without a trace: it goes back to the system
    first. Holes that arise later count, as they do for the user.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.rest = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)
            # Where the mark cannot be reset, it stands at the peak of all work so far.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.rest = _status("VmRSS")

    def bytes(self) -> int:
        """The peak so far, over rest; 0 where it cannot be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.rest
        if self.device.type == "cpu" and sys.platform == "linux":
            return max(0, _status("VmHWM") - self.rest)
        return 0


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
