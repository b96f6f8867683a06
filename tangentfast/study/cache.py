"""Results by content: what was computed from the same bytes and settings is not computed again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import write_json

__all__ = ["Cache", "digest"]


def digest(*values: object) -> str:
    """SHA-256, in hexadecimal, of values and of this package's version.

    Args:
        values: None, booleans, numbers, strings, paths, tensors, arrays, modules (class and
            state), dataclasses, and sequences and mappings of them. A mapping's order does not
            matter. Tensors count by dtype, shape and bytes, whatever their device.

    Raises:
        TypeError: a value of another kind, whose content is unknown.
    """
    hash = hashlib.sha256(metadata.version("tangentfast").encode())
    for value in values:
        _feed(hash, value)
    return hash.hexdigest()


def _feed(hash: Any, value: object) -> None:
    # Every value begins with its kind and length, so that no two trees have the same bytes.
    if value is None or isinstance(value, bool | int | float | str | Path):
        text = repr(str(value) if isinstance(value, Path) else value).encode()
        hash.update(b"v%d:" % len(text) + text)
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        hash.update(repr(("tensor", str(value.dtype), tuple(value.shape))).encode())
        hash.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        hash.update(repr(("array", value.dtype.str, value.shape)).encode())
        hash.update(np.ascontiguousarray(value).data)
    elif isinstance(value, nn.Module):
        hash.update(repr(("module", type(value).__qualname__)).encode())
        _feed(hash, value.state_dict())
    elif isinstance(value, Mapping):
        hash.update(b"m%d:" % len(value))
        for key in sorted(value, key=str):
            _feed(hash, key)
            _feed(hash, value[key])
    elif isinstance(value, list | tuple):
        hash.update(b"s%d:" % len(value))
        for item in value:
            _feed(hash, item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        hash.update(repr(("dataclass", type(value).__qualname__)).encode())
        _feed(hash, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    else:
        raise TypeError(
            f"digest: expected numbers, strings, tensors, modules or containers of them, got "
            f"{type(value).__name__}; pass what it is made of"
        )


class Cache:
    """JSON files in a folder, one for each key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value kept under `key`, or `compute()`, which is then kept.

        A file that is damaged, or is another key's, is computed again and replaced.

        Args:
            key: of `digest`: everything that the value depends on.
            compute: gives numbers, strings, lists and dictionaries; they come back as JSON has
                them (a tuple as a list, a key as a string), whether kept or just computed.

        Raises:
            OSError: the file cannot be written; none is left then.
        """
        path = self.folder / f"{key}.json"
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["key"] == key and entry["sha256"] == _checksum(entry["value"]):
                return entry["value"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        value = json.loads(json.dumps(compute()))
        write_json(path, {"key": key, "sha256": _checksum(value), "value": value})
        return value


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
