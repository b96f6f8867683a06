"""Parameter selection: what "attention" is in each family of names, globs, lists, callables,
errors.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tangentfast as tf
from tangentfast.select import select


class Attention(nn.Module):
    def __init__(self, inputs: tuple[str, ...], output: str) -> None:
        super().__init__()
        for name in (*inputs, output):
            self.add_module(name, nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.proj = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (("qkv",), "proj"),  # timm, torchvision swin
        (("q", "kv"), "proj"),  # timm attention pooling
        (("q_proj", "k_proj", "v_proj"), "out_proj"),  # Hugging Face CLIP, SigLIP
        (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama
        (("q", "k", "v"), "o"),  # T5
        (("c_attn",), "c_proj"),  # GPT-2
        (("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT
        (("to_q", "to_k", "to_v"), "to_out"),  # diffusers
    ],
)
def test_attention_is_the_weights_of_the_four_projections(
    inputs: tuple[str, ...], output: str
) -> None:
    net = nn.Sequential(Block(Attention(inputs, output)), Block(Attention(inputs, output)))
    wanted = [f"{i}.attn.{n}.weight" for i in range(2) for n in (*inputs, output)]
    assert select(net, "attention") == wanted


def test_multi_head_attention() -> None:
    net = Block(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert select(net, "attention") == ["attn.in_proj_weight", "attn.out_proj.weight"]
    apart = Block(nn.MultiheadAttention(4, 2, kdim=6, vdim=3))
    assert select(apart, "attention") == [
        "attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight",
    ]  # fmt: skip


def test_output_beside_the_projections() -> None:
    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Module()
            self.attention.self = nn.Module()
            for name in ("query", "key", "value"):
                self.attention.self.add_module(name, nn.Linear(4, 4))
            self.attention.output = nn.Module()
            self.attention.output.dense = nn.Linear(4, 4)
            self.output = nn.Module()
            self.output.dense = nn.Linear(4, 4)  # the MLP's

    assert select(Bert(), "attention") == [
        "attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight",
        "attention.output.dense.weight",
    ]  # fmt: skip


def test_patterns_lists_and_callables() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    everything = [n for n, _ in net.named_parameters()]
    assert select(net, "all") == everything
    assert select(net, "*.bias") == ["0.bias", "1.bias", "2.bias"]
    assert select(net, ["2.*", "0.weight"]) == ["0.weight", "2.weight", "2.bias"]
    assert select(net, lambda name, p: p.dim() == 2) == ["0.weight", "2.weight"]


def test_errors() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"'0.weigth' matches no parameter of Sequential; close names: 0.weight"
    ):
        select(net, ["0.weigth"])
    with pytest.raises(
        ValueError, match=r"no attention module was recognised in Sequential.*globs"
    ):
        select(net, "attention")
    with pytest.raises(ValueError, match="nothing of Sequential was selected"):
        select(net, lambda name, p: False)
    with pytest.raises(TypeError, match="got int"):
        select(net, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int in the list"):
        select(net, [3])  # type: ignore[list-item]
    net.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), False))
    assert "codes" not in select(net, "all")
    with pytest.raises(ValueError, match=r"'codes' is torch.int8"):
        select(net, ["codes"])


def test_train_only() -> None:
    net = Block(Attention(("qkv",), "proj"))
    trained = tf.train_only(net, "attention")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        "attn.qkv.weight", "attn.proj.weight",
    }  # fmt: skip
    assert [id(p) for p in trained] == [id(net.attn.qkv.weight), id(net.attn.proj.weight)]
    with pytest.raises(ValueError, match="matches no parameter"):
        tf.train_only(net, "nothing")
    assert net.attn.qkv.weight.requires_grad  # unchanged by the error
    assert len(tf.train_only(net, "all")) == len(list(net.parameters()))
