"""The coefficients of merge_ in all their forms, and what it says when arguments do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_merge import BACKENDS, Tied, same_bits
from torch import nn

from tangentfast.merge import gram, merge_
from tangentfast.task_vector import TaskVector

NAMES = ["blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.1.attn.weight", "head"]


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        (2, [[2] * 4] * 2),
        (torch.tensor(2.0), [[2] * 4] * 2),
        (np.float32(0.5), [[0.5] * 4] * 2),
        ([1, 3.0], [[1] * 4, [3] * 4]),
        (np.array([1.0, 3.0]), [[1] * 4, [3] * 4]),
        (torch.tensor([1, 3], dtype=torch.int64), [[1] * 4, [3] * 4]),
        ({"*": 1, "*attn*": 2, "blocks.0.*": 3, "head": 4}, [[3, 3, 2, 4]] * 2),
        ([{"*": 1, NAMES[1]: 5, "blocks.0.mlp.*": 9}, 7], [[1, 5, 1, 1], [7] * 4]),
        (torch.arange(8.0).reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (np.arange(8).reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_alphas(alphas: object, expected: list[list[float]]) -> None:
    base = {n: torch.zeros(2) for n in NAMES} | {"steps": torch.tensor(3)}
    vectors = [{n: torch.tensor([1.0, 0.0]) for n in NAMES}, dict.fromkeys(NAMES, torch.eye(2)[1])]
    merge_(base, vectors, alphas)  # type: ignore[arg-type]
    assert [base[n].tolist() for n in NAMES] == [list(pair) for pair in zip(*expected, strict=True)]


BAD_ALPHAS = [
    (True, TypeError, "alphas is True, expected a real number"),
    ([1, False], TypeError, r"alphas\[1\] is False, expected a real number"),
    ("1", TypeError, "alphas is '1', expected a real number"),
    (1j, TypeError, "alphas is 1j, expected a real number"),
    (torch.tensor([True, False]), TypeError, r"alphas\[0\] is True"),
    (float("nan"), ValueError, "alphas is nan, expected a finite number"),
    ([1, -float("inf")], ValueError, r"alphas\[1\] is -inf, expected a finite number"),
    (1e300, ValueError, r"alphas is 1e\+300, expected a finite number of float32's range"),
    (10**400, ValueError, "alphas is inf, expected a finite number of float32's range"),
    ([1, 10**400], ValueError, r"alphas\[1\] is inf, expected a finite number"),
    ({"*": 10**400}, ValueError, r"alphas\['\*'\] is inf, expected a finite number"),
    ({0: 0.4}, TypeError, "alphas has the key 0, expected parameter names or globs; for a number"),
    ([1, {1: 0.4}], TypeError, r"alphas\[1\] has the key 1, expected parameter names"),
    (None, TypeError, "alphas is None, expected a real number"),
    (torch.tensor(1j), TypeError, "alphas is 1j, expected a real number"),
    ([torch.ones(2), 1], TypeError, r"alphas\[0\] is tensor\(.*, expected a real number"),
    ([1.0], ValueError, "alphas has 1 entries, expected one for each of the 2 vectors"),
    ({"w": 1}, ValueError, r"alphas has no entry for 'bias', a name of vectors\[0\]"),
    ([{"w": 1}, 1], ValueError, r"alphas\[0\] has no entry for 'bias', a name of vectors\[0\]"),
    (
        {"*": 1, "wx": 2},
        ValueError,
        r"alphas\['wx'\] matches no name of the base; close names are w",
    ),
    ({"*": float("nan")}, ValueError, r"alphas\['\*'\] is nan"),
    (torch.ones(2, 3), ValueError, r"alphas has shape \(2, 3\), expected \(2, 2\): one row"),
    (torch.ones(1, 2, 2), ValueError, r"alphas has shape \(1, 2, 2\), expected \(2, P\)"),
    (torch.tensor([[1, 1], [1, torch.nan]]), ValueError, r"alphas\[1, 1\] is nan"),
]


@pytest.mark.parametrize(
    ("alphas", "error", "message"), BAD_ALPHAS, ids=[m for *_, m in BAD_ALPHAS]
)
def test_bad_alphas(alphas: object, error: type[Exception], message: str) -> None:
    base = {"w": torch.zeros(3), "bias": torch.zeros(2)}
    vectors = [{"w": torch.ones(3), "bias": torch.ones(2)}] * 2
    with pytest.raises(error, match=message):
        merge_(base, vectors, alphas)  # type: ignore[arg-type]
    assert not any(t.any() for t in base.values())


BAD_VECTORS = [
    ({"w": torch.ones(4)}, ValueError, r"vectors\[1\]\['w'\] has shape \(4,\), base has \(3,\)"),
    (
        {"wight": torch.ones(3)},
        ValueError,
        r"\['wight'\] is not in the base; close names are weight",
    ),
    (
        {"w": torch.ones(3, dtype=torch.int32)},
        TypeError,
        r"\['w'\] has dtype torch.int32, expected f",
    ),
    ({"w": torch.ones(3, dtype=torch.complex64)}, TypeError, "has dtype torch.complex64"),
    ({"w": [1, 1, 1]}, TypeError, r"vectors\[1\]\['w'\] is a list, expected a tensor"),
    ({"w": torch.ones(3).to_sparse()}, ValueError, "has layout torch.sparse_coo, expected dense"),
    (
        {"w": torch.ones(3, device="meta")},
        ValueError,
        r"\['w'\] is on meta, where tensors have no numbers",
    ),
    ({"steps": torch.ones(())}, ValueError, r"\['steps'\] names a tensor of dtype torch.int64"),
    (
        "cars.safetensors",
        TypeError,
        r"vectors\[1\] is a str, .*TaskVector.load\('cars.safetensors'",
    ),
    (None, TypeError, r"vectors\[1\] is a NoneType, expected a TaskVector"),
    (
        {"cars": {"w": torch.ones(3)}},
        TypeError,
        r"\['cars'\] is a dict, .*list\(vectors.values\(\)",
    ),
    (torch.ones(3), TypeError, r"vectors\[1\] is a Tensor, expected a TaskVector or a mapping"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_VECTORS, ids=[m for *_, m in BAD_VECTORS])
def test_bad_vectors(bad: object, error: type[Exception], message: str) -> None:
    base = {"w": torch.zeros(3), "weight": torch.zeros(2), "steps": torch.tensor(0)}
    with pytest.raises(error, match=message):
        merge_(base, [{"w": torch.ones(3)}, bad])  # type: ignore[list-item]
    assert not any(t.any() for t in base.values())


def test_bad_base() -> None:
    with pytest.raises(TypeError, match="base is a int, expected a module, a mapping of tensors"):
        merge_(3, {})
    with pytest.raises(ValueError, match=r"base\['w'\] has layout torch.sparse_coo"):
        merge_({"w": torch.ones(3).to_sparse()}, {"w": torch.ones(3)})


def test_no_vectors_is_no_change() -> None:
    base = {"w": torch.ones(3)}
    assert merge_(base, [], []) is base
    assert base["w"]._version == 0


VECTORS: list[tuple[Any, str]] = [
    (
        "a.safetensors",
        r"vectors\[0\] is a str, .*; read it first: TaskVector.load\('a.safetensors'\)",
    ),
    (Path("a.st"), r"vectors\[0\] is a \w*Path, .*; read it first: TaskVector.load\('a.st'\)"),
    ([Path("a.st")], r"vectors\[0\] is a \w*Path, .*TaskVector.load\('a.st'\)"),
    (None, r"vectors\[0\] is a NoneType, expected a TaskVector or a mapping of names"),
    ([None], r"vectors\[0\] is a NoneType"),
    (nn.Linear(1, 1), r"vectors\[0\] is a Linear"),
    (
        {"cars": TaskVector({"w": torch.ones(3)})},
        r"vectors\[0\]\['cars'\] is a TaskVector, .*pass a sequence, list\(vectors.values\(\)\)",
    ),
]


@pytest.mark.parametrize("alphas", [1.0, {"*": 1.0}], ids=["number", "glob"])
@pytest.mark.parametrize(("vectors", "message"), VECTORS, ids=[m for _, m in VECTORS])
def test_vectors_that_are_none(vectors: Any, message: str, alphas: Any) -> None:
    base = {"w": torch.zeros(3)}
    with pytest.raises(TypeError, match=message):
        merge_(base, vectors, alphas)
    assert not base["w"].any()
    if isinstance(vectors, dict):
        with pytest.raises(TypeError, match=r"write gram\(\[vector\]\)"):
            gram(vectors)  # type: ignore[arg-type]


@pytest.mark.parametrize("alphas", [1.0, {"*": 1.0}, torch.ones(1, 2)], ids=["1", "*", "2-D"])
@pytest.mark.parametrize("name", [1, None, ("a", 1), b"w"])
def test_names_that_are_no_strings(name: Any, alphas: Any) -> None:
    base: Any = {"w": torch.zeros(3), name: torch.zeros(3)}
    with pytest.raises(TypeError, match=rf"has a {type(name).__name__} as its name, expected a s"):
        merge_(base, dict.fromkeys(base, torch.ones(3)), alphas)
    assert not any(t.any() for t in base.values())


# Zero ---------------------------------------------------------------------------------------------

ZEROS = [0, 0.0, -0.0, {"*": 0}, [0], [{"*": 0.0}], torch.zeros(1), torch.zeros(1, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alphas", ZEROS, ids=str)
def test_zero_does_not_read(alphas: Any, backend: str) -> None:
    """The base keeps its bits, those of NaN and of -0.0 too, and is not written."""
    values = torch.tensor([1.0, -0.0, torch.nan, torch.inf])
    base = {"w": values.clone()}
    merge_(base, [{"w": torch.full((4,), torch.nan)}], alphas, backend=backend)
    assert same_bits(base["w"], values)
    assert base["w"]._version == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alphas", [[0.5, 0], [0.5, {"*": 0.0}], torch.tensor([[0.5], [0.0]])])
def test_zero_of_one_vector(alphas: Any, backend: str) -> None:
    base, one, other = (torch.randn(9) for _ in range(3))
    expected = merge_({"w": base.clone()}, {"w": one}, 0.5, backend=backend)["w"]
    merge_({"w": base}, [{"w": one}, {"w": other * torch.nan}], alphas, backend=backend)
    assert same_bits(base, expected)


def test_zero_of_what_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match=r"vectors\[0\]\['w'\] has shape \(4,\), base has \(3,\)"):
        merge_({"w": torch.zeros(3)}, {"w": torch.zeros(4)}, 0)


# Gradients ----------------------------------------------------------------------------------------

DIFFERENTIABLE: list[Any] = [
    lambda a: a[0],
    lambda a: a,
    lambda a: [a[0], 1.0],
    lambda a: {"*": a[0]},
    lambda a: [1.0, {"*": a[1]}],
    lambda a: a[:, None],
]


@pytest.mark.parametrize("make", DIFFERENTIABLE, ids=range(len(DIFFERENTIABLE)))
def test_alphas_that_require_grad(make: Any) -> None:
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    base, vectors = {"w": torch.zeros(3)}, [{"w": torch.ones(3)}] * 2
    with pytest.raises(ValueError, match=r"requires grad, and merge_ is not diff.*detach\(\) it"):
        merge_(base, vectors, make(weights))
    assert not base["w"].any()
    merge_(base, vectors, make(weights.detach()))
    once = base["w"].clone()
    assert once.any()
    with torch.no_grad():
        merge_(base, vectors, make(weights))
    assert torch.equal(base["w"], 2 * once)


# Results that are of no use -----------------------------------------------------------------------

each_way = pytest.mark.parametrize("alphas", [2, {"*": 2}], ids=["number", "glob"])


@each_way
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_of_float16_warns(backend: str, alphas: Any) -> None:
    huge = torch.tensor([1.0, 60000.0])
    base = {"a": huge.half(), "b": huge.half(), "c": huge.bfloat16()}
    vector = {"a": torch.ones(2), "b": huge, "c": huge}
    with pytest.warns(UserWarning, match=r"merge_: b hold infinities now: float16 ends") as caught:
        merge_(base, vector, alphas, backend=backend)
    assert [w.filename for w in caught] == [__file__]
    assert base["b"].tolist() == [3.0, torch.inf]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was there before
        merge_(base, {"b": torch.ones(2)}, alphas, backend=backend)


@each_way
@pytest.mark.parametrize("of", [nn.Module, dict])
def test_negative_running_var_warns(of: type, alphas: Any) -> None:
    model = Tied()
    base: Any = model if of is nn.Module else model.state_dict()
    step = {"norm.running_var": torch.tensor([0.0, 0.0, 0.0, -1.0])}
    message = r"merge_: norm.running_var are negative now, and batch norm takes their root"
    with pytest.warns(UserWarning, match=message) as caught:
        merge_(base, step, alphas)
    assert [w.filename for w in caught] == [__file__]
    assert model.norm.running_var.tolist() == [1.0, 1.0, 1.0, -1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_(base, {"norm.running_mean": -torch.ones(4)}, alphas)
        merge_(base, {"norm.running_var": torch.ones(4)}, alphas)
