"""The machine that was measured, in words that name no host, and where its results go.

python benchmarks/machine.py     # prints the path for results of today's commit
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from readings import kind

import tangentfast as tf

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "tangentfast", "open_clip_torch", "timm", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
ALLOCATORS = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF")


def describe() -> dict[str, Any]:
    """Processor, instruction sets, cores, threads, versions, and what steers the allocator.

    `instructions` is what the processor has, `isa` what our kernels use of it.
    """
    flags = _cpuinfo("flags").split()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "vendor": _cpuinfo("vendor_id"),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "isa": tf.info().isa or torch.backends.cpu.get_cpu_capability().lower(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "backend": tf.info().cuda_backend if gpu else tf.info().backend,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "allocator": {
            name: Path(value).name if name == "LD_PRELOAD" else value
            for name, value in os.environ.items()
            if name.startswith(ALLOCATORS)
        },
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine's folder under results/: the GPU's name, or processor, ISA and cores."""
    words = machine["gpu"] or " ".join([machine["cpu"], *kind(machine), f"{machine['cores']}cores"])
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*ghz", "", words.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def commit() -> str:
    """The commit that is measured, "-dirty" where the code differs from it.

    TANGENTFAST_COMMIT names it where there is a copy of the files alone.
    """
    if named := os.environ.get("TANGENTFAST_COMMIT"):
        return named
    measured = ["tangentfast", "csrc", "benchmarks", "setup.py", ":!benchmarks/results"]
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--", *measured) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((li.partition(":")[2].strip() for li in lines if li.startswith(key)), "")


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    path = RESULTS / slug(describe()) / f"{date.today()}-{commit()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(str(path.relative_to(ROOT)) + "\n")
