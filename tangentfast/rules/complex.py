"""Complex numbers from real ones and back, and Fourier transforms.

The derivative is that of the real and imaginary parts: of y = z conj(z) along dz it is
2 Re(conj(z) dz), as ``torch.func.jvp`` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tangentfast.rules.registry import Jvp, add, linear_in_first, rule

_transforms = [
    f"{i}{kind}{n}" for kind in ("fft", "rfft", "hfft") for i in ("", "i") for n in ("", "2", "n")
]
linear_in_first(
    *(getattr(torch.fft, name) for name in _transforms),
    torch.fft.fftshift,
    torch.fft.ifftshift,
    *("stft", "istft", "imag", "conj_physical", "cfloat", "cdouble"),
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
