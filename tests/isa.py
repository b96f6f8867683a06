"""A program run once for each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys


def assert_same_bits(program: str) -> None:
    """Run `program`, which prints the name of its set and a digest, on every set there is."""
    said: dict[str, list[tuple[str, str]]] = {}
    for isa in ("baseline", "avx2", ""):  # the last is the widest that there is
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TANGENTFAST_ISA": isa},
            text=True,
            capture_output=True,
            check=True,
        )
        name, digest = run.stdout.split()
        said.setdefault(digest, []).append((isa, name))
    assert len(said) == 1, said
    assert ("baseline", "baseline") in next(iter(said.values()))
