"""Each operation with its tangent: the library's kernel, its reference, ``torch.func.jvp``.

    pytest benchmarks/bench_kernels.py --benchmark-only
    pytest benchmarks -k layer_norm --benchmark-only

An operation is called through its rule, as the dual layer calls it, with one tangent for every
tensor argument: once on the best backend there is, once on the plain-torch reference (the same
where there is no kernel). Bytes or FLOPs are counted from the formula, every large tensor read or
written once, and the rate is set beside the machine's, measured in the same rounds at the same
amount of work. Adding an operation is one entry of `OPERATIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import ceilings
import pytest
import torch
import torch.nn.functional as F
from baselines import flash_jvp, function_jvp
from harness import DEVICE, SMOKE, assert_close, compare
from torch import Tensor

from tangentfast.rules import RULES

Shape = tuple[int, ...]
GPU = DEVICE.type == "cuda"

# [rows, width]: one token; one image and 16 of ViT-B/32; the MLP's width.
ROWS: list[Shape] = [(1, 768), (50, 768), (800, 768)]
WIDE: list[Shape] = [(1, 3072), (50, 3072), (800, 3072)]
# [batch, heads, tokens, head width]: ViT-B/32 with 1 and 16 images, ViT-B/16 with 8, ViT-L/14
HEADS: list[Shape] = [(1, 12, 50, 64), (16, 12, 50, 64), (8, 12, 197, 64), (1, 16, 577, 64)]
SCORES: list[Shape] = [(600, 50), (192 * 50, 50), (96 * 197, 197)]  # [rows, keys]
PRODUCTS: list[Shape] = [(1, 768, 768), (50, 768, 768), (800, 768, 3072)]  # rows, in, out
PATCHES: list[Shape] = [(1, 32, 224), (8, 32, 224), (4, 16, 224)]  # n, patch, size
if GPU:  # one image of ViT-L/14 and 128: far more than the caches hold
    ROWS = [(1, 768), (257, 1024), (128 * 257, 1024)]
    WIDE = [(1, 3072), (257, 4096), (128 * 257, 4096)]
    HEADS = [(1, 16, 257, 64), (128, 16, 257, 64), (64, 16, 1024, 64), (64, 16, 257, 80)]
    SCORES = [(16 * 257, 257), (128 * 16 * 257, 257)]
    PRODUCTS = [(1, 1024, 1024), (128 * 257, 1024, 3072), (128 * 257, 1024, 4096)]
    PATCHES = [(1, 14, 224), (128, 14, 224)]


@dataclass(frozen=True)
class Operation:
    """A torch function and what one call of it, with one tangent, must do.

    Attributes:
        function: the torch function, whose rule is taken.
        sizes: what is measured, small ones too.
        shapes: size -> shapes of the tensor arguments.
        call: tensor arguments -> positional and keyword arguments of the function.
        streams: tensors of the first argument's size that are read or written; 0 where FLOPs count.
        flops: size -> FLOPs of the matrix products.
    """

    function: Any
    sizes: Sequence[Shape]
    shapes: Callable[[Shape], Sequence[Shape]] = lambda size: [size]
    call: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda *t: (t, {})
    streams: int = 0
    flops: Callable[[Shape], float] = lambda size: 0.0


def attention(causal: bool) -> Operation:
    """Two products for o, four for its tangent; masked entries are counted as if computed."""
    return Operation(
        F.scaled_dot_product_attention,
        HEADS,
        lambda size: [size] * 3,
        lambda q, k, v: ((q, k, v), {"is_causal": causal}),
        flops=lambda s: 6 * 2.0 * s[0] * s[1] * s[2] ** 2 * s[3],
    )


OPERATIONS = {
    "layer_norm": Operation(
        F.layer_norm,
        ROWS,
        lambda size: [size, size[1:], size[1:]],
        lambda x, w, b: ((x, [x.shape[-1]], w, b), {}),
        streams=4,
    ),
    "rms_norm": Operation(
        F.rms_norm,
        ROWS,
        lambda size: [size, size[1:]],
        lambda x, w: ((x, [x.shape[-1]], w), {}),
        streams=4,
    ),
    "gelu": Operation(F.gelu, WIDE, streams=4),
    "gelu tanh": Operation(F.gelu, WIDE, call=lambda x: ((x,), {"approximate": "tanh"}), streams=4),
    "silu": Operation(F.silu, WIDE, streams=4),
    "softmax": Operation(F.softmax, SCORES, call=lambda x: ((x, -1), {}), streams=4),
    "log_softmax": Operation(F.log_softmax, SCORES, call=lambda x: ((x, -1), {}), streams=4),
    "add": Operation(torch.add, ROWS, lambda size: [size, size], streams=6),
    "attention": attention(causal=False),
    "attention causal": attention(causal=True),
    # x W; dx W and x dW
    "linear": Operation(
        F.linear,
        PRODUCTS,
        lambda s: [(s[0], s[1]), (s[2], s[1]), (s[2],)],
        flops=lambda s: 3 * 2.0 * s[0] * s[1] * s[2],
    ),
    # images are data and have no tangent: x W and x dW
    "patch embedding": Operation(
        F.conv2d,
        PATCHES,
        lambda s: [(768, 3, s[1], s[1]), (768,)],
        flops=lambda s: 2 * 2.0 * s[0] * s[2] ** 2 * 3 * 768,
    ),
}
PRODUCT_OPS = ("attention", "attention causal", "linear", "patch embedding")


def cases() -> list[Any]:
    """Every size in float32, the larger ones in bfloat16; products in bfloat16 on a GPU only.

    A processor without instructions for them needs seconds for one.
    """
    listed = []
    for name, operation in OPERATIONS.items():
        for size in operation.sizes[:1] if SMOKE else operation.sizes:
            for dtype in (torch.float32, torch.bfloat16):
                skipped = dtype == torch.bfloat16 and (
                    size == operation.sizes[0] or (name in PRODUCT_OPS and not GPU)
                )
                if not skipped:
                    shape = "x".join(map(str, size))
                    ident = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
                    listed.append(pytest.param(name, size, dtype, id=ident))
    return listed


def through_rule(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], tangents: dict[int, Tensor]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The rule's result for one tangent, on the backend that TANGENTFAST_BACKEND names."""
    rule = RULES[function]
    bound = rule.bind(args, kwargs)
    assert bound is not None
    row = [tangents.get(id(argument)) for argument in bound]

    def call() -> tuple[Tensor, Tensor]:
        y, (dy,) = rule.apply(bound, [row])
        return y, dy

    return call


def on_backend(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with TANGENTFAST_BACKEND set; an empty name takes the best backend."""

    def named() -> Any:
        before = os.environ.get("TANGENTFAST_BACKEND")
        os.environ["TANGENTFAST_BACKEND"] = name
        try:
            return call()
        finally:
            del os.environ["TANGENTFAST_BACKEND"]
            if before is not None:
                os.environ["TANGENTFAST_BACKEND"] = before

    return named


def flash_accepts(primals: Sequence[Tensor], dprimals: Sequence[Tensor]) -> bool:
    """Whether that package is here and runs on these operands."""
    if not GPU or find_spec("jvp_flash_attention") is None:
        return False
    try:
        flash_jvp(primals, dprimals)
    except Exception as error:  # whatever it or its compiler raises
        print(f"jvp_flash_attention: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


@pytest.mark.parametrize(("name", "size", "dtype"), cases())
def test_kernel(name: str, size: Shape, dtype: torch.dtype, benchmark: Any) -> None:
    operation = OPERATIONS[name]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    shapes = operation.shapes(size)
    primals, dprimals = [random(s) for s in shapes], [random(s) for s in shapes]
    call = operation.call
    if name == "patch embedding":
        picture = random((size[0], 3, size[2], size[2]))
        call = lambda w, b: ((picture, w, b), {"stride": size[1]})  # noqa: E731
    args, kwargs = call(*primals)
    tangents = {id(x): dx for x, dx in zip(primals, dprimals, strict=True)}
    through = through_rule(operation.function, args, kwargs, tangents)

    def function(*tensors: Tensor) -> Tensor:
        args, kwargs = call(*tensors)
        result: Tensor = operation.function(*args, **kwargs)
        return result

    flops = operation.flops(size)
    if flops:
        product, amount = ceilings.product(flops / 3, dtype)
        calls, work = {"ceiling: product": product}, {"ceiling: product": amount}
    else:
        flops = float(operation.streams * primals[0].nbytes)
        passes, moved = ceilings.passes(int(flops))
        calls = {f"ceiling: {n}": passes[n] for n in passes}
        work = {f"ceiling: {n}": moved[n] for n in passes}
    ours = ["tangentfast", "reference", "torch.func.jvp"]

    def check(results: dict[str, Any]) -> None:
        for variant in ours[:2]:
            assert_close(results[variant], results["torch.func.jvp"], f"{name}, {variant}")

    theirs: dict[str, Callable[[], Any]] = {
        "torch.func.jvp": lambda: function_jvp(function, primals, dprimals)
    }
    if name == "attention" and flash_accepts(primals, dprimals):
        theirs["jvp_flash_attention"] = lambda: flash_jvp(primals, dprimals)
        ours.append("jvp_flash_attention")

    with torch.no_grad():
        compare(
            benchmark,
            {
                "tangentfast": on_backend("", through),
                "reference": on_backend("reference", through),
                **theirs,
                **calls,
            },
            check,
            against="torch.func.jvp",
            work={variant: flops for variant in ours} | work,
            seconds=0.6,
            operation=name,
            size=list(size),
            dtype=str(dtype).removeprefix("torch."),
            unit="FLOP" if operation.streams == 0 else "B",
        )
