"""timm at tiny sizes: ``ZOO[name]() -> (model, args, kwargs)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from models import Made, images, stirred

ZOO: dict[str, Callable[[], Made]] = {}

# Options of the library's own factory. An `img_size` is what the model is built for, a `size` only
# that of the image.
_VIT: dict[str, Any] = dict(img_size=32, embed_dim=32, num_heads=4, depth=2)
_WIDTHS: dict[str, Any] = dict(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1))
_HEADS: dict[str, Any] = dict(num_heads=(1, 2, 2, 4))
_COAT: dict[str, Any] = dict(
    img_size=64, num_heads=4, serial_depths=(1, 1, 1, 1), crpe_window={3: 1, 5: 1, 7: 2}
)

FACTORIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _VIT,
    "vit_small_patch14_reg4_dinov2": _VIT | dict(img_size=28),
    "vit_base_patch16_siglip_224": _VIT,
    "deit_tiny_distilled_patch16_224": _VIT,
    "deit3_small_patch16_224": _VIT,
    "beit_base_patch16_224": _VIT,
    "eva02_tiny_patch14_224": _VIT | dict(img_size=28),
    "cait_xxs24_224": _VIT,
    "xcit_nano_12_p16_224": _VIT,
    "convit_tiny": _VIT | dict(depth=3, local_up_to_layer=2),
    "tnt_s_patch16_224": dict(
        img_size=32, embed_dim=32, inner_dim=8, num_heads_inner=2, num_heads_outer=4, depth=2
    ),
    "crossvit_tiny_240": dict(
        img_size=48, img_scale=(1.0, 2 / 3), embed_dim=(16, 32), num_heads=(2, 4),
        depth=((1, 1, 0), (1, 1, 0)),
    ),
    "coat_tiny": _COAT | dict(embed_dims=(16, 16, 16, 16), parallel_depth=1),
    "coat_lite_tiny": _COAT | dict(embed_dims=(8, 16, 16, 32)),
    "pit_ti_224": dict(img_size=64, base_dims=(8, 8, 8), heads=(1, 2, 4), depth=(1, 1, 1)),
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "swinv2_tiny_window8_256": dict(
        img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "twins_svt_small": _WIDTHS | _HEADS | dict(img_size=64),
    "pvt_v2_b0": _WIDTHS | _HEADS | dict(size=64),
    "visformer_tiny": dict(
        img_size=64, init_channels=8, embed_dim=32, depth=(1, 1, 1), num_heads=2
    ),
    "davit_tiny": _WIDTHS | _HEADS | dict(size=64, window_size=2),
    "hiera_tiny_224": dict(img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1)),
    "edgenext_xx_small": dict(
        size=64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(2, 2, 2, 4),
        global_block_counts=(0, 1, 1, 1),
    ),
    "levit_128s": dict(
        img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)
    ),
    "tiny_vit_5m_224": _WIDTHS | _HEADS | dict(size=64, window_sizes=(2, 2, 2, 2)),
    "efficientformer_l1": dict(
        size=224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 8, 16), num_vit=1
    ),  # its attention is made for 224 pixels
    "efficientformerv2_s0": _WIDTHS | dict(img_size=64, num_vit=1, mlp_ratios=((2,),) * 4),
    "efficientvit_m0": dict(
        img_size=64, embed_dim=(16, 24, 32), depth=(1, 1, 1), num_heads=(2, 3, 4), key_dim=(4, 4, 4)
    ),
    "efficientvit_b0": dict(
        size=64, widths=(8, 8, 16, 16, 32), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(32, 32)
    ),
    "fastvit_sa12": dict(size=64, layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
    "convnextv2_atto": dict(size=64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
    "mambaout_femto": dict(size=64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
    "mobilevit_xxs": dict(size=64),
    "mobilenetv3_small_050": dict(size=32),
    "test_efficientnet": dict(size=32),
}  # fmt: skip

# Classes, where the factory leaves the sizes to nobody: (module, class, options).
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "volo": ("volo", "VOLO", dict(
        img_size=32, layers=(1, 1, 0, 0), embed_dims=(16, 32, 32, 32), num_heads=(2, 4, 4, 4),
        stem_hidden_dim=8,
    )),
    "nest": ("nest", "Nest", dict(
        img_size=64, embed_dims=(16, 16, 32), num_heads=(2, 2, 4), depths=(1, 1, 1)
    )),
    "gcvit": ("gcvit", "GlobalContextVit", dict(
        img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)
    )),
    "focalnet": ("focalnet", "FocalNet", dict(size=32, embed_dim=8, depths=(1, 1, 1, 1))),
    "mlp_mixer": ("mlp_mixer", "MlpMixer", dict(img_size=64, embed_dim=32, num_blocks=2)),
    "poolformer": ("metaformer", "MetaFormer", dict(
        size=64, depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)
    )),
    "caformer": ("metaformer", "MetaFormer", dict(
        size=64, depths=(1, 1, 1, 1), dims=(8, 16, 32, 32),
        token_mixers=("SepConv", "SepConv", "Attention", "Attention"),
        norm_layers=("LayerNorm2dNoBias",) * 2 + ("LayerNormNoBias",) * 2,
    )),
    "resnetv2_bit": ("resnetv2", "ResNetV2", dict(  # weight standardisation
        size=32, layers=(1, 1, 1, 1), channels=(128,) * 4, stem_chs=32, stem_type="fixed"
    )),
}  # fmt: skip

# Classes built from a dataclass: (module, class, what the library's configuration is changed in,
# size of the image).
CONFIGURED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "eca_nfnet_l0": ("nfnet", "NormFreeNet", dict(
        depths=(1, 1, 1, 1), channels=(32, 32, 32, 32), stem_chs=16, group_size=8, num_features=32
    ), 32),
    "maxvit_tiny_rw": ("maxxvit", "MaxxVit", dict(
        embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=(8, 8)
    ), 64),
    "coatnet_0_rw": ("maxxvit", "MaxxVit", dict(
        embed_dim=(16, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=(8, 8)
    ), 64),
    "mvitv2_tiny": ("mvitv2", "MultiScaleVit", dict(
        depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2)
    ), 32),
    "naflexvit": ("naflexvit", "NaFlexVit", dict(
        embed_dim=32, depth=2, num_heads=4, pos_embed_grid_size=(3, 3)
    ), 32),
    "regnety_002": ("regnet", "RegNet", dict(
        depth=6, w0=8, wa=8.0, wm=2.0, group_size=8, stem_width=8
    ), 32),
}  # fmt: skip


def _part(name: str) -> Any:
    return getattr(pytest.importorskip("timm").models, name)


def _side(options: dict[str, Any]) -> int:
    size = options.get("img_size") or options["size"]
    return size if isinstance(size, int) else size[0]


def _factory(name: str, options: dict[str, Any]) -> Made:
    timm = pytest.importorskip("timm")
    given = {n: v for n, v in options.items() if n != "size"}
    model = timm.create_model(name, num_classes=2, **given)
    return stirred(model), (images(_side(options), 2),), {}


def _class(module: str, kind: str, options: dict[str, Any]) -> Made:
    part = _part(module)

    def named(value: Any) -> Any:  # classes stand in the table by their names
        if isinstance(value, tuple):
            return tuple(map(named, value))
        return getattr(part, value, value) if isinstance(value, str) else value

    given = {n: named(v) for n, v in options.items() if n != "size"}
    return stirred(getattr(part, kind)(num_classes=2, **given)), (images(_side(options), 2),), {}


def _configured(name: str, module: str, kind: str, changes: dict[str, Any], size: int) -> Made:
    part = _part(module)
    known = part.model_cfgs[name] if hasattr(part, "model_cfgs") else part.NaFlexVitCfg()
    sized = {"img_size": size} if kind in ("MaxxVit", "MultiScaleVit") else {}
    model = getattr(part, kind)(dataclasses.replace(known, **changes), num_classes=2, **sized)
    return stirred(model), (images(size, 2),), {}


ZOO |= {f"timm.{n}": partial(_factory, n, o) for n, o in FACTORIES.items()}
ZOO |= {f"timm.{n}": partial(_class, *row) for n, row in CLASSES.items()}
ZOO |= {f"timm.{n}": partial(_configured, n, *row) for n, row in CONFIGURED.items()}
