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


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save({c: distributed(*c, rank) for c in CASES}, f"{folder}/{rank}.pt")
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
