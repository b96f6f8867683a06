"""The coefficients of `merge_` in all their forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tangentfast.names import close_names

Number: TypeAlias = float | int
Alphas: TypeAlias = (
    Number | Mapping[str, Number] | Sequence[Number | Mapping[str, Number]] | Tensor | np.ndarray
)


class Coefficients:
    """alphas, asked by vector and parameter name.

    Args:
        alphas: as for `merge_`.
        count: K.

    Raises:
        TypeError, ValueError: a number that is none, or K is another.
    """

    def __init__(self, alphas: Any, count: int) -> None:
        self.table: list[list[float]] | None = None
        self.rows: list[tuple[str, float | dict[str, float]]] = []
        self.columns: dict[str, int] = {}
        if isinstance(alphas, Tensor | np.ndarray):
            _check_constant(alphas, "alphas")
            values = alphas.tolist()
            if alphas.ndim > 1:
                self.shape = tuple(alphas.shape)
                if alphas.ndim > 2 or self.shape[0] != count:
                    self._raise_shape((count, "P"))
                self.table = [
                    [_number(x, f"alphas[{k}, {p}]") for p, x in enumerate(row)]
                    for k, row in enumerate(values)
                ]
                return
            alphas = values
        if isinstance(alphas, Sequence) and not isinstance(alphas, str):
            if len(alphas) != count:
                raise ValueError(
                    f"merge_: alphas has {len(alphas)} entries, expected one for each of the "
                    f"{count} vectors"
                )
            for k, entry in enumerate(alphas):
                self.rows.append((f"alphas[{k}]", _read(entry, f"alphas[{k}]")))
        else:
            self.rows = [("alphas", _read(alphas, "alphas"))] * count

    def same(self) -> list[float] | None:
        """The coefficient of each vector, where it is one for all parameters, and none is zero."""
        if self.table is not None:
            return None
        numbers = [entry for _, entry in self.rows if isinstance(entry, float) and entry]
        return numbers if len(numbers) == len(self.rows) else None

    def fit(self, canonical: Mapping[str, str], tensors: Iterable[str]) -> None:
        """Check patterns and columns against a base's names.

        Args:
            canonical: every name of the base -> the first name of the same tensor.
            tensors: the names that columns stand for.
        """
        self.canonical = canonical
        self.columns = {name: p for p, name in enumerate(tensors)}
        if self.table is not None and self.shape[1] != len(self.columns):
            self._raise_shape((len(self.table), len(self.columns)))
        for what, entry in self.rows:
            for pattern in entry if isinstance(entry, dict) else ():
                if pattern in canonical or any(fnmatchcase(n, pattern) for n in canonical):
                    continue
                raise ValueError(
                    f"merge_: {what}[{pattern!r}] matches no name of the base"
                    f"{close_names(pattern, canonical)}"
                )

    def of(self, k: int, name: str) -> float:
        """The coefficient of vector k for a parameter."""
        if self.table is not None:
            return self.table[k][self.columns[self.canonical[name]]]
        what, entry = self.rows[k]
        if isinstance(entry, float):
            return entry
        if name in entry:
            return entry[name]
        matching = [glob for glob in entry if fnmatchcase(name, glob)]
        if not matching:
            raise ValueError(
                f"merge_: {what} has no entry for {name!r}, a name of vectors[{k}]; "
                'add it, or a last resort under "*"'
            )
        return entry[max(matching, key=len)]

    def _raise_shape(self, expected: tuple[object, object]) -> None:
        raise ValueError(
            f"merge_: alphas has shape {self.shape}, expected ({expected[0]}, {expected[1]}): one "
            "row for each vector, one column for each floating-point tensor of the base"
        )


def _read(entry: Any, what: str) -> float | dict[str, float]:
    if not isinstance(entry, Mapping):
        return _number(entry, what)
    for pattern in entry:
        if not isinstance(pattern, str):
            raise TypeError(
                f"merge_: {what} has the key {pattern!r}, expected parameter names or globs; for a "
                "number for each vector pass a sequence of them"
            )
    return {pattern: _number(x, f"{what}[{pattern!r}]") for pattern, x in entry.items()}


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        _check_constant(value, what)
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"merge_: {what} is {value!r}, expected a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"merge_: {what} is {number}, expected a finite number of float32's range")
    return number


def _check_constant(value: Tensor | np.ndarray, what: str) -> None:
    """Raise for a tensor whose gradient would be lost without a word."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"merge_: {what} requires grad, and merge_ is not differentiable; detach() it, or call "
            "the model with base + Σ α τ by torch.func.functional_call"
        )
