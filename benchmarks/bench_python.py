"""What Python adds to each operation of a training step: the step against its own aten operations.

    pytest benchmarks/bench_python.py --benchmark-only

A step of a small network on one image is traced: the operations that it hands to torch below
autograd, ours among them as ``torch.ops.tangentfast``, with their arguments. Replayed one after the
other, below autograd as well, they do the same work on the same memory, and what the step takes
beyond that is modules, rules, duals and autograd. An ordinary step beside it shows what torch's own
modules and autograd take.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import DEVICE, compare
from networks import directions, images, network
from regimes import ORDINARY
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import tangentfast as tf

NAME = "ViT-Ti/16"
OWN = "{}, its own operations"
THREADS = [1] if DEVICE.type == "cuda" else [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
COPIES = {"aten.detach.default": "aten.alias.default"}  # what the tracer writes for a detach
Step = Callable[[], list[Tensor]]


class Count(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls[COPIES.get(name, name)] += 1
        return func(*args, **kwargs or {})


def training_step(model: Callable[[Tensor], Tensor], trained: list[Tensor], x: Tensor) -> Step:
    """Forward, a loss and backward; the output and the gradients."""

    def step() -> list[Tensor]:
        out = model(x)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), trained)]

    return step


def own_operations(step: Step) -> tuple[Step, int]:
    """The same work without the Python that asks for it, and how many operations it is.

    The tracer leaves out what has no effect on the results; that there is no such operation, or any
    other difference, is checked by counting them in a step.
    """
    expected = step()  # the library has chosen its ways; under a tracer it would not measure
    with Count() as count:
        step()
    traced: GraphModule = make_fx(step, tracing_mode="real")()
    names = (str(n.target) for n in traced.graph.nodes if n.op == "call_function")
    operations = Counter(n for n in names if n.startswith(("aten.", "tangentfast.")))
    assert operations == count.calls, operations - count.calls | count.calls - operations

    def replay() -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            results: list[Tensor] = traced()
        return results

    for result, exact in zip(replay(), expected, strict=True):
        assert torch.equal(result, exact)
    return replay, operations.total()


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_python(threads: int, benchmark: Any) -> None:
    """One training step on one image."""
    model: nn.Module = network(NAME)
    x, linear = images(1), tf.linearize(model, at=directions(model, 1)[0])
    steps = {
        "tangentfast": training_step(linear, list(linear.parameters()), x),
        ORDINARY: training_step(model, list(model.parameters()), x),
    }
    variants: dict[str, Step] = {}
    operations: dict[str, int] = {}
    for name, step in steps.items():
        variants[name] = step
        variants[OWN.format(name)], operations[name] = own_operations(step)

    def check(results: dict[str, Any]) -> None:
        for name in steps:
            for result, exact in zip(results[OWN.format(name)], results[name], strict=True):
                assert torch.equal(result, exact)

    compare(
        benchmark,
        variants,
        check,
        against=OWN.format("tangentfast"),
        seconds=9.0,
        rounds=25,
        model=NAME,
        threads=threads,
        operations=operations,
    )
