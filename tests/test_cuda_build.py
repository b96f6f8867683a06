"""The CUDA kernels compile without a warning, and keep what they work on in registers."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from tangentfast.ops.backend import load_native, native_problem

ROOT = Path(__file__).parent.parent
KERNELS = re.findall(r"^cuda +(\S+\.cu)$", (ROOT / "csrc/sources.txt").read_text(), re.M)
FLAGS = re.findall(r'compile_args\["nvcc"\] = (\[.+?\])', (ROOT / "setup.py").read_text())
# Warnings and spills are of one compiler: these are asserted, and of others shown.
TESTED = "release 13.0"
SPILLS: dict[str, str] = {}  # part of a kernel's name -> why it may spill
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\S+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def spilling(report: str) -> list[str]:
    """Kernels of a report of ptxas that use local memory without a reason."""
    return [
        f"{kernel['kernel']}: {kernel['stack']} bytes of stack, {kernel['stores']} bytes spilled"
        for kernel in REPORT.finditer(report)
        if int(kernel["stack"]) + int(kernel["stores"]) + int(kernel["loads"])
        and not any(name in kernel["kernel"] for name in SPILLS)
    ]


def test_spills_are_found() -> None:
    said = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "ptxas info    : Function properties for k\n"
        "    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    assert spilling(said.format(0, 0)) == []
    assert spilling(said.format(8, 4)) == ["k: 8 bytes of stack, 4 bytes spilled"]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH (CUDA toolkit)")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_do_not_spill(source: str, tmp_path: Path) -> None:
    """On sm_80 and sm_90."""
    flags = ["-std=c++17", *ast.literal_eval(FLAGS[0]), "-Xptxas=-v", "-fatbin"]
    flags += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    command = ["nvcc", *flags, str(ROOT / source), "-o", str(tmp_path / "kernels.fatbin")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    kernels = list(REPORT.finditer(said))
    assert len(kernels) == said.count("Compiling entry function") > 0, said
    for kernel in kernels:  # pytest -rP shows it
        print(f"{kernel['kernel']} {kernel['arch']}: {kernel['registers']}{kernel['rest']}")
    problems = spilling(said) + [line for line in said.splitlines() if "warning" in line]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if TESTED in version.stdout:
        assert not problems, "\n".join(problems)
    elif problems:
        warnings.warn("\n".join(problems), stacklevel=1)


@pytest.mark.skipif(
    not getattr(load_native()[0], "cuda", False), reason="tangentfast._C was built without CUDA"
)
@pytest.mark.parametrize(
    "op", ["merge_", "gram", "layer_norm_jvp", "rms_norm_jvp", "activation_jvp"]
)
def test_cuda_tensors_reach_the_native_op(op: str) -> None:
    assert native_problem(op, torch.device("cuda")) == ""
