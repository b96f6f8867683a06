"""Checkpoints as people have them: the difference of all weights, or an error that says why not."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tangentfast as tf
from tangentfast.task_vector import TaskVector

build = TaskVector.from_checkpoints
ONE = {"w": torch.ones(2, 3), "b": torch.ones(3)}
TWO = {"w": torch.full((2, 3), 3.0), "b": torch.zeros(3)}


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refused(message: str, before: Any, after: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        build(before, before if after is None else after)


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3},
        lambda s: {"model": s, "loss": torch.tensor(0.3), "args": [torch.ones(1)]},
        lambda s: {"model": {"state_dict": {"module": s}}, "ema": None},
        lambda s: {"model_state_dict": s, "ema": {"decay": 0.99}},
        lambda s: s | {"epoch": 3, "name": "net", "config": {"depth": torch.ones(1)}},
        lambda s: s | {"rng_state": torch.get_rng_state(), "lr_schedulers": [torch.ones(1)]},
        lambda s: s | {"layer._extra_state": torch.ones(3), "other._extra_state": {"a": ONE}},
    ],
)
@pytest.mark.parametrize("suffix", [None, ".pt", ".ckpt", ".pth.tar", ""])
def test_layouts(wrap: Any, suffix: str | None, tmp_path: Path) -> None:
    sources: list = [wrap(ONE), wrap(TWO)]
    if suffix is not None:
        files = [tmp_path / f"{n}{suffix}" for n in "ab"]
        for source, file in zip(sources, files, strict=True):
            torch.save(source, file)
        sources = files
    tv = build(*sources)
    assert {n: t.tolist() for n, t in tv.items()} == {"w": [[2.0] * 3] * 2, "b": [-1.0] * 3}


@pytest.mark.parametrize(
    "options", [{"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}]
)
def test_files_of_other_options(options: dict, tmp_path: Path) -> None:
    for name, state in (("a", ONE), ("b", TWO)):
        torch.save(state, tmp_path / name, **options)
    assert build(tmp_path / "a", tmp_path / "b")["w"].eq(2).all()
    torch.save(ONE, tmp_path / "a", **options | {"pickle_protocol": 4})
    refused("/a is damaged, or of a pickle protocol beyond 3", tmp_path / "a")


def test_what_could_be_meant_is_asked() -> None:
    refused(
        r"weights of several models: state_dict, ema; .* checkpoint\['state_dict'\]",
        {"state_dict": ONE, "ema": ONE},
    )
    for inside in (ONE, [torch.ones(1)], (torch.ones(1),), {"deep": [{"er": torch.ones(1)}]}):
        kind = type(inside).__name__
        refused(f"state dict holds tensors in 'decoder', a {kind};", ONE | {"decoder": inside})
        refused("holds tensors in 'decoder'", {"decoder": inside, "epoch": 1})
    refused("holds tensors in 'mean', a ndarray", ONE | {"mean": torch.ones(2).numpy()})
    refused("a tensor under 0, expected names", ONE | {0: torch.ones(1)})
    loop: dict = dict(ONE)
    loop["model"] = loop
    refused("holds tensors in 'model'", loop)


def test_a_module_inside_a_mapping() -> None:
    nets = [nn.Linear(3, 2) for _ in range(2)]
    tv = build({"model": nets[0]}, {"model": nets[1]})
    assert torch.equal(tv["weight"], (nets[1].weight - nets[0].weight).detach())


# Entries ------------------------------------------------------------------------------------------


def test_whole_numbers() -> None:
    counted = ONE | {"n.num_batches_tracked": torch.tensor(3), "ids": torch.arange(4)}
    later = counted | {"n.num_batches_tracked": torch.tensor(9)}
    assert set(build(counted, later)) == {"w", "b"}
    assert set(build(counted, ONE)) == {"w", "b"}
    changed = counted | {"ids": torch.arange(4) + 1, "mask": torch.ones(2) > 0}
    refused(r"whole numbers differ: ids \(torch.int64\)\. A difference of int", counted, changed)
    refused(
        r"in the other: ids \(torch.int64 and torch.float32\); dequantise",
        counted,
        counted | {"ids": torch.ones(4)},
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to(torch.float8_e4m3fn), r"'w' is torch.float8_e4m3fn, .*bfloat16\) times"),
        (lambda x: x.to_sparse(), r"'w' is torch.sparse_coo, .*; call to_dense\(\)"),
        (lambda x: x.to("meta"), "'w' is on the meta device, .*; load its weights first"),
        (
            lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
            "'w' is nested",
        ),
    ],
)
def test_tensors_without_a_difference(make: Any, message: str) -> None:
    refused(message, {"w": make(torch.ones(2, 3))})


def test_quantised_and_lazy_modules() -> None:
    lazy = nn.LazyLinear(3)
    refused("'weight' is not initialised, .*; run the model once", lazy)
    packed = {"fc._packed_params": (torch.ones(2).char(), None), "fc.scale": torch.tensor(0.1)}
    refused("holds tensors in 'fc._packed_params', a tuple", packed)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it will remove
        codes = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused(r"'w' is quantised, .* dequantize\(\)", {"w": codes, "b": torch.ones(1)})


def test_complex_entries_are_weights() -> None:
    a, b = torch.randn(2, 3, dtype=torch.complex64)
    tv = build({"f": a}, {"f": b})
    assert torch.equal(tv["f"], b - a)
    assert torch.equal(build({"f": a.real}, {"f": b})["f"], b - a.real)


@pytest.mark.parametrize(
    "name",
    [
        "q.lora_A.default.weight",
        "lora_unet_q.lora_down.weight",
        "q.lora.up.weight",
        "e.lora_embedding_B",
        "q.hada_w1_a",
        "k.ia3_l.default",
        "q.lora_magnitude_vector.default.weight",
    ],
)
def test_adapters(name: str) -> None:
    refused(rf"adapter's factors \({name}\).*merge_and_unload", ONE | {name: torch.ones(1)})
    assert build(
        ONE | {"flora.lora_norm.weight": ONE["b"]}, TWO | {"flora.lora_norm.weight": ONE["b"]}
    )


def test_adapted_modules() -> None:
    net = nn.Linear(3, 2)
    net.lora_A = nn.Linear(3, 1)
    refused("Linear holds an adapter's factors", net)


# Files --------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path("ran-by-unpickling").write_text, ("code ran",))


def test_pickled_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "hook": Harmful()}, "evil.pt")
    torch.save({"hook": Harmful()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.bin").write_bytes(pickle.dumps(Harmful()))
    refused("evil.pt holds more than tensors", "evil.pt")
    refused("old.pt holds more than tensors", "old.pt")
    refused(r"plain.bin is a bare pickle \(pickle.dump\)", "plain.bin")
    torch.save(ONE | {"args": argparse.Namespace(lr=1)}, "args.pt")
    refused(r"args.pt holds more than tensors \(argparse.Namespace\)", "args.pt")
    assert not Path("ran-by-unpickling").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, or zeros: it was not written to the end"),
        (bytes(5000), "is empty, or zeros"),
        (b"\n<!DOCTYPE html><html>quota exceeded", "is an HTML page, not weights"),
        (b"<html><body>404", "is an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a",
            "is a pointer .*`git lfs pull`",
        ),
        (b"not at all", "begins with b'not at all': damaged, or no checkpoint. Expected .safet"),
        (b"\x89HDF\r\n\x1a\n", "begins with"),
        (b"PK\x03\x04 and no more", "is damaged or cut short"),
        (b"\x08\0\0\0\0\0\0\0{1234567", "is no safetensors file, or a damaged one"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_other_kinds(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    refused(f"/x{suffix} {message}", tmp_path / f"x{suffix}")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_are_cut_short(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    for size in (20, 100, 700, 1200, -1):
        torch.save(ONE, path, _use_new_zipfile_serialization=not legacy)
        os.truncate(path, min(size % path.stat().st_size, path.stat().st_size - 1))
        refused("cut.pt (is damaged|holds more than tensors)", path)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    tv = build(ONE, TWO)
    tv.save(tmp_path / "tv.safetensors")
    refused("tv.safetensors is a task vector, .*; use TaskVector.load", tmp_path / "tv.safetensors")
    refused("a TaskVector is a difference already", tv)
    lin = tf.linearize(nn.Linear(2, 2))
    refused(r"is a linearized model; take lin.task_vector\(\), or lin.materialize\(\)", lin)
    refused(r"is a linearized model", {"model": lin})
    torch.save([ONE["w"]], tmp_path / "list.pt")
    refused("list.pt holds a list, expected a state dict", tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("w.npy", b"")
    refused("x.npz is an archive that torch.save did not write", tmp_path / "x.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "js.pt"))
    refused("js.pt is a TorchScript archive", tmp_path / "js.pt")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        build(tmp_path, ONE)
    with pytest.raises(FileNotFoundError, match=r"absent.ckpt"):
        build(tmp_path / "absent.ckpt", ONE)


def test_shards(tmp_path: Path) -> None:
    for count in ("00001", "00003"):
        for name in (f"model-00001-of-{count}.safetensors", f"pytorch_model-00001-of-{count}.bin"):
            (save_file if name.endswith("safetensors") else torch.save)(ONE, tmp_path / name)
            if count == "00001":
                assert build(tmp_path / name, TWO)["w"].eq(2).all()
            else:
                refused(rf"{name} is one shard of 3; read them all", tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    refused("index.json lists the shards of a checkpoint", index)
