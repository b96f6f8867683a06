"""Until activation, layer_norm and attention are ported to `ops.contract`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tangentfast._torch import in_forward_ad, in_transform
from tangentfast.ops.backend import BACKENDS, load_native, native_problem, triton_problem

__all__ = ["load_native"]


def problem(name: str, op: str, device: torch.device) -> str:
    """Why a backend cannot run `op` on `device`; empty when it can."""
    find = {"native": native_problem, "triton": triton_problem}.get(name)
    return "" if find is None else find(op, device)


def choose(op: str, device: torch.device, name: str | None = None) -> str:
    """The backend of an op for tensors on `device`: ``"native"``, ``"triton"`` or ``"reference"``.

    Args:
        op: its name in `torch.ops.tangentfast`.
        device: where the tensors are.
        name: the backend wanted, or several with commas between, of which the first that has the
            op is taken; None asks TANGENTFAST_BACKEND, and without it takes the best: the
            extension on a CPU; Triton, then the extension on a GPU; the reference where neither is.

    Raises:
        ValueError: `name` or TANGENTFAST_BACKEND is no backend.
        RuntimeError: none of those named is there; the message says why and how to get it.
    """
    source = "backend" if name is not None else "TANGENTFAST_BACKEND"
    wanted = name if name is not None else os.environ.get("TANGENTFAST_BACKEND", "")
    if not wanted:
        order = ("triton", "native") if device.type == "cuda" else ("native",)
        return next((b for b in order if not problem(b, op, device)), "reference")
    names = [part.strip() for part in wanted.split(",")]
    if not set(names) <= set(BACKENDS):
        raise ValueError(f"{source} is {wanted!r}; expected one of {', '.join(BACKENDS)}")
    problems = [problem(b, op, device) for b in names]
    if all(problems):
        raise RuntimeError(f"{source} is {wanted!r}, but {'; '.join(problems)}")
    return names[problems.index("")]


def register_triton(op: str, schema: str, module: str, fake: Callable[..., Any]) -> None:
    """The op ``tangentfast::<op>_triton``: the function `op` of a module that imports Triton, which
    is imported when the op is first called.
    """
    name = f"tangentfast::{op}_triton"

    def call(*args: Any) -> Any:
        return getattr(import_module(module), op)(*args)

    torch.library.define(name, schema)
    torch.library.impl(name, "default", call)
    torch.library.register_fake(name, fake)


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether a native op may take these tensors: no subclass that has rules of its own (DTensor),
    no ``torch.func`` transform and no forward-mode AD, which look inside an op.
    """
    if in_transform() or in_forward_ad():
        return False
    return all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)


def native_dtypes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernels know these types: parameters like x, or float32 beside a 16-bit x."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if not narrow and x.dtype not in (torch.float32, torch.float64):
        return False
    return all(
        p is None or p.dtype == x.dtype or (narrow and p.dtype == torch.float32) for p in parameters
    )


def in_rows(rows: Sequence[Any], dys: list[Tensor]) -> list[Tensor | None]:
    """The tangents of the rows that are not None in their places, and None in the others."""
    if len(dys) == len(rows):
        return list(dys)
    rest = iter(dys)
    return [None if row is None else next(rest) for row in rows]
