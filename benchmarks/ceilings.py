"""What the machine can do at best: passes over memory, and matrix products.

Bytes are counted as a program asks for them. A store to memory that was not read first makes many
processors fetch the line before (write-allocate); that traffic is not counted, and the passes
differ in it: ``copy_`` has it, an in-place axpy has not, and the C library's memcpy avoids it with
non-temporal stores. The ceiling is the fastest of the passes in the same round, so that a rate is
compared with the best that was seen, not with the kindest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from harness import DEVICE
from torch import Tensor

PASSES = ("read", "copy_", "memcpy", "axpy in place")


def passes(total: int) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Passes over float32 tensors that each move about `total` bytes, and the bytes of each."""

    def tensor(streams: int) -> Tensor:
        return torch.ones(max(total // (4 * streams), 64), device=DEVICE)

    one, source, target = tensor(1), tensor(2), tensor(2)
    x, y = tensor(3), tensor(3)
    calls: dict[str, Callable[[], object]] = {
        "read": one.sum,
        "copy_": lambda: target.copy_(source),
        "axpy in place": lambda: y.add_(x, alpha=1e-3),
    }
    work = {
        "read": one.nbytes,
        "copy_": 2.0 * source.nbytes,
        "axpy in place": 3.0 * x.nbytes,
    }
    if DEVICE.type == "cpu":
        calls["memcpy"] = lambda: memcpy(target, source)
        work["memcpy"] = 2.0 * source.nbytes
    return calls, work


def memcpy(target: Tensor, source: Tensor) -> None:
    """The C library's memcpy on every thread; ctypes releases the interpreter's lock."""
    threads = torch.get_num_threads()
    share = -(-source.nbytes // threads)
    parts = [
        (target.data_ptr() + i, source.data_ptr() + i, min(share, source.nbytes - i))
        for i in range(0, source.nbytes, share)
    ]
    if len(parts) == 1 or source.nbytes < 1 << 20:  # starting threads would take longer
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: ctypes.memmove(*part), parts))


def product(flops: float, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square matrix product of about `flops`, and its FLOPs; at least 64, at most 2048 wide."""
    n = min(2048, max(64, round((flops / 2) ** (1 / 3) / 64) * 64))
    a = torch.randn(n, n, device=DEVICE).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2.0 * n**3
