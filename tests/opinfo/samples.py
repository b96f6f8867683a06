"""PyTorch's own operation database as calls: which operations, samples and forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_unflatten

LARGEST = 500  # numbers in all tensors of a sample
LOOKED_AT = 40  # samples that are made and compared in size
Function = Callable[..., Any]


@dataclasses.dataclass
class Sample:
    """A call of one operation as a function of its differentiable tensors alone."""

    op: OpInfo
    leaves: list[Any]
    spec: Any
    output: Function  # picks the outputs that have a derivative

    @property
    def active(self) -> list[int]:
        """Which leaves are differentiable."""
        return [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[i].detach() for i in self.active)

    def function(self, form: Form) -> Function:
        """The call in one form: f(*inputs)."""

        def f(*inputs: Tensor) -> Any:
            # constants are copied: a batch norm moves its statistics
            values = [x.detach().clone() if isinstance(x, Tensor) else x for x in self.leaves]
            for i, x in zip(self.active, inputs, strict=True):
                values[i] = x
            first, args, kwargs = tree_unflatten(values, self.spec)
            torch.manual_seed(0)  # a random function is one function
            # makes a matrix symmetric or triangular where the operation takes it to be
            return self.output(self.op.gradcheck_wrapper(form.call, first, *args, **kwargs))

        return f


@dataclasses.dataclass
class Form:
    """One way to write an operation."""

    name: str
    call: Function

    @property
    def inplace(self) -> bool:
        return self.name.endswith("_")


def forms(op: OpInfo) -> list[Form]:
    """The operation as function, method, operator and in place, under all of its names."""
    found = []
    for prefix, source in [("", op), *((f"{a.name}.", a) for a in op.aliases)]:
        variants = {
            "function": source.op,
            "method": source.method_variant,
            "operator": getattr(source, "operator_variant", None),
            "inplace_": source.inplace_variant,
            "inplace_operator_": getattr(source, "inplace_operator_variant", None),
        }
        for name, call in variants.items():
            if call is not None:
                form = Form(prefix + name, call)
                if form.inplace:
                    form.call = _on_a_clone(call)
                found.append(form)
    return found


def _on_a_clone(call: Function) -> Function:
    return lambda x, *args, **kwargs: call(x.clone(), *args, **kwargs)


def operations(dtype: torch.dtype) -> list[OpInfo]:
    """Every operation with a derivative in `dtype`."""
    return [op for op in op_db if op.supports_autograd and dtype in op.supported_dtypes("cpu")]


def samples(op: OpInfo, dtype: torch.dtype, count: int) -> list[Sample]:
    """The smallest samples of `op`, no two of which differ in their tensors' sizes alone."""
    torch.manual_seed(0)
    made = list(islice(_made(op, dtype), LOOKED_AT))
    kinds: dict[str, tuple[int, Sample]] = {}
    for size, kind, sample in sorted(made, key=lambda m: m[0]):
        kinds.setdefault(kind, (size, sample))
    ordered = sorted(kinds.values(), key=lambda m: m[0])
    return [s for n, (size, s) in enumerate(ordered) if n == 0 or size <= LARGEST][:count]


def _made(op: OpInfo, dtype: torch.dtype) -> Iterator[tuple[int, str, Sample]]:
    for s in op.sample_inputs("cpu", dtype, requires_grad=True):
        leaves, spec = tree_flatten((s.input, tuple(s.args), dict(s.kwargs)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        size = sum(x.numel() for x in tensors)
        if not any(x.requires_grad for x in tensors) or not _filled(tensors):
            continue
        kind = str([f"t{x.dim()}" if isinstance(x, Tensor) else x for x in leaves]) + str(spec)
        yield size, kind, Sample(op, leaves, spec, _output_of(s))


def _filled(tensors: list[Tensor]) -> bool:
    return all(x.numel() for x in tensors if x.requires_grad)


def _output_of(sample: SampleInput) -> Function:
    return sample.output_process_fn_grad or (lambda y: y)


def constants(dtype: torch.dtype) -> list[Sample]:
    """A sample of every operation that torch has no derivative of, all its numbers being inputs."""
    found = []
    for op in op_db:
        if op.supports_autograd or dtype not in op.supported_dtypes("cpu"):
            continue
        if "empty" in op.name or "jiterator" in op.name:
            continue  # means nothing, and needs a GPU
        torch.manual_seed(0)
        for s in islice(op.sample_inputs("cpu", dtype), LOOKED_AT):
            leaves, spec = tree_flatten((s.input, tuple(s.args), dict(s.kwargs)))
            leaves = [_moving(x) for x in leaves]
            sample = Sample(op, leaves, spec, _output_of(s))
            if sample.active and _filled([leaves[i] for i in sample.active]):
                found.append(sample)
                break
    return found


def _moving(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
