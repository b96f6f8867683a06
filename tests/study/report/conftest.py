"""The report's tests need what draws and writes it; a full synthetic report is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for extra in ("matplotlib", "jinja2", "pydantic", "rich"):
    pytest.importorskip(extra)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run folder with its report, and the files that `write` says it wrote."""
    from synthetic_results import results

    from tangentfast.study.report import write

    run = tmp_path_factory.mktemp("runs") / "synthetic"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results()))
    return run, write(run)
