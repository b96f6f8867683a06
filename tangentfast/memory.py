"""Who shares memory with whom: ties between tensors, and overlaps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, each rank holding a part."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, on the same memory; other tensors themselves."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients, to_local() would make a view in the graph
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def dispatches(tensor: Tensor) -> bool:
    """Whether a subclass handles torch's operations itself: its own memory, if any, says nothing.

    Wrappers of several tensors, fake and functional tensors do; `nn.Parameter` does not.
    """
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def place(tensor: Tensor) -> Hashable:
    """A key of the values that a tensor is: equal for two tensors that are the same memory.

    A DTensor is where its local part is, as the same part of the same whole. What has no memory to
    point at (no elements, meta, wrappers of other tensors) is the object itself: such a key holds
    while the object lives.
    """
    if is_sharded(tensor):
        sharded: Any = tensor
        whole = tuple(tensor.shape), sharded.device_mesh, tuple(sharded.placements)
        part = local(tensor)
        return (whole, place(part)) if part.numel() else id(tensor)
    if dispatches(tensor):
        return id(tensor)
    try:
        pointer = tensor.data_ptr() if tensor.numel() else 0
        if pointer == 0:
            return id(tensor)
        flags = tensor.is_conj(), tensor.is_neg()  # of the same memory, but other values
        shape, stride = tensor.shape, tensor.stride()
        if 1 in shape:  # where no step is made, its length says nothing
            stride = tuple(s for n, s in zip(shape, stride, strict=True) if n > 1)
        return tensor.device, pointer, tensor.dtype, shape, stride, flags
    except RuntimeError:  # sparse and nested tensors, those of torch.func, ...
        return id(tensor)


def tied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same mapping, where tensors that are the same memory become one object."""
    memo: dict[Hashable, Tensor] = {}
    return {name: memo.setdefault(place(t), t) for name, t in tensors.items()}


def check_disjoint(bases: Sequence[Tensor]) -> None:
    """Raise when two tensors, or two elements of one, share memory.

    Only those whose extents meet are looked at closely, and those that their strides do not prove
    free of overlaps: slices of one buffer may interleave without sharing anything.

    Args:
        bases: dense tensors on any devices.

    Raises:
        ValueError: as described.
    """
    extents = []
    for i, base in enumerate(bases):
        if base.numel():
            start = base.data_ptr()
            extents.append((str(base.device), start, start + _span(base), i))
    extents.sort()
    group: list[int] = []
    device, reach = "", 0
    for where, begin, end, i in extents:
        if where != device or begin >= reach:
            _check_group(bases, group)
            group, device, reach = [], where, 0
        group.append(i)
        reach = max(reach, end)
    _check_group(bases, group)


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, gaps between them included."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _check_group(bases: Sequence[Tensor], group: Sequence[int]) -> None:
    """Raise when tensors whose extents meet share a byte."""
    if len(group) < 2 and all(_separate(bases[i]) for i in group):
        return
    begins, ends, owners = [], [], []
    for i in group:
        length, outer = _contiguous(bases[i])
        if any(stride == 0 for _, stride in outer):
            _raise_shared(bases, i)
        starts = torch.tensor([bases[i].data_ptr()])
        for size, stride in outer:
            starts = (starts[:, None] + stride * torch.arange(size)).reshape(-1)
        begins.append(starts)
        ends.append(starts + length)
        owners.append(torch.full_like(starts, i))
    begin, order = torch.cat(begins).sort()
    shared = begin[1:] < torch.cat(ends)[order][:-1]
    if shared.any():
        _raise_shared(bases, int(torch.cat(owners)[order][1:][shared][0]))


def _raise_shared(bases: Sequence[Tensor], i: int) -> None:
    raise ValueError(
        f"merge_: bases[{i}] of shape {tuple(bases[i].shape)} shares memory with itself or with "
        "another base; merge into a clone()"
    )


def _contiguous(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of a block without gaps; (size, stride in bytes) of the dimensions that repeat it."""
    item = tensor.element_size()
    dims = sorted(
        (s * item, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    )
    length, outer = item, list[tuple[int, int]]()
    for stride, size in dims:
        if not outer and stride == length:
            length *= size
        else:
            outer.append((size, stride))
    return length, outer


def _separate(tensor: Tensor) -> bool:
    """Whether strides alone prove that no two elements share memory: each steps over the last."""
    length, outer = _contiguous(tensor)
    reach = length
    for size, stride in outer:
        if stride < reach:
            return False
        reach += (size - 1) * stride
    return True
