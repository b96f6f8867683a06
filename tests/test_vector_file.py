"""The files of task vectors: read by the format's own library, whole or refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tangentfast import vector_file
from tangentfast.fingerprint import Base
from tangentfast.task_vector import TaskVector

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.complex64] * vector_file.has_complex()
FIELDS = {
    "format": "tangentfast.task_vector",
    "version": "1",
    "names": '["w"]',
    "aliases": "{}",
    "base": "null",
    "selection": "all",
    "package": "tangentfast 0.1.0",
}


def example() -> TaskVector:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randn(3, 5, generator=generator, dtype=torch.complex128).to(dtype)
        if dtype.is_complex
        else torch.randn(3, 5, generator=generator).to(dtype)
        for dtype in DTYPES
    }
    tensors |= {"ä.weight": torch.ones(()), "none": torch.ones(0, 4), "odd": torch.ones(3).half()}
    tensors["tied"] = tensors["ä.weight"]
    return TaskVector(tensors, base=Base("net", "a" * 64), selection='"attention"')


def test_every_dtype_is_read_back_and_by_the_library(tmp_path: Path) -> None:
    path, tv = tmp_path / "a", example()
    tv.save(path)
    for how in ({}, {"mmap": True}, {"mmap": True, "verify": True}, {"verify": False}):
        again = TaskVector.load(path, **how)  # type: ignore[arg-type]
        assert again == tv
        assert [(n, t.dtype, t.shape) for n, t in again.items()] == [
            (n, t.dtype, t.shape) for n, t in tv.items()
        ]
        assert (again.base, again.selection) == (tv.base, tv.selection)
        assert again["tied"] is again["ä.weight"]
        again["odd"].fill_(7)  # a window's too is no way into the file
    read = load_file(path)
    assert all(torch.equal(read[name], tv[name]) for name in read)
    assert read.keys() == tv.keys() - {"tied"}
    raw = path.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


@pytest.mark.skipif(not vector_file.has_complex(), reason="safetensors before 0.6")
def test_conjugate_and_negated_views_are_resolved(tmp_path: Path) -> None:
    x = torch.randn(4, dtype=torch.complex64)
    tv = TaskVector({"conj": x.conj(), "imag": x.conj().imag, "turned": torch.randn(3, 4).T})
    tv.save(tmp_path / "a")
    assert TaskVector.load(tmp_path / "a") == tv


def test_float8(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn)
    TaskVector({"w": values}).save(tmp_path / "a")
    again = TaskVector.load(tmp_path / "a")["w"]
    assert again.dtype == torch.float8_e4m3fn
    assert torch.equal(again.float(), values.float())


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    ones = torch.ones(2)
    for tensor, message in (
        (ones.to(torch.complex128), r"cannot hold torch\.complex128, the dtype of 'w'"),
        (ones.to("meta"), "'w' is on meta"),
    ):
        with pytest.raises(TypeError, match=message):
            TaskVector({"w": tensor}).save(tmp_path / "a")
    with pytest.raises(TypeError, match="the name 0 is no string"):
        TaskVector({0: ones})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_files_of_other_writers(tmp_path: Path) -> None:
    path, w = tmp_path / "a", torch.arange(5.0)
    save_file({"w": w}, path, metadata=FIELDS)  # as written before there were digests
    for mmap in (False, True):
        assert torch.equal(TaskVector.load(path, mmap=mmap)["w"], w)
    with pytest.raises(ValueError, match=r"a has no digest to verify; save it again"):
        TaskVector.load(path, verify=True)
    base = {"name": "net", "fingerprint": "f", "prints": {"w": "1"}, "later": [1]}
    save_file({"w": w}, path, metadata=FIELDS | {"base": json.dumps(base)})
    assert TaskVector.load(path).base is not None
    header = json.dumps(
        {"__metadata__": FIELDS, "w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    )
    for pad in range(4):  # data at any place
        text = header.encode() + b" " * pad
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(w.numpy()))
        for mmap in (False, True):
            assert torch.equal(TaskVector.load(path, mmap=mmap)["w"], w)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("aliases", value) for value in ("[]", "null", '{"w": 3}', '{"w": "absent"}')),
        *(
            ("names", value)
            for value in ("3", "null", '[["w"]]', "[0]", '["w", "w"]', "[" * 50_000)
        ),
        *(("base", value) for value in ("3", "{}", '{"name": 3, "fingerprint": 4}')),
        ("base", '{"name": "", "fingerprint": "", "prints": [1]}'),
        ("base", '{"name": "", "fingerprint": "", "prints": {"w": 1}}'),
        *(("version", value) for value in ("one", "1.5", "null")),
    ],
)
def test_damaged_metadata(field: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(3)}, path, metadata=FIELDS | {field: value})
    message = rf"x.safetensors (has damaged metadata, field {field}|lacks the tensors absent)"
    with pytest.raises(ValueError, match=message):
        TaskVector.load(path)


def raw(path: Path, **entry: Any) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    text = json.dumps({"__metadata__": FIELDS, "w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "I64", "shape": [1]},
        {"dtype": ["F32"]},
        {"shape": [-2]},
        {"shape": [2.0]},
        {"shape": None},
        {"shape": [0, 2**70], "data_offsets": [0, 0]},
        {"shape": [2**62, 4]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [8, 16]},
        {"data_offsets": [0]},
        {"more": 1},
    ],
)
def test_damaged_headers(entry: dict[str, Any], tmp_path: Path) -> None:
    raw(tmp_path / "a")
    assert TaskVector.load(tmp_path / "a")["w"].tolist() == [0, 0]
    raw(tmp_path / "a", **entry)
    with pytest.raises(ValueError, match=r"/a (is no readable safetensors file|has damaged)"):
        TaskVector.load(tmp_path / "a")


def mutate(content: bytes, chance: random.Random) -> bytes:
    """One fault of a disk or a transfer, in the header as often as in the data."""
    end = chance.choice([8, 8 + int.from_bytes(content[:8], "little"), len(content)])
    place, size = chance.randrange(end), chance.randrange(1, 40)
    kind = chance.choice(["flip", "cut", "insert", "drop", "splice", "text"])
    if kind == "flip":
        flipped = bytes([content[place] ^ (1 << chance.randrange(8))])
        return content[:place] + flipped + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "drop":
        return content[:place] + content[place + size :]
    if kind == "text":
        old, new = chance.sample([b"[", b"]", b"0", b"1", b"{", b'"', b"F32", b"F16", b"a"], 2)
        return content.replace(old, new, 1)
    other = chance.randrange(len(content))
    piece = chance.randbytes(size) if kind == "insert" else content[other : other + size]
    return content[:place] + piece + content[place + (size if kind == "splice" else 0) :]


def test_no_fault_of_a_file_goes_unseen(tmp_path: Path) -> None:
    path, tv, chance = tmp_path / "a", example(), random.Random(0)
    tv.save(path)
    whole = path.read_bytes()
    for _ in range(int(os.environ.get("TANGENTFAST_FUZZ", "200"))):
        path.write_bytes(mutate(whole, chance))
        try:
            again = TaskVector.load(path)
        except ValueError:
            continue
        assert again == tv
    for place in range(8 + len(vector_file._PREFIX), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="/a "):
            TaskVector.load(path)


def test_what_is_read_is_no_window_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    zeros, ones = (TaskVector({"w": torch.full((5000,), x)}) for x in (0.0, 1.0))
    ones.save(path)
    content = path.read_bytes()
    zeros.save(path)
    read, mapped = TaskVector.load(path), TaskVector.load(path, mmap=True)
    path.open("r+b").write(content)
    assert read == zeros
    assert mapped == ones
    os.truncate(path, 100)
    assert read == zeros


def test_a_device_is_reached_one_tensor_at_a_time(tmp_path: Path, device: torch.device) -> None:
    tv = TaskVector({"a": torch.ones(3, device=device), "b": torch.ones(2, 2, device=device)})
    tv.save(tmp_path / "a")
    again = TaskVector.load(tmp_path / "a", device)
    assert again == tv
    assert all(t.device.type == device.type for t in again.values())


def test_damage_of_large_tensors_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a"
    TaskVector({"w": torch.zeros(2 * vector_file.PIECE // 4 + 3)}).save(path)
    with path.open("r+b") as file:
        for place in (-1, -13, -vector_file.PIECE, -2 * vector_file.PIECE):
            file.seek(place, os.SEEK_END)
            file.write(b"\1")
            file.flush()
            with pytest.raises(ValueError, match="does not match its digest"):
                TaskVector.load(path)
            with pytest.raises(ValueError, match="does not match its digest"):
                TaskVector.load(path, mmap=True, verify=True)
            TaskVector.load(path, verify=False)
            file.seek(place, os.SEEK_END)
            file.write(b"\0")
    TaskVector.load(path)
