"""One evaluation of a network on dual numbers, and which one runs on this thread."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tangentfast import _torch
from tangentfast.handles import Handles


class Anchors:
    """The linearized parameters of one model, and the passes over it that run now.

    Code of the model may run on threads of its own, which find the pass here.
    """

    def __init__(self) -> None:
        self.running: list[Pass] = []

    def __reduce__(self) -> tuple[Any, ...]:  # a copy runs nowhere yet
        return Anchors, ()

    def pass_of_this_thread(self) -> Pass | None:
        """The pass in which a parameter is read now."""
        pass_ = current()
        if pass_ is not None:
            if pass_ is REPLAY:
                return STRICT_REPLAY
            return pass_ if pass_.anchors is self else None
        if len(self.running) > 1:
            raise RuntimeError(
                "a thread reads the parameters of a linearized model that runs on several other "
                "threads; expected to know for which. Call the model itself on that thread."
            )
        return self.running[0] if self.running else None


class Pass:
    """One evaluation of a network on dual numbers: how many tangents, and what users can be told.

    `k`: number of tangents. `root`: the module whose names locate errors. `strict`: nothing
    requires grad but what depends on a tangent, so that a plain tensor with a graph has lost its
    tangent (it came from code that takes a handle for an ordinary tensor). `anchors`: the
    linearized parameters that give duals in this pass. `recording`: their gradient is wanted.
    `casts`: the copies of frozen parameters that autocast works with. `narrow`: tangents' products
    run in bfloat16. `fallbacks`: counts (operation, module path).
    """

    def __init__(
        self,
        k: int,
        root: nn.Module | None = None,
        strict: bool = False,
        anchors: Anchors | None = None,
        recording: bool = False,
        casts: MutableMapping[Tensor, Any] | None = None,
        narrow: bool = False,
    ):
        self.k = k
        self.root = root
        self.strict = strict
        self.anchors = anchors
        self.recording = recording
        self.casts = casts
        self.narrow = narrow
        self.active = False
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.handles = Handles()
        self.graph: set[Any] = set()  # nodes of autograd known to depend on no tangent
        self.read: set[int] = set()  # the parameters that the forward has read, by identity
        self.moving: set[int] = set()  # those that have a tangent, where duals stand for them

    def check_no_transform(self, what: str) -> None:
        """Refuse a torch.func transform inside the pass: it would lose the tangents."""
        if _torch.in_transform():
            raise RuntimeError(
                f"{what} in {self.where()} runs inside a torch.func transform (vmap, grad, ...) "
                "that knows nothing of tangents. Write that part without the transform, or apply "
                "torch.func.jvp to the original function, which composes with it."
            )

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


# A checkpointed block is run again inside backward: the same operations on the primals, without
# tangents, of a pass that was strict or of one that was not.
REPLAY = Pass(0, recording=True)
STRICT_REPLAY = Pass(0, strict=True, recording=True)
_local = threading.local()


def current() -> Pass | None:
    """The pass that runs on this thread; the replay, which has no tangents, inside a backward."""
    running: Pass | None = getattr(_local, "running", None)
    if running is None and _torch.in_backward():
        return REPLAY
    return running


def narrow_tangents() -> bool:
    """Whether the products of tangents run in bfloat16 in the pass of this thread."""
    running: Pass | None = getattr(_local, "running", None)
    return running is not None and running.narrow


def is_narrow(tangent_dtype: torch.dtype | None, what: str) -> bool:
    """`Pass.narrow` for a `tangent_dtype` that a user gave.

    Raises:
        ValueError: there are no such tangents.
    """
    if tangent_dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"{what}: tangent_dtype is {tangent_dtype}, expected torch.bfloat16, or None for "
            "tangents computed as the primal is."
        )
    return tangent_dtype is not None


def check_no_transform() -> None:
    """Refuse a torch.func transform around a pass: it would see the primals alone."""
    if _torch.in_transform() or _torch.in_forward_ad():
        raise RuntimeError(
            "a linearized model or tangentfast.jvp was called inside a torch.func transform or a "
            "forward-mode level, which would not see its tangents. Expected an ordinary call: take "
            "derivatives by inputs with tangentfast.jvp of the original model, and those by τ with "
            "backward; or apply torch.func to the original model."
        )


@contextlib.contextmanager
def running(pass_: Pass) -> Iterator[Pass]:
    """Run `pass_`. Gradient mode is on inside, so that a ``no_grad`` of the model can be seen."""
    if getattr(_local, "running", None) is not None:
        raise RuntimeError(
            "a linearized model or tangentfast.jvp was called inside another one; "
            "expected one pass at a time. Linearize the outer model only."
        )
    siblings = [] if pass_.anchors is None else pass_.anchors.running
    _local.running = pass_
    pass_.active = True
    siblings.append(pass_)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _plain_kernels():
            yield pass_
    finally:
        siblings.remove(pass_)
        pass_.active = False
        _local.running = None


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Modules run as they are written: not compiled, and no fused path around torch's functions."""
    stance: Any = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        stance = torch.compiler.set_stance("force_eager")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with stance:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
