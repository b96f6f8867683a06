"""TaskVector: arithmetic in float64, checkpoints, files, and what is said when they are wrong."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import standins
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tangentfast.fingerprint import SAMPLES, Base, fingerprint
from tangentfast.task_vector import TaskVector

NET = Base("net", "a" * 64)


@st.composite
def vectors(draw: st.DrawFn) -> TaskVector:
    """Integers in float64 over a random subset of names: exact under + - * by small numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = {"a": (3, 4), "b": (), "c": (0, 2), "d": (5,)}
    names = draw(st.sets(st.sampled_from(sorted(shapes))))
    return TaskVector(
        {n: torch.randint(-99, 99, shapes[n], generator=generator).double() for n in names}
    )


numbers = st.integers(-8, 8).map(lambda n: n / 4)


@given(u=vectors(), v=vectors(), w=vectors(), a=numbers, b=numbers)
@settings(max_examples=60, deadline=None)
def test_vector_space(u: TaskVector, v: TaskVector, w: TaskVector, a: float, b: float) -> None:
    zero = 0 * (u + v + w)
    assert u + v == v + u
    assert (u + v) + w == u + (v + w)
    assert a * (u + v) == a * u + v * a
    assert (a + b) * u == a * u + b * u
    assert u - v == u + -v
    assert sum([u, v, w]) == u + v + w
    assert u + zero == (u + v + w) - (v + w)
    assert (u / 4) * 4 == u
    assert set(u + v) == set(u) | set(v)


@given(u=vectors(), v=vectors())
@settings(max_examples=60, deadline=None)
def test_norm_dot_cosine(u: TaskVector, v: TaskVector) -> None:
    dot = sum(float((u[n] * v[n]).sum()) for n in u.keys() & v.keys())
    size = math.sqrt(sum(float((t * t).sum()) for t in u.values()))
    assert u.dot(v) == v.dot(u) == dot
    assert u.norm() == size
    if u.norm() and v.norm():
        assert u.cosine(v) == pytest.approx(dot / (size * v.norm()), rel=1e-14)
        assert u.cosine(-1 * u) == pytest.approx(-1, rel=1e-14)


def test_norm_is_accumulated_in_float64_and_counts_ties_once() -> None:
    assert TaskVector({"a": torch.full((10,), 3e4).half()}).norm() == pytest.approx(
        math.sqrt(10) * float(torch.tensor(3e4).half()), rel=1e-15
    )
    shared = torch.full((4,), 1.0)
    assert TaskVector({"a": shared, "b": shared.view(4)}).norm() == 2
    assert math.isnan(TaskVector({"a": torch.zeros(2)}).cosine({"a": torch.ones(2)}))


def test_results_do_not_share_memory_with_operands() -> None:
    u, v = TaskVector({"a": torch.ones(2)}), TaskVector({"b": torch.ones(2)})
    for result in (u + v, u - v, -u, 1 * u, v - u):
        for tensor in result.values():
            tensor.fill_(7)
    assert u["a"].tolist() == v["b"].tolist() == [1, 1]


def test_detached_and_read_only() -> None:
    parameter = nn.Parameter(torch.ones(2))
    tv = TaskVector({"a": parameter})
    assert not tv["a"].requires_grad
    with pytest.raises(TypeError):
        tv["a"] = torch.zeros(2)  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(tv)
    assert np.float32(2) * tv == tv * 2
    assert tv.to(torch.bfloat16)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("entry", "got"), [(torch.ones(2).long(), "torch.int64"), ([1.0], "list"), (None, "NoneType")]
)
def test_only_floating_tensors(entry: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"'a' is {got}, expected a floating-point tensor"):
        TaskVector({"a": entry})  # type: ignore[dict-item]


def test_wrong_operands() -> None:
    tv = TaskVector({"a": torch.ones(2, 3)})
    with pytest.raises(
        ValueError, match=r"'a' has shape \(2, 3\) on the left, \(3,\) on the right"
    ):
        tv + TaskVector({"a": torch.ones(3)})  # would broadcast
    for wrong in (
        lambda: tv + 1,
        lambda: tv * tv,
        lambda: tv * True,
        lambda: tv * "2",
        lambda: 1 + tv,
        lambda: tv / tv,
    ):
        with pytest.raises(TypeError):
            wrong()


def test_bases() -> None:
    u, v = (TaskVector({"a": torch.ones(2)}, base=NET) for _ in range(2))
    other = TaskVector({"a": torch.ones(2)}, base=Base("net", "b" * 64))
    part = TaskVector({"a": torch.ones(2), "b": torch.ones(1)}, base=Base("net", "c" * 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (u + v).base == (2 * u).base == sum([u, v]).base == NET
        assert (u + part).base == part.base  # fingerprints of other names are not comparable
        assert (u + TaskVector({"b": torch.ones(1)}, base=NET)).base is None
    with pytest.warns(
        UserWarning, match=r"net \[aaaaaaaaaaaa\] and net \[bbbbbbbbbbbb\]"
    ) as caught:
        u - other
    assert caught[0].filename == __file__


def test_repr_is_short() -> None:
    shared = torch.ones(1000, 2)
    tv = TaskVector({"a": shared, "b": shared}, base=NET, selection="attention")
    assert repr(tv) == (
        "TaskVector(2 tensors, 2,000 numbers, selection='attention', base=net [aaaaaaaaaaaa])"
    )


def test_select_and_views() -> None:
    tv = TaskVector(
        {f"blocks.{i}.{n}": torch.ones(i + 1) for i in range(3) for n in "ab"}, base=NET
    )
    part = tv.select("blocks.0.*", "*.b")
    assert list(part) == ["blocks.0.a", "blocks.0.b", "blocks.1.b", "blocks.2.b"]
    assert part["blocks.2.b"].data_ptr() == tv["blocks.2.b"].data_ptr()
    assert (part.base, part.selection) == (None, "blocks.0.* | *.b")  # of no names known
    assert part.select("*.a").selection == "blocks.0.* | *.b: *.a"
    with pytest.raises(ValueError, match=r"'block.0.a' matches no name .* names are blocks.0.a"):
        tv.select("*", "block.0.a")
    assert "blocks.0.a" in tv
    assert "blocks" not in tv
    assert tv.get("blocks", 3) == 3
    assert list(tv.items()) == list(zip(tv.keys(), tv.values(), strict=True))


# Checkpoints --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def write(model: nn.Module, path: Path) -> Path:
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if path.suffix == ".pth" else state, path)
    return path


@pytest.mark.parametrize("kind", ["module", "state dict", ".pt", ".pth", ".bin", ".safetensors"])
def test_from_checkpoints(kind: str, tmp_path: Path) -> None:
    before, after = Net(0), Net(1)
    sources: list = [before, after]
    if kind == "state dict":
        sources = [before.state_dict(), {"state_dict": after.state_dict()}]
    elif kind.startswith("."):
        sources = [write(m, tmp_path / f"{n}{kind}") for m, n in ((before, "old"), (after, "new"))]
    tv = TaskVector.from_checkpoints(*sources)
    assert set(tv) == {
        "embed.weight",
        "head.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    }
    assert torch.equal(tv["embed.weight"], (after.embed.weight - before.embed.weight).detach())
    assert tv.base is not None
    assert tv.base.fingerprint == fingerprint({n: before.state_dict()[n] for n in tv})
    assert tv.base.name == {"module": "Net", "state dict": "state dict"}.get(kind, f"old{kind}")
    if kind != ".safetensors":  # that format has no ties
        assert tv["embed.weight"] is tv["head.weight"]


def test_halves_are_subtracted_in_float32() -> None:
    old, new = torch.tensor([1.0]).bfloat16(), torch.tensor([3e-3]).bfloat16()
    tv = TaskVector.from_checkpoints({"a": old}, {"a": new})
    assert tv["a"].dtype == torch.float32
    assert torch.equal(tv["a"], new.float() - old.float())
    wide = TaskVector.from_checkpoints({"a": old}, {"a": new.double()})
    assert wide["a"].dtype == torch.float64


def test_checkpoints_that_do_not_match() -> None:
    one, two = torch.ones(1), torch.ones(2)
    build = TaskVector.from_checkpoints
    with pytest.raises(ValueError, match="finetuned has no b, c"):
        build({"a": one, "b": one, "c": one}, {"a": one})
    with pytest.raises(ValueError, match="pretrained has no p0, p1, p2, p3, p4 and 2 more"):
        build({"a": one}, {"a": one} | {f"p{i}": one for i in range(7)})
    with pytest.raises(ValueError, match=r"pretrained and finetuned differ: a \(1,\) and \(2,\)"):
        build({"a": one}, {"a": two})
    with pytest.raises(ValueError, match="state dict has no floating-point tensor"):
        build({"a": one.int()}, {"a": one})


# Files --------------------------------------------------------------------------------------------


@given(tv=vectors(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=20, deadline=None)
def test_round_trip(tv: TaskVector, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tv") / "cars.safetensors"
    tv = TaskVector(tv.to(dtype), base=NET, selection="attention")
    tv.save(path)
    again = TaskVector.load(path)
    assert again == tv
    assert list(again) == list(tv)
    assert all(again[n].dtype == dtype for n in again)
    assert (again.base, again.selection) == (NET, "attention")
    assert [p.name for p in path.parent.iterdir()] == ["cars.safetensors"]
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_round_trip_of_views_and_ties(tmp_path: Path) -> None:
    buffer = torch.randn(6, 9)
    q, k, v = buffer.split(3, dim=1)
    tv = TaskVector({"q": q, "k": k, "tied": q, "overlap": buffer[:, 1:4], "turned": v.T})
    tv.save(tmp_path / "a.safetensors")
    again = TaskVector.load(tmp_path / "a.safetensors")
    assert again == tv
    assert again.base is None
    assert again["q"] is again["tied"]
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"q", "k", "overlap", "turned"}


def test_failure_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    old = TaskVector({"a": torch.ones(2)})
    old.save(path)
    with standins.largest_file(5000), pytest.raises(OSError, match="large"):
        TaskVector({"a": torch.ones(2000)}).save(path)
    assert TaskVector.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def rewrite(path: Path, drop: str = "", **changes: str) -> None:
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name) for name in names if name != drop}
    save_file(tensors, path, metadata=header | changes)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tv = TaskVector({"a": torch.ones(200), "b": torch.ones(3)}, base=NET)

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TaskVector.load(path)

    with pytest.raises(FileNotFoundError):
        TaskVector.load(path)
    path.write_bytes(b"")
    refuses("a.safetensors is no readable safetensors file")
    tv.save(path)
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuses("is no readable safetensors file")
    save_file({"a": torch.ones(1)}, path)
    refuses(
        "is no task vector: its metadata has format None, expected 'tangentfast.task_vector'; f"
    )
    tv.save(path)
    rewrite(path, version="2", package="tangentfast 9.0")
    refuses(r"format version 2, this tangentfast reads up to 1; upgrade .* by tangentfast 9.0\)")
    tv.save(path)
    rewrite(path, drop="b")
    refuses("lacks the tensors b")
    tv.save(path)
    rewrite(path, names="[")
    refuses("has damaged metadata, field names: JSONDecodeError")
    tv.save(path)
    rewrite(path, base=json.dumps({"name": "net"}))
    refuses("has damaged metadata, field base: expected null or name")


# Fingerprints -------------------------------------------------------------------------------------


def test_fingerprint_sees_names_shapes_and_sampled_values() -> None:
    big = torch.arange(100_000.0)
    state = {"a": big, "b": torch.zeros(()), "c": torch.zeros(0, 2)}
    same = {"c": torch.zeros(0, 2), "b": torch.zeros(()), "a": big.clone()}
    assert fingerprint(state) == fingerprint(same)
    turned = big.reshape(250, 400).T.contiguous().T
    assert fingerprint({"a": turned}) == fingerprint({"a": big.reshape(250, 400)})
    assert len(fingerprint(state)) == 64
    changes = [
        {"a": big.reshape(2, -1)},
        {"d": big},
        {"b": torch.ones(())},
        {"c": torch.zeros(0, 3)},
        *({"a": big.index_put((torch.tensor(i),), torch.tensor(-1.0))} for i in (0, 99_999)),
    ]
    seen = {fingerprint(state), *(fingerprint(state | change) for change in changes)}
    assert len(seen) == len(changes) + 1
    # Honestly sampled: one element between two samples goes unseen.
    assert 100_000 // SAMPLES > 2
    unseen = big.index_put((torch.tensor(1),), torch.tensor(-1.0))
    assert fingerprint(state | {"a": unseen}) == fingerprint(state)


def test_fingerprint_is_the_same_for_exact_conversions() -> None:
    half = torch.randn(30).half()
    assert fingerprint({"a": half}) == fingerprint({"a": half.double()})
    assert fingerprint({"a": half}) != fingerprint({"a": half.double() + 1e-9})
