"""Named tensors onto a network: every name and shape must fit, position embeddings are resized."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from inputs.sizes import Size, height_width


def resize_position_embeddings(
    state_dict: dict[str, Tensor], model: Any, size: Size | None = None
) -> dict[str, Tensor]:
    """`state_dict` with a ViT's position embeddings (1, p + h*w, d), and timm's Swin's tables, fit to `model`.

    Args:
        size: of the images that the weights were trained with; None for a square.
    """
    own, changed = dict(model.named_parameters()), {}
    key = "visual.pos_embed"
    if key in own and key in state_dict and own[key].ndim == 3:
        h, w = model.visual.patch_embed.grid_size
        prefix = own[key].shape[1] - h * w  # 0 where class and register tokens have no position
        places = state_dict[key].shape[1] - prefix
        patch = model.visual.patch_embed.patch_size
        old = tuple(side // p for side, p in zip(height_width(size), patch, strict=True)) if size is not None else None
        if old is None or old[0] * old[1] != places:  # a square grid, or load_weights says that the shape is another
            old = (math.isqrt(places),) * 2
        if old != (h, w) and old[0] * old[1] == places:
            changed[key] = resample_abs_pos_embed(state_dict[key], [h, w], list(old), num_prefix_tokens=prefix)
    for key, table in state_dict.items():  # of windows, which timm makes smaller where a stage has less room
        if key.endswith("relative_position_bias_table") and key in own and own[key].shape != table.shape:
            window = getattr(model.get_submodule(key.rpartition(".")[0]), "window_size", None)
            if window is not None and math.isqrt(len(table)) ** 2 == len(table):  # of a square window
                changed[key] = resize_rel_pos_bias_table(table, window, own[key].shape)
    return {**state_dict, **changed}


def load_weights(model: Any, state_dict: dict[str, Tensor], source: str, other_head: bool = False) -> None:
    """Load every parameter and buffer by name.

    Args:
        other_head: a SimCLR head that only one side has, or of another shape, is passed over: the model keeps its own.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    if other_head:
        head = {k: v for k, v in own.items() if k.startswith("image_mlp.")}
        same = all(k in state_dict and state_dict[k].shape == v.shape for k, v in head.items())
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("image_mlp.")} | (
            {k: state_dict[k] for k in head} if same else head
        )
    missing = [k for k in own if k not in state_dict]
    unexpected = [k for k in state_dict if k not in own]
    shapes = [
        f"{k} {tuple(state_dict[k].shape)} instead of {tuple(v.shape)}"
        for k, v in own.items()
        if k in state_dict and state_dict[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source} does not fit {model.name}: missing {missing[:8] or 'none'} ({len(missing)}), "
            f"unexpected {unexpected[:8] or 'none'} ({len(unexpected)}), "
            f"other shape {shapes[:8] or 'none'} ({len(shapes)})"
        )
    model.load_state_dict(state_dict)
