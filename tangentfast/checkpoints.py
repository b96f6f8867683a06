"""Checkpoints of models: a module, a state dict or a file → named tensors, or why there are none.

Nothing is left out of the weights without a word, and no code that a file holds is run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tangentfast.names import listed
from tangentfast.vector_file import FORMAT

Source: TypeAlias = nn.Module | Mapping[str, Any] | str | os.PathLike[str]

# Entries of a checkpoint that hold the model's weights,
WEIGHTS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights",
    "params", "ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema",
)  # fmt: skip
# those that hold none,
_NO_WEIGHTS = re.compile(
    r"(.*_)?(optimi[sz]er|optim|scheduler|scaler|rng|callback|loop|hyper_?parameter|hparam|arg"
    r"|config|metric|histor(y|ie))s?(_states?|_state_dicts?|_dict)?",
    re.IGNORECASE,
)
# and parts of names that adapters give to their factors: peft, diffusers, kohya, LyCORIS.
_ADAPTER = re.compile(
    r"(^|[._])(lora_(A|B|up|down|embedding_[AB]|magnitude_vector)|lora_linear_layer|lora\.(up|down)"
    r"|hada_(w\d_[ab]|t\d)|lokr_[wt]\d(_[ab])?|ia3_l|vera_lambda_[bd]|dora_scale|oft_r|boft_[RS])"
    r"(\.|$)"
)
_DEEPEST = 8  # a mapping may hold itself
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's own number, before it wrote archives
_HTML = re.compile(rb"\s*<(!doctype|html|\?xml|head)", re.IGNORECASE)


def read_state(source: Source) -> tuple[str, dict[str, Tensor]]:
    """What people call a source, and all its tensors: floating, complex, whole numbers.

    Raises:
        ValueError: it holds no weights, or more than those of one model, or what is no tensor of
            plain memory; the message says which, and what to do.
    """
    name, state = _name(source), source
    if isinstance(source, str | os.PathLike):
        state = _read(Path(source))
    what = f"from_checkpoints: {name}"
    for _ in range(_DEEPEST):
        if (inner := _unwrapped(what, state)) is None:
            break
        state = inner
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} holds a {type(state).__name__}, expected a state dict")
    tensors = dict(_entries(what, state))
    if not any(_is_weight(tensor) for tensor in tensors.values()):
        raise ValueError(f"{what} has no floating-point tensor")
    if adapters := [n for n in tensors if _ADAPTER.search(n)]:
        raise ValueError(
            f"{what} holds an adapter's factors ({listed(adapters)}): the difference of factors is "
            "not the difference of weights; merge the adapter into its model first (peft: "
            "model.merge_and_unload())"
        )
    return name, tensors


def weights(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The floating-point and complex entries of two states, which are seen to be subtractable.

    Whole numbers (counters, indices, masks) that are the same in both are left out.

    Raises:
        ValueError: an entry is missing in one of both, shapes or kinds differ, or whole numbers do.
    """
    old = {name: tensor for name, tensor in before.items() if _is_weight(tensor)}
    new = {name: tensor for name, tensor in after.items() if _is_weight(tensor)}
    if mixed := [
        n for n in (*old, *new) if n in before and n in after and (n in old) != (n in new)
    ]:
        kinds = (f"{n} ({before[n].dtype} and {after[n].dtype})" for n in mixed)
        raise ValueError(
            "from_checkpoints: whole numbers in one of pretrained and finetuned, floating-point "
            f"in the other: {listed(kinds)}; dequantise first"
        )
    for here, there, where in ((old, new, "finetuned"), (new, old, "pretrained")):
        if missing := [name for name in here if name not in there]:
            raise ValueError(f"from_checkpoints: {where} has no {listed(missing)}")
    if differing := [n for n in old if old[n].shape != new[n].shape]:
        shapes = (f"{n} {tuple(old[n].shape)} and {tuple(new[n].shape)}" for n in differing)
        raise ValueError(
            f"from_checkpoints: shapes of pretrained and finetuned differ: {listed(shapes)}"
        )
    if placed := [n for n in old if _placement(old[n]) != _placement(new[n])]:
        raise ValueError(
            "from_checkpoints: pretrained and finetuned are sharded in different ways: "
            f"{listed(placed)}; gather them with full_tensor()"
        )
    _check_whole_numbers(before, after)
    return old, new


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return Path(source).name
    return type(source).__name__ if isinstance(source, nn.Module) else "state dict"


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _placement(tensor: Tensor) -> object:
    """How a DTensor is sharded; None for a plain tensor."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _check_whole_numbers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    both = [n for n in before if n in after and not _is_weight(before[n])]
    changed = [
        n
        for n in both
        if not n.endswith("num_batches_tracked")  # batch norm's counter of steps
        and not torch.equal(before[n].cpu(), after[n].cpu())
    ]
    if changed:
        kinds = (f"{n} ({before[n].dtype})" for n in changed)
        raise ValueError(
            f"from_checkpoints: entries of whole numbers differ: {listed(kinds)}. A difference of "
            "integers is no task vector: dequantise weights first, and drop what is no weight"
        )


# States -------------------------------------------------------------------------------------------


def _unwrapped(what: str, state: Any) -> Any:
    """What lies one level deeper, or None where this is the state dict."""
    if isinstance(state, nn.Module):
        if isinstance(getattr(state, "tau", None), Mapping):
            raise ValueError(
                f"{what} is a linearized model; take lin.task_vector(), or lin.materialize() for "
                "a model with the weights θ0 + τ"
            )
        return state.state_dict()
    if not isinstance(state, Mapping):
        return None
    inside = [key for key in WEIGHTS if key in state and _holds_tensors(state[key])]
    inside = [key for key in inside if isinstance(state[key], Mapping | nn.Module)]
    if len(inside) > 1:
        raise ValueError(
            f"{what} holds the weights of several models: {', '.join(inside)}; load it, and pass "
            f"the entry that you mean, such as checkpoint[{inside[0]!r}]"
        )
    return state[inside[0]] if inside else None


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor, an array or a module anywhere inside."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor | np.ndarray | nn.Module):
            return True
        if isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values() if isinstance(value, Mapping) else value
    return False


def _entries(what: str, state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict; other things that hold tensors are refused by name."""
    for key, value in state.items():
        if not _holds_tensors(value) or _is_no_weight(key, value):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{what} holds tensors in {key!r}, a {type(value).__name__}; expected tensors by "
                "name. Pass the entry that is the state dict, unpack or dequantise what is packed, "
                "or drop what is no weight"
            )
        if not isinstance(key, str):
            raise ValueError(f"{what} has a tensor under {key!r}, expected names that are strings")
        _check_tensor(f"{what}: {key!r}", value)
        yield key, value.detach()


def _is_no_weight(key: Any, value: Any) -> bool:
    """By its name; a floating-point tensor has to be called extra state, as torch does."""
    if not isinstance(key, str):
        return False
    weight = isinstance(value, Tensor) and _is_weight(value)
    return key.endswith("_extra_state") or (not weight and bool(_NO_WEIGHTS.fullmatch(key)))


def _check_tensor(what: str, tensor: Tensor) -> None:
    faults: tuple[tuple[Callable[[], bool], str, str], ...] = (
        (lambda: is_lazy(tensor), "not initialised", "run the model once"),
        (lambda: tensor.is_meta, "on the meta device, without values", "load its weights first"),
        (lambda: tensor.is_quantized, "quantised", "call dequantize()"),
        (lambda: tensor.is_nested, "nested", "give plain tensors"),
        (lambda: tensor.layout != torch.strided, f"{tensor.layout}", "call to_dense()"),
        (
            lambda: tensor.is_floating_point() and tensor.element_size() == 1,
            f"{tensor.dtype}",
            "convert it with .to(torch.bfloat16) times its scale",
        ),
    )
    for is_so, fault, remedy in faults:
        if is_so():
            raise ValueError(f"{what} is {fault}, expected a tensor of plain memory; {remedy}")


# Files --------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The contents of a file, of the kind that its first bytes say."""
    what = f"from_checkpoints: {path}"
    if path.is_dir():
        raise IsADirectoryError(f"{what} is a folder, expected a file; name the one in it")
    with path.open("rb") as file:
        start = file.read(1024)
    _check_name(what, path)
    if start[8:9] == b"{":
        return _safetensors(what, path)
    if start[:2] == b"PK":
        _check_archive(what, path)
        return _torch_load(what, path, mmap=True)
    if _LEGACY in start[:40]:
        return _torch_load(what, path, mmap=False)
    raise ValueError(f"{what} {_unreadable(start)}")


def _check_name(what: str, path: Path) -> None:
    shard = _SHARD.search(path.name)
    if shard and int(shard[2]) != 1:
        raise ValueError(
            f"{what} is one shard of {int(shard[2])}; read them all into one state dict and pass "
            "that, or save the model in one file"
        )
    if path.name.endswith(".index.json"):
        raise ValueError(
            f"{what} lists the shards of a checkpoint; read the files that it names into one state "
            "dict and pass that"
        )


def _unreadable(start: bytes) -> str:
    """What else a file is, by its first bytes, and what to do."""
    if not start.strip(b"\0"):
        return "is empty, or zeros: it was not written to the end; copy or download it again"
    if _HTML.match(start):
        return "is an HTML page, not weights: the server sent an error; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the weights; run `git lfs pull`"
    if start[:1] == b"\x80":
        return (
            "is a bare pickle (pickle.dump): reading it would run code. If you trust it, read it "
            "with pickle.load, pass the state dict, and save that with torch.save"
        )
    return (
        f"begins with {start[:16]!r}: damaged, or no checkpoint. Expected .safetensors, or .pt, "
        ".pth, .bin, .ckpt written by torch.save"
    )


def _safetensors(what: str, path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            made_by = (file.metadata() or {}).get("format")
        state = load_file(path) if made_by != FORMAT else {}
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and KeyError of dtypes that torch has not
        raise ValueError(f"{what} is no safetensors file, or a damaged one: {error}") from error
    if made_by == FORMAT:
        raise ValueError(f"{what} is a task vector, expected a model; use TaskVector.load")
    return state


def _check_archive(what: str, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
    except OSError:
        raise
    except Exception as error:  # BadZipFile, and what a damaged table of contents leads to
        raise ValueError(
            f"{what} is damaged or cut short ({error}); copy or download it again"
        ) from error
    if "constants.pkl" in inside:
        raise ValueError(
            f"{what} is a TorchScript archive, which holds code; if you trust it, pass "
            "torch.jit.load(path).state_dict()"
        )
    if "data.pkl" not in inside:
        raise ValueError(
            f"{what} is an archive that torch.save did not write; expected .safetensors, or .pt, "
            ".pth, .bin, .ckpt"
        )


def _torch_load(what: str, path: Path, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols, which are read all the same
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        classes = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not classes:
            raise ValueError(
                f"{what} is damaged, or of a pickle protocol beyond 3, which torch does not read "
                "without running code; save model.state_dict() again"
            ) from error
        raise ValueError(
            f"{what} holds more than tensors ({', '.join(classes)}), and unpickling anything else "
            "runs code; save model.state_dict() in its place"
        ) from error
    except Exception as error:  # what a damaged file leads to can be anything
        raise ValueError(
            f"{what} is damaged or cut short ({error}); copy or download it again"
        ) from error
