"""Whole models of four libraries: output, gradients, no fallback, and what "attention" means."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import pytest
import torch
from models import MODELS, Made
from truth import (
    CONTRACT,
    converted,
    floats,
    model_errors,
    random_tau,
    relative,
    torch_linearized,
)

from tangentfast import linearize

# Eager attention and the RMS norms of transformers compute in float32 by their own code
# (`dtype=torch.float32` in softmax, `.to(torch.float32)` in the norms), in a float64 model too: the
# truth itself is no better.
FLOAT32_INSIDE = {
    "hf.ViTModel.eager",
    "hf.SiglipVisionModel.eager",
    "hf.CLIPModel.eager",
    "hf.LlamaForCausalLM.sdpa",
    "hf.LlamaForCausalLM.eager",
}

NO_ATTENTION = {"timm.convnext_atto", "torchvision.resnet18", "torchvision.convnext_tiny"}


def made(name: str) -> Made:
    torch.manual_seed(0)
    return MODELS[name]()


def selections() -> Iterable[tuple[str, str]]:
    for name in MODELS:
        yield name, "all"
        if name not in NO_ATTENTION:
            yield name, "attention"


@pytest.mark.parametrize(("name", "params"), list(selections()))
def test_exact(name: str, params: str) -> None:
    model, args, kwargs = made(name)
    limits, zero = CONTRACT[torch.float64], 1e-12
    if name in FLOAT32_INSIDE:
        limits = CONTRACT[torch.float32]
        zero = limits[0]
    output, gradient, lin = model_errors(model, args, kwargs, params, zero=zero)
    assert output <= limits[0]
    assert gradient <= limits[1]
    assert "fallback: none" in lin.report()


@pytest.mark.parametrize("name", ["timm.vit_tiny_patch16_224", "open_clip.CLIP"])
def test_float32(name: str) -> None:
    exact, args, kwargs = made(name)
    model = copy.deepcopy(exact).float()
    exact.load_state_dict(model.state_dict())  # the same numbers
    args = converted(args, torch.float32)
    output, gradient, _ = model_errors(model, args, kwargs, truth=exact)
    assert output <= CONTRACT[torch.float32][0]
    assert gradient <= CONTRACT[torch.float32][1]


def test_bfloat16() -> None:
    """No farther from the truth than 1.25 × ``torch.func.jvp`` in bfloat16."""
    exact, args, kwargs = made("timm.vit_tiny_patch16_224.norms")
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    args = converted(args, torch.bfloat16)
    lin = linearize(model)
    random_tau(lin)
    out = lin(*args, **kwargs)
    u = torch.randn_like(out)
    out.backward(u)

    def by_torch(
        model: torch.nn.Module, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        taus = {n: t.detach().to(dtype).requires_grad_() for n, t in lin.tau.items()}
        (y,) = torch_linearized(model, converted(args, dtype), kwargs, taus)
        y.backward(u.to(dtype))
        return y, {n: t.grad for n, t in taus.items() if t.grad is not None}

    truth, grads = by_torch(exact, torch.float64)
    theirs, their_grads = by_torch(model, torch.bfloat16)
    assert relative(out, truth) <= 1.25 * relative(theirs, truth)

    def distance(found: dict[str, torch.Tensor]) -> float:
        flat = [torch.cat([g[n].double().flatten() for n in grads]) for g in (found, grads)]
        return relative(*flat)

    ours = {n: t.grad for n, t in lin.tau.items()}
    assert distance(ours) <= 1.25 * distance(their_grads)


def test_mixture_of_two_outputs() -> None:
    """Every floating tensor of a ModelOutput is linearized; the structure stays."""
    model, args, kwargs = made("hf.CLIPModel.sdpa")
    lin = linearize(model)
    random_tau(lin)
    out, plain = lin(*args, **kwargs), model(*args, **kwargs)
    assert type(out) is type(plain)
    assert list(out) == list(plain)
    assert all(not torch.equal(a, b) for a, b in zip(floats(out), floats(plain), strict=True))


# What "attention" must select in one block, by hand: these and nothing else.
BLOCKS: dict[str, tuple[str, list[str]]] = {
    "open_clip.ViT-B-32.visual": (
        "transformer.resblocks.3.",
        ["attn.in_proj_weight", "attn.out_proj.weight"],
    ),
    "timm.vit_tiny_patch16_224": ("blocks.3.", ["attn.qkv.weight", "attn.proj.weight"]),
    "timm.swin_tiny_patch4_window7_224": (
        "layers.2.blocks.1.",
        ["attn.qkv.weight", "attn.proj.weight"],
    ),
    "timm.eva02_tiny_patch14_224": (
        "blocks.1.",
        ["attn.qkv.weight", "attn.proj.weight"],
    ),
    "timm.vit_tiny_patch16_224.map_pool": (
        "attn_pool.",
        ["q.weight", "kv.weight", "proj.weight"],
    ),
    "torchvision.VisionTransformer": (
        "encoder.layers.encoder_layer_1.",
        ["self_attention.in_proj_weight", "self_attention.out_proj.weight"],
    ),
    "torchvision.swin_v2": ("features.1.0.", ["attn.qkv.weight", "attn.proj.weight"]),
    "torch.TransformerEncoderLayer": (
        "",
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight"],
    ),
    "hf.Dinov2Model.sdpa": (
        "encoder.layer.1.",
        [f"attention.{n}_proj.weight" for n in "qkvo"],
    ),
    "hf.CLIPModel.sdpa": (
        "vision_model.encoder.layers.1.",
        [f"self_attn.{n}_proj.weight" for n in ("k", "v", "q", "out")],
    ),
    "hf.SiglipVisionModel.sdpa": (
        "head.",
        ["attention.in_proj_weight", "attention.out_proj.weight"],
    ),
    "hf.BertModel.sdpa": (
        "encoder.layer.1.",
        [f"attention.self.{n}.weight" for n in ("query", "key", "value")]
        + ["attention.output.dense.weight"],
    ),
    "hf.GPT2LMHeadModel.sdpa": ("transformer.h.1.", ["attn.c_attn.weight", "attn.c_proj.weight"]),
    "hf.T5ForConditionalGeneration.sdpa": (
        "decoder.block.1.",
        [f"layer.0.SelfAttention.{n}.weight" for n in "qkvo"]
        + [f"layer.1.EncDecAttention.{n}.weight" for n in "qkvo"],
    ),
    "hf.LlamaForCausalLM.sdpa": (
        "model.layers.1.",
        [f"self_attn.{n}_proj.weight" for n in "qkvo"],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_names(name: str) -> None:
    block, expected = BLOCKS[name]
    model, _, _ = made(name)
    tau = linearize(model, "attention").tau
    assert [n for n in tau if n.startswith(block)] == [block + n for n in expected]
    # no other kind of parameter anywhere: every name is one of the block's up to the block's number
    last = {re.sub(r"\d+", "#", n).split(".")[-2] for n in tau if "." in n}
    wanted = {re.sub(r"\d+", "#", n).split(".")[-2] for n in expected}
    assert wanted <= last
    assert all(
        "mlp" not in n and "fc" not in n and "norm" not in n and "bias" not in n for n in tau
    )
