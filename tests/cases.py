"""Calls of every function that has a rule, as data: `CASES`, by the function's name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import C, Call, Case, R, Table, but, each, index, inf, on
from cases_attention import ATTENTION
from cases_complex import COMPLEX
from torch import Tensor

__all__ = ["CASES", "C", "Call", "Case", "R", "Table", "but", "each", "positive"]

X = C(R(2, 3))
SHAPES = [C(R(3, 4)), C(R()), C(R(5)), C(R(0, 3))]
mask34 = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
rows = index([0, 2, 1, 0], [3, 1, 1, 0], [2, 2, 0, 1])  # 3 x 4
image, volume = R(2, 4, 5, 6), R(1, 2, 4, 4, 4)
SHAPE: Table = {
    "reshape": [C(R(2, 6), (3, 4)), on(Tensor, C(R(2, 6), -1, 4)),
                C(R(0, 6), (3, 0))],
    "flatten": [C(R(2, 3, 4)), C(R(2, 3, 4), 1), C(R(2, 3, 4), start_dim=-2), C(R())],
    "ravel": [X],
    "unflatten": [C(R(2, 6), 1, (2, 3)), C(R(2, 6), -1, (-1, 2))],
    "squeeze": [C(R(2, 1, 3, 1)), C(R(2, 1, 3), 1), C(R(2, 1, 3), 0)],
    "unsqueeze": [C(R(2, 3), 1), C(R(), 0), C(R(2, 3), dim=-1)],
    "contiguous": [X, C(image, memory_format=torch.channels_last)],
    "permute": [C(R(2, 3, 4), (2, 0, 1)), on(Tensor, C(R(2, 3), 1, 0))],
    **each("transpose swapaxes swapdims", [C(R(2, 3, 4), 0, 2), C(R(2, 3), -1, -2)]),
    **each("moveaxis movedim", [C(R(2, 3, 4), 0, 2), C(R(2, 3, 4), (0, 1), (2, 0))]),
    "t": [X, C(R(3))],
    "adjoint": [C(R(2, 3, 4))],
    **each("positive conj resolve_conj resolve_neg neg negative", SHAPES),
    "clone": [X, C(image, memory_format=torch.channels_last)],
    "expand": [C(R(2, 1, 3), 2, 4, 3), C(R(3), (2, 3)), C(R(2, 1), -1, 0)],
    "broadcast_to": [C(R(1, 3), (2, 3))],
    "repeat": [C(R(2, 3), 2, 1, 2), C(R(2, 3), (1, 0))],
    "tile": [C(R(2, 3), (2, 2))],
    "repeat_interleave": [C(R(2, 3), 2), C(R(2, 3), 3, dim=1), C(R(2, 3), index(1, 2), dim=0)],
    "roll": [C(R(3, 4), 1), C(R(3, 4), (1, -2), (0, 1)), C(R(3, 4), shifts=2, dims=1)],
    "flip": [C(R(3, 4), (0, 1)), C(R(3, 4), dims=[1])],
    "fliplr": [X], "flipud": [X],
    "rot90": [C(R(3, 4)), C(R(3, 4), 3, (0, 1))],
    "narrow": [C(R(3, 4), 1, 1, 2)],
    "select": [C(R(3, 4), 1, 2), C(R(3, 4), 0, -1)],
    "split": [C(R(5, 4), 2), C(R(5, 4), [2, 3]), C(R(5, 4), 3, dim=1)],
    "split_with_sizes": [C(R(5, 4), [2, 3])],
    "chunk": [C(R(5, 4), 2), C(R(5, 4), 3, dim=-1)],
    "tensor_split": [C(R(5, 4), 3), C(R(5, 4), (1, 2), dim=1)],
    "hsplit": [C(R(4, 4), 2)], "vsplit": [C(R(4, 4), 2)], "dsplit": [C(R(2, 2, 4), 2)],
    "unbind": [X, C(R(2, 3), 1), C(R(3, 2, 1, 3, 2))],
    "unfold": [on(Tensor, C(R(3, 7), 1, 3, 2)), on(F, C(R(2, 3, 5, 5), 2)),
               on(F, C(R(2, 3, 5, 5), (2, 3), dilation=1, padding=1, stride=2))],
    "fold": [C(R(2, 12, 16), (5, 5), 2), C(R(1, 8, 9), (6, 6), 2, stride=2)],
    "diagonal": [C(R(3, 4)), C(R(3, 4), 1), C(R(2, 3, 4), dim1=1, dim2=2)],
    "diag": [C(R(3)), C(R(3, 3)), C(R(3, 4), 1)],
    "diag_embed": [X, C(R(2, 3), 1)],
    **each("tril triu", [C(R(3, 4)), C(R(2, 3, 4), 1), C(R(3, 4), diagonal=-1)]),
    "index_select": [C(R(4, 3), 0, index(2, 0, 2)), C(R(4, 3), dim=1, index=index(1))],
    "gather": [C(R(3, 4), 1, rows), C(R(3, 4), dim=0, index=rows % 3)],
    "take": [C(R(3, 4), index(0, 5, 5))],
    "take_along_dim": [C(R(3, 4), rows, 1), but(C(R(3, 4), index(1, 0)), strided=False)],
    "masked_select": [C(R(3, 4), mask34), C(R(3, 4), ~mask34 & mask34)],
    "pixel_shuffle": [C(R(1, 4, 2, 3), 2)],
    "pixel_unshuffle": [C(R(1, 1, 4, 6), 2)],
    "channel_shuffle": [C(R(2, 4, 3, 3), 2)],
    **each("atleast_1d atleast_2d atleast_3d", [
        C(R()), C(R(3)), C(R(2, 2)), C(R(), R(3))]),
    "to": [C(R(2, 3), torch.float32), C(R(2, 3), torch.long), C(R(2, 3), "cpu"),
           C(R(2, 3), dtype=torch.float64), C(R(2, 3), torch.zeros(1))],
    "type": [C(R(2, 3), torch.float32), C(R(2, 3), "torch.LongTensor")],
    **each("float double half bfloat16 cpu", [X]),
    "cuda": [but(X, cuda=True)], "pin_memory": [but(X, cuda=True, strided=False)],
    "sum": [C(R(3, 4)), C(R(3, 4), 1), C(R(3, 4), (0, 1), keepdim=True), C(R(3, 4), dim=-1),
            C(R(3, 4), dtype=torch.float32), C(R(0, 4)), C(R(0, 4), 0)],
    "mean": [C(R(3, 4)), C(R(3, 4), 1), C(R(3, 4), (0, 1), True), C(R(3, 4), dim=-1, keepdim=True)],
    "cumsum": [C(R(3, 4), 1), C(R(3, 4), dim=0)],
    "trace": [C(R(3, 3))],
    "__getitem__": [C(R(3, 4), 1), C(R(3, 4), (slice(None), slice(0, 4, 2))), C(R(3, 4), ...),
                    C(R(3, 4), (None, -1)), C(R(3, 4), index(2, 0, 2)), C(R(3, 4), mask34),
                    C(R(3, 4), (index(0, 1), slice(1, 3))), C(R(3, 4), (slice(2, 2),)),
                    C(R(3, 4), [0, 2])],
    "Tensor.T": [X], "Tensor.mT": [C(R(2, 3, 4))], "Tensor.H": [X], "Tensor.mH": [C(R(2, 3, 4))],
    "Tensor.real": [X], "real": [X],
    "view": [but(C(R(2, 6), 3, 4), strided=False), but(C(R(2, 6), (3, -1)), strided=False),
             C(R(2, 3, 4), 2, 3, 2, 2), C(R(2, 0), 0, 5)],
    "view_as": [but(C(R(2, 6), torch.zeros(3, 4)), strided=False)],
    "expand_as": [C(R(1, 3), torch.zeros(2, 3))],
    "reshape_as": [C(R(2, 6), torch.zeros(3, 4)), C(R(2, 6), R(3, 4))],
    "type_as": [C(R(2, 3), torch.zeros(1)), C(R(2, 3), R(1))],
    **each("cat concat concatenate", [
        C([R(2, 3), R(1, 3)]), C((R(2, 3), R(2, 2), torch.ones(2, 1)), 1),
           C([R(2, 3), R(2, 0)], dim=-1)]),
    "stack": [C([R(2, 3), R(2, 3)]), C((R(3), torch.ones(3)), dim=1)],
    **each("hstack vstack dstack", [C([R(2, 3), R(2, 3)]), C((R(3), torch.ones(3)))]),
    "broadcast_tensors": [C(R(2, 1), R(3)), C(R(2, 1), torch.ones(3), R())],
    "pad": [C(R(2, 3), (1, 2)), C(R(2, 3), (1, -1, 0, 2), "constant", 3.0),
            C(R(1, 2, 5), (1, 2), mode="reflect"), C(R(1, 2, 5), (1, 2), mode="circular"),
            C(R(1, 2, 5), (1, 2), mode="replicate")],
    "constant_pad_nd": [C(R(2, 3), (1, 2)), C(R(2, 3), (1, 2), 3.0),
                        C(R(2, 3), (0, 1), value=-inf)],
    "where": [*(on(torch, c) for c in (C(mask34, R(3, 4), R(3, 4)), C(mask34, R(4), R(3, 1)),
              C(mask34, R(), 2.0), C(mask34, -inf, R(3, 4)), C(mask34[0], R(3, 4), R(4)))),
              on(Tensor, C(R(3, 4), mask34, R(4))), on(Tensor, C(R(3, 4), mask34, 0.0))],
    "masked_fill": [C(R(3, 4), mask34, 2.0), C(R(3, 4), mask34[0], -inf), C(R(3, 4), mask34, R()),
                    C(R(1, 4), mask34, 0.0)],
    **each("scatter scatter_add", [C(R(4, 4), 1, rows.sort(1)[0].new_tensor(
        [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]]), R(3, 4)),
        C(R(4, 4), dim=0, index=index([0, 1, 2, 3]), src=torch.ones(1, 4, dtype=torch.float64))]),
    "index_copy": [C(R(4, 3), 0, index(2, 0), R(2, 3))],
    "index_add": [C(R(4, 3), 0, index(2, 2), R(2, 3)), C(R(4, 3), 1, index(0), R(4, 1))],
    "index_fill": [C(R(4, 3), 0, index(2, 0), 1.5), C(R(4, 3), 0, index(2, 0), R())],
    "index_put": [C(R(4, 3), (index(2, 0),), R(2, 3)), C(R(4, 3), (index(2, 0), index(1, 1)), R())],
    "masked_scatter": [C(R(3, 4), mask34, R(12))],
    "select_scatter": [C(R(4, 3), R(4), 1, 2)],
    "slice_scatter": [C(R(4, 3), R(4, 3)), C(R(4, 3), R(2, 3), 0, 1, 3),
                      C(R(4, 3), R(2, 3), start=2)],
    **each("as_strided as_strided_copy", [
        but(C(R(3, 4), (2, 2), (5, 1)), strided=False), but(C(R(6), (3, 4), (1, 1)), strided=False),
        but(C(R(3, 4), (2, 3), (4, 1), 1), strided=False)]),
    "as_strided_scatter": [but(
        C(R(3, 4), R(2, 2), (2, 2), (5, 1), 1), strided=False, adjoint=False)],
    "diagonal_scatter": [C(R(3, 3), R(3)), C(R(3, 3), R(2), 1), C(R(3, 3), R(2), offset=-1)],
}  # fmt: skip

points = R(2, 3, 5, 2, low=-1.2, high=1.2)
points3 = R(1, 2, 3, 2, 3, low=-1.2, high=1.2)
_, highest = F.max_pool2d(torch.randn(1, 2, 4, 4), 2, return_indices=True)
SAMPLING: Table = {
    "max_unpool1d": [C(R(1, 2, 2), index([0, 3], [1, 2])[None], 2)],
    "max_unpool2d": [on(F, C(R(1, 2, 2, 2), highest, 2)),
                     on(torch._C._nn, C(R(1, 2, 2, 2), highest, (4, 4)))],
    "max_unpool3d": [on(F, C(R(1, 2, 1, 2, 2), highest[:, :, None], (1, 2, 2))),
                     on(torch._C._nn, C(
                         R(1, 2, 1, 2, 2), highest[:, :, None], (1, 4, 4), (1, 2, 2), (0, 0, 0)))],
    "grid_sample": [
        C(image, points), C(image, points, "nearest"), C(image, points, "bicubic", "reflection"),
        C(image, points, padding_mode="border", align_corners=True), C(volume, points3),
        C(volume, points3, padding_mode="reflection"), C(R(0, 4, 5, 6), R(0, 3, 5, 2)),
    ],
    **each("grid_sampler grid_sampler_2d", [C(image, points, 0, 0, False)]),
    "grid_sampler_3d": [C(volume, points3, 0, 1, True)],
    "interpolate": [C(image, scale_factor=2), C(image, (3, 7), mode="bilinear"),
                    C(image, size=(7, 3), mode="bilinear", align_corners=True),
                    C(image, (7, 7), mode="bicubic", antialias=True),
                    C(image, (3, 4), mode="bilinear", antialias=True),
                    C(R(1, 2, 5), 7, mode="linear"), C(image, (3, 3), mode="area")],
    "upsample": [C(image, scale_factor=2), C(image, (3, 7), mode="bilinear", align_corners=True)],
    "avg_pool1d": [C(R(2, 3, 8), 2), C(R(2, 3, 8), 3, 2, 1)],
    "avg_pool2d": [C(image, 2), C(image, (2, 3), stride=1, padding=1, count_include_pad=False)],
    "avg_pool3d": [C(volume, 2)],
    "adaptive_avg_pool1d": [C(R(2, 3, 8), 1), C(R(2, 3, 8), 3)],
    "adaptive_avg_pool2d": [C(image, (1, 1)), C(image, (2, 3)), C(image, 2)],
    "adaptive_avg_pool3d": [C(volume, (1, 2, 3))],
}  # fmt: skip

# The interval in which a function is smooth, where it is not the whole line.
DOMAINS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), (0.1, 3.0)),
    "reciprocal": (0.5, 2.0), "log1p": (-0.9, 2.0), "asin": (-0.9, 0.9), "acos": (-0.9, 0.9),
    "tan": (-1.2, 1.2), "relu6": (-9, 9), "hardswish": (-5, 5), "hardsigmoid": (-5, 5),
}  # fmt: skip
UNARY = """
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan sinh cosh asin
    acos atan erf erfc abs absolute tanh sigmoid softsign tanhshrink log_sigmoid nan_to_num relu
    relu6 silu mish hardswish hardsigmoid selu
"""


def unary(name: str) -> list[Case]:
    low, high = DOMAINS.get(name, (0, 0))
    return [C(R(*s, low=low, high=high)) for s in ((3, 4), (), (5,), (0, 3))]


BROADCAST = [C(R(3, 4), R(3, 4)), C(R(3, 1), R(4)), C(R(), R(2, 3)), C(R(3, 4), 2.5),
             C(R(0, 3), R(3)),
             C(R(2, 3), index(1, 2, 3))]  # fmt: skip
QUOTIENT = [C(R(3, 4), R(3, 4, low=1, high=2)), C(R(3, 1), R(4, low=1, high=2)), C(R(2, 3), 2.5),
            C(index(1, 2, 3), R(2, 3, low=1, high=2)),
            C(R(3, 4), R(4, low=1, high=2), rounding_mode="floor")]  # fmt: skip
positive = R(3, 4, low=0.3, high=2)
CLAMP = [C(R(3, 4), -0.5, 0.5), C(R(3, 4), min=-0.5), C(R(3, 4), max=0.5),
         C(R(4, 4, ties=True), 0, 1),
         C(R(3, 4), R(3, 4), R(4)), C(R(3, 4), max=R(4)),
         but(C(R(5, 5, ties=True), R(5, 5, ties=True), R(5, 5, ties=True)),
             since="2.15")]  # fmt: skip
CHOICE = [C(R(3, 4), R(3, 4)), C(R(3, 1), R(4)),
          but(C(R(5, 5, ties=True), R(5, 5, ties=True)), since="2.15")]  # fmt: skip
DROPOUT = [on(F, C(R(3, 4), 0.5, True)), on(F, C(R(3, 4), 0.5, training=False)),
           on(F, C(R(3, 4), p=0.0)), on(F, C(R(3, 4), 1.0))]  # fmt: skip

ELEMENTWISE: Table = {
    **{name: unary(name) for name in UNARY.split()},
    "gelu": [*SHAPES, C(R(3, 4), approximate="tanh")],
    "leaky_relu": [*SHAPES, C(R(3, 4), 0.2), C(R(3, 4), negative_slope=0.3)],
    "celu": [*SHAPES, C(R(3, 4), 0.5), C(R(3, 4), alpha=1.5)],
    **each("threshold _threshold", [
        C(R(3, 4), 0.1, 20.0), C(R(), threshold=-0.5, value=0.0)]),
    "rrelu": [on(F, C(R(3, 4))), on(F, C(R(3, 4), 0.1, 0.4, True))],
    **each("alpha_dropout feature_alpha_dropout", [
        on(F, C(R(3, 4, 5), 0.4, True)), on(F, C(R(3, 4, 5))), on(F, C(R(3, 4), 1.0, True))]),
    "elu": [*SHAPES, C(R(3, 4), 0.5), C(R(3, 4), alpha=1.5)],
    "hardtanh": [*SHAPES, C(R(3, 4), -0.5, 0.7), C(R(3, 4), min_val=-0.1)],
    "softplus": [*SHAPES, C(R(3, 4), 2), C(R(3, 4), threshold=0.5)],
    "add": [*BROADCAST, C(R(3, 4), R(4), alpha=2), C(R(3, 4), 2, alpha=3)],
    **each("sub subtract", [*BROADCAST, C(R(3, 1), R(4), alpha=2)]),
    **each("mul multiply", [*BROADCAST, C(R(3, 4), mask34)]),
    **each("div divide", QUOTIENT),
    "true_divide": QUOTIENT[:-1],
    "pow": [C(positive, 2), C(positive, -1.5), C(R(3, 4), 3), C(R(3, 4), 0),
            C(R(3, 3, ties=True), 1),
            C(R(3, 3, ties=True), 2), C(positive, R(4)), on(torch, C(2.0, R(3))),
            C(R(3, 4), index(0, 1, 2, 3)), C(R(3, 3, ties=True), index(0, 1, 2)),
            C(torch.tensor([0.0, 2.0]), R(2, low=1, high=2))],
    "__rsub__": [C(R(3, 4), 2.0), C(R(3, 1), R(4))],
    "__rdiv__": [C(positive, 2.0)],
    "__rpow__": [C(R(3, 4), 2.0), C(R(3, 4), 3)],
    "rsub": [C(R(3, 4), 2.0), C(R(3, 1), R(4)), C(R(3, 1), R(4), alpha=2)],
    "addcmul": [C(R(3, 4), R(3, 4), R(3, 4)), C(R(3, 4), R(4), R(3, 1), value=0.5)],
    "addcdiv": [C(R(3, 4), R(3, 4), positive), C(R(3, 4), R(4), positive, value=0.5)],
    "lerp": [C(R(3, 4), R(3, 4), 0.3), C(R(3, 4), R(4), R(3, 4)), C(R(3, 4), R(3, 4), weight=R())],
    **each("clamp clip", CLAMP),
    "clamp_min": [C(R(3, 4), 0.2), C(R(5, 5, ties=True), R(5, 5, ties=True))],
    "clamp_max": [C(R(3, 4), 0.2), C(R(5, 5, ties=True), R(5, 5, ties=True))],
    **each("maximum minimum fmax fmin", CHOICE),
    "dropout": [*DROPOUT, on(torch, C(R(3, 4), 0.5, True)), on(torch, C(R(3, 4), 0.5, False))],
    "dropout1d": [on(F, C(R(2, 3, 4), 0.5))],
    "dropout2d": [on(F, C(image, 0.5)), on(F, C(image, 0.5, False))],
    "dropout3d": [on(F, C(volume, 0.5))],
}  # fmt: skip

filters = R(6, 4, 3, 3)
flat, starts = index(0, 2, 4, 2, 1), index(0, 2, 2, 4)  # of bags, one of which is empty
bounds = index(0, 2, 2, 5)
ends = torch.tensor([2, 2, 6], dtype=torch.int32)  # of groups, one of which is empty
LINEAR: Table = {
    **each("matmul __matmul__", [
        C(R(3, 4), R(4, 5)), C(R(4), R(4)), C(R(4), R(4, 5)), C(R(3, 4), R(4)),
            C(R(2, 3, 4), R(4, 5)),
        C(R(2, 1, 3, 4), R(5, 4, 2)), C(R(0, 4), R(4, 5)), C(R(3, 0), R(0, 5)),
            C(R(1, 1), R(1, 1))]),
    "__rmatmul__": [C(R(4, 5), R(3, 4)), C(R(4), R(4))],
    "mm": [C(R(3, 4), R(4, 5)), C(R(0, 4), R(4, 5))], "bmm": [C(R(2, 3, 4), R(2, 4, 5))],
    "mv": [C(R(3, 4), R(4))], "dot": [C(R(4), R(4))], "vdot": [C(R(4), R(4))],
    "inner": [C(R(3, 4), R(5, 4)), C(R(4), R(4))], "outer": [C(R(3), R(4))], "ger": [C(R(3), R(4))],
    "kron": [C(R(2, 3), R(3, 2)), C(R(2), R(3))],
    "linear": [C(R(2, 3, 4), R(5, 4), R(5)), C(R(3, 4), R(5, 4)), C(R(4), R(5, 4), R(5)),
               C(R(0, 4), R(5, 4), R(5)), C(R(3, 4), R(4)), C(R(3, 0), R(5, 0), R(5)),
               C(R(3, 4), R(0, 4)), C(R(2, 3, 4), weight=torch.ones(5, 4, dtype=torch.float64))],
    "bilinear": [C(R(2, 3), R(2, 4), R(5, 3, 4), R(5)), C(R(2, 3), R(2, 4), R(5, 3, 4), None)],
    "addmm": [C(R(5), R(3, 4), R(4, 5)), C(R(3, 5), R(3, 4), R(4, 5), beta=0.5, alpha=2)],
    "addmv": [C(R(3), R(3, 4), R(4)), C(R(3), R(3, 4), R(4), beta=2)],
    "addr": [C(R(3, 4), R(3), R(4)), C(R(3, 4), R(3), R(4), alpha=-1)],
    "baddbmm": [C(R(2, 3, 5), R(2, 3, 4), R(2, 4, 5)),
                C(R(5), R(2, 3, 4), R(2, 4, 5), beta=0.5, alpha=2)],
    "addbmm": [C(R(3, 5), R(2, 3, 4), R(2, 4, 5)), C(R(3, 5), R(2, 3, 4), R(2, 4, 5), beta=0.5)],
    "einsum": [C("ij,jk->ik", R(3, 4), R(4, 5)), C("bhid,bhjd->bhij", R(2, 2, 3, 4), R(2, 2, 5, 4)),
               C("ii->i", R(3, 3)), C("i,i,i->", R(4), R(4), R(4)),
                   C("...i,ji", R(2, 3, 4), R(5, 4)),
               C("ij,j->i", [R(3, 4), R(4)])],
    "tensordot": [C(R(2, 3, 4), R(3, 4, 5)), C(R(2, 3), R(3, 2), dims=([0, 1], [1, 0])),
                  C(R(2), R(3), 0)],
    "conv1d": [C(R(2, 4, 7), R(6, 4, 3), R(6)), C(R(2, 4, 7), R(4, 1, 3), None, 2, 1, 1, 4),
               C(R(4, 7), R(6, 4, 3), R(6), padding="same")],
    "conv2d": [C(image, filters, R(6)), C(image, filters, R(6), stride=2, padding=1),
               C(image, filters, dilation=2), C(image, R(4, 2, 3, 3), R(4), (1, 2), (2, 0), 1, 2),
               C(image, R(4, 1, 3, 3), groups=4, padding="same"), C(R(0, 4, 5, 6), filters, R(6)),
               C(R(2, 3, 8, 8), R(5, 3, 4, 4), R(5), stride=4), C(R(4, 5, 6), filters, R(6)),
               C(R(2, 2, 35, 49), R(5, 2, 16, 16), R(5), stride=16),  # patches: see ops/linear
               C(R(2, 2, 16, 48), R(3, 2, 16, 16), None, (16, 16), "valid")],
    "conv3d": [C(volume, R(3, 2, 2, 2, 2), R(3)),
               C(R(2, 1, 16, 9, 8), R(3, 1, 8, 8, 8), R(3), 8)],
    "conv_transpose1d": [C(R(2, 4, 7), R(4, 3, 3), R(3), stride=2, output_padding=1)],
    "conv_transpose2d": [C(image, R(4, 3, 3, 3), R(3)),
                         C(image, R(4, 2, 2, 2), None, 2, 1, 0, 2, 1)],
    "conv_transpose3d": [C(volume, R(2, 3, 2, 2, 2), R(3))],
    # backward gives the padding row no gradient, but its tangent counts: not an adjoint pair
    "embedding": [C(rows, R(5, 3)), C(index(1, 1), R(5, 3)),
                  but(C(rows, R(5, 3), 0), adjoint=False)],
    "embedding_bag": [
        C(rows, R(5, 3)), C(rows, R(5, 3), mode="sum", per_sample_weights=R(3, 4)),
        C(flat, R(5, 3), starts), C(flat, R(5, 3), bounds, mode="max", include_last_offset=True),
        C(rows, R(5, 3), mode="max"), C(flat, R(5, 3), starts, mode="sum", padding_idx=2),
    ],
    **each("_grouped_mm grouped_mm", [
        but(C(R(6, 8), R(3, 8, 4), offs=ends), dtype=torch.float32, strided=False),
        but(C(R(3, 4, 8), R(3, 8, 4)), dtype=torch.float32, strided=False)]),
}  # fmt: skip

running_mean, running_var = torch.linspace(-1, 1, 4).double(), torch.linspace(0.5, 2, 4).double()
NORM: Table = {
    "layer_norm": [C(R(2, 3, 8), (8,), R(8), R(8)), C(R(2, 3, 4), (3, 4), R(3, 4), R(3, 4)),
                   C(R(3, 8), (8,)), C(R(3, 8), (8,), R(8)), C(R(3, 8), [8], None, R(8)),
                   C(R(0, 8), (8,), R(8), R(8)),
                   C(R(3, 7), (7,), R(7), R(7), 1e-2), C(R(3, 8), (8,), weight=R(8), eps=1e-6)],
    "rms_norm": [C(R(2, 3, 8), (8,), R(8)), C(R(2, 3, 4), (3, 4), R(3, 4)), C(R(3, 8), (8,)),
                 C(R(3, 7), (7,), R(7), 1e-2), C(R(3, 8), (8,), weight=R(8), eps=1e-6),
                 C(R(0, 8), (8,), R(8))],
    "group_norm": [C(image, 2, R(4), R(4)), C(image, 4), C(image, 1, R(4)),
                   but(C(image, 2, None, R(4)), since="2.15"),
                   C(R(2, 6), 2, R(6), R(6)), C(R(0, 4, 3), 2, R(4), R(4)), C(image, 2, eps=0.1)],
    "batch_norm": [*(on(F, c) for c in (C(image, running_mean, running_var, R(4), R(4)),
                   C(image, running_mean, running_var), C(R(3, 4), running_mean, running_var, R(4)),
                   C(image, running_mean, running_var, weight=R(4), bias=R(4), eps=0.1))),
                   on(torch, C(image, R(4), R(4), running_mean, running_var, False, 0.1, 1e-5,
                       False)),
                   *(on(F, c) for c in (C(image, None, None, R(4), R(4), True),
                   C(R(3, 4), None, None, training=True), C(R(1, 4, 9), None, None, R(4),
                       training=True)))],
    "instance_norm": [C(image), C(image, weight=R(4), bias=R(4)), C(image, None, None, R(4)),
                      C(image, running_mean, running_var, R(4), R(4), use_input_stats=False)],
    "_weight_norm": [C(R(3, 4), R(3, 1)), C(R(3, 4), R(1, 4), 1), C(R(3, 4, 2), R(3, 1, 1)),
                     C(R(3, 4), R(), -1)],
    "normalize": [C(R(3, 4)), C(R(3, 4), dim=0), C(R(3, 4), 2.0, -1), C(R(2, 3, 4), dim=(1, 2)),
                  C(R(3, 4), eps=2.0)],
}  # fmt: skip

POOL = [(1,), (3, 2, 1), (2, 2, 0, 1, True), (2, 1, 0, 2)]
EXTREME = [C(R(3, 4)), C(R(3, 4), 1), C(R(3, 4), 0, True), C(R(3, 4), dim=-1, keepdim=True),
           C(R(5, 5, ties=True)), C(R(1, 4), 0)]  # fmt: skip
SPREAD = [C(R(3, 4)), C(R(3, 4), 1), C(R(3, 4), (0, 1)), C(R(3, 4), -1, False, True),
          C(R(3, 4), unbiased=False), C(R(3, 4), dim=0, keepdim=True), C(R(3, 4), False),
          C(R(3, 4), (1,), False), C(R(1, 3), 1)]  # fmt: skip
NORMS = [
    C(R(3, 4)),
    C(R(3, 4), dim=1),
    C(R(3, 4), 2, 1, True),
    C(R(4), 2),
    C(R(2, 3, 4), dim=(0, 2)),
]
REDUCTION: Table = {
    "softmax": [C(R(3, 4), -1), C(R(3, 4), dim=0), C(R(2, 3, 4), 1), C(R(0, 4), -1), C(R(3, 1), 1),
                C(R(3, 4), dim=1, dtype=torch.float32)],
    "log_softmax": [C(R(3, 4), -1), C(R(3, 4), dim=0), C(R(0, 4), 1),
                    C(R(3, 4), dim=1, dtype=torch.float32)],
    "logsumexp": [C(R(3, 4), 1), C(R(3, 4), (0, 1)), C(R(3, 4), dim=-1, keepdim=True),
                  C(R(0, 4), 1)],
    "max": EXTREME, "min": EXTREME,
    "topk": [C(R(3, 4), 2), C(R(3, 4), 2, 0, False), C(R(3, 4), k=1, dim=1)],
    "sort": [C(R(3, 4)), C(R(3, 4), 0, True), C(R(3, 4), descending=True)],
    **each("amax amin", [C(R(3, 4)), C(R(3, 4), 1), C(R(3, 4), (0, 1), keepdim=True),
                    C(R(5, 5, ties=True), dim=-1), C(R(5, 5, ties=True)),
                        C(R(2, 1, 3), dim=(0, 2))]),
    "max_pool1d": [C(R(2, 3, 8), *p) for p in POOL],
    "max_pool2d": [*(C(image, *p) for p in POOL), C(R(3, 5, 6), (2, 3), stride=1),
                   C(R(1, 1, 5, 5, ties=True), 3)],
    "max_pool3d": [C(volume, *p) for p in POOL[:2]],
    "var": [*SPREAD, C(R(3, 1), -1, False)],
    # of one number: torch's JVP is 0, its backward NaN
    "std": [*SPREAD, but(C(R(3, 1), -1, False), adjoint=False)],
    "norm": [*NORMS, C(R(3, 4), "fro", 0)],
    "linalg_vector_norm": NORMS,
    "linalg_norm": [C(R(3, 4)), C(R(3, 4), dim=1), C(R(4), 2), C(R(2, 3, 4), dim=(0, 2)),
                    C(R(3, 4), None, 1, keepdim=True)],
}  # fmt: skip


labels = index([1, 0, -1, 2], [2, -1, 0, 0], [0, 1, 2, 3])
LOSS: Table = {
    "multi_margin_loss": [C(R(3, 4), index(0, 3, 1)), C(R(4), index(2)[0], 2, reduction="sum"),
                          C(R(3, 4), index(0, 3, 1), 1, 0.5, torch.arange(4.0).double()),
                          C(R(3, 4), index(0, 3, 1), reduction="none"),
                          C(R(3, 4), index(0, 3, 1), size_average=False)],
    "ctc_loss": [C(R(5, 2, 4), index([1, 2], [3, 1]), index(5, 4), index(2, 1)),
                 C(R(5, 2, 4), index([1, 2], [3, 1]), (5, 4), (2, 1), reduction="none"),
                 C(R(5, 4), index(1, 2), index(5)[0], index(2)[0], 3, "sum", True)],
    "multilabel_margin_loss": [C(R(3, 4), labels), C(R(4), labels[0], reduction="sum"),
                               C(R(3, 4), labels, reduction="none"),
                               C(R(3, 4), labels, reduce=False)],
}  # fmt: skip

CASES: Table = {
    **SHAPE,
    **SAMPLING,
    **ELEMENTWISE,
    **LINEAR,
    **NORM,
    **REDUCTION,
    **ATTENTION,
    **LOSS,
}
CASES = {name: CASES.get(name, []) + COMPLEX.get(name, []) for name in CASES | COMPLEX}
ALIASES = {
    "special_exp2": "exp2", "special_expm1": "expm1", "special_log1p": "log1p",
        "special_erf": "erf",
    "special_erfc": "erfc", "special_expit": "sigmoid", "special_logsumexp": "logsumexp",
    "special_softmax": "softmax", "special_log_softmax": "log_softmax",
}  # fmt: skip
CASES |= {alias: CASES[name] for alias, name in ALIASES.items()}
