"""The reference of merge and gram: plain torch, any device, the same bits as the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def merge_(
    bases: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    alphas: Sequence[Sequence[float]],
) -> None:
    """``bases[i] ← round(bases[i] + Σ_k alphas[i][k] · vectors[i][k])``; see `ops.merge.merge_`."""
    for i, (base, row) in enumerate(zip(bases, vectors, strict=True)):
        _check("merge_", f"bases[{i}]", base)
        for k, vector in enumerate(row):
            _check("merge_", f"vectors[{i}][{k}]", vector, base, f"bases[{i}]")
    _check_disjoint(bases)
    owned = {base.untyped_storage().data_ptr() for base in bases if base.numel()}
    safe = [
        [v.clone() if v.untyped_storage().data_ptr() in owned else v for v in row]
        for row in vectors
    ]
    for base, row, factors in zip(bases, safe, alphas, strict=True):
        wide = torch.float64 in (base.dtype, *(v.dtype for v in row))
        dtype = torch.float64 if wide else torch.float32
        total = base.to(dtype, copy=True)
        for vector, alpha in zip(row, factors, strict=True):
            # Product and sum rounded separately: add_(alpha=) may fuse them, the kernels never do.
            total += vector.to(dtype) * alpha
        base.copy_(round_once(total, base.dtype))


def gram(rows: Sequence[Sequence[Tensor]], owners: Sequence[Sequence[int]], size: int) -> Tensor:
    """``G[owners[r][a], owners[r][b]] = Σ_r ⟨rows[r][a], rows[r][b]⟩``; see `ops.merge.gram`."""
    total = torch.zeros(size, size, dtype=torch.float64, device=rows[0][0].device)
    for r, (row, columns) in enumerate(zip(rows, owners, strict=True)):
        for k, tensor in enumerate(row):
            _check("gram", f"tensors[{r}][{k}]", tensor, row[0], f"tensors[{r}][0]")
        wide = [tensor.to(torch.float64).reshape(-1) for tensor in row]
        for a, i in enumerate(columns):
            for b, j in enumerate(columns[: a + 1]):
                total[i, j] += _dot(wide[a], wide[b])
    return total + total.tril(-1).T


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ by rows: torch shares rows out to threads, but the sum of one is one thread's."""
    terms = a * b
    while terms.numel() > 1:
        terms = F.pad(terms, (0, -terms.numel() % 4096)).view(-1, 4096).sum(1)
    return terms.sum()


def round_once(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` (float32 or float64) in `dtype`, to nearest even, never through two roundings.

    torch converts float64 to a half by way of float32, which rounds twice. Rounding to odd first
    makes the second rounding the only one that counts (Boldo and Melquiond 2008).
    """
    if total.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        nearest = total.float()
        other = torch.where(nearest.double() < total, torch.inf, -torch.inf).to(torch.float32)
        even = nearest.view(torch.int32) % 2 == 0
        inexact = (nearest.double() != total) & ~total.isnan()
        total = torch.where(inexact & even, torch.nextafter(nearest, other), nearest)
    return total.to(dtype)


def _check(
    op: str, name: str, tensor: Tensor, like: Tensor | None = None, like_name: str = ""
) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: {name} has layout {tensor.layout}, expected a dense tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected float64, float32, float16 or bfloat16"
        )
    if like is not None and tensor.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, {like_name} has {tuple(like.shape)}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}")


def _check_disjoint(bases: Sequence[Tensor]) -> None:
    """Raise when two bases, or two elements of one, share memory: byte numbers must be unique."""
    by_storage: dict[int, list[int]] = {}
    for i, base in enumerate(bases):
        if base.numel():
            by_storage.setdefault(base.untyped_storage().data_ptr(), []).append(i)
    for members in by_storage.values():
        first = bases[members[0]]
        if len(members) == 1 and first.is_contiguous():
            continue
        unit = min(bases[i].element_size() for i in members)
        units = torch.arange(first.untyped_storage().nbytes() // unit, device=first.device)
        used = torch.zeros_like(units, dtype=torch.bool)
        for i in members:
            base = bases[i]
            step = base.element_size() // unit
            strides = (*(s * step for s in base.stride()), 1)
            offset = base.storage_offset() * step
            places = units.as_strided((*base.shape, step), strides, offset).reshape(-1)
            if used[places].any() or places.unique().numel() < places.numel():
                raise ValueError(
                    f"merge_: bases[{i}] of shape {tuple(base.shape)} shares memory with itself or "
                    "with another base; merge into a clone()"
                )
            used[places] = True
