"""Which weights a vector is a difference to, and whether those it is merged into are the same."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import same_bits
from torch import Tensor, nn

from tangentfast.fingerprint import DIGITS, SAMPLES, Base, Samples, fingerprint
from tangentfast.linearize import linearize
from tangentfast.merge import merge_
from tangentfast.task_vector import TaskVector

MESSAGE = r"merge_: vectors\[\d\] is a difference to .* \[.{12}\], which is not"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float64]
State = dict[str, Tensor]


@contextmanager
def silence() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def state(seed: int = 0) -> State:
    """Weights of several shapes, of more and of fewer elements than there are samples."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (40, 7), "block.w": (9, 9), "block.bias": (9,), "scale": ()}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def trained(weights: State, seed: int = 1) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: w + (0.01 * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for n, w in weights.items()
    }


def cast(weights: State, dtype: torch.dtype, *but: str) -> State:
    return {n: w.clone() if n in but else w.to(dtype) for n, w in weights.items()}


def vector_of(weights: State, seed: int = 1) -> TaskVector:
    return TaskVector.from_checkpoints(weights, trained(weights, seed))


def check_warns(base: Any, *vectors: TaskVector) -> None:
    """A warning, at the caller's line; strict, an error, and not a bit is written."""
    before = {n: t.detach().clone() for n, t in base.items()}
    with silence(), pytest.raises(ValueError, match=MESSAGE):
        merge_(base, list(vectors), 0.3, strict_base=True)
    assert all(same_bits(base[n], before[n]) for n in before)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        merge_(base, list(vectors), 0.3)
    assert {w.filename for w in caught} == {__file__}


# The same weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["base", "vector", "both"])
@pytest.mark.parametrize("but", [(), ("block.bias", "scale"), ("embed",)], ids=["", "2", "1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_are_the_same_weights(dtype: torch.dtype, but: tuple[str, ...], of: str) -> None:
    """A checkpoint and its cast, of all tensors or of a part, as base, of the vector, or both."""
    one, other = state(), cast(state(), dtype, *but)
    pretrained, base = {"base": (one, other), "vector": (other, one), "both": (other, other)}[of]
    with silence():
        vector = vector_of(pretrained)
        merge_({n: t.clone() for n, t in base.items()}, vector, 0.3, strict_base=True)
        merge_({n: t.clone() for n, t in base.items()}, [vector, vector], {"*": 0.3})
        module = nn.ParameterDict({n.replace(".", "_"): nn.Parameter(t) for n, t in base.items()})
        renamed = {n.replace(".", "_"): t for n, t in pretrained.items()}
        merge_(module, vector_of(renamed), 0.3, strict_base=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_vectors_of_half_and_whole_checkpoints(dtype: torch.dtype) -> None:
    weights = state()
    with silence():
        vectors = [vector_of(weights, 1), vector_of(cast(weights, dtype), 2)]
        merge_(weights, [*vectors, vectors[0] + vectors[1]], 0.3, strict_base=True)


def test_moved_and_strided_weights_are_the_same() -> None:
    weights = state()
    vector = vector_of(weights)
    weights["embed"] = weights["embed"].T.contiguous().T
    weights["block.w"] = torch.stack([weights["block.w"]] * 2, -1)[..., 1]
    with silence():
        merge_(weights, vector, strict_base=True)


def test_parts_of_a_vector() -> None:
    """What select() or a comprehension leaves knows the base of its own names."""
    vector = vector_of(state())
    by_hand = TaskVector({"embed": vector["embed"]}, base=vector.base)
    for part in (vector.select("block.*"), by_hand, vector.select("*").select("scale")):
        with silence():
            merge_(state(), part, 0.3, strict_base=True)
            merge_(cast(state(), torch.bfloat16), [part, vector], 0.3, strict_base=True)
            only = {n: t for n, t in state().items() if n in part}
            merge_(only, part, 0.3, strict_base=True)
        check_warns(state(7), part)


def test_other_tensors_of_the_base_do_not_count() -> None:
    """A head that was swapped is none of the vector's names."""
    vector = vector_of(state()).select("block.*", "scale")
    with silence():
        merge_(state() | {"embed": torch.zeros(3), "head": torch.ones(2)}, vector, strict_base=True)


def test_vectors_of_different_names() -> None:
    weights = state()
    one = vector_of({n: weights[n] for n in ("embed", "scale")}, 1)
    other = vector_of({n: weights[n] for n in ("block.w", "scale")}, 2)
    with silence():
        both = one + other
        merge_(state(), [one, other], 0.3, strict_base=True)
        merge_(state(), both, 0.3, strict_base=True)
    assert set(both) == {"embed", "scale", "block.w"}
    check_warns(state() | {"scale": torch.tensor(3.0)}, one, other)


def test_sums_and_multiples_keep_the_base() -> None:
    one, other = vector_of(state(), 1), vector_of(state(), 2)
    with silence():
        for made in (one + other, 0.5 * one - other, -one, sum([one, other]), one.to(torch.half)):
            assert made.base == one.base
            merge_(state(), made, 0.3, strict_base=True)
            check_warns(state(7), made)
    with pytest.warns(UserWarning, match="combining vectors of different bases"):
        _ = one + vector_of(state(3))


def test_linearized_models() -> None:
    torch.manual_seed(0)
    model = nn.Linear(9, 9)
    lin = linearize(copy.deepcopy(model))
    vector = TaskVector.from_checkpoints(model, trained(model.state_dict()))
    with silence():
        merge_(lin, vector, strict_base=True)
        merge_(model, lin.task_vector(), strict_base=True)
        half = linearize(copy.deepcopy(nn.Linear(9, 9)).bfloat16())
    with pytest.warns(UserWarning, match=MESSAGE):
        merge_(half, vector)


# Other weights ------------------------------------------------------------------------------------


def changed(name: str) -> Callable[[State], State]:
    """One element in one tensor, by more than a half's last place."""

    def change(weights: State) -> State:
        weights[name].view(-1)[0] += 0.25
        return weights

    return change


OTHER: dict[str, Callable[[State], State]] = {
    "other weights": lambda w: state(7),
    "trained": trained,
    "trained and cast": lambda w: cast(trained(w), torch.bfloat16),
    "zeros": lambda w: {n: torch.zeros_like(t) for n, t in w.items()},
    **{f"changed {n}": changed(n) for n in state()},
}


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", OTHER)
def test_other_weights_warn(kind: str, dtype: torch.dtype) -> None:
    check_warns(OTHER[kind](cast(state(), dtype)), vector_of(state()))
    check_warns(OTHER[kind](state()), vector_of(cast(state(), dtype)))


def test_each_vector_is_compared() -> None:
    right, wrong = vector_of(state()), vector_of(state(7))
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        merge_(state(), [wrong, {"embed": torch.zeros(40, 7)}, right, wrong], 0.3)
    assert [str(w.message)[:18] for w in caught] == ["merge_: vectors[0]", "merge_: vectors[3]"]


# Several merges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_merges_in_a_row(dtype: torch.dtype) -> None:
    """What merge_ itself has added does not make other weights of them."""
    weights = cast(state(), dtype)
    vectors = [vector_of(state(), k) for k in range(1, 6)]
    with silence():
        for k, vector in enumerate(vectors):
            merge_(weights, vector, 0.3 if k % 2 else {"*": 0.3}, strict_base=True)
        merge_(weights, vectors, -0.3, strict_base=True)
        merge_(weights, vectors[0].select("block.*"), strict_base=True)
    check_warns(weights | {"scale": torch.tensor(3.0)}, vectors[0])


@pytest.mark.parametrize("kind", ["module", "state dict", "clone"])
def test_second_merge_into_a_module(kind: str) -> None:
    model = nn.Linear(9, 9)
    vector = TaskVector.from_checkpoints(model, trained(model.state_dict()))
    merge_(model, vector, 0.3)
    with silence():
        if kind == "module":
            merge_(model, vector, -0.3, strict_base=True)
    if kind == "clone":  # another tensor, of which nothing is known
        check_warns({n: p.detach().clone() for n, p in model.named_parameters()}, vector)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda t: t.add_(0.5),
    "copy_": lambda t: t.copy_(torch.ones_like(t)),
    "a part": lambda t: t.view(-1)[:1].fill_(3.0),
    "a view": lambda t: t.detach().mul_(2),
    "out": lambda t: torch.add(t, 1, out=t),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_in_between_warns(write: Callable[[Tensor], Any]) -> None:
    weights, vector = state(), vector_of(state())
    with silence():
        merge_(weights, vector, 0.3, strict_base=True)
        merge_(weights, vector, 0.3, strict_base=True)
    write(weights["embed"])
    check_warns(weights, vector)


def test_an_optimizer_step_in_between_warns() -> None:
    torch.manual_seed(0)
    model = nn.Linear(9, 9)
    vector = TaskVector.from_checkpoints(model, trained(model.state_dict()))
    with silence():
        merge_(model, vector, 0.3, strict_base=True)
    model(torch.ones(9)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    check_warns(dict(model.named_parameters()), vector)


def test_back_at_the_base_is_the_base() -> None:
    weights, vector = state(), vector_of(state())
    merge_(weights, vector)
    for name, tensor in weights.items():
        tensor.copy_(state()[name])
    with silence():
        merge_(weights, vector, strict_base=True)


@pytest.mark.parametrize("alphas", [0.3, {"*": 0.3}], ids=["number", "glob"])
def test_the_merged_as_a_new_base(alphas: Any) -> None:
    """Trained from the merged weights, and merged into them: each base on the way is known."""
    weights, vectors = state(), [vector_of(state())]
    with silence():
        for _ in range(3):
            merge_(weights, vectors[-1], alphas, strict_base=True)
            now = {n: t.clone() for n, t in weights.items()}
            vectors.append(vector_of(now))
            merge_(now, vectors[-1], alphas, strict_base=True)
        merge_(weights, vectors[::-1], alphas, strict_base=True)
        merge_(weights, vectors[1].select("scale"), alphas, strict_base=True)
    check_warns(weights, vector_of(state(7)))
    check_warns({n: t.clone() for n, t in weights.items()}, vectors[1])


def test_a_write_between_merges_that_are_no_bases() -> None:
    """A vector that knows no base: its merge is a write like any other."""
    weights, vector = state(), vector_of(state())
    merge_(weights, vector, 0.3)
    merge_(weights, dict(vector_of(state(7))), 0.3)
    check_warns(weights, vector)


def test_failed_merges_are_not_remembered() -> None:
    weights, vector = state(), vector_of(state())
    with pytest.raises(ValueError, match="backend"):
        merge_(weights, vector, backend="none such")
    with silence():
        merge_(weights, vector, strict_base=True)
    check_warns(state(7), vector)


# Bases of before there were prints ----------------------------------------------------------------


def old(vector: TaskVector) -> TaskVector:
    assert vector.base is not None
    return TaskVector(dict(vector), base=Base(vector.base.name, vector.base.fingerprint))


def test_old_bases() -> None:
    """Compared by the fingerprint, of the vector's names, exactly."""
    vector = old(vector_of(state()))
    with silence():
        merge_(state(), vector, 0.3, strict_base=True)
        merge_(state() | {"head": torch.ones(3)}, vector, 0.3, strict_base=True)
        merge_(cast(state(), torch.float64), vector, 0.3, strict_base=True)
        half = cast(state(), torch.bfloat16)
        merge_(half, old(vector_of(half)), 0.3, strict_base=True)
        assert (vector + vector_of(state(), 2)).base == vector.base
        assert vector.select("block.*").base is None  # a part's fingerprint is not known
        merge_(state(7), vector.select("block.*"), strict_base=True)
    check_warns(state(7), vector)
    check_warns(trained(state()), vector)


def test_old_and_new_bases_of_vectors() -> None:
    new, other = vector_of(state()).base, vector_of(state(7)).base
    assert new is not None
    assert other is not None
    names = list(state())
    before = Base(new.name, new.fingerprint)
    assert new == before
    assert before.is_same(new, names, names)
    assert new.is_same(before, names, names)
    assert not other.is_same(before, names, names)
    assert before.is_same(other, names[:2], names)  # different names: the base's name says it
    assert not before.is_same(Base("another", other.fingerprint), names[:2], names)
    assert new.is_same(other, names[:2], names[2:])  # nothing in common
    assert not new.is_same(other, names[:2], names[1:])


# What is sampled ----------------------------------------------------------------------------------


def small() -> State:
    return {
        "a": torch.arange(200.0).reshape(10, 20) / 3,
        "b": torch.tensor([1.5, -0.0, torch.inf]).bfloat16(),
        "c": torch.tensor(1 + 2j),
        "n": torch.tensor(7),
        "e": torch.zeros(0, 3),
    }


PINNED = "6746f2958fa2996fcd59dbea71aeb8acdccb50f9223f2f2f3b7f5c2fb4205695"
PRINTS = {
    "a": "ccd3a8a77b179ebf50453f06",
    "b": "b97df44db97df44db97df44d",
    "c": "b8a500c7b8a500c7b8a500c7",
    "n": "05df2bf605df2bf605df2bf6",
    "e": "78eca6bb78eca6bb78eca6bb",
}


def test_values_do_not_change() -> None:
    """Files hold them: what is hashed, and how, is a matter of their format."""
    base = Base.of("net", small())
    assert base.fingerprint == fingerprint(small())
    assert base.fingerprint == PINNED
    assert dict(base.prints) == PRINTS


def test_json_keeps_prints(tmp_path: Path) -> None:
    vector = vector_of(state())
    base = vector.base
    assert base is not None
    assert set(base.prints) == set(state())
    assert all(len(p) == 3 * DIGITS and int(p, 16) >= 0 for p in base.prints.values())
    again = Base.from_json(json.loads(json.dumps(base.to_json())))
    assert (again.name, again.fingerprint) == (base.name, base.fingerprint)
    assert again.prints == base.prints
    assert Base.from_json({"name": "net", "fingerprint": "f"}).prints == {}
    vector.save(tmp_path / "v.st")
    loaded = TaskVector.load(tmp_path / "v.st")
    assert loaded.base is not None
    assert loaded.base.prints == base.prints
    with silence():
        merge_(cast(state(), torch.float16), loaded, 0.3, strict_base=True)
        merge_(state(), loaded.select("block.*"), 0.3, strict_base=True)
    check_warns(state(7), loaded)


def wide(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "conj": lambda t: t.conj().resolve_conj().conj(),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("shape", [(20, 30), (3, 4), (1, 1), (2, 0), (64, 1), (5, 13)])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_layouts_have_the_same_samples(kind: str, shape: tuple[int, ...], complex_: bool) -> None:
    plain = torch.complex(wide(shape), wide(shape).flip(0)) if complex_ else wide(shape)
    one, other = Samples({"w": plain}), Samples({"w": SAME[kind](plain)})
    assert torch.equal(one.values["w"], other.values["w"])
    assert one.print("w") == other.print("w")
    assert one.fingerprint(["w"]) == other.fingerprint(["w"])
    numbers = torch.view_as_real(plain) if complex_ else plain
    assert len(one.values["w"]) == min(SAMPLES, numbers.numel())
    if numbers.numel():
        flat = numbers.reshape(-1)
        assert one.values["w"][[0, -1]].tolist() == flat[[0, -1]].tolist()
        assert other.fingerprint(["w"]) != fingerprint({"w": plain + 1})


def test_scalars_and_empty_tensors() -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (0,), (0, 3), (3, 0)]
    tensors = {str(s): torch.zeros(s) for s in shapes}
    samples = Samples(tensors)
    assert [samples.values[n].numel() for n in tensors] == [1, 1, 1, 0, 0, 0]
    assert len({samples.print(n) for n in tensors}) == len(shapes)  # a shape is part of them
    assert len({fingerprint({"w": t}) for t in tensors.values()}) == len(shapes)
    assert fingerprint({}) == Base.of("nothing", {}).fingerprint
    assert Base.of("nothing", {}).prints == {}


ANY = ["int64", "uint8", "bool", "float64", "float16", "bfloat16", "complex64", "complex128"]
ANY += ["uint16", "uint32", "float8_e4m3fn", "float8_e5m2"]  # take() has no such tensors


@pytest.mark.parametrize("name", ANY)
def test_any_dtype_on_any_device(name: str, device: torch.device) -> None:
    values = (3 * wide((20, 30)).abs()).to(getattr(torch, name))
    here = {"b": torch.ones(3), "w": values}
    there = {"w": values.to(device), "b": torch.ones(3, device=device)}
    transposed = there | {"w": values.mT.contiguous().to(device).mT}
    for other in (there, transposed):
        assert fingerprint(other) == fingerprint(here)
        assert Base.of("net", other).prints == Base.of("net", here).prints


def test_meta_raises() -> None:
    for function in (fingerprint, Samples, lambda t: Base.of("net", t)):
        with pytest.raises(TypeError, match="fingerprint: 'w' is on meta, which holds no numbers"):
            function({"a": torch.ones(2), "w": torch.ones(2, device="meta")})  # type: ignore


def test_prints_see_what_a_half_can_hold() -> None:
    """A print is that of a cast, and of nothing else of the same casts."""
    weights = {"w": wide((9, 9)).float()}
    other = {"w": weights["w"] * (1 + 2e-7)}  # rounds to the same halves, mostly

    def same(a: State, b: State) -> bool:
        return Base.of("a", a).is_same(Base.of("b", b), a, b)

    assert not same(weights, other)
    for dtype in HALVES:
        assert same(weights, cast(weights, dtype))
        assert same(cast(weights, dtype), weights)
    assert not same(cast(weights, HALVES[0]), cast(weights, HALVES[1]))


def test_state_dicts_taken_anew_are_the_same_memory() -> None:
    model, other = nn.Linear(70, 3), nn.Linear(70, 3)
    vector = TaskVector.from_checkpoints(model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for base in (model.state_dict(), model, model.state_dict()):
            merge_(base, vector, 0.5)
    with torch.no_grad():
        model.weight.add_(0.01)
    with pytest.warns(UserWarning, match="which is not the base given"):
        merge_(model.state_dict(), vector, 0.5)
