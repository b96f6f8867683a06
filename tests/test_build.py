"""The build: C++ tests by CMake, the one list of sources, layers, and life without a compiler."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tangentfast.info import info
from tangentfast.ops.backend import load_native

ROOT = Path(__file__).parent.parent
SOURCES = [
    line.split()
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_sources_list_is_the_tree() -> None:
    listed = {path for _, path in SOURCES}
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*")}
    assert listed == {p for p in found if p.endswith((".cpp", ".cu"))}
    assert {kind for kind, _ in SOURCES} <= {"kernel", "torch", "cuda", "test"}


def test_kernels_know_no_torch() -> None:
    headers = ["csrc/scalar.h", "csrc/isa.h", *(p for k, p in SOURCES if k in ("kernel", "test"))]
    headers += [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("formula.h")]
    headers += [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("kernel.h")]
    for path in headers:
        text = (ROOT / path).read_text()
        assert not any(word in text for word in ("ATen", "c10/", "torch/", "at::")), path


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
@pytest.mark.skipif(not (shutil.which("c++") or os.environ.get("CXX")), reason="no C++ compiler")
def test_cpp(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path)],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


BELOW_OPS = ("tangentfast._torch", "tangentfast.memory")


def test_ops_know_nothing_of_the_layers_above() -> None:
    for path in (ROOT / "tangentfast/ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                below = name in BELOW_OPS or name.startswith("tangentfast.ops")
                assert below or not name.startswith("tangentfast"), f"{path} imports {name}"


# A package without its extension: the import system says that tangentfast._C is not there.
WITHOUT = """
import sys
sys.modules["tangentfast._C"] = None
import torch
from tangentfast.info import info
from tangentfast.merge import gram, merge_
base = merge_({"a": torch.ones(3)}, {"a": torch.ones(3)}, 0.5)
assert base["a"].tolist() == [1.5] * 3 and gram([base]).item() == 6.75
print(info())
"""


def without(**environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TANGENTFAST_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_extension_the_reference_runs() -> None:
    run = without()
    assert run.returncode == 0, run.stderr
    assert "reference (CPU), reference (CUDA)" in run.stdout
    assert "tangentfast._C was not built; reinstall with a C++17 compiler and ninja" in run.stdout


def test_a_backend_that_is_named_and_missing_raises() -> None:
    run = without(TANGENTFAST_BACKEND="native")
    assert run.returncode != 0
    assert "TANGENTFAST_BACKEND is 'native', but tangentfast._C was not built" in run.stderr


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGENTFAST_BACKEND", "reference")
    report = info()
    assert report.backend == "reference"
    module, why = load_native()
    assert report.native == (why or "present")
    assert report.isa == (module.isa() if module is not None else "")
    lines = str(report).splitlines()
    assert lines[0].split() == ["tangentfast", report.version]
    assert f"reference (CPU), {report.cuda_backend} (CUDA)" in str(report)


def setup_says(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the extension's build into a scratch folder."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_without_a_compiler_the_build_warns_and_goes_on(tmp_path: Path) -> None:
    absent = {"CC": "/absent/cc", "CXX": "/absent/c++", "TANGENTFAST_CUDA": "0"}
    run = setup_says(tmp_path, TANGENTFAST_NATIVE="", **absent)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING: tangentfast will run on its reference backend" in run.stderr
    run = setup_says(tmp_path, TANGENTFAST_NATIVE="1", **absent)
    assert run.returncode != 0
    run = setup_says(tmp_path, TANGENTFAST_NATIVE="0", **absent)
    assert run.returncode == 0
    assert not list((tmp_path).rglob("*.so"))
