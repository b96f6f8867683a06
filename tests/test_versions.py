"""The versions that are said to be supported are those that are tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)


def constraints(name: str, sign: str = "==") -> dict[str, str]:
    text = (ROOT / f"constraints/{name}.txt").read_text()
    return dict(re.findall(rf"^(\S+?){sign}([^\s;]+)", text, re.MULTILINE))


def test_floors_are_what_the_oldest_environment_has() -> None:
    floors = dict(re.findall(r'^ *(?:triton = \[)?"(\w+)>=([\d.]+)"', PYPROJECT, re.MULTILINE))
    oldest = constraints("oldest")
    assert set(floors) == {"torch", "triton", "numpy", "safetensors"}
    for name, floor in floors.items():
        assert oldest[name].removesuffix(".0").startswith(floor)


def test_default_environment_pins_every_dependency() -> None:
    extras = PYPROJECT.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    lists = "".join(re.findall(r"\[([^\]]*)\]", re.sub(r"#.*", "", extras)))
    names = {re.split("[>=]", name)[0] for name in re.findall(r'"([^"]+)"', lists)}
    assert {"pytest", "timm", "nox"} <= names <= set(constraints("default"))


def test_readme_says_them() -> None:
    readme = (ROOT / "README.md").read_text()
    oldest, default = constraints("oldest"), constraints("default")
    newest = dict(re.findall(r"(\w+) (\d[\d.]*\d)", (ROOT / "constraints/newest.txt").read_text()))
    for name, shown in (("torch", "PyTorch"), ("triton", "Triton")):
        row = f"| {shown} | {oldest[name]} | {default[name]} | {newest[name]} |"
        assert row in readme, row
    assert f"| Python | {PYTHONS[0]} | 3.11 | {PYTHONS[-1]} |" in readme
