"""PyTorch's own module database: along parameters and along inputs, in both modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from derivatives import close, derivative, directions, distance, numbers
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db

import tangentfast

pytestmark = pytest.mark.filterwarnings("ignore")
LARGEST = 20_000  # numbers that move
STATISTICS = {"BatchNorm": "train-mode batch norm", "InstanceNorm": "updates running statistics"}


class Use(NamedTuple):
    """A module, its arguments, and which of these are differentiable."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    active: list[int]

    def at(self, *inputs: Tensor, **parameters: Tensor) -> Any:
        args = list(self.args)
        for i, x in zip(self.active, inputs, strict=False):
            args[i] = x
        torch.manual_seed(0)
        return torch.func.functional_call(
            copy.deepcopy(self.module), parameters, tuple(args), self.kwargs
        )


def uses(info: ModuleInfo, training: bool) -> Iterator[Use]:
    torch.manual_seed(0)
    made = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    for given in islice(made, 12):
        if given.forward_input is None:
            continue
        args = given.forward_input.args
        active = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        made_by = given.constructor_input
        module = info.module_cls(*made_by.args, **made_by.kwargs).double().train(training)
        module(*plain, **given.forward_input.kwargs)  # lazy modules make their parameters
        yield Use(module, plain, given.forward_input.kwargs, active)


def check(use: Use, along_parameters: bool, refusal: str | None) -> None:
    named = {n: p.detach() for n, p in use.module.named_parameters()}
    moving = list(named.values()) if along_parameters else [use.args[i] for i in use.active]
    if not moving or sum(x.numel() for x in moving) > LARGEST:
        return

    def f(*xs: Tensor) -> Any:
        if along_parameters:
            return use.at(*(use.args[i] for i in use.active), **dict(zip(named, xs, strict=True)))
        return use.at(*xs, **named)

    y, vs = numbers(f(*moving)), directions(moving)
    dy, tolerance = derivative(f, moving, vs)
    if not all(bool(t.isfinite().all()) for t in dy):
        return  # roots and logarithms of negative numbers
    if along_parameters:
        given: dict[str, Any] = {"params": dict(zip(named, vs, strict=True))}
    else:
        along = dict(zip(use.active, vs, strict=True))
        given = {"tangents": tuple(along.get(i) for i in range(len(use.args)))}
    for recording in (True, False):
        module = copy.deepcopy(use.module)
        torch.manual_seed(0)
        try:
            with torch.set_grad_enabled(recording):
                got, dgot = tangentfast.jvp(module, use.args, kwargs=use.kwargs, **given)
        except RuntimeError as error:
            if refusal is None or refusal not in str(error):
                raise
            continue
        assert distance(numbers(got), y) <= close(y)
        assert distance(numbers(dgot), dy) <= tolerance


@pytest.mark.parametrize("along", ["parameters", "inputs"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.formatted_name)
def test_module(info: ModuleInfo, mode: str, along: str) -> None:
    """Value and tangent are torch's; a norm that moves its statistics is refused."""
    refusal = next((r for kind, r in STATISTICS.items() if kind in info.name), None)
    for use in uses(info, mode == "train"):
        check(use, along == "parameters", refusal if mode == "train" else None)
