"""One call of a function as data: what `cases` is written in.

``R(3, 4)`` stands for a random float tensor that may carry a tangent, ``Z(3, 4)`` for a complex
one; every other value, tensors included, is a constant of the call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

inf = float("inf")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class R:
    """A random tensor of a shape: normal, or within [low, high], or of few whole numbers (ties)."""

    def __init__(self, *shape: int, low: float = 0, high: float = 0, ties: bool = False):
        self.shape, self.low, self.high, self.ties = shape, low, high, ties

    def build(self, generator: torch.Generator, dtype: torch.dtype, strided: bool) -> Tensor:
        if self.ties:
            x = torch.randint(-1, 2, self.shape, generator=generator).double()
        elif self.low == self.high:
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        else:
            x = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            x = self.low + (self.high - self.low) * x
        x = self.cast(x, dtype, generator)
        if not strided or x.dim() == 0:
            return x
        # neither contiguous nor at the start of its memory
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1, 2), float("nan"))
        wide[..., 1:, 1] = x
        return wide[..., 1:, 1]

    def cast(self, x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return x.to(dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


class Z(R):
    """The same with a random imaginary part."""

    def cast(self, x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        y = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return torch.complex(x.double(), y).to(dtype.to_complex())


@dataclasses.dataclass
class Case:
    """One call. `on`: only the functions found in this room (torch, Tensor, F)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on: Any = None
    strided: bool = True  # may its tensors be non-contiguous
    adjoint: bool = True  # is torch's backward the adjoint of its JVP
    cuda: bool = False
    dtype: torch.dtype = torch.float64  # the widest that torch computes it in
    since: str = "2.10"  # in older torch its JVP and its backward differ, or one of them fails

    def build(self, dtype: torch.dtype, strided: bool = False) -> tuple[Call, list[int]]:
        """The call's (args, kwargs), and which of its leaves may have a tangent."""
        generator = torch.Generator().manual_seed(1)
        leaves, spec = tree_flatten((self.args, self.kwargs))
        active = [i for i, x in enumerate(leaves) if isinstance(x, R)]
        built = [x.build(generator, dtype, strided) if isinstance(x, R) else x for x in leaves]
        return tree_unflatten(built, spec), active

    @property
    def complex(self) -> bool:
        return any(isinstance(x, Z) for x in tree_flatten((self.args, self.kwargs))[0])

    def applies(self, function: Any) -> bool:
        return self.on is None or getattr(self.on, function.__name__, None) is function

    def __repr__(self) -> str:
        def short(x: Any) -> str:
            if isinstance(x, (tuple, list)):
                return "[" + ",".join(map(short, x)) + "]"
            if isinstance(x, Tensor):
                return "t" + "x".join(map(str, x.shape))
            if not isinstance(x, R):
                return str(x)
            return ("z" if isinstance(x, Z) else "") + ("x".join(map(str, x.shape)) or "0d")

        parts = [short(a) for a in self.args] + [f"{n}={short(v)}" for n, v in self.kwargs.items()]
        return ";".join(parts)


def C(*args: Any, **kwargs: Any) -> Case:
    return Case(args, kwargs)


def on(room: Any, case: Case, **options: Any) -> Case:
    return dataclasses.replace(case, on=room, **options)


def but(case: Case, **options: Any) -> Case:
    return dataclasses.replace(case, **options)


def index(*values: Any) -> Tensor:
    return torch.tensor(values)


Table = dict[str, list[Case]]


def each(names: str, cases: list[Case]) -> Table:
    """The same cases for several functions."""
    return {name: cases for name in names.split()}
