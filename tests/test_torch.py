"""The private names of torch that the package relies on do what `tangentfast._torch` says.

When torch moves one of these fails, and says which; the package must then refuse, not go on.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import tangentfast
from tangentfast import _torch

PACKAGE = Path(tangentfast.__file__).parent


class Sub(Tensor):
    pass


def test_nothing_else_touches_private_names() -> None:
    """Beside the namespaces of functions that rules and ops register for."""
    allowed = ("_C._nn", "_C.TensorBase")
    found = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name == "_torch.py" or "study" in file.parts:
            continue
        for name in re.findall(r"torch\.(_C[.\w]*)", ast.unparse(ast.parse(file.read_text()))):
            if not any(name.startswith(a) for a in allowed):
                found.add((file.name, name))
    assert not found


def test_gradient_modes() -> None:
    _torch.set_grad_enabled(False)
    off = torch.is_grad_enabled()
    _torch.set_grad_enabled(True)
    assert (off, torch.is_grad_enabled()) == (False, True)
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            seen.append(_torch.forward_grad_enabled())
            return x * 1

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad

    Asks.apply(torch.ones(1, requires_grad=True))
    with torch.no_grad():
        seen.append(_torch.forward_grad_enabled())
    assert seen == [False, True]


def test_transforms() -> None:
    seen = [_torch.in_transform()]

    def f(x: Tensor) -> Tensor:
        seen.append(_torch.in_transform())
        return x.sum()

    for transform in (torch.func.grad(f), torch.vmap(f), torch.func.jacrev(f)):
        transform(torch.ones(2, 2))
    torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),))
    assert seen == [False, True, True, True, True]
    assert not _torch.in_transform()
    assert not _torch.in_forward_ad()
    with forward_ad.dual_level():
        assert _torch.in_forward_ad()


def test_has_kernel() -> None:
    assert _torch.has_kernel("aten::relu", "CPU")
    assert not _torch.has_kernel("aten::relu", "FPGA")
    assert not _torch.has_kernel("tangentfast::never_defined", "CPU")


def test_in_dispatch_mode() -> None:
    class Mode(TorchDispatchMode):
        pass

    assert not _torch.in_dispatch_mode()
    with Mode():
        assert _torch.in_dispatch_mode()


def test_process_group_store(tmp_path: Path) -> None:
    """Of several ranks: tests/ops/test_choice.py."""
    assert _torch.process_group_store() is None
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert _torch.process_group_store() is None
    finally:
        torch.distributed.destroy_process_group()


def test_in_backward() -> None:
    seen = [_torch.in_backward()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: seen.append(_torch.in_backward()))
    (x * 2).sum().backward()
    assert [*seen, _torch.in_backward()] == [False, True, False]


def test_a_subclass_is_a_leaf_on_the_same_memory() -> None:
    x = torch.randn(3, requires_grad=True) * 2
    y = _torch.subclassed(Sub, x, True)
    assert type(y) is Sub
    assert y.data_ptr() == x.data_ptr()
    assert y.is_leaf
    assert y.requires_grad
    assert not _torch.subclassed(Sub, x, False).requires_grad


def test_storage_uses() -> None:
    x = torch.zeros(4)
    alone = _torch.storage_uses(x)
    view = x[:2]
    assert _torch.storage_uses(x) == alone + 1
    del view
    assert _torch.storage_uses(x) == alone == 2


def test_versions_and_bases() -> None:
    x = torch.zeros(4)
    before = _torch.version(x)
    x[1:].add_(1)
    x.detach().mul_(2)
    assert _torch.version(x) == before + 2
    assert _torch.base(x[1:][:1]) is x
    assert _torch.base(x) is x
    with torch.inference_mode():
        inferred = torch.zeros(1)
    assert _torch.version(inferred) == 0


def test_swapped_tensors() -> None:
    plain, other = torch.zeros(2), torch.ones(2).as_subclass(Sub)
    torch.utils.swap_tensors(plain, other)
    assert (type(plain), type(other)) == (Sub, Tensor)
    assert plain.sum() == 2


def test_own_body() -> None:
    """It never asks for a torch function again, and computes what it did."""
    net = nn.MultiheadAttention(4, 2, batch_first=False)
    x = torch.randn(3, 2, 4)
    args = (x, x, x, 4, 2, net.in_proj_weight, net.in_proj_bias, None, None, False, 0.0,
            net.out_proj.weight, net.out_proj.bias)  # fmt: skip
    want = F.multi_head_attention_forward(*args)
    torch.testing.assert_close(_torch.multi_head_attention_forward(*args), want)
    with pytest.raises(ImportError, match="not supported yet"):
        _torch.own_body(lambda x: x)


def test_identities_are_identities() -> None:
    """The autograd.Functions that duals are carried through return their tensors as they came."""
    import torch.distributed.fsdp

    found = list(_torch.identity_functions())
    assert len(found) == len(_torch._IDENTITIES)
    for function in found:
        xs = (torch.randn(2, requires_grad=True), torch.randn(3))
        state: Any = {
            "BackwardHookFunction": (),
            "_DDPSink": (lambda: types.SimpleNamespace(_ddp_sink_clone=True),),
            "RegisterPostBackwardFunction": (None,),
        }[function.__name__]

        class Context:
            needs_input_grad = (True,) * 4

            def __getattr__(self, name: str) -> Any:
                return lambda *_: None

        old = "ctx" in inspect.signature(function.forward).parameters
        ys = function.forward(*([Context()] if old else []), *state, *xs)
        assert all(torch.equal(a, b) for a, b in zip(xs, ys, strict=True))


def test_ddp_finds_the_tensors_of_its_outputs() -> None:
    x = torch.ones(2)
    assert list(_torch.ddp_module()._find_tensors({"a": [x], "b": 1})) == [x]


def test_compiled_original() -> None:
    net = nn.Linear(2, 2)
    assert _torch.compiled_original(net) is net
    assert _torch.compiled_original(torch.compile(net)) is net


def test_kinds_of_compiled_functions() -> None:
    """How the fallback tells code that torch.jit compiled."""
    script = torch.jit.script(nn.Linear(2, 2))
    assert _torch.compiled_by_jit(script.forward)
    assert not _torch.compiled_by_jit(torch.tanh)
