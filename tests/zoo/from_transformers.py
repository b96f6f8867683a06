"""transformers at tiny sizes: ``ZOO[name]() -> (model, args, kwargs)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Made, images, padding, stirred, tokens

ZOO: dict[str, Callable[[], Made]] = {}

_SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
_VISION: dict[str, Any] = dict(image_size=28, patch_size=7, num_channels=3, **_SIZES)
_TOKENS: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=99)
_CAUSAL: dict[str, Any] = dict(_TOKENS, max_position_embeddings=32, **_SIZES)
_GROUPED: dict[str, Any] = dict(_CAUSAL, num_key_value_heads=2)
_T5: dict[str, Any] = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
)  # fmt: skip
_TWO_TOWERS = dict(text_config=_CAUSAL, vision_config=_VISION)
_STAGES: dict[str, Any] = dict(
    image_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4
)
_DETR: dict[str, Any] = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=5,
    num_feature_levels=2, num_labels=3, use_timm_backbone=False, use_pretrained_backbone=False,
    backbone=None, disable_custom_kernels=True,
)  # fmt: skip

# (class, configuration class, options)
VISION: list[tuple[str, str, dict[str, Any]]] = [
    ("ViTModel", "ViTConfig", _VISION),
    ("DeiTModel", "DeiTConfig", _VISION),
    ("BeitModel", "BeitConfig", _VISION),
    ("Dinov2Model", "Dinov2Config", _VISION),
    ("DINOv3ViTModel", "DINOv3ViTConfig", _VISION),
    ("SiglipVisionModel", "SiglipVisionConfig", _VISION),
    ("BlipVisionModel", "BlipVisionConfig", _VISION),
    ("ViTMSNModel", "ViTMSNConfig", _VISION),
    ("YolosModel", "YolosConfig", dict(_VISION, image_size=[28, 28], num_detection_tokens=3)),
    ("SwinModel", "SwinConfig", _STAGES),
    ("Swinv2Model", "Swinv2Config", _STAGES),
    ("ConvNextModel", "ConvNextConfig", dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])),
    ("ResNetModel", "ResNetConfig", dict(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1]
    )),
    ("SegformerModel", "SegformerConfig", dict(
        hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]
    )),
    ("LevitModel", "LevitConfig", dict(
        image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    )),
]  # fmt: skip
TEXT: list[tuple[str, str, dict[str, Any]]] = [
    ("BertModel", "BertConfig", _CAUSAL),
    ("AlbertModel", "AlbertConfig", dict(_CAUSAL, embedding_size=16)),
    ("DistilBertModel", "DistilBertConfig", dict(
        vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0
    )),
    ("DebertaV2Model", "DebertaV2Config", dict(
        _CAUSAL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    )),
    ("ElectraModel", "ElectraConfig", dict(_CAUSAL, embedding_size=16)),
    ("ModernBertModel", "ModernBertConfig", dict(_CAUSAL, cls_token_id=3, sep_token_id=2)),
    ("FNetModel", "FNetConfig", dict(_CAUSAL, use_tpu_fourier_optimizations=False)),
    ("GPT2LMHeadModel", "GPT2Config", dict(
        vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=2
    )),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", _CAUSAL),
    ("GPTJForCausalLM", "GPTJConfig", dict(
        vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    )),
    ("BloomForCausalLM", "BloomConfig", dict(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
    ("OPTForCausalLM", "OPTConfig", dict(_CAUSAL, ffn_dim=48, word_embed_proj_dim=32)),
    ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    ("Gemma2ForCausalLM", "Gemma2Config", dict(_GROUPED, head_dim=8)),
    ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    ("MixtralForCausalLM", "MixtralConfig", dict(
        _GROUPED, num_local_experts=4, num_experts_per_tok=2
    )),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(
        _GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1,
    )),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", dict(
        _CAUSAL, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
    )),
    ("MambaForCausalLM", "MambaConfig", dict(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4
    )),
    ("T5EncoderModel", "T5Config", _T5),
]  # fmt: skip


# The products of their experts know no float64; a loop over the experts does.
MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")


def _made(kind: str, config: str, options: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, config)(**options)
    model = stirred(getattr(transformers, kind)._from_config(made))
    if kind == "BloomForCausalLM":  # its GELU is an autograd.Function, which torch.func refuses too
        for block in model.transformer.h:
            block.mlp.gelu_impl = torch.nn.GELU("tanh")
    if kind in MIXTURES:
        model.set_experts_implementation("eager")
    return model


def _vision(kind: str, config: str, options: dict[str, Any]) -> Made:
    size = options.get("image_size", 32)
    size = size if isinstance(size, int) else size[0]
    return _made(kind, config, options), (), dict(pixel_values=images(size, 2))


def _text(kind: str, config: str, options: dict[str, Any]) -> Made:
    call: dict[str, Any] = dict(input_ids=tokens())
    if kind not in ("FNetModel", "MambaForCausalLM"):
        call["attention_mask"] = padding()
    if kind.endswith("LM") or kind.endswith("LMHeadModel"):
        call["use_cache"] = False
    return _made(kind, config, options), (), call


ZOO |= {f"transformers.{row[0]}": partial(_vision, *row) for row in VISION}
ZOO |= {f"transformers.{row[0]}": partial(_text, *row) for row in TEXT}


def _grouped(kind: str, config: str, options: dict[str, Any]) -> Made:
    """The experts' products in one call, in float32."""
    model, args, call = _text(kind, config, options)
    model.float().set_experts_implementation("grouped_mm")
    return model, args, call


for _row in TEXT:
    if _row[0] in MIXTURES:
        ZOO[f"transformers.{_row[0]}.grouped_mm"] = partial(_grouped, *_row)


def _t5(checkpointed: bool) -> Made:
    model = _made("T5ForConditionalGeneration", "T5Config", _T5)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids = tokens()
    call = dict(
        input_ids=ids, attention_mask=padding(), decoder_input_ids=ids.flip(1), use_cache=False
    )
    return model, (), call


def _clip() -> Made:
    model = _made("CLIPModel", "CLIPConfig", dict(_TWO_TOWERS, projection_dim=16))
    ids = torch.cat([tokens()[:, :-1], torch.full((2, 1), 2)], 1)  # each ends in the end token
    return model, (), dict(input_ids=ids, pixel_values=images(28, 2), attention_mask=padding() | 1)


def _deformable_detr() -> Made:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage1", "stage2"]
    )
    options = dict(_DETR, backbone_config=backbone)
    model = _made("DeformableDetrModel", "DeformableDetrConfig", options)
    return model, (), dict(pixel_values=images(32))


ZOO["transformers.T5ForConditionalGeneration"] = partial(_t5, False)
ZOO["transformers.T5ForConditionalGeneration.checkpointed"] = partial(_t5, True)
ZOO["transformers.CLIPModel"] = _clip
ZOO["transformers.DeformableDetrModel"] = _deformable_detr
