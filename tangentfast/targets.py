"""What `merge_` and `gram` take: kinds of base, ties, and the tensors that can be added to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tangentfast._torch import in_transform
from tangentfast.memory import dispatches, is_sharded, local, place
from tangentfast.names import close_names

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex128, torch.complex64, torch.complex32)


class NoMemory(ValueError, RuntimeError):
    """A tensor on meta: no value for us, and a RuntimeError wherever torch is asked for one."""


@dataclass
class Target:
    """What is merged into: `canonical` maps every name that can be to a key of `tensors`."""

    tensors: dict[str, Tensor]  # floating-point and complex, tied ones once
    canonical: dict[str, str]
    others: dict[str, Tensor]  # entries that nothing can be merged into

    @classmethod
    def of(cls, entries: Mapping[str, Tensor]) -> Target:
        """Of named tensors."""
        target = cls({}, {}, {})
        seen: dict[object, str] = {}
        for name, entry in entries.items():
            if refusal(entry, COMPLEX) is not None:
                target.others[name] = entry
                continue
            first = seen.setdefault(place(entry), name)
            target.canonical[name] = first
            if first == name:
                target.tensors[name] = entry
        return target

    def check(self, what: str, vector: Mapping[str, Tensor]) -> None:
        """Raise when a name of a vector is not here, or its tensor does not fit.

        Raises:
            TypeError, ValueError: as said.
            RuntimeError: an inference tensor, outside inference mode.
        """
        for name, tensor in vector.items():
            whole = f"merge_: {what}[{name!r}]"
            if not isinstance(name, str):
                raise TypeError(f"{whole} has a {type(name).__name__} as its name, expected a str")
            if isinstance(tensor, Mapping):
                raise TypeError(
                    f"{whole} is a {type(tensor).__name__}, expected a tensor: vectors is one "
                    "mapping, of vectors; pass a sequence, list(vectors.values())"
                )
            if name in self.others:
                reason = refusal(self.others[name], COMPLEX)
                if reason is None or reason[0] is None:
                    raise ValueError(
                        f"{whole} names a tensor of dtype {self.others[name].dtype} in the base, "
                        "which is left alone; drop it from the vector"
                    )
                raise reason[0](f"merge_: base[{name!r}] {reason[1]}")
            if name not in self.canonical:
                raise ValueError(
                    f"{whole} is not in the base{close_names(name, self.canonical | self.others)}"
                )
            own = self.tensors[self.canonical[name]]
            check_tensor(whole, tensor, own, "base")
            if own.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"merge_: base[{name!r}] is an inference tensor, which torch writes in place "
                    "under torch.inference_mode() alone; merge there, or into a clone()"
                )


def entries_of(base: object) -> Mapping[str, Tensor]:
    """The named tensors of a base: a `LinearizedModel`'s τ, a module's parameters and buffers."""
    if type(base) is dict and set(map(type, base.values())) <= {Tensor, nn.Parameter}:
        return base
    tau = getattr(base, "tau", None)
    if isinstance(base, nn.Module) and isinstance(tau, Mapping):
        return dict(tau)
    if isinstance(base, nn.Module):
        saved = base.state_dict().keys()
        buffers = base.named_buffers(remove_duplicate=False)
        entries: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
        return entries | {name: buffer for name, buffer in buffers if name in saved}
    if isinstance(base, Mapping):
        return {name: entry for name, entry in base.items() if isinstance(entry, Tensor)}
    raise TypeError(
        f"merge_: base is a {type(base).__name__}, expected a module, a mapping of tensors, "
        "a TaskVector or a LinearizedModel"
    )


def refusal(tensor: Tensor, more: tuple[torch.dtype, ...] = ()) -> tuple[Any, str] | None:
    """Why a tensor is none that can be computed with: an exception's class and its text.

    None where it can. The class is None where the dtype alone is another than FLOATS and `more`.
    """
    name = type(tensor).__name__
    if is_lazy(tensor):
        return ValueError, (
            f"is a {name}, which has no shape yet; run the module once on an input first"
        )
    if tensor.is_nested:
        return TypeError, "is a nested tensor, expected dense ones; take its parts with unbind()"
    if is_sharded(tensor):
        if not all(p.is_shard() or p.is_replicate() for p in _placements(tensor)):
            return ValueError, (
                f"is a DTensor placed {_placements(tensor)}, expected Shard and Replicate alone; "
                "redistribute() it"
            )
    elif dispatches(tensor):
        return TypeError, (
            f"is a {name}, a subclass of Tensor with operations of its own; expected an ordinary "
            "tensor: give those that it holds"
        )
    elif tensor.is_quantized:
        return TypeError, f"is quantised ({tensor.dtype}), expected floating point; dequantize() it"
    if tensor.layout != torch.strided:
        return ValueError, f"has layout {tensor.layout}, expected dense; call to_dense()"
    if tensor.is_meta:
        return NoMemory, (
            "is on meta, where tensors have no numbers; load the weights first, such as by "
            "to_empty(device=...) and load_state_dict"
        )
    if tensor.dtype not in FLOATS + more:
        return None, ""
    if in_transform() and _wrapped(tensor):
        return TypeError, "is traced by torch.func, which merge_ and gram are not; call it outside"
    return None


def check_tensor(
    what: str, tensor: object, like: Tensor | None = None, like_name: str = ""
) -> None:
    """Raise unless a vector's tensor can be computed with, beside `like`.

    Complex numbers go with complex ones; a DTensor with one that is placed alike.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}, expected a tensor")
    complex_like = like is not None and like.is_complex()
    refused = refusal(tensor, COMPLEX if complex_like else ())
    if refused is not None:
        kind, text = refused
        if kind is None:
            expected = "float64, float32, float16 or bfloat16"
            raise TypeError(f"{what} has dtype {tensor.dtype}, expected {expected}")
        raise kind(f"{what} {text}")
    if like is None:
        return
    if tensor.shape != like.shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, {like_name} has {tuple(like.shape)}"
        )
    if is_sharded(tensor) != is_sharded(like):
        a, b = ("a DTensor" if is_sharded(t) else "an ordinary tensor" for t in (tensor, like))
        raise TypeError(
            f"{what} is {a}, {like_name} is {b}; gather with full_tensor(), or shard with "
            "distribute_tensor(), one of both"
        )
    if is_sharded(tensor) and _sharding(tensor) != _sharding(like):
        raise ValueError(
            f"{what} is placed {_sharding(tensor)}, {like_name} {_sharding(like)}; redistribute() "
            "it like that"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{what} is on {tensor.device}, {like_name} on {like.device}; "
            f"move it with .to({str(like.device)!r})"
        )
    if complex_like and not tensor.is_complex():
        raise TypeError(
            f"{what} has dtype {tensor.dtype}, {like_name} is complex ({like.dtype}); convert it "
            f"with .to({like.dtype})"
        )


def numbers(tensor: Tensor) -> Tensor:
    """A tensor as the op takes it, on the same memory: this rank's part, complex ones as pairs.

    A conjugate view is its own memory's conjugate: its partner in a merge is conjugated in
    `partner`.
    """
    tensor = local(tensor).detach()
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def partner(tensor: Tensor, like: Tensor) -> Tensor:
    """What is to be added to ``numbers(like)`` in place of adding `tensor` to `like`."""
    tensor = local(tensor).detach()
    if not tensor.is_complex():
        return tensor
    tensor = tensor.conj() if local(like).is_conj() else tensor
    return torch.view_as_real(tensor.resolve_conj())


def _placements(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.placements)


def _sharding(tensor: Any) -> tuple[Any, tuple[Any, ...]]:
    return tensor.device_mesh, _placements(tensor)


def _wrapped(tensor: Tensor) -> bool:
    """Whether it stands for others in torch.func: then it has no memory to point at."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False
