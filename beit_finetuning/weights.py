"""Weights for fine-tuning: from published SLIP files, checkpoints of ours, and BEiT's own files.

    load_weights(model, "slip_base_100ep.pt", model_key="state_dict", model_prefix="module.visual.")

Everything of the network but its head must come from the file, and everything of the tower in the file but a head must
fit the network. What a head leaves behind is logged by name; anything else is an error that lists the keys.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.interpolate import RectBivariateSpline
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from beit_finetuning.modeling_finetune import Beit
from inputs.transforms import Preprocess
from runtime.checkpoints import find_average, load_checkpoint, strip_wrappers
from towers.weights import Mismatch

log = logging.getLogger("medslip")

_SHARED = "rel_pos_bias.relative_position_bias_table"
_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"
# Heads of pre-training and of other fine-tuning; no part of the tower.
_HEAD_PARTS = ("head.", "fc_norm.", "lm_head.", "mask_token", "pre_logits.")


@dataclass
class Loaded:
    """What became of a file's tensors."""

    loaded: list[str] = field(default_factory=list)  # names in the network
    resized: list[str] = field(default_factory=list)  # those of them that were interpolated
    dropped: list[str] = field(default_factory=list)  # names in the file: heads
    fresh: list[str] = field(default_factory=list)  # names in the network that keep their start: its own head


# ---------------------------------------------------------------------------------------------------------------------
# Reading the file
# ---------------------------------------------------------------------------------------------------------------------


def read_tower(
    path: str | Path, model_key: str = "model|module|state_dict", model_prefix: str = ""
) -> dict[str, Tensor]:
    """The tower's tensors in a file, under the names that the network gives them.

    Args:
        model_key: where the weights lie in the file; of several names with | between them the first that is there, or
            the weights' moving average (`find_average`), as timm takes it. A file that is a state dictionary needs
            none.
        model_prefix: what the tower's names begin with. Wrappers (`module.`, `_orig_mod.`) may be missing or extra on
            either side, and a file that holds a tower alone may lack the prefix.

    Raises:
        FileNotFoundError, ValueError: no such file; unreadable; no weights under these names.
    """
    state = load_checkpoint(path)
    weights = strip_wrappers(_weights_of(state, path, model_key))
    prefix = next(iter(strip_wrappers({model_prefix: torch.empty(0)})))
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not inside and "patch_embed.proj.weight" in weights:
        log.info("%s: no name begins with %s; its names are taken as those of the tower", path, model_prefix)
        return weights
    if not inside:
        raise ValueError(f"{path}: no name begins with {model_prefix!r}; the names begin {_parts(weights)}")
    if others := {name for name in weights if not name.startswith(prefix)}:
        log.info("%s: %d tensors beside the tower are not read (%s)", path, len(others), ", ".join(_parts(others)))
    return inside


def _weights_of(state: dict, path: str | Path, model_key: str) -> dict[str, Tensor]:
    keys = model_key.split("|")
    if len(keys) == 1 and _is_weights(state.get(model_key)):  # that one was asked for
        with suppress(ValueError):  # of an average in a form that is not known
            average, _ = find_average(state, path)
            if average not in ("", model_key):
                log.info(f"{path} holds a moving average too: --model_key {average} takes it in place of {model_key}")
        return state[model_key]
    average, mean = find_average(state, path)
    if mean and (len(keys) > 1 or average == model_key):
        log.info(f"{path} holds weights and their moving average: the average, {average}, is taken")
        return mean
    for key in keys:
        if _is_weights(state.get(key)):
            return state[key]
    if _is_weights(state):
        return state
    candidates = [key for key, value in state.items() if _is_weights(value)]
    raise ValueError(
        f"{path} holds no weights under {model_key!r}; "
        + (
            f"choose --model_key {' or '.join(map(str, candidates))}"
            if candidates
            else f"its keys are {list(state)[:8]}"
        )
    )


def _is_weights(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _parts(names) -> list[str]:
    """First parts of names, each once: what a file consists of."""
    return list(dict.fromkeys(name.split(".", 1)[0] for name in names))[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Other sizes
# ---------------------------------------------------------------------------------------------------------------------


def resize_positions(embeddings: Tensor, grid: tuple[int, int], source: tuple[int, int] | None = None) -> Tensor:
    """Position embeddings (1, 1 + n, D) of the grid `source`, by default a square, for another: (1, 1 + h * w, D).

    Bicubic without antialiasing; the class token's embedding stays as it is.

    Raises:
        ValueError: not a class token and that grid.
    """
    places = embeddings.shape[1] - 1
    source = source or (math.isqrt(places), math.isqrt(places))
    if source[0] * source[1] != places:
        shape = "a square grid" if source[0] == source[1] else f"a grid of {source[0]} x {source[1]}"
        raise ValueError(f"{1 + places} position embeddings are not a class token and {shape}")
    if source == tuple(grid):
        return embeddings
    return resample_abs_pos_embed(embeddings, list(grid), list(source), num_prefix_tokens=1, antialias=False)


def resize_relative_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table of relative positions (rows, heads) of a square grid for another `grid`.

    The offsets of the smaller grid are taken to lie in geometric progression, dense near zero, so that they span those
    of the larger one; between them a bicubic spline interpolates, as in BEiT's code. The three rows of the class token
    come last and stay as they are.

    Raises:
        ValueError: not three rows and a square.
    """
    side = math.isqrt(len(table) - 3)
    if side * side != len(table) - 3:
        raise ValueError(f"a table of {len(table)} relative positions is not that of a square grid")
    wanted = [2 * n - 1 for n in grid]
    if wanted == [side, side]:
        return table
    if side < 7:  # a cubic spline needs four points, and an odd side of five has no room for a progression
        raise ValueError(f"a table of {side} x {side} relative positions is too small to interpolate")
    y, x = (_progression(side, n) for n in wanted)
    spline: Any = RectBivariateSpline  # its annotations know only single points
    targets = [np.arange(n) - n // 2 for n in wanted]
    columns = [spline(y, x, head.reshape(side, side))(*targets).reshape(-1) for head in table[:-3].double().numpy().T]
    resized = torch.from_numpy(np.stack(columns, axis=1)).to(table.dtype)
    return torch.cat([resized, table[-3:]])


def _progression(source: int, target: int) -> np.ndarray:
    """`source` offsets around zero, 1, 1 + q, 1 + q + q^2 and so on, the last of which is `target // 2`."""
    low, high = 1.01, 1.5
    q = high
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source // 2)) / (1 - q) > target // 2 else (q, high)
    positive = np.cumsum(q ** np.arange(source // 2))
    return np.concatenate([-positive[::-1], [0], positive])


# ---------------------------------------------------------------------------------------------------------------------
# From the file into the network
# ---------------------------------------------------------------------------------------------------------------------


def load_weights(
    model: Beit, path: str | Path, model_key: str = "model|module|state_dict", model_prefix: str = ""
) -> Loaded:
    """Start `model` from the tower in a file; other input sizes are interpolated, see the module's first lines.

    Raises:
        FileNotFoundError, ValueError: as `read_tower`; a tower that does not fit, with its keys and the flags to try.
    """
    weights = read_tower(path, model_key, model_prefix)
    _check_heads(model, path)
    own, report, grid = model.state_dict(), Loaded(), _grid(model, path)
    weights = _in_our_names(model, weights, own)
    if "pos_embed" in weights and model.pos_embed is None:
        raise ValueError(f"{path} holds position embeddings (pos_embed), and the model has none: add --abs_pos_emb")
    for name in list(weights):
        head = name.startswith(_HEAD_PARTS) or (name.startswith("norm.") and model.use_mean_pooling)
        if name.endswith(_INDEX):  # follows from the size
            del weights[name]
        elif head and (name not in own or own[name].shape != weights[name].shape):
            report.dropped.append(name)
            del weights[name]
        elif _resized(model, name, weights, path, grid):
            report.resized.append(name)
    report.loaded = [name for name in own if name in weights]
    report.fresh = [n for n in own if n not in weights and n.startswith(("head.", "fc_norm."))]
    _check_fit(own, weights, report, path)
    model.load_state_dict(weights, strict=False)
    log.info("%s: %d tensors loaded", path, len(report.loaded))
    if report.resized:
        log.info("  interpolated to another input size: %s", ", ".join(report.resized))
    if report.dropped:
        log.info("  of another head, dropped: %s", ", ".join(report.dropped))
    if report.fresh:
        log.info("  of the head, start fresh: %s", ", ".join(report.fresh))
    return report


def _in_our_names(model: Beit, weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's own files: a shared table becomes one for each block, and the two biases of qkv become one."""
    weights = dict(weights)
    if _SHARED in weights and _SHARED not in own and f"blocks.0.attn.{_TABLE}" in own:
        table = weights.pop(_SHARED)
        log.info("the shared table of relative positions is copied into each of %d blocks", len(model.blocks))
        weights |= {f"blocks.{i}.attn.{_TABLE}": table.clone() for i in range(len(model.blocks))}
    for i in range(len(model.blocks)):
        attn = f"blocks.{i}.attn."
        if attn + "q_bias" in weights and attn + "v_bias" in weights:
            q, v = weights.pop(attn + "q_bias"), weights.pop(attn + "v_bias")
            weights[attn + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # softmax is blind to a key's bias
    return weights


def _grid(model: Beit, path: str | Path) -> tuple[int, int] | None:
    """The patches (h, w) of the images that a checkpoint of ours was trained with; None where the file does not say."""
    if not isinstance(preprocess := load_checkpoint(path).get("preprocess"), dict):
        return None
    height, width = Preprocess.from_dict(preprocess).shape
    down, across = model.patch_embed.proj.kernel_size
    return height // down, width // across


def _resized(
    model: Beit, name: str, weights: dict[str, Tensor], path: str | Path, source: tuple[int, int] | None
) -> bool:
    """Interpolate `weights[name]` in place where it is a map of positions of another size; whether it was."""
    before = weights[name]
    grid = model.patch_embed.grid_size
    try:
        if name == "pos_embed" and before.ndim == 3:
            weights[name] = resize_positions(before, grid, source)
        elif name.endswith(_TABLE) and before.ndim == 2 and source != grid:
            if source is not None and source[0] != source[1]:
                raise ValueError(f"a table of relative positions of {source[0]} x {source[1]} patches fits no other")
            weights[name] = resize_relative_table(before, grid)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    return weights[name] is not before


def _check_heads(model: Beit, path: str | Path) -> None:
    """The number of heads changes no shape: where a checkpoint of ours says it, compare."""
    state = load_checkpoint(path)
    described = state.get("model")
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict) or not timm.is_model(str(config.get("vision_tower"))):
        return
    with torch.device("meta"):
        tower = timm.create_model(config["vision_tower"], num_classes=0, **config.get("vision_kwargs", {}))
    blocks = getattr(tower, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    if heads is not None and heads != model.num_heads:
        raise ValueError(f"{path} holds a tower with {heads} attention heads, and the model has {model.num_heads}")


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], report: Loaded, path: str | Path) -> None:
    wanted = {
        n: value for n, value in own.items() if n in weights or (n not in report.fresh and not n.endswith(_INDEX))
    }
    differ = Mismatch.between(wanted, weights)
    if not differ:
        return
    missing, unexpected = differ.missing, differ.unexpected
    advice = [
        text
        for sign, text in {
            "pos_embed": "the file has no position embeddings: leave --abs_pos_emb out",
            _TABLE: "the file has no relative positions: --disable_rel_pos_bias",
            "gamma_1": "the file has no layer scale: --layer_scale_init_value 0",
            "norm.weight": "the file's features are read from the class token: --use_cls",
        }.items()
        if any(name == sign or name.endswith("." + sign) and sign != "norm.weight" for name in missing)
    ]
    if any(name.endswith("gamma_1") for name in unexpected):
        advice.append("the file has layer scale: a --layer_scale_init_value above 0")
    if any(name.endswith(_TABLE) for name in unexpected):
        advice.append("the file has relative positions: leave --disable_rel_pos_bias out")
    if any(name.startswith("visual.") for name in unexpected):
        advice.append("the tower's names begin with visual.: --model_prefix module.visual.")
    raise ValueError(f"{path} does not fit the model: {differ}" + "".join(f"\n  {text}" for text in advice))
