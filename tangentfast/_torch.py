"""Every private name of torch that the package relies on, and why.

tests/test_torch.py has a test for each, which says what broke when torch moved.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Gradient mode without the object that torch.no_grad makes: it is switched for every tangent.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled

# Whether forward-mode derivatives are on: custom autograd.Functions switch them off, no_grad does
# not.
forward_grad_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled

# Whether a torch.func transform (grad, jvp, vmap, ...) is running on this thread.
in_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active


def has_kernel(op: str, key: str) -> bool:
    """Whether an op, defined or not, has a kernel for a key of the dispatcher: ``"aten::relu"``,
    ``"CPU"``.
    """
    dispatch = torch._C
    return dispatch._dispatch_has_kernel(op) and dispatch._dispatch_has_kernel_for_dispatch_key(
        op, key
    )


def in_backward() -> bool:
    """Whether this thread runs a backward: a checkpointed block is then run again."""
    return torch._C._current_graph_task_id() != -1


def in_forward_ad() -> bool:
    """Whether a ``torch.autograd.forward_ad.dual_level`` is open."""
    return torch.autograd.forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode (a tracer, a counter of FLOPs) sees what runs."""
    return torch._C._len_torch_dispatch_stack() > 0


def process_group_store() -> Any:
    """The key-value store that the ranks of a distributed run share; None for a rank alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()


# (cls, tensor, requires_grad): the tensor as a leaf of class `cls` on the same memory, without its
# graph.
subclassed: Callable[[type, Tensor, bool], Any] = Tensor._make_subclass


def storage_uses(tensor: Tensor) -> int:
    """How many tensors and storage objects hold the memory of `tensor`, the one made here too."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


def version(tensor: Tensor) -> int:
    """The counter of writes in place to the memory of `tensor` (0 where torch keeps none)."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor
        return 0


def base(tensor: Tensor) -> Tensor:
    """The tensor whose memory `tensor` is a view of; itself if it is no view."""
    viewed = tensor._base
    return tensor if viewed is None else viewed


def own_body(function: Any) -> Callable[..., Any]:
    """A Python function of torch, run on dual numbers as it stands.

    Its first lines hand tensor subclasses back to the dispatcher; here they must not, once, so the
    name they ask is bound to "no" for this body. What it calls is dispatched as ever.
    """
    if "has_torch_function" not in function.__code__.co_names:
        raise ImportError(
            f"{function.__name__} of torch {torch.__version__} does not ask has_torch_function; "
            "expected it to. This version of torch is not supported yet."
        )
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


multi_head_attention_forward = own_body(F.multi_head_attention_forward)

# autograd.Functions of torch's own hooks whose forward is the identity on its tensors: they mark
# where a backward begins or ends. Module and class.
_IDENTITIES = (
    ("torch.nn.modules._functions", "BackwardHookFunction"),  # register_full_backward_hook
    ("torch.nn.parallel.distributed", "_DDPSink"),  # static_graph, find_unused_parameters
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "RegisterPostBackwardFunction"),
)


def identity_functions() -> Iterator[Any]:
    """Those of the identities whose module is loaded: without it nothing can call them."""
    for module, name in _IDENTITIES:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            yield function


def ddp_module() -> Any:
    """Where DDP looks for the graph of its outputs, by `_find_tensors`; None while it is unused."""
    return sys.modules.get("torch.nn.parallel.distributed")


def compiled_by_jit(function: Any) -> bool:
    """Whether `function` is code that torch.jit compiled, which changes from call to call."""
    return isinstance(function, (torch.jit.ScriptFunction, torch._C.ScriptMethod))


def compiled_original(module: Any) -> Any:
    """What ``torch.compile(module)`` was made of; `module` itself where it was not."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    return module
