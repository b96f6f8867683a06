"""Which backends there are, and which were asked for.

The environment variable TANGENTFAST_BACKEND (``native``, ``triton`` or ``reference``) or an op's
`backend` argument names one, and naming one that is not there raises; by default the best present
is taken. Few ops have a Triton kernel: ``triton,native,reference`` takes the first that has the op.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

import torch

from tangentfast._torch import has_kernel

BACKENDS = ("native", "triton", "reference")


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


@cache
def native_problem(op: str, device: torch.device) -> str:
    """Why the extension cannot run `op` on `device`; empty when it can."""
    module, why = load_native()
    if module is None:
        return why
    if has_kernel(f"tangentfast::{op}", device.type.upper()):
        return ""
    if device.type == "cuda" and not module.cuda:
        return "tangentfast._C was built without CUDA kernels (TANGENTFAST_CUDA in setup.py)"
    return f"tangentfast._C has no {op} for {device.type}"


@cache
def triton_problem(op: str, device: torch.device) -> str:
    """Why Triton cannot run `op` on `device`; empty when it can."""
    if not has_kernel(f"tangentfast::{op}_triton", "CompositeExplicitAutograd"):
        return f"there is no Triton kernel of {op}"
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"Triton runs on CUDA devices, not on {device.type}; choose another backend"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, and torch is built for ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"Triton needs compute capability 8.0 or later, {device} has {capability}"
    return ""


def missing(backend: str, op: str, device: torch.device) -> str:
    """Why a backend cannot run `op` on `device`; empty when it can."""
    find = {"native": native_problem, "triton": triton_problem}.get(backend)
    return "" if find is None else find(op, device)


def wanted(backend: str | None) -> tuple[str, tuple[str, ...]]:
    """Where the wish for a backend comes from, and the names in it; none for the default.

    Raises:
        ValueError: one is the name of no backend.
    """
    if backend is not None:
        return "backend", _names("backend", backend)
    text = os.environ.get("TANGENTFAST_BACKEND", "")
    return "TANGENTFAST_BACKEND", _names("TANGENTFAST_BACKEND", text) if text else ()


@cache
def _names(source: str, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(BACKENDS):
        raise ValueError(f"{source} is {text!r}; expected one of {', '.join(BACKENDS)}")
    return names
