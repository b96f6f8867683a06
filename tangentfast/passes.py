"""One evaluation of a network on dual numbers, and which one runs on this thread."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast import inplace


class Pass:
    """One evaluation of a network on dual numbers: how many tangents, and what users can be told.

    `k`: number of tangents. `root`: the module whose names locate errors. `strict`: nothing
    requires grad but what depends on a tangent, so that a plain tensor with a graph has lost its
    tangent (it came from code that takes a handle for an ordinary tensor). `anchors`: linearized
    parameters give duals in this pass. `recording`: their gradient is wanted. `casts`: the copies
    of frozen parameters that autocast works with. `fallbacks`: counts (operation, module path).
    """

    def __init__(
        self,
        k: int,
        root: nn.Module | None = None,
        strict: bool = False,
        anchors: bool = False,
        recording: bool = False,
        casts: MutableMapping[Tensor, Any] | None = None,
    ):
        self.k = k
        self.root = root
        self.strict = strict
        self.anchors = anchors
        self.recording = recording
        self.casts = casts
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.sharers = inplace.Sharers()

    def where(self) -> str:
        """The path of the module whose forward runs now, found on the Python stack."""
        names = {id(m): n for n, m in self.root.named_modules()} if self.root else {}
        frame = sys._getframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if id(owner) in names:
                path = names[id(owner)]
                return f"module {path!r} ({type(owner).__name__})" if path else "the model itself"
            frame = frame.f_back  # type: ignore[assignment]
        return "a function outside any module"


# A checkpointed block is run again inside backward: same operations on the primals, no tangents.
_REPLAY = Pass(0, anchors=True, recording=True)
_local = threading.local()


def current() -> Pass | None:
    """The pass that runs on this thread; the replay, which has no tangents, inside a backward."""
    running: Pass | None = getattr(_local, "running", None)
    if running is None and torch._C._current_graph_task_id() != -1:
        return _REPLAY
    return running


@contextmanager
def running(pass_: Pass) -> Iterator[Pass]:
    """Run `pass_`. Gradient mode is on inside, so that a ``no_grad`` of the model can be seen."""
    if getattr(_local, "running", None) is not None:
        raise RuntimeError(
            "a linearized model or tangentfast.jvp was called inside another one; "
            "expected one pass at a time. Linearize the outer model only."
        )
    _local.running = pass_
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield pass_
    finally:
        _local.running = None
