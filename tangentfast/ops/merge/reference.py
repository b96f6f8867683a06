"""The reference of merge and gram: plain torch, any device, the same bits as the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.memory import check_disjoint

T = TypeVar("T")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PART = 65536  # elements that are merged at a time: their sums stay in a cache
SPLIT = 2.0**27 + 1  # of a float64 into two of 26 digits
DROPPED = 2**29 - 1  # bits of a float64 that a float32 has not


def split(entries: Sequence[T], counts: Sequence[int]) -> list[list[T]]:
    """Rows of counts[0], counts[1], ... consecutive entries."""
    rest = iter(entries)
    return [list(islice(rest, count)) for count in counts]


def prepare(bases: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Check what merge_ is called with; the vectors, copied where they share memory with a base."""
    for i, (base, row) in enumerate(zip(bases, vectors, strict=True)):
        _check("merge_", f"bases[{i}]", base)
        if base.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"merge_: bases[{i}] was made in inference mode and may be written there alone; "
                "merge into a clone() or under torch.inference_mode()"
            )
        for k, vector in enumerate(row):
            _check("merge_", f"vectors[{i}][{k}]", vector, base, f"bases[{i}]")
    check_disjoint(bases)
    owned = {base.untyped_storage().data_ptr() for base in bases if base.numel()}
    return [
        [v.clone() if v.untyped_storage().data_ptr() in owned else v for v in row]
        for row in vectors
    ]


def merge_(
    bases: Sequence[Tensor],
    vectors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float],
) -> None:
    """``bases[i] ← round(bases[i] + Σ_k alphas[k] · vectors[k])``; see `ops.merge.merge_`.

    What is needed to compute is there before the first write.
    """
    rows = prepare(bases, split(vectors, counts))
    most = min(PART, max((base.numel() for base in bases), default=0))
    device = bases[0].device if bases else "cpu"
    scratch = torch.empty(8, most, dtype=torch.float64, device=device)
    for base, row, factors in zip(bases, rows, split(alphas, counts), strict=True):
        if not row:
            continue
        for part, *terms in _parts([base, *row]):
            if base.dtype == torch.float64:
                _merge_pairs(part, terms, factors, scratch)
            else:
                _merge(part, terms, factors, scratch)


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same parts of tensors of one shape, as views of PART elements at most."""
    if tensors[0].numel() <= PART:
        if tensors[0].numel():
            yield tensors
        return
    d = max(range(tensors[0].dim()), key=tensors[0].size)
    half = tensors[0].size(d) // 2
    for start, length in ((0, half), (half, tensors[0].size(d) - half)):
        yield from _parts([t.narrow(d, start, length) for t in tensors])


def _merge(
    base: Tensor, terms: Sequence[Tensor], factors: Sequence[float], scratch: Tensor
) -> None:
    """Terms first, base last, in float32 among halves and in float64 otherwise."""
    halves = all(t.element_size() == 2 for t in (base, *terms))
    buffers = scratch.view(torch.float32) if halves else scratch
    total, term, low = (r[: base.numel()].view(base.shape) for r in buffers[:3])
    for k, (vector, alpha) in enumerate(zip(terms, factors, strict=True)):
        # Product and sum rounded separately: add_(alpha=) may fuse them, the kernels never do.
        term.copy_(vector).mul_(alpha)
        total = total.copy_(term) if k == 0 else total.add_(term)
    term.copy_(base).add_(total)
    base.copy_(term if halves or base.dtype == torch.float32 else to_odd_(term, low))


def _merge_pairs(
    base: Tensor, terms: Sequence[Tensor], factors: Sequence[float], scratch: Tensor
) -> None:
    """The same in pairs hi + lo of float64; the formulas are those of csrc/merge/formula.h."""
    hi, lo, v, p, s, t, error, rest = (r[: base.numel()].view(base.shape) for r in scratch)
    hi.fill_(-0.0)
    lo.zero_()
    for vector, alpha in zip(terms, factors, strict=True):
        torch.mul(v.copy_(vector), alpha, out=p)
        _two_sum(hi, p, s, t, error)
        lo.add_(error)
        hi.copy_(s)
        _product_error(v, alpha, p, s, t, error, rest)
        lo.add_(error)
    _two_sum(v.copy_(base), hi, s, t, error)
    error.add_(lo).nan_to_num_(0, 0, 0)  # NaN is what is left of an infinity
    some = rest.view(-1).view(torch.bool)[: base.numel()].view(base.shape)
    torch.ne(error, 0, out=some)
    base.copy_(torch.where(some, error.add_(s), s, out=t))  # a rest of +0 would lose the sign of -0


def _two_sum(x: Tensor, y: Tensor, s: Tensor, t: Tensor, error: Tensor) -> None:
    """s + error = x + y, exactly (Knuth 1969)."""
    torch.add(x, y, out=s)
    torch.sub(s, x, out=t)
    torch.sub(x, torch.sub(s, t, out=error), out=error)
    error.add_(torch.sub(y, t, out=t))


def _product_error(
    v: Tensor, alpha: float, p: Tensor, high: Tensor, low: Tensor, error: Tensor, scratch: Tensor
) -> None:
    """p + error = alpha v, exactly (Dekker 1971): without a fused multiply-add, from halves."""
    torch.mul(v, SPLIT, out=low)
    torch.sub(low, v, out=high)
    torch.sub(low, high, out=high)
    torch.sub(v, high, out=low)
    alpha_high = alpha * SPLIT - (alpha * SPLIT - alpha)
    torch.mul(high, alpha_high, out=error).sub_(p)
    for part, factor in (
        (low, alpha_high),
        (high, alpha - alpha_high),
        (low, alpha - alpha_high),
    ):
        error.add_(torch.mul(part, factor, out=scratch))
    error.nan_to_num_(0, 0, 0)  # a number too large to be split: its product is rounded


def gram(
    tensors: Sequence[Tensor], counts: Sequence[int], owners: Sequence[int], size: int
) -> Tensor:
    """``G[owners[r][a], owners[r][b]] = Σ_r ⟨rows[r][a], rows[r][b]⟩``, in rows of `counts`; see
    `ops.merge.gram`.
    """
    total = torch.zeros(size, size, dtype=torch.float64, device=tensors[0].device)
    rows = zip(split(tensors, counts), split(owners, counts), strict=True)
    for r, (row, columns) in enumerate(rows):
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


def to_odd_(total: Tensor, low: Tensor) -> Tensor:
    """`total` (float64) in place to the 24 digits of float32, rounded to odd.

    torch converts float64 to a half by way of float32, which rounds twice. After rounding to odd
    the second rounding is the only one that counts (Boldo and Melquiond 2008). `low` is scratch.
    """
    bits, rest = total.view(torch.int64), low.view(torch.int64)
    torch.bitwise_and(bits, DROPPED, out=rest)
    rest.ne_(0).mul_(DROPPED + 1)
    bits.bitwise_and_(~DROPPED).bitwise_or_(rest)
    return total


def _check(
    op: str, name: str, tensor: Tensor, like: Tensor | None = None, like_name: str = ""
) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        got = "meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{op}: {name} is {got}, expected a dense tensor with memory")
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
