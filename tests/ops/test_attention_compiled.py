"""The Triton kernels of attention, compiled for GPUs that need not be there: their resources."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tangentfast.ops.attention import triton as kernels

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
NAMES = ["attention_jvp_kernel", "attention_dq_kernel", "attention_dkv_kernel"]


class Absent:
    """A driver of a GPU that is not there: Triton compiles for it, and launches nothing."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # by which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel whose launch compiles, with the very arguments of the launch."""

    def __init__(self, kernel: Any, found: list[Any]):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.found.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, capability: int) -> list[Any]:
    found: list[Any] = []
    for name in NAMES:
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), found))
    monkeypatch.setattr(kernels, "_hopper", lambda q: capability >= 90)
    monkeypatch.setattr(driver, "_active", Absent(capability))
    return found


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, by Triton's own cuobjdump."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize(
    ("capability", "width", "dtype"),
    [
        (80, 64, torch.bfloat16),
        (80, 80, torch.bfloat16),
        (90, 64, torch.bfloat16),
        (90, 128, torch.bfloat16),
        (90, 64, torch.float32),
    ],
)
def test_registers_and_shared_memory(
    capability: int, width: int, dtype: torch.dtype, compiled: list[Any], tmp_path: Path
) -> None:
    """With the three tangents that an attention layer has."""
    q, k, v, dq, dk, dv = (
        torch.empty(2, 257, 3, width, dtype=dtype).transpose(1, 2) for _ in range(6)
    )
    o, lse, _ = kernels.attention_jvp(q, k, v, None, False, 0.1, [dq], [dk], [dv], [None], True)
    kernels.attention_backward(o, q, k, v, o, lse, None, False, 0.1)
    assert [kernel.metadata.name for kernel in compiled] == NAMES
    for kernel in compiled:
        registers, spilled = resources(kernel.asm["cubin"], tmp_path)
        print(f"sm_{capability} {dtype} {width} {kernel.metadata.name}: {registers} registers,"
              f" {kernel.metadata.shared} bytes shared, {spilled} spilled")  # fmt: skip
        assert kernel.metadata.shared <= SHARED[capability]
        assert spilled == 0
