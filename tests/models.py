"""Model factories of four libraries: small sizes, and real ones where a name says so.

``MODELS[name]() -> (model, args, kwargs)`` in float64 and evaluation mode; it skips the test where
the library is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
MODELS: dict[str, Callable[[], Made]] = {}


def images(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    """Ids clear of the special ones (0, 1, 2 in the configurations below)."""
    return torch.randint(3, 90, (batch, length))


def stirred(model: nn.Module) -> nn.Module:
    """Float64, evaluation mode, and nothing at a zero or a one from which a term could hide."""
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() <= 1 or not p.any():
                p.add_(torch.randn_like(p) * 0.1)
    return model


def add(name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        MODELS[name] = make
        return make

    return register


# --- torch and open_clip


@add("torch.TransformerEncoderLayer")
def encoder_layer() -> Made:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return stirred(model), (torch.randn(2, 7, 32, dtype=torch.float64),), {}


@add("open_clip.ViT-B-32.visual")
def open_clip_vit_b_32() -> Made:
    open_clip = pytest.importorskip("open_clip")
    return stirred(open_clip.create_model("ViT-B-32").visual), (images(224),), {}


def _open_clip(kind: str, size: int = 28, **vision: Any) -> Made:
    module = pytest.importorskip("open_clip.model")
    vision = dict(image_size=size, patch_size=7, width=32, layers=2, head_width=8) | vision
    text = dict(context_length=9, vocab_size=99, width=32, heads=4, layers=2)
    model = getattr(module, kind)(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return stirred(model), (images(size, 2), tokens()), {}


MODELS["open_clip.CLIP"] = partial(_open_clip, "CLIP")
MODELS["open_clip.CustomTextCLIP"] = partial(
    _open_clip, "CustomTextCLIP", pool_type="avg", no_ln_pre=True
)
MODELS["open_clip.CLIP.attentional_pool"] = partial(
    _open_clip, "CLIP", attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4
)
MODELS["open_clip.CLIP.attention_pool_resnet"] = partial(
    _open_clip, "CLIP", size=64, layers=(1, 1, 1, 1), width=8
)

# --- timm


def _timm(name: str, size: int = 224, **options: Any) -> Made:
    timm = pytest.importorskip("timm")
    return stirred(timm.create_model(name, **options)), (images(size),), {}


TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},  # real size
    "deit_tiny_distilled_patch16_224": dict(depth=2),
    "swin_tiny_patch4_window7_224": dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 4, 8)),
    "convnext_atto": dict(size=64),
    "vit_small_patch14_dinov2": dict(img_size=56, size=56, depth=3),
    "vit_tiny_patch16_224.map_pool": dict(global_pool="map", class_token=False, depth=2),
    "vit_tiny_patch16_224.norms": dict(
        img_size=64, size=64, depth=2, qk_norm=True, init_values=0.1, reg_tokens=2
    ),
    "eva02_tiny_patch14_224": dict(img_size=56, size=56, depth=2),
    "beit_base_patch16_224": dict(
        img_size=64, size=64, depth=2, embed_dim=48, num_heads=4, use_rel_pos_bias=True
    ),
}
for _name, _options in TIMM.items():
    MODELS[f"timm.{_name}"] = partial(_timm, _name.split(".")[0], **_options)

# --- Hugging Face transformers

_SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
_VISION = dict(image_size=28, patch_size=7, num_channels=3, **_SIZES)
_TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=99)


def padding() -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return mask


def _hugging_face(kind: str, config: str, options: dict[str, Any], attention: str) -> Made:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, config)(**options)
    model = getattr(transformers, kind)._from_config(made, attn_implementation=attention)
    ids = tokens()
    calls: dict[str, Any] = {
        "T5ForConditionalGeneration": dict(
            input_ids=ids, attention_mask=padding(), decoder_input_ids=ids, use_cache=False
        ),
        "CLIPModel": dict(
            input_ids=torch.cat([ids[:, :-1], torch.full((2, 1), 2)], 1),
            pixel_values=images(28, 2),
            attention_mask=padding() | 1,
        ),
        "BertModel": dict(input_ids=ids, attention_mask=padding()),
        "GPT2LMHeadModel": dict(input_ids=ids, attention_mask=padding(), use_cache=False),
        "LlamaForCausalLM": dict(input_ids=ids, attention_mask=padding(), use_cache=False),
    }
    return stirred(model), (), calls.get(kind, dict(pixel_values=images(28, 2)))


HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTConfig", _VISION),
    "Dinov2Model": ("Dinov2Config", _VISION),
    "SiglipVisionModel": ("SiglipVisionConfig", _VISION),
    "CLIPModel": (
        "CLIPConfig",
        dict(
            text_config=dict(max_position_embeddings=16, **_TOKENS, **_SIZES),
            vision_config=_VISION,
            projection_dim=16,
        ),
    ),
    "BertModel": ("BertConfig", dict(_TOKENS, **_SIZES)),
    "GPT2LMHeadModel": (
        "GPT2Config",
        dict(_TOKENS, n_positions=32, n_embd=32, n_layer=2, n_head=4),
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        dict(
            _TOKENS,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    "LlamaForCausalLM": ("LlamaConfig", dict(_TOKENS, num_key_value_heads=2, **_SIZES)),
}
for _kind, (_config, _options) in HUGGING_FACE.items():
    for _attention in ("sdpa", "eager"):
        MODELS[f"hf.{_kind}.{_attention}"] = partial(
            _hugging_face, _kind, _config, _options, _attention
        )

# --- torchvision


def _torchvision(name: str, size: int, **options: Any) -> Made:
    models = pytest.importorskip("torchvision").models
    return stirred(getattr(models, name)(**options)), (images(size),), {}


MODELS["torchvision.VisionTransformer"] = partial(
    _torchvision, "VisionTransformer", 32, image_size=32, patch_size=8, num_layers=2, num_heads=4,
    hidden_dim=32, mlp_dim=64,
)  # fmt: skip
MODELS["torchvision.resnet18"] = partial(_torchvision, "resnet18", 64)
MODELS["torchvision.convnext_tiny"] = partial(_torchvision, "convnext_tiny", 32)


@add("torchvision.swin_v2")
def swin_v2() -> Made:
    swin = pytest.importorskip("torchvision").models.swin_transformer
    # no window is padded: the keys of padding are zero vectors, at whose norm torch's second
    # derivative, which backward through torch.func.jvp needs, is NaN
    model = swin.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], window_size=[4, 4],
        block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2,
    )  # fmt: skip
    return stirred(model), (images(32),), {}
