"""The Triton kernels, compiled for GPUs that need not be there: their resources."""

from __future__ import annotations

import re
import subprocess
import warnings
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

from tangentfast.ops.attention import triton as attention
from tangentfast.ops.linear import triton as linear

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
# What ptxas leaves in registers is a matter of its version, which comes with Triton. So the limits
# hold for the Triton of the default environment, and of any other a warning says what it spills.
CONSTRAINTS = Path(__file__).parents[2] / "constraints/default.txt"
PINNED = re.findall(r"^triton==(\S+)", CONSTRAINTS.read_text(), re.M)
# (operation, dtype, head's width or tile, capability) -> bytes a thread may spill there, and why.
SPILLS = {
    ("attention_jvp_kernel", torch.bfloat16, 256, 90): (400, "no tile of so wide a head fits"),
    ("attention_jvp_kernel", torch.float32, 128, 90): (400, "nor here, in three parts of 11 bits"),
    ("linear_jvp_kernel", torch.bfloat16, 1, 80): (3000, "3.8 takes 32 registers"),
}


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
    for module in (attention, linear):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Compiled(getattr(module, name), found))
    for module in (attention, linear):
        monkeypatch.setattr(module, "hopper", lambda x: capability >= 90)
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


def check(kernels: list[Any], capability: int, dtype: torch.dtype, what: Any, folder: Path) -> None:
    for kernel in kernels:  # pytest -rP shows it
        name, shared = kernel.metadata.name, kernel.metadata.shared
        registers, spilled = resources(kernel.asm["cubin"], folder)
        print(f"{name} {dtype} {what} sm_{capability}: {registers} registers, {shared} bytes shared"
              f", {spilled} spilled")  # fmt: skip
        assert shared <= SHARED[capability]
        allowed, _ = SPILLS.get((name, dtype, what, capability), (0, ""))
        if triton.__version__ in PINNED:
            assert spilled <= allowed
        elif spilled > allowed:
            warnings.warn(f"{name} {dtype} {what} sm_{capability} spills {spilled} bytes under "
                          f"Triton {triton.__version__}", stacklevel=2)  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "mask"),
    [
        (80, 64, torch.bfloat16, None),
        (80, 80, torch.float16, "causal"),
        (80, 64, torch.float32, None),
        (90, 64, torch.bfloat16, None),
        (90, 64, torch.bfloat16, "added"),
        (90, 80, torch.float16, "causal"),
        (90, 128, torch.bfloat16, None),
        (90, 256, torch.bfloat16, None),
        (90, 64, torch.float32, None),
        (90, 128, torch.float32, None),
    ],
)
def test_attention(
    capability: int, width: int, dtype: torch.dtype, mask: str | None, compiled: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """With the three tangents that an attention layer has, and that of an added mask."""
    q, k, v, dq, dk, dv = (
        torch.empty(2, 257, 3, width, dtype=dtype).transpose(1, 2) for _ in range(6)
    )
    added = torch.empty(2, 3, 257, 257) if mask == "added" else None
    rest = (added, mask == "causal", 0.1)
    o, lse, _ = attention.attention_jvp(q, k, v, *rest, [dq], [dk], [dv], [added], True)
    attention.attention_backward(o, q, k, v, o, lse, *rest, False)
    assert len(compiled) == 3
    check(compiled, capability, dtype, width, tmp_path)


TILES = [
    (capability, dtype, tile)
    for dtype in (torch.bfloat16, torch.float32)
    for tile in range(len(linear.TILES[dtype.itemsize]))
    for capability in (80, 90)
    if capability == 90 or tile + 1 < len(linear.TILES[dtype.itemsize])
]


@pytest.mark.parametrize(("capability", "dtype", "tile"), TILES)
def test_linear(
    capability: int, dtype: torch.dtype, tile: int, compiled: list[Any], tmp_path: Path
) -> None:
    """All three products, and the two of a second tangent."""
    x, w, b = (torch.empty(*s, dtype=dtype) for s in ((512, 768), (1024, 768), (1024,)))
    linear.linear_jvp(x, w, b, [x, x], [w, w], [b, b], tile)
    check(compiled, capability, dtype, tile, tmp_path)
