"""Layer ids: how deep in its tower each parameter lies, for learning rates that decay towards the stem.

    ids = layer_ids(model)                       {"patch_embed.proj.weight": 0, ..., "head.weight": 13}
    scales = layer_scales(ids, decay=0.65)       0.65 ** (13 - id)

Id 0 is the stem (patch embedding, class token, position embeddings), i + 1 is block i of a plain transformer, or stage
i of a tower that narrows (Swin, ResNet, ConvNeXt); the last is everything else: the final norm and the head. That is
the rule of BEiT's fine-tuning (Bao et al. 2021). timm's own grouping differs: it puts the final norm with the last
block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn
from torchvision.models import ResNet

from towers import library

_HEAD = "<head>"  # stands for a head that a tower without classifier lacks
# A block of a transformer, or a stage of a tower that narrows; and what stands before the first.
_LIBRARY_LAYER = re.compile(r"\b(?:layers?|stages|blocks|resblocks)\.(\d+)\.")
_LIBRARY_STEM = re.compile("embed|conv1|class_embedding|token|ln_pre|pre_layrnorm|norm_pre|stem")
_SWIN_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(downsample\.)?")


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The layer id of every parameter, by name.

    Args:
        model: an image tower (ours, any of timm that can group its parameters, MedCLIP's Swin, torchvision's ResNet),
            or a model that holds one as `visual`: everything beside the tower has the last id.

    Raises:
        ValueError: a tower whose layers are not known here.
    """
    prefix, tower = "", model
    if isinstance(visual := getattr(model, "visual", None), nn.Module):
        prefix, tower = "visual.", visual
    names = [name for name, _ in tower.named_parameters()]
    ids: Any = group_with_matcher(((name, None) for name in [*names, _HEAD]), _matcher(tower), reverse=True)
    if ids[_HEAD] < 2:
        raise ValueError(f"layer decay finds no blocks in the image tower {type(tower).__name__}")
    return {
        name: ids.get(name.removeprefix(prefix), ids[_HEAD]) if name.startswith(prefix) else ids[_HEAD]
        for name, _ in model.named_parameters()
    }


def layer_scales(ids: dict[str, int], decay: float) -> dict[str, float]:
    """The factor on the learning rate of every parameter: 1 for the last id, `decay` times less for each one before."""
    if not 0 < decay <= 1:
        raise ValueError(f"layer decay is a factor above 0 and at most 1, not {decay:g}")
    last = max(ids.values())
    return {name: decay ** (last - i) for name, i in ids.items()}


def _matcher(tower: Any) -> dict | Callable:
    """What makes up the stem and each block or stage of `tower`, in timm's form of regular expressions."""
    if isinstance(tower, ResNet):
        return dict(stem=r"conv1\.|bn1\.", blocks=r"layer(\d+)\.")
    if isinstance(tower, (library.HFImageTower, library.OpenCLIPImageTower)):
        return _library_layer
    if any(kind.__name__ == "SwinModel" for kind in type(tower).__mro__):  # transformers takes seconds to import
        return _hf_swin_stage
    if not hasattr(tower, "group_matcher"):
        raise ValueError(
            f"layer decay does not know the layers of {type(tower).__name__}: choose a timm tower with a "
            f"`group_matcher`, MedCLIP's Swin or ResNet-50, or --layer_decay 1"
        )
    matcher = tower.group_matcher(coarse=True)
    if not isinstance(matcher, dict):
        return matcher
    # What timm counts to the last block (the final norm) matches nothing then, and goes with the head.
    return {
        part: spec if isinstance(spec, str) or spec is None else [s for s in spec if s[1] != MATCH_PREV_GROUP]
        for part, spec in matcher.items()
    }


def _library_layer(name: str) -> float:
    """Of a tower of transformers or open_clip, by its parameter's name."""
    if found := _LIBRARY_LAYER.search(name):
        return int(found[1]) + 1
    return 0 if _LIBRARY_STEM.search(name) else math.inf


def _hf_swin_stage(name: str) -> float:
    """Stem 0, stage i at i + 1. A patch merging belongs with the stage that it feeds, where timm's Swin has it too."""
    if name.startswith("embeddings."):
        return 0
    found = _SWIN_LAYER.match(name)
    return int(found[1]) + (2 if found[2] else 1) if found else math.inf
