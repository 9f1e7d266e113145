"""Towers by name, with fresh weights: image towers of timm and MedCLIP, text towers of CLIP and BERT.

An image tower maps (B, 3, H, W) to features (B, d). A text tower is a small object that registers its parameters on the
model itself, because the published SLIP checkpoints keep the text transformer at the top level.
"""

from __future__ import annotations

import json
import re
from typing import Any

import timm
from timm.layers import PatchDropout
from torch import nn

from inputs.sizes import Size, height_width
from inputs.transforms import IMAGENET_MEAN, IMAGENET_STD, MEDCLIP_MEAN, MEDCLIP_STD, Preprocess
from towers import library
from towers.clip_text import CLIPText
from towers.library import is_library_tower
from towers.weights import refuse_margin


def is_medclip_tower(name: str) -> bool:
    """Whether an image tower is one of MedCLIP's two, and no model of timm."""
    return name.startswith("medclip-")


def build_image_tower(name: str, settings: dict[str, Any], size: Size) -> tuple[nn.Module, int, nn.Module | None]:
    """The image tower, the width of its features, and a projection of its own to the space of captions, if it has one.

    Args:
        name: timm's; medclip-swin, medclip-resnet50; or another library's (towers/library.py).
        settings: of the tower's constructor.
        size: of the images in pixels; a ViT's position embeddings follow.

    Raises:
        ValueError: unknown name, with those near it; settings or a size that the tower does not take.
    """
    if is_library_tower(name):
        return library.build_image_tower(name, settings, size)
    check_settings(name, settings)
    if is_medclip_tower(name):
        from towers import medclip  # transformers takes seconds to import, and only these models need it

        return *medclip.build_image_tower(name, settings, size), None
    tower = build_timm_tower(name, settings, size)
    return tower, getattr(tower, "head_hidden_size", None) or tower.num_features, None


# Of a tower's constructor that are words: how tokens become one, and layers by their names in timm.
WORDS = {"global_pool", "act_layer", "norm_layer"}
# Of timm.create_model that are no architecture: they name weights, files and addresses.
NOT_ARCHITECTURE = re.compile("pretrained|checkpoint|cache|cfg|config|hub|url|file")


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """ValueError for a setting that is more than the architecture's numbers: checkpoints bring settings from anywhere.

    Numbers, and lists of numbers, pass; a word for WORDS alone.
    """

    def is_number(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_number, value))
        return value is None or isinstance(value, (int, float))

    for key, value in settings.items():
        if not isinstance(key, str) or NOT_ARCHITECTURE.search(key):
            raise ValueError(f"vision tower {name!r}: {key} is no setting of an architecture")
        word = key in WORDS and isinstance(value, str) and re.fullmatch("[a-z0-9_]{0,32}", value)
        if not word and not is_number(value):
            raise ValueError(f"vision tower {name!r}: {key} takes numbers, not {str(value)[:80]!r}")


def build_timm_tower(name: str, settings: dict[str, Any], size: Size) -> Any:
    """Any timm image model without its classifier."""
    if not timm.is_model(name):
        near = timm.list_models(f"{name.split('_')[0]}*")[:20]
        raise ValueError(f"unknown vision tower {name!r}: not a timm model (see timm.list_models()); near it: {near}")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    given = dict(img_size=size) if known is not None and known.fixed_input_size else {}
    try:
        tower: Any = timm.create_model(name, num_classes=0, **given, **settings)
    except TypeError as error:
        raise ValueError(f"vision tower {name!r} does not take the settings {settings}: {error}") from error
    embed: Any = getattr(tower, "patch_embed", None)
    if hasattr(embed, "patch_size") and not getattr(embed, "dynamic_img_pad", False):
        refuse_margin(name, height_width(embed.patch_size), size)
    if getattr(tower, "cls_token", None) is not None:
        # timm 0.5, which the published models were trained with; later releases start the class token at 1e-6.
        nn.init.trunc_normal_(tower.cls_token, std=0.02)
    return tower


def drop_patches(tower: Any, name: str, share: float) -> None:
    """Have a ViT of timm leave out a random share of each image's patches in training (Li et al. 2023, FLIP).

    Weights and their names stay, and what is not training sees whole images. ValueError for a tower without patches
    that it could leave out.
    """
    if not isinstance(getattr(tower, "patch_drop", None), nn.Module):
        raise ValueError(f"--patch-dropout: {name} cannot leave patches out, as the plain ViTs of timm can")
    tower.patch_drop = PatchDropout(share, num_prefix_tokens=tower.num_prefix_tokens)


def build_text_tower(kind: str, pooling: str, settings: dict[str, Any], **sizes: int) -> Any:
    """CLIP's, BERT's or another library's text tower, whose `attach` registers its parameters on a model.

    Args:
        kind: clip, bert, or a name of towers/library.py.
        pooling: of bert.
        settings: of another library's tower.
        sizes: context_length, vocab_size, width, heads and layers.
    """
    if kind == "clip":
        return CLIPText(**sizes)
    if kind == "bert":
        from towers import medclip

        return medclip.BertText(**sizes, pooling=pooling)
    if is_library_tower(kind):
        return library.LibraryText(kind, settings, sizes["context_length"])
    raise ValueError(f"unknown text tower {kind!r}: choose clip or bert")


def preprocess_of(tower: str, size: Size) -> Preprocess:
    """How images are prepared for an image tower: each family brings its own normalisation."""
    if is_medclip_tower(tower):
        return Preprocess(size=size, mean=MEDCLIP_MEAN, std=MEDCLIP_STD, prepare="medclip")
    return Preprocess(size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, prepare="slip")


def titled(name: str, own: Any, usual: Any) -> str:
    """A model in words: SLIP_VITB16, or "SLIP with resnet18" where its image tower is another than the name says.

    Args:
        own, usual: its ModelConfig and the one that the name stands for, if it stands for one.
    """

    def tower(config: Any) -> str:  # a checkpoint brings lists for tuples
        return json.dumps([config.vision_tower, config.vision_kwargs], sort_keys=True, default=list)

    if usual is None or tower(own) == tower(usual):
        return name
    sizes = " of other sizes" if usual.vision_tower and own.vision_kwargs else ""
    return f"{name.partition('_')[0]} with {own.vision_tower}{sizes}"
