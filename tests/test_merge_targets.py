"""What merge_ and gram take and refuse: DTensors, wrappers of tensors, complex bases, layouts."""

from __future__ import annotations

import copy
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_merge import BACKENDS, long, same_bits, truth
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from tangentfast.fingerprint import Base
from tangentfast.linearize import linearize
from tangentfast.merge import gram, merge_
from tangentfast.task_vector import TaskVector

tensor = pytest.importorskip("torch.distributed.tensor")
DTensor, Partial, Replicate, Shard = (
    getattr(tensor, n) for n in ("DTensor", "Partial", "Replicate", "Shard")
)

ALPHAS = [0.3, {"*": 0.3}]  # both ways of merge_: the op alone looks at the tensors, or merge_ too
each_way = pytest.mark.parametrize("alphas", ALPHAS, ids=["number", "glob"])
each_count = pytest.mark.parametrize("count", [1, 3])


# What is refused ----------------------------------------------------------------------------------


class Wrapper(Tensor):
    """A wrapper subclass that knows no operation: whatever is asked of it raises."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"Wrapper has no {func}")


def lazy(t: Tensor) -> Tensor:
    return nn.LazyLinear(2).to(t.dtype).weight


def fake(t: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: Tensor = FakeTensorMode().from_tensor(t)
    return made


@pytest.fixture(autouse=True)
def _prototypes() -> Iterator[None]:
    """Nested, quantised and compressed sparse tensors say that they are prototypes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*(nested|prototype|beta|quantiz|Sparse)")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "TwoTensor": (lambda t: TwoTensor(t, t.clone()), TypeError, "is a TwoTensor, a subclass"),
    "wrapper": (Wrapper, TypeError, "is a Wrapper, a subclass of Tensor with operations of its"),
    "parameter": (
        lambda t: nn.Parameter(TwoTensor(t, t.clone())),
        TypeError,
        "is a TwoTensor, a subclass",
    ),
    "fake": (fake, TypeError, "is a FakeTensor, a subclass"),
    "meta": (lambda t: t.to("meta"), ValueError, "is on meta, where tensors have no numbers"),
    "lazy": (lazy, ValueError, "is a UninitializedParameter, which has no shape yet"),
    "nested": (
        lambda t: torch.nested.nested_tensor([t, t[:1]]),
        TypeError,
        "is a nested tensor, expected dense ones",
    ),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
        TypeError,
        "is a nested tensor, expected dense ones",
    ),
    "coo": (lambda t: t.to_sparse(), ValueError, "has layout torch.sparse_coo, expected dense"),
    "csr": (lambda t: t.to_sparse_csr(), ValueError, "has layout torch.sparse_csr, expected dense"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        TypeError,
        r"is quantised \(torch.qint8\), expected floating point",
    ),
}
each_refused = pytest.mark.parametrize("kind", REFUSED)


ORIGIN = Base.of("net", {"first": torch.zeros(2), "w": torch.zeros(2, 2)})


def known(vector: dict[str, Tensor]) -> TaskVector:
    """A vector that knows its base: merge_ takes samples of what it is merged into."""
    return TaskVector(vector, base=ORIGIN)


@each_way
@each_count
@each_refused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("origin", [dict, known], ids=["plain", "known"])
def test_refused_as_base(
    kind: str, count: int, alphas: Any, dtype: torch.dtype, origin: Any
) -> None:
    make, error, message = REFUSED[kind]
    first = torch.zeros(2, dtype=dtype)
    base = {"first": first, "w": make(torch.eye(2, dtype=dtype))}
    vectors = [origin({"first": torch.ones(2), "w": torch.ones(2, 2)}) for _ in range(count)]
    with pytest.raises(error, match=rf"merge_: base\['w'\] {message}"):
        merge_(base, vectors, alphas)
    assert not first.any()
    assert first._version == 0


@each_way
@each_refused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_refused_as_vector(kind: str, alphas: Any, dtype: torch.dtype) -> None:
    """As the only vector, and as the second of two, of the same names and of others."""
    make, error, message = REFUSED[kind]
    base = {"first": torch.zeros(2, dtype=dtype), "w": torch.zeros(2, 2, dtype=dtype)}
    fits = {"first": torch.ones(2), "w": torch.ones(2, 2)}
    bad = {"first": torch.ones(2), "w": make(torch.eye(2, dtype=dtype))}
    rows: list[Any] = [[bad], [fits, bad], [fits, {"w": bad["w"]}]]
    for vectors in rows:
        where = rf"vectors\[{len(vectors) - 1}\]\['w'\] {message}"
        with pytest.raises(error, match=where):
            merge_(base, vectors, alphas)
        assert all(not t.any() and t._version == 0 for t in base.values())
        with pytest.raises(error, match=where):
            gram(vectors)


@each_way
def test_a_base_that_no_vector_names_may_be_anything(alphas: Any) -> None:
    """A module of which a part is lazy, on meta or quantised: the rest can be merged into."""
    for make, *_ in REFUSED.values():
        base = {"w": make(torch.eye(2)), "first": torch.zeros(2)}
        merge_(base, {"first": torch.ones(2)}, alphas)
        assert base["first"].tolist() == [torch.tensor(0.3)] * 2


def test_lazy_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"base\['1.weight'\] is a UninitializedParameter"):
        merge_(model, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
    assert torch.equal(model[0].weight, before)
    model(torch.ones(1, 2))
    merge_(model, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
    assert torch.equal(model[0].weight, before + 1)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@each_way
@each_count
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("origin", [dict, known], ids=["plain", "known"])
def test_refused_in_transforms(transform: Any, count: int, alphas: Any, origin: Any) -> None:
    """A merge would have no derivative, and say nothing of it."""
    base, ones = {"first": torch.zeros(2), "w": torch.zeros(2, 2)}, torch.ones(2)

    def merged(x: Tensor) -> Tensor:
        vector = origin({"first": ones, "w": x * x})
        return merge_(base, [vector] * count, alphas)["w"].sum()

    with pytest.raises(TypeError, match=r"merge_: .* is traced by torch.func, which merge_"):
        transform(merged, torch.ones(2, 2))
    assert not any(t.any() for t in base.values())


# Complex numbers ----------------------------------------------------------------------------------


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "conj": lambda t: t.conj(),
    "transposed": lambda t: t.T,
    "conj of a transposed": lambda t: t.mH,
}


@each_way
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_vector", VIEWS)
@pytest.mark.parametrize("of_base", VIEWS)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_complex_base(
    dtype: torch.dtype, of_base: str, of_vector: str, backend: str, alphas: Any
) -> None:
    """Integers: sums are exact, whatever their order."""
    torch.manual_seed(0)

    def values() -> Tensor:
        return torch.complex(*torch.randint(-99, 99, (2, 5, 5)).to(torch.float64)).to(dtype)

    scale = 2 if isinstance(alphas, float) else {"*": 2}
    base, own = VIEWS[of_base](values()), [VIEWS[of_vector](values()), values()]
    expected = base.clone() + 2 * own[0] + 2 * own[1]
    merge_({"w": base}, [{"w": t} for t in own], scale, backend=backend)
    assert base.is_conj() == ("conj" in of_base)
    assert torch.equal(base, expected)


@each_way
def test_complex_and_real(alphas: Any) -> None:
    base = {"w": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(TypeError, match=r"has dtype torch.float32, base is complex .*complex64\)"):
        merge_(base, {"w": torch.ones(3)}, alphas)
    real = {"w": torch.zeros(3)}
    with pytest.raises(TypeError, match=r"has dtype torch.complex64, expected float64"):
        merge_(real, {"w": torch.ones(3, dtype=torch.complex64)}, alphas)
    assert not base["w"].any()
    assert not real["w"].any()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0)])
def test_complex_shapes(shape: tuple[int, ...]) -> None:
    base = torch.ones(shape, dtype=torch.complex64)
    merge_({"w": base}, [{"w": torch.full(shape, 1j)}] * 2, 0.5)
    assert torch.equal(base, torch.full(shape, 1 + 1j))


def test_complex_module_with_a_spectrum() -> None:
    """Real and complex parameters side by side, as in networks of Fourier operators."""
    model = nn.ParameterDict({"w": torch.ones(2, 2), "f": torch.ones(2, 2, dtype=torch.cfloat)})
    vector = TaskVector({"w": torch.ones(2, 2), "f": torch.full((2, 2), 2j)})
    merge_(model, [vector, vector], [0.5, 1.0])
    assert torch.equal(model["w"].detach(), torch.full((2, 2), 2.5))
    assert torch.equal(model["f"].detach(), torch.full((2, 2), 1 + 3j))


# Inference mode -----------------------------------------------------------------------------------


@each_way
def test_inference_tensors(alphas: Any) -> None:
    with torch.inference_mode():
        made = torch.zeros(3)
    base = {"first": torch.zeros(3), "w": made}
    vector = dict.fromkeys(base, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"base\['w'\] is an inference tensor, .*clone\(\)"):
        merge_(base, vector, alphas)
    assert not any(t.any() for t in base.values())
    with torch.inference_mode():
        merge_(base, vector, alphas)
    assert all(t.tolist() == [torch.tensor(0.3)] * 3 for t in base.values())
    merge_({"w": base["first"]}, {"w": made}, alphas)  # as a vector it is only read
    assert base["first"].tolist() == pytest.approx([0.39] * 3)


def test_ordinary_bases_in_inference_mode() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    with torch.inference_mode():
        merge_(model, {"weight": torch.ones(2, 2)}, 2)
    assert torch.equal(model.weight, before + 2)
    model(torch.ones(2)).sum().backward()


# Layouts ------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_full((1,), torch.nan), t.reshape(-1)])[1:].view(t.shape),
    "expanded": lambda t: t[:, :1, :, :1].expand(t.shape),
    "one number": lambda t: t[0, 0, 0, 0].expand(t.shape),
}


@each_way
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_base", [n for n in LAYOUTS if n not in ("expanded", "one number")])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16"],
)
def test_layouts(
    dtype: torch.dtype, other: torch.dtype, of_base: str, backend: str, alphas: Any
) -> None:
    """One vector in every layout there is, into a base in each that can be written."""
    torch.manual_seed(0)
    base = LAYOUTS[of_base](torch.randn(3, 4, 5, 2).to(dtype))
    vectors = [make(torch.randn(3, 4, 5, 2).to(other)) for make in LAYOUTS.values()]
    strides, kept = base.stride(), [v.clone() for v in vectors]
    value, bound = truth(base, vectors, [0.3] * len(vectors))
    merge_({"w": base}, [{"w": v} for v in vectors], alphas, backend=backend)
    assert base.stride() == strides
    assert (abs(long(base) - value) <= bound).all()
    assert all(map(torch.equal, vectors, kept))
    if of_base == "strided":
        assert base._base is not None
        assert base._base[..., 1].isnan().all()


# Nothing is written before everything fits --------------------------------------------------------


SECOND: dict[str, tuple[Tensor, Tensor, str]] = {
    "shape": (torch.zeros(3), torch.ones(4), r"\['b'\] has shape \(4,\), base has \(3,\)"),
    "dtype": (torch.zeros(3), torch.ones(3).int(), r"\['b'\] has dtype torch.int32"),
    "whole numbers": (torch.zeros(3).int(), torch.ones(3), r"\['b'\] names a tensor of dtype"),
    "meta": (torch.zeros(3, device="meta"), torch.ones(3), r"base\['b'\] is on meta"),
    "expanded": (torch.zeros(1).expand(3), torch.ones(3), "shares memory with itself"),
    "no base": (torch.zeros(3), torch.ones(3), r"\['c'\] is not in the base"),
}


@each_way
@each_count
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SECOND)
def test_a_second_that_fails_leaves_the_first(
    kind: str, backend: str, count: int, alphas: Any
) -> None:
    own, added, message = SECOND[kind]
    base = {"a": torch.arange(3.0), "b": own.as_strided(own.shape, own.stride())}
    vector = {"a": torch.ones(3), "b": added}
    if kind == "no base":
        vector["c"] = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=message):
        merge_(base, [vector] * count, alphas, backend=backend)
    assert same_bits(base["a"], torch.arange(3.0))
    assert base["a"]._version == 0


# DTensors -----------------------------------------------------------------------------------------


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
