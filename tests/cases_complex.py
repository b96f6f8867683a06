"""Calls with complex numbers: the functions that make them, and the rules that hold for them."""

from __future__ import annotations

import torch
from case import C, R, Table, Z, but, each, index, on
from torch import Tensor

mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
window = torch.hann_window(8, dtype=torch.float64)
radius = R(2, 3, low=0.5, high=2)
BOTH = [C(R(2, 6)), C(Z(2, 6)), C(R(2, 6), dim=0), C(Z(2, 6), 4)]
TO_REAL = [C(Z(2, 6)), C(Z(2, 6), 5, norm="ortho")]
FROM_REAL = [C(R(2, 6)), C(R(2, 6), 5, 0, "forward")]
ONE = [C(Z(2, 3)), C(Z()), C(Z(0, 3))]
TWO = [C(Z(2, 3), Z(2, 3)), C(R(2, 1), Z(3)), C(Z(2, 3), R(3)), C(Z(2, 3), 2.5), C(R(2, 3), 1j)]


# torch has no backward (adjoint=False) for some that it has a forward derivative for.
COMPLEX: Table = {
    **each("fft_fft fft_ifft", BOTH),
    **each("fft_rfft fft_ihfft", FROM_REAL),
    **each("fft_irfft fft_hfft", TO_REAL),
    **each("fft_fft2 fft_ifft2 fft_fftn fft_ifftn", [C(R(2, 3, 4)), C(Z(3, 4), (4, 4))]),
    **each("fft_rfft2 fft_rfftn fft_ihfft2 fft_ihfftn", [C(R(2, 3, 4)), C(R(3, 4), norm="ortho")]),
    **each("fft_irfft2 fft_irfftn fft_hfft2 fft_hfftn", [C(Z(2, 3, 4)), C(Z(3, 4), (3, 5))]),
    **each("fft_fftshift fft_ifftshift", [C(R(2, 5)), C(Z(2, 5), 1)]),
    "stft": [C(R(2, 20), 8, return_complex=True),
             C(R(20), 8, 3, window=window, return_complex=True),
             C(Z(20), 8, return_complex=True, onesided=False)],
    "istft": [C(Z(2, 5, 6), 8, window=window), C(Z(5, 6), 8, length=12)],
    "view_as_complex": [but(C(R(2, 3, 2)), strided=False)], "view_as_real": [C(Z(2, 3))],
    "complex": [C(R(2, 3), R(2, 3)), C(R(3), torch.ones(2, 3, dtype=torch.float64))],
    # a negative radius has a wrong gradient in torch
    "polar": [C(radius, R(2, 3)), C(radius, R(3)), C(torch.ones(3, dtype=torch.float64), R(3))],
    "angle": [C(R(2, 3)), *ONE],
    **each("imag conj_physical Tensor.imag Tensor.real real conj adjoint", [C(Z(2, 3))]),
    **each("cfloat cdouble", [on(Tensor, C(R(2, 3))), on(Tensor, C(Z(2, 3)))]),
    **each("exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan sinh cosh "
           "asin acos atan abs absolute neg clone", ONE),
    **each("add sub mul", TWO), "rsub": TWO[:2], "div": [C(Z(2, 3), Z(3)), C(R(2, 3), Z(3))],
    "pow": [C(Z(2, 3), 2), C(Z(2, 3), Z(3)), C(Z(2, 3), 0)],
    "addcmul": [C(Z(2, 3), Z(3), Z(2, 1), value=2)], "addcdiv": [C(Z(2, 3), Z(3), Z(2, 1))],
    "lerp": [C(Z(2, 3), Z(2, 3), 0.3)],
    **each("matmul mm", [C(Z(3, 4), Z(4, 2))]), **each("vdot dot outer", [C(Z(4), Z(4))]),
    "bmm": [C(Z(2, 3, 4), Z(2, 4, 5))], "addmm": [C(Z(5), Z(3, 4), Z(4, 5), alpha=1j)],
    "linear": [C(Z(2, 3, 4), Z(5, 4), Z(5))], "einsum": [C("ij,kj->ik", Z(2, 3), Z(4, 3))],
    "tensordot": [C(Z(2, 3), Z(3, 2), 1)],
    "embedding": [but(C(index(0, 2), Z(3, 4)), adjoint=False)],
    "conv1d": [C(Z(2, 4, 7), Z(6, 4, 3), Z(6))], "conv2d": [C(Z(1, 2, 4, 4), Z(3, 2, 2, 2))],
    **each("cat stack", [C([Z(2, 3), Z(2, 3)]), C([R(2, 3), Z(2, 3)])]),
    **each("sum mean cumsum", [C(Z(2, 3), 1)]), "pad": [C(Z(2, 3), (1, 2))],
    "where": [on(torch, C(mask, Z(2, 3), Z(3))), on(torch, C(mask, R(2, 3), Z(3)), adjoint=False)],
    "masked_fill": [C(Z(2, 3), mask, 1j)], "view": [but(C(Z(2, 6), 3, 4), strided=False)],
    "__getitem__": [C(Z(2, 3), mask), C(Z(2, 3), (slice(None), 1))],
    "index_add": [C(Z(4, 3), 0, index(2, 2), Z(2, 3))],
    "select_scatter": [but(C(Z(4, 3), Z(4), 1, 2), adjoint=False)],
}  # fmt: skip
