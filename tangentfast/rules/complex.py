"""Complex numbers from real ones and back, and Fourier transforms.

The derivative is that of the real and imaginary parts: of y = z conj(z) along dz it is
2 Re(conj(z) dz), as ``torch.func.jvp`` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tangentfast.rules.linear import product
from tangentfast.rules.registry import (
    Jvp,
    jointly,
    jointly_linear,
    linear_in_first,
    rule,
)

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


jointly_linear("real imag", (0, 1), "complex")


@rule("polar", complex=True)
def polar(abs: Tensor, angle: Tensor) -> tuple[Tensor, Jvp, Jvp]:
    y = torch.polar(abs, angle)
    return (
        y,
        lambda dabs: torch.polar(*torch.broadcast_tensors(dabs, angle)),
        lambda dangle: 1j * dangle * y,
    )


@rule("angle", complex=True)
def angle(input: Tensor) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor) -> Tensor | None:
        if not input.is_complex():
            return None  # 0 or π
        return torch.where(input == 0, 0, (dx / input).imag)  # 0 at 0, as autograd has it

    return torch.angle(input), jvp


@jointly("stft", complex=True)
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

    def transform(input: Tensor, window: Tensor | None) -> Tensor:
        return torch.stft(
            input, n_fft, hop_length, win_length, window, center, pad_mode, normalized, onesided,
            return_complex, **newer,
        )  # fmt: skip

    y, jvp = product(transform, input, window)
    return y, lambda *row: jvp(row[0], row[4])


@rule("istft", complex=True)
def istft(
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
) -> tuple[Tensor, Jvp]:
    """Linear in the spectrogram; it divides by the squares of the window."""
    options = (n_fft, hop_length, win_length, window, center, normalized, onesided, length)
    return (
        torch.istft(input, *options, return_complex),
        lambda dx: torch.istft(dx, *options, return_complex),
    )
