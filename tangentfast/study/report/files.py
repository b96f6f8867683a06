"""Files that are all written, or none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..files import replacing

__all__ = ["publish"]


def publish(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` (path under `folder` -> content); what was there stays until all are on disk.

    They appear in the order given, the page that shows the others last, and are returned with it
    first.

    Raises:
        OSError: They could not be written, and then none of them was.
    """
    contents = {folder / name: content for name, content in reversed(list(files.items()))}
    with ExitStack() as last_first:
        for path, content in contents.items():
            file = last_first.enter_context(replacing(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk is an error now, and not of the last file
    return list(contents)
