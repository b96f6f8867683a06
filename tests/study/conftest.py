"""Fixtures of the study's tests, which need the study's own libraries (the extra `study`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")


@pytest.fixture
def add_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, Any]], None]:
    """Makes a configuration known to open_clip by a name, through a file of its own format.

    The name may be one that open_clip has already; after the test it has its own again.
    """
    factory = pytest.importorskip("open_clip").factory
    # What it knows and where it looks: a search rebuilds the first from the second.
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))

    def add(name: str, configuration: dict[str, Any]) -> None:
        folder = tmp_path / "configurations"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(configuration))
        factory.add_model_config(folder)

    return add
