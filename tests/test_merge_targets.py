"""What merge_ and gram take and refuse: DTensors, wrappers of tensors, complex bases, layouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_merge import BACKENDS, long, same_bits, truth
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from tangentfast.fingerprint import Base
from tangentfast.merge import gram, merge_
from tangentfast.task_vector import TaskVector

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
