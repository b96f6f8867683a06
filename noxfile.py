"""The suite against the versions that are supported, each in an environment of its own.

`nox` runs oldest, triton and newest; `nox -s python` the versions between. CI runs the first two.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["oldest", "triton", "newest"]
nox.options.reuse_venv = "yes"
EXTRAS = "models,study,bench,test"
BUILD = ["setuptools>=77", "wheel", "ninja", "pybind11"]


def python(version: str) -> str | None:
    """That Python where it starts (a shim may not), else the one that runs nox."""
    path = shutil.which(f"python{version}")
    starts = path and not subprocess.run([path, "-V"], capture_output=True, check=False).returncode
    return version if starts else None


def suite(session: nox.Session, constraints: str, extras: str) -> None:
    """Install under constraints/<constraints>.txt, build, and run what `make test` runs.

    In a copy of this folder, since the extension is built in place, against the session's torch.
    """
    copy = Path(session.create_tmp()).resolve() / "tangentfast"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".?*", "build", "*.so", "*.egg-info"))
    session.chdir(copy)
    # In place of a constraint of this machine's own, so that the versions are the project's.
    environment = {"PIP_CONSTRAINT": f"constraints/{constraints}.txt", "TANGENTFAST_CUDA": "0"}
    session.env.update(environment, TANGENTFAST_NATIVE="1")
    session.install("torch", "numpy", *BUILD)
    session.install("--no-build-isolation", "-e", f".[{extras}]")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["-m", "not slow"]))


@nox.session(python=python("3.10"))
def oldest(session: nox.Session) -> None:
    """The oldest Python and torch, without the libraries that only some features need."""
    suite(session, "oldest", "test")


@nox.session(python=python("3.13"))
def newest(session: nox.Session) -> None:
    """The newest of everything."""
    suite(session, "newest", EXTRAS)


@nox.session(name="python", python=["3.11", "3.12"])
def between(session: nox.Session) -> None:
    """The default versions on the Pythons between."""
    suite(session, "default", EXTRAS)


@nox.session(venv_backend="none")
def triton(session: nox.Session) -> None:
    """The oldest Triton compiles the kernels, beside the torch that runs nox."""
    folder = Path(session.create_tmp()).resolve() / "triton"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
    oldest = {"PIP_CONSTRAINT": "constraints/oldest.txt"}
    session.run(sys.executable, *pip, "triton", env=oldest)
    beside = {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    # Its interpreter wants an older numpy than the default: `oldest`, where this Triton comes with
    # torch, has one and runs the kernels.
    tests = "tests/ops/test_triton_compiled.py"
    session.run(sys.executable, "-m", "pytest", "-q", tests, env=beside)


# What computes: every rule, op and pass, with small networks and two whole models.
FILES = ("rules", "dual", "jvp", "linearize", "writes", "state", "merge", "gram", "task_vector")
NUMERICAL = [
    "tests/ops",
    *(f"tests/test_{name}.py" for name in FILES),
    "tests/test_models.py::test_float32",
    "tests/test_models.py::test_bfloat16",
]
# Each of the four that choose loops by the CPU is told of a narrower one: torch, oneDNN and MKL
# below it, and tangentfast._C.
CHOOSERS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "TANGENTFAST_ISA"
)  # fmt: skip
NARROW = [("default", "SSE41", "SSE4_2", "baseline")]
AVX2 = ("avx2", "AVX2", "AVX2", "avx2")


@nox.session(venv_backend="none")
def isa(session: nox.Session) -> None:
    """The numerical tests on every instruction set of this CPU but the widest."""
    cpu = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    for names in NARROW + [AVX2] * (" avx512f" in cpu):
        command = ["-m", "pytest", "-q", "-m", "not slow", *NUMERICAL]
        session.run(sys.executable, *command, env=dict(zip(CHOOSERS, names, strict=True)))
