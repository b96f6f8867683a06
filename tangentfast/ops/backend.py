"""Which implementation an op runs on: the one place that decides.

The environment variable TANGENTFAST_BACKEND (``native`` or ``reference``) or an op's `backend`
argument names one, and naming one that is not there raises; by default the best present is taken.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module, metadata
from types import ModuleType

import torch

BACKENDS = ("native", "reference")


@cache
def load_native() -> tuple[ModuleType | None, str]:
    """The extension `tangentfast._C`, or None and the reason why it is not there."""
    try:
        module = import_module("tangentfast._C")
    except ModuleNotFoundError:
        return None, "tangentfast._C was not built; reinstall with a C++17 compiler and ninja"
    except ImportError as error:  # built against another torch, as a rule
        return None, f"tangentfast._C does not load ({error}); reinstall tangentfast"
    version = metadata.version("tangentfast")
    if module.version != version:
        return None, f"tangentfast._C is of version {module.version}, not {version}; reinstall"
    return module, ""


def native_problem(op: str, device: torch.device) -> str:
    """Why the extension cannot run `op` on `device`; empty when it can."""
    module, why = load_native()
    if module is None:
        return why
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"tangentfast::{op}", device.type.upper()):
        return ""
    if device.type == "cuda" and not module.cuda:
        return "tangentfast._C was built without CUDA kernels (TANGENTFAST_CUDA in setup.py)"
    return f"tangentfast._C has no {op} for {device.type}"


def choose(op: str, device: torch.device, name: str | None = None) -> str:
    """The backend of an op for tensors on `device`: ``"native"`` or ``"reference"``.

    Args:
        op: its name in `torch.ops.tangentfast`.
        device: where the tensors are.
        name: the backend wanted; None asks TANGENTFAST_BACKEND, and without it takes the best.

    Raises:
        ValueError: `name` or TANGENTFAST_BACKEND is no backend.
        RuntimeError: the backend named is not there; the message says why and how to get it.
    """
    source = "backend" if name is not None else "TANGENTFAST_BACKEND"
    wanted = name if name is not None else os.environ.get("TANGENTFAST_BACKEND", "")
    if not wanted:
        return "reference" if native_problem(op, device) else "native"
    if wanted not in BACKENDS:
        raise ValueError(f"{source} is {wanted!r}; expected one of {', '.join(BACKENDS)}")
    if wanted == "native" and (problem := native_problem(op, device)):
        raise RuntimeError(f"{source} is 'native', but {problem}")
    return wanted
