"""Backends: who is chosen, and that the native op has its contract on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from isa import assert_same_bits

from tangentfast.merge import merge_
from tangentfast.ops import OPS
from tangentfast.ops.backend import load_native, triton_problem

NATIVE = load_native()[0] is not None
native_only = pytest.mark.skipif(not NATIVE, reason="no native extension")


@native_only
def test_opcheck() -> None:
    bases = [torch.randn(4, 5), torch.randn(3).bfloat16()]
    vectors = [torch.randn(4, 5).half(), torch.randn(4, 5), torch.randn(3)]
    args = (bases, vectors, [2, 1], [0.5, 1.0, -1.0])
    torch.library.opcheck(torch.ops.tangentfast.merge_.default, args)


@native_only
def test_op_checks_its_own_arguments() -> None:
    merge = torch.ops.tangentfast.merge_
    base = torch.zeros(3)
    for args, error, message in [
        (
            ([base], [torch.ones(4)], [1], [1.0]),
            ValueError,
            r"vectors\[0\] has shape \[4\], bases\[",
        ),
        (([base], [torch.ones(3)], [2], [1.0]), ValueError, "counts sum to 2, expected the number"),
        (([base], [torch.ones(3)], [1, 0], [1.0]), ValueError, "counts has 2 entries, expected 1"),
        (
            ([base], [torch.ones(3)], [1], []),
            ValueError,
            "alphas has 0 entries, expected one per v",
        ),
        (([base], [torch.ones(3).int()], [1], [1.0]), TypeError, r"vectors\[0\] has dtype Int"),
        (([base, base], [torch.ones(3)] * 2, [1, 1], [1.0, 1.0]), ValueError, "shares memory"),
    ]:
        with pytest.raises(error, match=message):
            merge(*args)
    assert not base.any()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        base = {"w": torch.zeros(3)}
        merge_(base, {"w": torch.ones(3)})
    assert base["w"].tolist() == [1.0] * 3


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("TANGENTFAST_BACKEND", raising=False)
    merge = OPS["merge_"]
    assert merge.provider(cpu, None).backend == ("native" if NATIVE else "reference")
    monkeypatch.setenv("TANGENTFAST_BACKEND", "reference")
    assert merge.provider(cpu, None).backend == "reference"
    monkeypatch.setenv("TANGENTFAST_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="TANGENTFAST_BACKEND is 'fast'; expected one of native, t"
    ):
        merge.provider(cpu, None)
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        merge_({"w": torch.zeros(1)}, {"w": torch.zeros(1)}, backend="gpu")
    with pytest.raises(
        RuntimeError, match=r"backend is 'native', but tangentfast._C (has no merge_ for mps|was)"
    ):
        merge.provider(torch.device("mps"), "native")


def test_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list takes the first that has the op; what is missing says why."""
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton_problem.cache_clear()
    OPS["linear_jvp"]._orders.clear()
    for op, message in [
        ("linear_jvp", "Triton (runs on CUDA devices, not on cpu|is not installed)"),
        ("merge_", "there is no triton merge_"),
    ]:
        with pytest.raises(RuntimeError, match=f"backend is 'triton', but {message}"):
            OPS[op].provider(cpu, "triton")
        assert OPS[op].provider(cpu, "triton,reference").backend == "reference"
    with pytest.raises(ValueError, match="backend is 'triton,fast'; expected one of"):
        OPS["merge_"].provider(cpu, "triton,fast")


ISA_PROGRAM = """
import hashlib, torch
from tangentfast.merge import gram, merge_
torch.manual_seed(0)
digest = hashlib.sha256()
types = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
for base in types:
    for count in (1, 3, 6):
        for vectors in types:
            b = {"a": torch.randn(70_003).to(base)}
            rows = [{"a": torch.randn(70_003).to(vectors)} for _ in range(count)]
            merge_(b, rows, 0.3, backend="native")
            digest.update(b["a"].view(torch.uint8).numpy().tobytes())
            digest.update(gram(rows, backend="native").numpy().tobytes())
import tangentfast._C as native
print(native.isa(), digest.hexdigest())
"""


@native_only
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits(ISA_PROGRAM)


@native_only
def test_unknown_instruction_set_raises() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import torch, tangentfast._C as native; native.isa()"],
        env={**os.environ, "TANGENTFAST_ISA": "sse"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode != 0
    assert "TANGENTFAST_ISA is 'sse'; expected baseline, avx2" in run.stderr
