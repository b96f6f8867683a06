"""merge_ of DTensors: shard by shard, the bits of the whole; others are refused by name."""

from __future__ import annotations

import copy
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_merge import same_bits
from test_merge_targets import each_way
from torch import Tensor, nn

from tangentfast.fingerprint import Base
from tangentfast.linearize import linearize
from tangentfast.merge import gram, merge_
from tangentfast.task_vector import TaskVector

tensor = pytest.importorskip("torch.distributed.tensor")
DTensor, Partial, Replicate, Shard = (
    getattr(tensor, n) for n in ("DTensor", "Partial", "Replicate", "Shard")
)


def ranks(rank: int, port: int, world: int) -> None:
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    if dist.is_initialized():
        pytest.skip("another process group is there")
    ranks(0, free_port(), 1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(t: Tensor, mesh: Any, placement: Any = None) -> Tensor:
    made: Tensor = tensor.distribute_tensor(t, mesh, [placement or Shard(0)])
    return made


def states() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and two vectors; 5 rows, so that two ranks hold parts of differing size."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"k": (5, 4), "q": (5, 4), "bias": (1,), "scale": ()}

    def state() -> dict[str, Tensor]:
        return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}

    return state(), [state(), state()]


PLACED = {"k": 0, "q": 1, "bias": 0, "scale": None}


def placed(state: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    places = {n: Replicate() if d is None else Shard(d) for n, d in PLACED.items()}
    return {n: sharded(t, mesh, places[n]) for n, t in state.items()}


def whole(state: Any) -> dict[str, Tensor]:
    return {n: t.full_tensor() for n, t in state.items()}


def merged_both_ways(mesh: Any, alphas: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The merge of full tensors, and that of the same ones as DTensors."""
    base, vectors = states()
    there = placed(copy.deepcopy(base), mesh)  # a single rank's part may be the tensor itself
    merge_(there, [placed(v, mesh) for v in vectors], alphas)
    return merge_(base, vectors, alphas), whole(there)


@pytest.mark.parametrize(
    "alphas", [0.3, {"*": 0.3, "k": -1}, torch.arange(8.0).view(2, 4)], ids=["1", "2", "3"]
)
def test_dtensors_equal_full_tensors(mesh: Any, alphas: Any) -> None:
    full, gathered = merged_both_ways(mesh, alphas)
    assert all(same_bits(full[n], gathered[n]) for n in full)


def test_task_vector_of_dtensors(mesh: Any) -> None:
    """Wrappers have no memory of their own to tell k and q apart by; ties stay ties."""
    k, q = sharded(torch.ones(4, 2), mesh), sharded(2 * torch.ones(4, 2), mesh)
    again = DTensor.from_local(k.to_local(), mesh, [Shard(0)])  # another object on k's memory
    vector = TaskVector({"k": k, "q": q, "tied": again})
    assert vector["k"] is vector["tied"]
    assert vector["k"] is not vector["q"]
    assert whole(vector)["q"].eq(2).all()
    doubled = whole(2 * vector)
    assert doubled["k"].eq(2).all()
    assert doubled["q"].eq(4).all()
    other = DTensor.from_local(k.to_local(), mesh, [Replicate()])  # placed otherwise: no tie
    assert len({id(t) for t in TaskVector({"k": k, "other": other}).values()}) == 2


@each_way
def test_tied_dtensors_are_merged_once(mesh: Any, alphas: Any) -> None:
    k = sharded(torch.zeros(4, 2), mesh)
    base = {"k": k, "tied": DTensor.from_local(k.to_local(), mesh, [Shard(0)])}
    step = sharded(torch.ones(4, 2), mesh)
    merge_(base, [{"k": step, "tied": step}, {"tied": step}], alphas)
    full = merge_({"w": torch.zeros(4, 2)}, [{"w": torch.ones(4, 2)}] * 2, 0.3)
    assert same_bits(k.full_tensor(), full["w"])


@each_way
@pytest.mark.parametrize(
    ("own", "theirs", "error", "message"),
    [
        ("S0", "S1", ValueError, r"vectors\[0\]\['w'\] is placed .*; redistribute\(\) it"),
        ("R", "S0", ValueError, r"vectors\[0\]\['w'\] is placed .*; redistribute\(\) it"),
        ("S0", "P", ValueError, r"vectors\[0\]\['w'\] is a DTensor placed .*Partial"),
        ("P", "P", ValueError, r"base\['w'\] is a DTensor placed .*Partial"),
        ("S0", "-", TypeError, r"vectors\[0\]\['w'\] is an ordinary tensor, base is a DTensor"),
        ("-", "S0", TypeError, r"vectors\[0\]\['w'\] is a DTensor, base is an ordinary tensor"),
    ],
)
def test_dtensors_that_do_not_fit(
    mesh: Any, own: str, theirs: str, error: type[Exception], message: str, alphas: Any
) -> None:
    places = {"S0": Shard(0), "S1": Shard(1), "R": Replicate(), "P": Partial()}

    def make(t: Tensor, place: str) -> Tensor:
        made: Tensor = t if place == "-" else DTensor.from_local(t, mesh, [places[place]])
        return made

    memory = torch.zeros(2, 2)
    base = {"first": torch.zeros(2), "w": make(memory, own)}
    with pytest.raises(error, match=message):
        merge_(base, {"first": torch.ones(2), "w": make(torch.ones(2, 2), theirs)}, alphas)
    assert not memory.any()
    assert not base["first"].any()


def test_dtensors_that_know_their_base(mesh: Any) -> None:
    """Fingerprints are of the whole: sharded weights are those of the checkpoint."""
    base, (step, _) = states()
    vector = TaskVector(placed(step, mesh), base=Base.of("net", base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = placed(copy.deepcopy(base), mesh)
        merge_(there, vector, 0.3, strict_base=True)
        merge_(there, vector, 0.3, strict_base=True)  # its own merges do not count
    other = placed(copy.deepcopy(step), mesh)
    with pytest.raises(ValueError, match=r"vectors\[0\] is a difference to net"):
        merge_(other, vector, strict_base=True)
    assert all(torch.equal(t, step[n]) for n, t in whole(other).items())


def test_gram_refuses_dtensors(mesh: Any) -> None:
    vector = {"w": sharded(torch.ones(2, 2), mesh)}
    with pytest.raises(TypeError, match=r"gram: vectors\[0\]\['w'\] is a DTensor; gather"):
        gram([vector, {"w": torch.ones(2, 2)}])
    with pytest.raises(TypeError, match=r"gram: vectors\[1\]\['w'\] is a DTensor; gather"):
        gram([{"w": torch.ones(2, 2)}, vector])


def test_fully_sharded_module(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    full = copy.deepcopy(model)
    steps = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    fully_shard(model, mesh=mesh)
    assert merge_(model, {n: sharded(t, mesh) for n, t in steps.items()}, 0.3) is model
    merge_(full, steps, 0.3)
    for name, parameter in full.named_parameters():
        assert same_bits(model.get_parameter(name).full_tensor(), parameter)
    lin = linearize(copy.deepcopy(full))
    with pytest.raises(TypeError, match="is a DTensor, base is an ordinary tensor"):
        merge_(lin, {n: sharded(t, mesh) for n, t in steps.items()})


def two(rank: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    ranks(rank, port, 2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        pairs = [merged_both_ways(mesh, alphas) for alphas in (0.3, {"*": 0.3, "k": -1})]
        test_dtensors_that_know_their_base(mesh)
        torch.save(pairs, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Any) -> None:
    mp.spawn(two, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        for full, gathered in torch.load(tmp_path / f"{rank}.pt"):
            assert all(same_bits(full[n], gathered[n]) for n in full)
