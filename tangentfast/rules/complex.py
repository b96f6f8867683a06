"""Complex numbers from real ones and back, and Fourier transforms.

The derivative is that of the real and imaginary parts: of y = z conj(z) along dz it is
2 Re(conj(z) dz), as ``torch.func.jvp`` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast.rules.linear import product_rule
from tangentfast.rules.registry import Jvp, add, evaluate, fused, linear_in_first, rule

_transforms = [
    f"{i}{kind}{n}" for kind in ("fft", "rfft", "hfft") for i in ("", "i") for n in ("", "2", "n")
]
linear_in_first(
    *(getattr(torch.fft, name) for name in _transforms),
    torch.fft.fftshift,
    torch.fft.ifftshift,
    *("imag", "conj_physical", "cfloat", "cdouble"),
    Tensor.imag.__get__,  # type: ignore[attr-defined]
)


# A tangent may have other strides than its primal, or be a conjugate that is not yet resolved.
@rule("view_as_complex", complex=True)
def view_as_complex(input: Tensor) -> tuple[Tensor, Jvp]:
    return torch.view_as_complex(input), lambda dx: torch.view_as_complex(dx.contiguous())


@rule("view_as_real", complex=True)
def view_as_real(input: Tensor) -> tuple[Tensor, Jvp]:
    return torch.view_as_real(input), lambda dx: torch.view_as_real(dx.resolve_conj())


@rule("complex", complex=True)
def complex_(real: Tensor, imag: Tensor) -> tuple[Tensor, Jvp]:
    def jvp(dreal: Tensor | None, dimag: Tensor | None) -> Tensor:
        dreal = torch.zeros_like(real) if dreal is None else dreal
        dimag = torch.zeros_like(imag) if dimag is None else dimag
        return torch.complex(dreal, dimag)

    return torch.complex(real, imag), jvp


@rule("polar", complex=True)
def polar(abs: Tensor, angle: Tensor) -> tuple[Tensor, Jvp]:
    y = torch.polar(abs, angle)

    def jvp(dabs: Tensor | None, dangle: Tensor | None) -> Tensor | None:
        outwards = None if dabs is None else torch.polar(*torch.broadcast_tensors(dabs, angle))
        return add(outwards, None if dangle is None else 1j * dangle * y)

    return y, jvp


@rule("angle", complex=True)
def angle(input: Tensor) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor) -> Tensor | None:
        if not input.is_complex():
            return None  # 0 or π
        return torch.where(input == 0, 0, (dx / input).imag)  # 0 at 0, as autograd has it

    return torch.angle(input), jvp


@rule("stft", complex=True)
def stft(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> tuple[Tensor, Jvp]:
    """Linear in the signal and in the window."""
    newer = {} if align_to_window is None else {"align_to_window": align_to_window}

    def product(input: Tensor, window: Tensor | None) -> Tensor:
        return torch.stft(
            input, n_fft, hop_length, win_length, window, center, pad_mode, normalized, onesided,
            return_complex, **newer,
        )  # fmt: skip

    def jvp(dx: Tensor | None, *rest: Tensor | None) -> Any:
        return product_rule(product, (input, window), (dx, rest[3]))

    return product(input, window), jvp


@fused("istft", complex=True)
def istft(
    tangents: Sequence[Any],
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> tuple[Tensor, list[Any]] | None:
    if any(row is not None and row[4] is not None for row in tangents):
        return None  # it divides by the squares of the window
    options = (n_fft, hop_length, win_length, window, center, normalized, onesided, length)
    dys = evaluate(lambda dx, *_: torch.istft(dx, *options, return_complex), tangents)
    return torch.istft(input, *options, return_complex), dys
