"""The log of one fine-tuning: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from .files import write_text

__all__ = ["Log"]


class Log:
    """One line a step, appended to `path`; TensorBoard's files go into a folder of its stem.

    Args:
        path: a ``.jsonl`` file.
        done: steps that are behind us: lines of later ones, and a last one that is cut off, are
            dropped, because those steps are taken again.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        write_text(path, "".join(_lines(path, done)))
        self.file = path.open("a", encoding="utf-8")
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.with_suffix("")), purge_step=done + 1)  # type: ignore[no-untyped-call, unused-ignore]

    def write(self, step: int, **values: float) -> None:
        """Append what step `step`, counted from 1, gave."""
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Nothing is written after this."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def _lines(path: Path, done: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(True) if done and path.exists() else []
    taken = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= done:
                taken.append(line)
    return taken
