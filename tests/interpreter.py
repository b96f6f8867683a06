"""Triton's interpreter, for tests: kernels on the CPU, without a GPU.

`run_interpreted` starts a second process, because Triton asks TRITON_INTERPRET when it is imported;
there `imitate_bfloat16` mends what the interpreter lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """Run the tests of `file` that are marked `interpreted`, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parent.parent
    run = subprocess.run(
        command, env=environment, cwd=root, text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def imitate_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as the bits, which its product takes for whole numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
