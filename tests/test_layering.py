"""The arrows of the package point one way, files stay short, and the public names are these."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tangentfast

PACKAGE = Path(tangentfast.__file__).parent
# A module may import from its own layer and from those after it.
LAYERS = [
    ["study", "cli"],
    ["jvp", "info"],
    ["substitute", "linearize"],
    ["hooks", "leftovers", "anchor", "select", "task_vector"],
    ["dispatch", "merge", "vector_file", "checkpoints"],
    ["arguments", "inplace", "fallback", "fingerprint", "targets", "coefficients"],
    ["rules"],
    ["dual"],
    ["passes"],
    ["handles", "graph", "trees", "files"],
    ["ops"],
    ["memory", "names", "interrupts"],
    ["_torch"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[tuple[str, Path]]:
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]
    return [(f.relative_to(PACKAGE).with_suffix("").parts[0], f) for f in files]


def imported(file: Path) -> set[str]:
    layers = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("tangentfast")
        ):
            parts = node.module.split(".")
            layers |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            layers |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("tangentfast.")
            }
    return layers


def test_arrows_point_one_way() -> None:
    for layer, file in modules():
        assert layer in RANK, f"{file} is in no layer"
        if layer == "study":
            continue  # uses the public interface
        for other in imported(file) - {layer, "__version__", "_C"}:
            assert RANK[other] >= RANK[layer], f"{file.name} imports {other}, a layer above it"
    library = [file for layer, file in modules() if layer not in ("study", "cli")]
    assert not {"study", "cli"} & {other for file in library for other in imported(file)}


def test_core_imports_none_of_the_extras() -> None:
    code = (
        "import sys, tangentfast; extras = "  # triton comes with torch.compiler
        "{'open_clip', 'timm', 'transformers', 'torchvision', "
        "'sklearn', 'matplotlib', 'rich', 'onnx', "
        "'typer', 'pydantic', 'jinja2', 'datasets', 'scipy', "
        "'pytest'}; print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert tangentfast.__all__ == [
        "LinearizedModel", "TaskVector", "gram", "info", "jvp", "linearize", "merge_", "train_only",
    ]  # fmt: skip
    assert all(getattr(tangentfast, name).__doc__ for name in tangentfast.__all__)


def test_files_are_short() -> None:
    long = {str(f): n for _, f in modules() if (n := len(f.read_text().splitlines())) > 420}
    assert not long
