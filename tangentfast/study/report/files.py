"""Files that are all written, or none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["publish"]


def publish(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` (path under `folder` -> content); what was there stays until all are on disk.

    They appear in the order given, the page that shows the others last, and are returned with it
    first.

    Raises:
        OSError: They could not be written, and then none of them was.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            written.append((partial, path))
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for partial, _ in written:
            partial.unlink(missing_ok=True)
        raise
    for partial, path in written:
        os.replace(partial, path)
    return [path for _, path in reversed(written)]
