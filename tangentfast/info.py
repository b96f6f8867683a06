"""What this installation of tangentfast is made of, and what runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import torch

from tangentfast.ops import OPS
from tangentfast.ops.backend import load_native, native_problem, triton_problem


@dataclass(frozen=True)
class Info:
    """The report of `info`; `str()` of it is a table.

    Attributes:
        version: of tangentfast.
        torch: version of torch.
        backend: what CPU tensors run on, ``"native"`` or ``"reference"``.
        cuda_backend: the same for CUDA tensors, ``"native, triton"`` where both have their ops.
        native: ``"present"``, or why the extension is not.
        isa: the instruction set that the CPU kernels use, ``"avx512_bf16"``, ``"avx512"``,
            ``"avx2"`` or ``"baseline"``; empty without the extension.
        cuda: ``"built"``, or why the CUDA kernels are not.
        triton: version of Triton, or why its kernels do not run on CUDA tensors.
        threads: that torch, and so the CPU kernels, use.
        ops: op -> kind of device -> its providers, the default first: name -> empty, or the reason
            why it is not there.
        measured: what was measured in this process, one line for each op and shape class.
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
    ops: dict[str, dict[str, dict[str, str]]]
    measured: tuple[str, ...]

    def __str__(self) -> str:
        """One line for each attribute, and for each op."""
        rows = {
            "tangentfast": self.version,
            "torch": self.torch,
            "backend": f"{self.backend} (CPU), {self.cuda_backend} (CUDA)",
            "native": self.native + (f", {self.isa}" if self.isa else ""),
            "CUDA": self.cuda,
            "triton": self.triton,
            "threads": str(self.threads),
        }
        missing: dict[str, None] = {}  # a reason is said once
        for op, devices in self.ops.items():
            there = []
            for device, providers in devices.items():
                there.append(
                    f"{', '.join(n for n, why in providers.items() if not why)} ({device})"
                )
                for name, why in providers.items():
                    if why:
                        missing[f"no {name.partition(' ')[0]} {op} on {device}: {why}"] = None
            rows[op] = ", ".join(there)
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join([*lines, *missing, *(f"measured: {line}" for line in self.measured)])


def info() -> Info:
    """What is installed and what runs: versions, instruction set, threads; for every op the
    providers there are, with the reason for each that is not; and which were measured fastest.

    Raises:
        ValueError, RuntimeError: TANGENTFAST_BACKEND names a backend that is not there.
    """
    module, why = load_native()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    ops = {
        name: {d.type: {p.name: p.missing(d) for p in op.listed(d)} for d in (cpu, gpu)}
        for name, op in OPS.items()
    }
    on_gpu = {
        name.partition(" ")[0]
        for devices in ops.values()
        for name, reason in devices["cuda"].items()
        if not reason and name != "reference"
    }
    return Info(
        version=metadata.version("tangentfast"),
        torch=torch.__version__,
        backend=OPS["merge_"].provider(cpu, None).backend,  # compiled together: one speaks for all
        cuda_backend=", ".join(sorted(on_gpu)) or "reference",
        native=why or "present",
        isa=module.isa() if module is not None else "",
        cuda=native_problem("merge_", gpu) or "built",
        triton=triton_problem("linear_jvp", gpu) or metadata.version("triton"),
        threads=torch.get_num_threads(),
        ops=ops,
        measured=tuple(line for op in OPS.values() for line in op.choice.lines()),
    )
