"""The file format of task vectors: safetensors, with names, base, selection and a digest.

The digest is the SHA-256 of the header as it stands in the file (its length before it, the digest's
own 64 digits written as zeros) followed by the SHA-256 of each piece of 8 MiB of each tensor's
bytes, in the order of the file: no byte is left out, and pieces can be hashed at the same time.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import IO, Any

import torch
from torch import Tensor

from tangentfast.files import replacing

FORMAT = "tangentfast.task_vector"
FORMAT_VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
PIECE = 8 << 20
_NO_DIGEST = "0" * 64
_PREFIX = b'{"__metadata__":{"digest":"'
_LONGEST_HEADER = 100_000_000  # of the format


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file: where its bytes are, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Contents:
    """What a file holds: `names` in order, each a tensor of its own or the alias of one."""

    names: list[str]
    aliases: dict[str, str]
    base: dict[str, Any] | None
    selection: str
    tensors: dict[str, Tensor]


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a file; tensors come to the CPU, and are made contiguous, one at a time.

    Raises:
        TypeError: a tensor of a dtype that the format has not, or of no plain memory.
        ValueError: a name that the format keeps for itself.
    """
    for name, tensor in contents.tensors.items():
        _check_writable(name, tensor)
    # By size of the elements, so that all are aligned.
    order = sorted(contents.tensors.items(), key=lambda item: -item[1].element_size())
    header = _header(contents, order)
    with replacing(path) as file, _hashing() as hashed:
        file.write(header)
        digests: list[bytes] = []
        for _, tensor in order:
            data = _bytes(tensor)
            pieces = hashed(data)
            file.write(data)
            digests += pieces
        file.seek(8 + len(_PREFIX))
        file.write(_combined(header, digests).encode())


def read(
    what: str,
    path: str | os.PathLike[str],
    device: str | torch.device,
    mapped: bool,
    verify: bool | None,
) -> Contents:
    """Read a file; `what` begins every error.

    Raises:
        ValueError: it is not such a file, is damaged, or has no digest where one is asked for.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(what, file, size)
        fields, entries = _parse(what, header, size - len(header))
        contents = _contents(what, fields, {entry.name for entry in entries})
        digest = fields.get("digest")
        if verify and digest is None:
            raise ValueError(f"{what} has no digest to verify; save it again, or leave verify out")
        checked = digest is not None and (not mapped if verify is None else verify)
        digests: list[bytes] = []
        with _hashing() as hashed:
            pieces: Iterable[bytes] = ()
            for entry, flat in _read(what, file, entries, mapped):
                digests += pieces  # hashed while this tensor was read
                pieces = hashed(flat.numpy().data) if checked else ()
                contents.tensors[entry.name] = _shaped(what, entry, flat).to(device)
            digests += pieces
    blank = header.replace(str(digest).encode(), _NO_DIGEST.encode(), 1)
    if checked and _combined(blank, digests) != digest:
        raise ValueError(
            f"{what} does not match its digest: it was damaged or changed after it was written. "
            "Copy or save it again; verify=False reads it as it is."
        )
    return contents


def has_complex() -> bool:
    """The format got complex numbers with version 0.6 of its library."""
    major, minor = metadata.version("safetensors").split(".")[:2]
    return (int(major), int(minor)) >= (0, 6)


def _check_writable(name: str, tensor: Tensor) -> None:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    if hasattr(tensor, "to_local") or not plain or tensor.is_meta:
        raise TypeError(
            f"save: {name!r} is on {tensor.device} with layout {tensor.layout}, expected values in "
            "plain memory; call full_tensor() of a DTensor, to_dense() of a sparse one"
        )
    if tensor.dtype not in DTYPES.values() or (tensor.is_complex() and not has_complex()):
        raise TypeError(
            f"save: safetensors {metadata.version('safetensors')} cannot hold {tensor.dtype}, "
            f"the dtype of {name!r}. Expected another dtype: convert the entries that have it."
        )


def _header(contents: Contents, order: list[tuple[str, Tensor]]) -> bytes:
    """Length and JSON, the digest first and blank."""
    fields = {
        "digest": _NO_DIGEST,
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "names": json.dumps(contents.names),
        "aliases": json.dumps(contents.aliases),
        "base": json.dumps(contents.base),
        "selection": contents.selection,
        "package": f"tangentfast {metadata.version('tangentfast')}",
    }
    header: dict[str, Any] = {"__metadata__": fields}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    end = 0
    for name, tensor in order:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        code = codes[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # data is aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _hashing() -> Iterator[Any]:
    """A function from bytes to the digests of its pieces, made by other threads meanwhile."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield lambda data: pool.map(
            lambda start: hashlib.sha256(data[start : start + PIECE]).digest(),
            range(0, len(data), PIECE),
        )


def _combined(header: bytes, digests: list[bytes]) -> str:
    total = hashlib.sha256(header)
    for digest in digests:
        total.update(digest)
    return total.hexdigest()


def _read_header(what: str, file: IO[bytes], size: int) -> bytes:
    """Length and JSON, as they stand in the file."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{what} is no readable safetensors file, or only a part of one: expected a header of "
            f"{length} bytes, the file has {size}"
        )
    return start + file.read(length)


def _parse(what: str, header: bytes, size: int) -> tuple[dict[str, Any], list[_Entry]]:
    """Metadata, and the entries in the order of the file; `size` is that of all their bytes."""
    try:
        parsed = json.loads(header[8:].decode())
        fields = parsed.pop("__metadata__", {})
        entries = [_entry(name, **entry) for name, entry in parsed.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.end))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{what} is no readable safetensors file: its header is damaged ({error!r})"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{what} has damaged metadata: {fields!r:.80}, expected a mapping")
    ends = [0, *(entry.end for entry in entries)]
    if [entry.begin for entry in entries] != ends[:-1] or ends[-1] != size:
        raise ValueError(
            f"{what} is no readable safetensors file, or only a part of one: its tensors take "
            f"{ends[-1]} bytes, the file has {size} for them"
        )
    return fields, entries


def _entry(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    begin, end = data_offsets
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has shape {shape} and offsets {data_offsets}")
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    entry = _Entry(name, DTYPES[dtype], tuple(shape), begin, end)
    if end - begin != math.prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"{name!r} of {dtype} {shape} has {end - begin} bytes")
    return entry


def _contents(what: str, fields: Mapping[str, Any], stored: set[str]) -> Contents:
    """The metadata, checked; no tensors yet."""
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{what} is no task vector: its metadata has format {fields.get('format')!r}, "
            f"expected {FORMAT!r}; from_checkpoints reads checkpoints"
        )
    version = _field(what, fields, "version", int)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{what} has format version {version}, this tangentfast reads up to "
            f"{FORMAT_VERSION}; upgrade tangentfast (written by {fields.get('package')})"
        )
    names = _field(what, fields, "names", list)
    if not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise _damaged(what, "names", "a list of distinct strings")
    aliases = _field(what, fields, "aliases", dict)
    if not all(isinstance(n, str) for n in aliases.values()):
        raise _damaged(what, "aliases", "a mapping of names to names")
    base = _field(what, fields, "base", dict, type(None))
    if base is not None:
        _check_base(what, base)
    selection = fields.get("selection", "all")
    if not isinstance(selection, str):
        raise _damaged(what, "selection", "a string")
    if missing := sorted({aliases.get(name, name) for name in names} - stored):
        raise ValueError(f"{what} lacks the tensors {', '.join(missing[:5])} of its field names")
    return Contents(names, aliases, base, selection, {})


def _field(what: str, fields: Mapping[str, Any], name: str, *kinds: type) -> Any:
    try:
        value = json.loads(fields[name])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} has damaged metadata, field {name}: {error!r}") from error
    if type(value) not in kinds:
        raise _damaged(what, name, " or ".join(kind.__name__ for kind in kinds))
    return value


def _check_base(what: str, base: dict[str, Any]) -> None:
    prints = base.get("prints", {})
    texts = [base.get("name"), base.get("fingerprint")]
    if isinstance(prints, dict):
        texts += prints.values()
    if not all(isinstance(text, str) for text in [*texts, *prints]):
        raise _damaged(what, "base", "null or name, fingerprint and prints of strings")


def _damaged(what: str, field: str, expected: str) -> ValueError:
    return ValueError(f"{what} has damaged metadata, field {field}: expected {expected}")


def _read(
    what: str, file: IO[bytes], entries: list[_Entry], mapped: bool
) -> Iterator[tuple[_Entry, Tensor]]:
    """Each entry's bytes: read into memory of its own, or a window on the file."""
    start, length = file.tell(), entries[-1].end if entries else 0
    if mapped:  # private: what is written to the tensors does not reach the file
        window = mmap.mmap(file.fileno(), start + length, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(window, dtype=torch.uint8)[start:]
    for entry in entries:
        if mapped:
            yield entry, whole[entry.begin : entry.end]
            continue
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        if file.readinto(flat.numpy().data) != flat.numel():  # type: ignore[attr-defined]
            raise ValueError(f"{what} was cut short while it was read; load it again")
        yield entry, flat


def _shaped(what: str, entry: _Entry, flat: Tensor) -> Tensor:
    if flat.storage_offset() % entry.dtype.itemsize:
        flat = flat.clone()  # a mapped file of other writers
    try:
        return flat.view(entry.dtype).reshape(entry.shape)
    except (RuntimeError, OverflowError, TypeError) as error:  # such as sizes beyond 64 bits
        raise ValueError(f"{what} has damaged tensors: {entry.name!r} of {entry.shape}") from error
