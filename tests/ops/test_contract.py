"""The contract: who takes a call, and with what gradient; without any kernel of our own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tangentfast.info import info
from tangentfast.ops import contract
from tangentfast.ops.contract import (
    OPS,
    YES,
    Op,
    Provider,
    columns,
    in_places,
    kernel_dtypes,
    plain,
    with_vjp,
)

CPU = torch.device("cpu")


class Tangent(NamedTuple):
    da: Any = None
    db: Any = None


def even(n: int) -> str:
    return YES if n % 2 == 0 else "it is odd"


@pytest.fixture
def op() -> Iterator[Op]:
    made = Op(
        "of_the_test",
        Provider("native", lambda n: ("native", n), even),
        Provider("reference", lambda n: ("reference", n)),
        Provider("triton", lambda n: ("triton", n), op="never_defined", unasked=("cuda",)),
        small=lambda n: n < 10,
    )
    yield made
    del OPS[made.name]


def test_the_first_that_takes_a_call(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANGENTFAST_BACKEND", raising=False)
    for n, backend, names in [
        (12, None, ["native", "reference"]),
        (13, None, ["reference"]),
        (2, None, ["reference"]),  # small
        (2, "native", ["native"]),  # but named
        (3, "native", ["reference"]),  # named, but it cannot
        (12, "triton,native", ["native"]),
        (12, "reference", ["reference"]),
    ]:
        assert [p.name for p in op.candidates(CPU, backend, n)] == names, (n, backend)
    assert op.provider(CPU, None, 12).run(12) == ("native", 12)
    assert op.provider(CPU, None, 13).run(13) == ("reference", 13)
    monkeypatch.setenv("TANGENTFAST_BACKEND", "reference")
    assert op.provider(CPU, None, 12).backend == "reference"
    with pytest.raises(RuntimeError, match="backend is 'triton', but there is no Triton kernel of"):
        op.provider(CPU, "triton", 12)


def test_info_prints_the_table(op: Op) -> None:
    report = info()
    assert report.ops[op.name]["cpu"] == {"native": "", "reference": ""}
    assert "never_defined" in report.ops[op.name]["cuda"]["triton"]
    words = [line.split() for line in str(report).splitlines()]
    expected = ["of_the_test", "native,", "reference", "(cpu),", "native,", "reference", "(cuda)"]
    assert expected in words
    assert str(report).count("no triton of_the_test on cuda: there is no Triton kernel of") == 1


def test_columns() -> None:
    rows = [Tangent(1, 2), None, Tangent(None, 4)]
    assert columns(rows, 2) == [[1, None], [2, 4]]
    assert columns([None], 2) == columns([], 2) == [[], []]
    assert in_places(rows, [5, 6]) == [5, None, 6]  # type: ignore[list-item]
    assert in_places([None], []) == [None]


def test_reasons() -> None:
    x = torch.zeros(2)
    assert plain(x, None, nn.Parameter(x)) == YES

    class Other(Tensor):
        pass

    assert plain(x.as_subclass(Other)) == "Other has rules of its own"
    inside: list[str] = []
    torch.func.vmap(lambda t: inside.append(plain(t)) or t)(x)
    assert inside == ["a torch.func transform or forward-mode AD looks inside"]
    assert kernel_dtypes(x, None, x) == YES
    assert kernel_dtypes(x.half(), x) == YES
    assert kernel_dtypes(x, x.half()) == "torch.float16 beside torch.float32"
    assert kernel_dtypes(x.int()) == "no kernel computes in torch.int32"


def cube(x: Tensor, dx: Tensor) -> tuple[Tensor, Any]:
    """x³ with its VJP by hand."""

    def run(needs: Any) -> Any:
        return x**3, [3 * x**2 * dx], (x if needs[0] else None,)

    def vjp(needs: Any, grad: Tensor, x: Tensor) -> tuple[Tensor]:
        return (3 * x**2 * grad,)

    return with_vjp(run, vjp, x)


def test_gradients_of_the_primal_alone() -> None:
    x, dx = torch.randn(5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    y, (dy,) = cube(x, dx)
    assert y.requires_grad
    assert not dy.requires_grad
    assert torch.autograd.gradcheck(lambda x: cube(x, dx)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: cube(x, dx)[0], x)
    with torch.no_grad():
        assert not cube(x, dx)[0].requires_grad
    assert not cube(x.detach(), dx)[0].requires_grad


def test_nothing_of_the_tangents_is_kept() -> None:
    import gc
    import weakref

    x = torch.randn(5, requires_grad=True)
    dx = torch.randn(5)
    alive = weakref.ref(dx)
    y, _ = cube(x, dx)
    del dx, _
    gc.collect()
    assert alive() is None
    y.sum().backward()
    assert x.grad is not None


def test_the_op_of_contributing() -> None:
    """The example in CONTRIBUTING.md is whole: with a kernel for the CPU it runs and derives."""
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = page[page.index("## Adding an op") :]
    code = section.split("```python\n")[1].split("```")[0]

    def square(x: Tensor, dx: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            dys = [2 * x * d for d in dx]
        return x * x, dys

    names: dict[str, Any] = {name: getattr(contract, name) for name in dir(contract)}
    names |= {"NamedTuple": NamedTuple, "reference": Namespace(square_jvp=square)}
    exec(code, names)
    torch.library.impl("tangentfast::square_jvp", "CPU", square)
    try:
        x, dx = torch.randn(3, requires_grad=True), torch.randn(3)
        for backend in ("native", "reference"):
            y, (dy, none) = names["square_jvp"](x, [names["SquareTangent"](dx), None], backend)
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(y, x * x)
            assert torch.equal(dy, 2 * x * dx)
            assert torch.equal(grad, 2 * x)
            assert none is None
            assert not dy.requires_grad
        assert info().ops["square_jvp"]["cpu"] == {"native": "", "reference": ""}
    finally:
        del OPS["square_jvp"]
