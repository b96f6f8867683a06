"""What this installation of tangentfast is made of, and what runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import torch

from tangentfast.ops.backend import choose, load_native, native_problem, triton_problem


@dataclass(frozen=True)
class Info:
    """The report of `info`; `str()` of it is a table.

    Attributes:
        version: of tangentfast.
        torch: version of torch.
        backend: what CPU tensors run on, ``"native"`` or ``"reference"``.
        cuda_backend: the same for CUDA tensors, ``"native, triton"`` where both have their ops.
        native: ``"present"``, or why the extension is not.
        isa: the instruction set that the CPU kernels use, ``"avx512"``, ``"avx2"`` or
            ``"baseline"``; empty without the extension.
        cuda: ``"built"``, or why the CUDA kernels are not.
        triton: version of Triton, or why its kernels do not run on CUDA tensors.
        threads: that torch, and so the CPU kernels, use.
    """

    version: str
    torch: str
    backend: str
    cuda_backend: str
    native: str
    isa: str
    cuda: str
    triton: str
    threads: int

    def __str__(self) -> str:
        """One line for each attribute."""
        rows = {
            "tangentfast": self.version,
            "torch": self.torch,
            "backend": f"{self.backend} (CPU), {self.cuda_backend} (CUDA)",
            "native": self.native + (f", {self.isa}" if self.isa else ""),
            "CUDA": self.cuda,
            "triton": self.triton,
            "threads": str(self.threads),
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def info() -> Info:
    """What is installed and what runs: versions, backends, instruction set, threads.

    Raises:
        ValueError, RuntimeError: TANGENTFAST_BACKEND names a backend that is not there.
    """
    module, why = load_native()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    backend = choose("merge_", cpu)  # the ops are compiled together: one speaks for all
    missing = native_problem("merge_", gpu)
    # A backend that is named but not there for CUDA is no reason to say nothing of the rest.
    ops = ("merge_", "attention_jvp")
    there = [op for op in ops if not (native_problem(op, gpu) and triton_problem(op, gpu))]
    found = sorted({choose(op, gpu) for op in there})
    return Info(
        version=metadata.version("tangentfast"),
        torch=torch.__version__,
        backend=backend,
        cuda_backend=", ".join(found) or "reference",
        native=why or "present",
        isa=module.isa() if module is not None else "",
        cuda=missing or "built",
        triton=triton_problem("attention_jvp", gpu) or metadata.version("triton"),
        threads=torch.get_num_threads(),
    )
