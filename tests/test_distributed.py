"""DDP and FSDP2 on two gloo processes: outputs and gradients equal those of one process."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import tangentfast as tf

WORLD = 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def case(params: str) -> tuple[tf.LinearizedModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lin = tf.linearize(Net().double(), params)
    for tau in lin.parameters():
        nn.init.normal_(tau, std=0.1)
    return lin, torch.randn(4, 5, 16).double(), torch.randn(4, 4).double()


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[no-any-return]


CASES = [(kind, params) for kind in ("ddp", "fsdp") for params in ("all", "attention")]


def distributed(kind: str, params: str, rank: int) -> tuple[object, ...]:
    lin, x, target = case(params)
    model: nn.Module = lin
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for block in lin.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(lin, mesh=mesh)
        assert all(isinstance(t, dist.tensor.DTensor) for t in lin.tau.values())
    else:
        model = nn.parallel.DistributedDataParallel(lin)
    half = slice(rank * 2, rank * 2 + 2)
    for _ in range(2):  # the second step meets what the first left behind
        model.zero_grad()
        out = model(x[half])
        ((out - target[half]) ** 2).mean().backward()
    gradients = {name: whole(tau.grad) for name, tau in lin.tau.items()}
    vector = dict(lin.task_vector())
    with torch.no_grad():
        evaluated = model(x[half])
    return out.detach(), evaluated, gradients, vector


JVP_CASES = ("fsdp", "ddp", "static_graph", "find_unused_parameters")


def mean_flow(net: nn.Module, x: torch.Tensor, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivative by the input and a loss of both, as consistency models are trained."""
    with torch.set_grad_enabled(grad):
        u, du = tf.jvp(net, (x,), tangents=(torch.ones_like(x),))
    return du, (u - du).square().mean()


def jvp_distributed(kind: str, rank: int) -> tuple[object, ...]:
    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(4, 5, 16).double()[rank * 2 : rank * 2 + 2]
    model: nn.Module = net
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    else:
        options = {} if kind == "ddp" else {kind: True}
        model = nn.parallel.DistributedDataParallel(net, **options)
    found = []
    for grad in (True, False, True):  # what one call leaves behind, the next one meets
        model.zero_grad()
        du, loss = mean_flow(model, x, grad)
        if grad:
            loss.backward()
            found.append({n: whole(p.grad) for n, p in net.named_parameters()})
        found.append(du)
    with torch.no_grad():
        found.append(model(x))
    return tuple(found)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found: dict[object, object] = {c: distributed(*c, rank) for c in CASES}
        found.update({kind: jvp_distributed(kind, rank) for kind in JVP_CASES})
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], tuple]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_two_processes_equal_one(results: list, kind: str, params: str) -> None:
    lin, x, target = case(params)
    out = lin(x)
    ((out - target) ** 2).mean().backward()
    parts = [result[kind, params] for result in results]
    for computed in (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])):
        torch.testing.assert_close(computed, out.detach(), rtol=1e-13, atol=1e-14)
    for _, _, gradients, vector in parts:
        assert gradients.keys() == lin.tau.keys() == vector.keys()
        for name, tau in lin.tau.items():
            torch.testing.assert_close(gradients[name], tau.grad, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(vector[name], tau.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", JVP_CASES)
def test_jvp_in_two_processes_equals_one(results: list, kind: str) -> None:
    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(4, 5, 16).double()
    du, loss = mean_flow(net, x, True)
    loss.backward()
    for result in results:
        first, _, _, second, *_ = result[kind]
        for gradients in (first, second):
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-14)
    for place in (1, 2, 4):
        computed = torch.cat([result[kind][place] for result in results])
        torch.testing.assert_close(computed, du, rtol=1e-12, atol=1e-13)
    computed = torch.cat([result[kind][5] for result in results])
    torch.testing.assert_close(computed, net(x).detach(), rtol=1e-12, atol=1e-13)
