"""Builds the native extension `tangentfast._C`; everything else is said in pyproject.toml.

Environment:
    TANGENTFAST_NATIVE  0: build no extension; 1: fail when it cannot be built. Default: build it,
                        and install without it, with a warning, when that fails.
    TANGENTFAST_CUDA    0: CPU only; 1: with CUDA, fail without a toolkit. Default: with CUDA when
                        torch has CUDA, a toolkit is found, and csrc/sources.txt lists CUDA sources.
                        A visible GPU never decides.
    MAX_JOBS            compilers run at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
NATIVE = os.environ.get("TANGENTFAST_NATIVE", "")
VERSION = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[0]


def sources(*kinds: str) -> list[str]:
    """Paths of the given kinds in csrc/sources.txt."""
    lines = (line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines())
    return [words[1] for words in lines if words and words[0] in kinds]


def toolkit() -> str | None:
    """Root of the CUDA toolkit: CUDA_HOME or CUDA_PATH, else what nvcc itself reports.

    torch takes the folder above nvcc's, which is wrong when nvcc on the PATH is a wrapper script.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not named:
        command = ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        except OSError:
            said = ""
        top = re.search(r"^#\$ _?TOP_?=(.+)$", said, re.M)
        named = os.path.realpath(top[1].strip()) if top else None
    if named:
        os.environ["CUDA_HOME"] = named
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return home if home and Path(home, "include", "cuda_runtime.h").exists() else None


def release(toolkit: str) -> str:
    """The major version of the toolkit in that folder."""
    command = [str(Path(toolkit, "bin", "nvcc")), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)", said)
    return found[1] if found else "unknown"


def with_cuda() -> bool:
    """Whether the CUDA sources join the build; raises when TANGENTFAST_CUDA=1 cannot be met."""
    import torch

    wanted = os.environ.get("TANGENTFAST_CUDA", "")
    if wanted == "0":
        return False
    problem = (
        "csrc/sources.txt lists no CUDA source"
        if not sources("cuda")
        else "this torch has no CUDA"
        if torch.version.cuda is None
        else "no CUDA toolkit was found (set CUDA_HOME)"
        if (home := toolkit()) is None
        else f"torch has CUDA {torch.version.cuda}, and the toolkit in {home} is {release(home)}"
        if release(home) != torch.version.cuda.partition(".")[0]
        else None
    )
    if problem and wanted == "1":
        raise RuntimeError(f"TANGENTFAST_CUDA=1, but {problem}")
    return problem is None


def extension() -> dict[str, object]:
    """Arguments of setup() for the extension."""
    cuda = with_cuda()  # first: it may set CUDA_HOME, which cpp_extension reads once
    from torch.utils import cpp_extension

    msvc = sys.platform == "win32"
    # No -march: kernels choose their instruction set at run time. No contraction to fused
    # multiply-adds: all instruction sets give the same bits. No -lgomp: the symbols come from the
    # OpenMP runtime that torch has loaded, so there is one thread pool.
    flags = ["/O2", "/openmp"] if msvc else ["-O3", "-g0", "-ffp-contract=off"]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    compile_args = {"cxx": flags}
    macros: list[tuple[str, str | None]] = [("TANGENTFAST_VERSION", f'"{VERSION}"')]
    if cuda:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        compile_args["nvcc"] = ["-O3", "-lineinfo", "-fmad=false"]  # rounds as the CPU does
        macros.append(("TANGENTFAST_WITH_CUDA", None))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = make(
        "tangentfast._C",
        sources("kernel", "torch", *(["cuda"] if cuda else [])),
        define_macros=macros,
        extra_compile_args=compile_args,
    )
    module.optional = NATIVE != "1"

    class Build(cpp_extension.BuildExtension):
        """torch's build, whose failure is a warning as long as the extension is optional."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if not module.optional:
                    raise
                warn(error)

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def warn(error: Exception) -> None:
    """Say that the package will be without its extension, and how to get it."""
    print(
        f"\nWARNING: tangentfast._C was not built: {error}\n"
        "WARNING: tangentfast will run on its reference backend (plain torch, slower).\n"
        "WARNING: install a C++17 compiler and ninja and reinstall; TANGENTFAST_NATIVE=1 makes "
        "this an error.\n",
        file=sys.stderr,
    )


def build() -> dict[str, object]:
    """Arguments of setup(): none when no extension is wanted or can be configured."""
    if NATIVE == "0":
        return {}
    try:
        return extension()
    except Exception as error:  # no torch, no toolkit: as optional as a failing compiler
        if NATIVE == "1" or os.environ.get("TANGENTFAST_CUDA") == "1":
            raise
        warn(error)
        return {}


setup(**build())
