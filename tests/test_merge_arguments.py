"""The coefficients of merge_ in all their forms, and what it says when arguments do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tangentfast.merge import merge_

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
