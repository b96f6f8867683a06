"""tangentfast.study.cache: equal contents have one key, others do not; damage is computed again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standins
import torch

from tangentfast.study.cache import Cache, digest
from tangentfast.study.files import replacing, write_json


@dataclass
class Point:
    x: int
    y: int


DIFFERENT: list[tuple[Any, ...]] = [
    (), (None,), (0,), (0.0,), (False,), ("0",), ("",), ("a", "b"), ("ab",), (["a", "b"],),
    (["ab"],),
    ([["a"], "b"],), ([["a", "b"]],), ({"a": 1},), ({"a": 2},), ({"b": 1},), (Point(1, 2),),
    (Point(2, 1),), ({"x": 1, "y": 2},), (torch.tensor([1.0, 2.0]),), (torch.tensor([[1.0, 2.0]]),),
    (torch.tensor([1, 2]),), (torch.tensor([1.0, 2.0], dtype=torch.float64),),
    (torch.tensor([1.0, 2.0], dtype=torch.bfloat16),), (torch.tensor([2.0, 1.0]),), ([1.0, 2.0],),
    (np.array([1.0, 2.0], dtype=np.float32),), (torch.empty(0),), (torch.empty(0, 3),),
    (torch.nn.ReLU(),), (torch.nn.GELU(),),
]  # fmt: skip


def test_different_contents_have_different_keys() -> None:
    keys = [digest(*values) for values in DIFFERENT]
    assert len(set(keys)) == len(keys)


def test_equal_contents_have_one_key() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    x = torch.arange(12.0).view(3, 4)
    assert digest(x.T) == digest(x.T.contiguous())
    assert digest((1, 2)) == digest([1, 2])
    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert digest(one) != digest(two)
    two.load_state_dict(one.state_dict())
    assert digest(one) == digest(two)


def test_the_package_version_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(1)
    monkeypatch.setattr("tangentfast.study.cache.metadata.version", lambda name: "99")
    assert digest(1) != before


def test_what_has_no_known_content_is_refused() -> None:
    with pytest.raises(TypeError, match=r"digest: expected numbers, .* got object"):
        digest([object()])


def test_a_value_is_computed_once_and_as_json_has_it(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path / "cache"), []

    def compute() -> Any:
        calls.append(0)
        return {1: (0.1, 1e-17), "b": None}

    first = cache.get("k", compute)
    assert first == {"1": [0.1, 1e-17], "b": None}
    assert Cache(tmp_path / "cache").get("k", compute) == first
    assert cache.get("l", compute) == first
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": "k"}', "other", "value"])
def test_damage_is_computed_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.get("k", lambda: 1)
    entry = json.loads((tmp_path / "k.json").read_text())
    changed = {"other": entry | {"key": "l"}, "value": entry | {"value": 2}}
    text = json.dumps(changed[damage]) if damage in changed else damage
    (tmp_path / "k.json").write_text(text)
    assert cache.get("k", lambda: 3) == 3
    assert cache.get("k", lambda: 4) == 3


def test_an_error_or_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)

    with pytest.raises(ZeroDivisionError):
        Cache(tmp_path).get("k", lambda: 1 / 0)
    with standins.largest_file(10):
        with pytest.raises(OSError, match="large"):
            write_json(tmp_path / "a.json", [2] * 10)
        with pytest.raises(OSError, match="large"):
            Cache(tmp_path).get("k", lambda: 1)
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_replacing_keeps_the_old_file_when_interrupted(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def interrupted() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_text() == "old"
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
