"""gram against float64 truth in exact order-free cases, its determinism and its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import rounding

from tangentfast.merge import gram
from tangentfast.ops.backend import load_native
from tangentfast.task_vector import TaskVector

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", *(["native"] if load_native()[0] is not None else [])]


def dense(vectors: list[dict[str, Tensor]], names: list[str], shapes: dict[str, tuple[int, ...]]):
    """K × N float64 matrix of the vectors, zeros for names that are missing."""
    rows = [
        torch.cat(
            [
                v[n].cpu().double().reshape(-1) if n in v else torch.zeros(shapes[n]).reshape(-1)
                for n in names
            ]
        )
        for v in vectors
    ]
    return torch.stack(rows).double()


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 9),
    present=st.integers(0, 2**27 - 1),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_truth(
    backend: str, device: torch.device, seed: int, count: int, present: int, data: st.DataObject
) -> None:
    """Small integers: products and sums are exact, so every order gives the same number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (37, 29), "b": (), "c": (0, 3)}
    vectors: list[dict[str, Tensor]] = []
    for k in range(count):
        vectors.append({})
        for i, (name, shape) in enumerate(shapes.items()):
            if present >> (3 * k + i) & 1:
                values = torch.randint(-9, 10, shape, generator=generator)
                values = values.to(device, data.draw(st.sampled_from(DTYPES)))
                if data.draw(st.booleans()) and values.dim() == 2:
                    values = values.T.contiguous().T
                vectors[k][name] = values
    matrix = dense(vectors, list(shapes), shapes)
    assert torch.equal(gram(vectors, backend=backend).cpu(), matrix @ matrix.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_in_float64(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    vectors = [{"a": torch.randn(1_000_003).to(device)} for _ in range(3)]
    matrix = dense(vectors, ["a"], {})
    truth = matrix @ matrix.T
    error = (gram(vectors, backend=backend).cpu() - truth).abs().max()
    size = float(truth.diagonal().max())  # no Σ|terms| is larger
    assert error <= rounding(1_000_003, sums=1) * torch.finfo(torch.float64).eps * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_threads(backend: str) -> None:
    torch.manual_seed(0)
    vectors = [{"a": torch.randn(900_001), "b": torch.randn(77, 5)} for _ in range(4)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gram(vectors, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[0].T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    vectors = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([torch.nan, 0.0])}]
    g = gram(vectors, backend=backend)
    assert g[0, 0] == 5
    assert g.isnan().tolist() == [[False, True], [True, True]]


def test_tied_parameters_count_once() -> None:
    shared = torch.full((3,), 2.0)
    tied = TaskVector({"a": shared, "b": shared})
    assert gram([tied]).item() == 12
    assert gram([tied, TaskVector({"a": torch.ones(3), "b": torch.ones(3)})])[0, 1] == 12


def test_no_vectors_and_no_names() -> None:
    assert gram([]).shape == (0, 0)
    assert torch.equal(gram([{}, {}]), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        (
            {"a": torch.ones(2)},
            TypeError,
            r"vectors is one mapping, expected a sequence; write gram",
        ),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(3)}],
            ValueError,
            r"gram: vectors\[1\]\['a'\] has shape \(3,\), vectors\[0\] has \(2,\)",
        ),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(2, device="meta")}],
            ValueError,
            r"vectors\[1\]\['a'\] is on meta, where tensors have no numbers",
        ),
        ([{"a": torch.ones(2).int()}], TypeError, r"vectors\[0\]\['a'\] has dtype torch.int32"),
    ],
)
def test_errors(vectors: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gram(vectors)  # type: ignore[arg-type]


@pytest.mark.skipif("native" not in BACKENDS, reason="no native extension")
def test_op() -> None:
    tensors = [torch.randn(4, 5), torch.randn(4, 5).half(), torch.randn(3)]
    args = (tensors, [2, 1], [0, 1, 1], 2)
    torch.library.opcheck(torch.ops.tangentfast.gram.default, args)
    for bad, message in [
        ((tensors, [2, 1], [1, 0, 1], 2), r"owners\[1\] is 0, expected rising numbers"),
        (
            (tensors, [2, 1], [0, 2, 1], 2),
            r"owners\[1\] is 2, expected rising numbers within a row",
        ),
        (
            (tensors, [1, 2], [0, 0, 1], 2),
            r"tensors\[2\] has shape \[3\], tensors\[1\] has \[4, 5\]",
        ),
        ((tensors, [2, 1], [0, 1], 2), "owners has 2 entries, expected one per tensor, 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.tangentfast.gram(*bad)
