"""Named tensors onto a network: every name and shape must fit, position embeddings are resized."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inputs.sizes import Size, height_width


def resize_position_embeddings(
    state_dict: dict[str, Tensor], tower: Any, size: Size | None = None, prefix: str = "visual."
) -> dict[str, Tensor]:
    """`state_dict` with a ViT's position embeddings (1, p + h*w, d), and timm's Swin's tables, fit to `tower`.

    Of an image tower of open_clip, those of its own ViT (1 + h*w, d), or of the tower of timm in it.

    Args:
        size: of the images that the weights were trained with; None for a square.
        prefix: of the tower's names in `state_dict`.
    """
    if hasattr(tower, "positioned"):  # open_clip's, in which they are another module's
        inner, tower = tower.positioned
        prefix += inner
    own, changed = dict(tower.named_parameters()), {}
    key = f"{prefix}positional_embedding"
    if "positional_embedding" in own and hasattr(tower, "grid_size") and key in state_dict:
        h, w = tower.grid_size
        old = _old_grid(len(state_dict[key]) - 1, size, tower.patch_size)
        if old != (h, w) and old[0] * old[1] == len(state_dict[key]) - 1:
            changed[key] = resample_abs_pos_embed(state_dict[key][None], [h, w], list(old))[0]
    key = f"{prefix}pos_embed"
    if "pos_embed" in own and key in state_dict and own["pos_embed"].ndim == 3:
        h, w = tower.patch_embed.grid_size
        special = own["pos_embed"].shape[1] - h * w  # 0 where class and register tokens have no position
        places = state_dict[key].shape[1] - special
        old = _old_grid(places, size, tower.patch_embed.patch_size)
        if old != (h, w) and old[0] * old[1] == places:
            changed[key] = resample_abs_pos_embed(state_dict[key], [h, w], list(old), num_prefix_tokens=special)
    for key, table in state_dict.items():  # of windows, which timm makes smaller where a stage has less room
        name = key.removeprefix(prefix)
        if name.endswith("relative_position_bias_table") and name in own and own[name].shape != table.shape:
            window = getattr(tower.get_submodule(name.rpartition(".")[0]), "window_size", None)
            if window is not None and math.isqrt(len(table)) ** 2 == len(table):  # of a square window
                changed[key] = resize_rel_pos_bias_table(table, window, own[name].shape)
    return {**state_dict, **changed}


def _old_grid(places: int, size: Size | None, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of `places` patches of images of `size`; a square, where that is another number or unknown."""
    if size is not None:
        (h, w), (patch_h, patch_w) = height_width(size), patch
        if (h // patch_h) * (w // patch_w) == places:
            return h // patch_h, w // patch_w
    side = math.isqrt(places)
    return side, side  # where it is none, load_weights says that the shape is another


# In-place functions by which fresh parameters get their values.
_FILL = {
    "normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
    "xavier_uniform_", "xavier_normal_",
}  # fmt: skip


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FILL:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return func(*args, **(kwargs or {}))


def unfilled(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`build(...)`, a network, whose parameters are not drawn: for weights that `load_weights` puts onto all of them.

    Random numbers for 150 million parameters take longer than reading these from a file. The process's generator is
    left where it stood: an initialiser that draws again until all values are in range would move it by what lay in
    the memory.
    """
    with _Unfilled(), torch.random.fork_rng(devices=[]):
        return build(*args, **kwargs)


@dataclass(frozen=True)
class Mismatch:
    """What keeps tensors from going onto a network name by name; false where nothing does."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]  # with both shapes
    types: list[str]  # whole numbers for weights, as of a quantised file, with both types

    @classmethod
    def between(cls, own: dict[str, Tensor], given: dict[str, Tensor]) -> Mismatch:
        """Of what a network has and what is to go onto it.

        BatchNorm's count of batches is no weight: files from before PyTorch 0.4.1 have none, and a network that is
        loaded keeps its own (torch.nn.BatchNorm2d's load_state_dict does the same).
        """
        shapes = [
            f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in given and given[name].shape != value.shape
        ]
        missing = [name for name in own if name not in given and not name.endswith(".num_batches_tracked")]
        types = [
            f"{name} {given[name].dtype} instead of {value.dtype}".replace("torch.", "")
            for name, value in own.items()
            if name in given and value.is_floating_point() and not given[name].is_floating_point()
        ]
        return cls(missing, [name for name in given if name not in own], shapes, types)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.types)

    def __str__(self) -> str:
        """Every kind with its number and its first names."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "other shape": self.shapes}
        kinds |= {"other type": self.types} if self.types else {}
        return "; ".join(f"{kind} ({len(names)}): {', '.join(names[:8]) or 'none'}" for kind, names in kinds.items())


def refuse_margin(name: str, patches: tuple[int, int], size: Size) -> None:
    """ValueError for a size that a tower's patches do not fill: it would never see the right and lower margin."""
    for side, patch in zip(height_width(size), patches, strict=True):
        if side % patch:
            near = f"{side // patch * patch} or {-(-side // patch) * patch}" if side > patch else str(patch)
            raise ValueError(
                f"vision tower {name!r} takes patches of {patch} pixels, which {side} pixels are no multiple of: the "
                f"margin would never be seen; choose {near}"
            )


def require_finite(features: Tensor, of: str = "an image") -> Tensor:
    """The features as they are; ValueError for NaN or infinity among them, from which any answer could be made."""
    if not features.isfinite().all():
        raise ValueError(
            f"a tower answers {of} with NaN or infinity: its weights, or numbers too large for --precision are at fault"
        )
    return features


def with_fitting_scale(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights from elsewhere, `given`, whose scale and bias of the logits fit each other and the model's `own`.

    A sigmoid learns both together. Beside the scale of 100 that a softmax ends with, the bias it starts from would call
    any two a pair: so it keeps its own start of both where the weights have no bias. A softmax has no place for one.
    """
    if "logit_bias" in own and "logit_bias" not in given:
        return {**given, **{name: own[name] for name in ("logit_scale", "logit_bias")}}
    return {name: value for name, value in given.items() if name != "logit_bias" or name in own}


def load_weights(
    model: Any, state_dict: dict[str, Tensor], source: str, other_head: bool = False, from_file: bool = False
) -> None:
    """Load every parameter and buffer by name.

    Args:
        other_head: a SimCLR head that only one side has, or of another shape, is passed over: the model keeps its own;
            and so are scale and bias of the logits that another loss has trained (`with_fitting_scale`).
        from_file: nobody else holds these tensors: each that lies in memory as the model's own does takes its place.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    if other_head:
        head, theirs = ({k: v for k, v in part.items() if k.startswith("image_mlp.")} for part in (own, state_dict))
        rest = {k: v for k, v in state_dict.items() if k not in theirs}
        state_dict = with_fitting_scale(rest | (head if Mismatch.between(head, theirs) else theirs), own)
    if differ := Mismatch.between(own, state_dict):
        raise ValueError(f"{source} does not fit {model.name}: {differ}")
    if from_file:
        state_dict = {
            name: value if _lies_alike(value, own[name]) else torch.empty_like(own[name]).copy_(value)
            for name, value in state_dict.items()
        }
    # Without torch's note of its version, by which a count is no must.
    model.load_state_dict(dict(state_dict), assign=from_file)


def _lies_alike(first: Tensor, second: Tensor) -> bool:
    if not (first.layout == second.layout == torch.strided and first.device == second.device):
        return False
    return (first.dtype, first.stride()) == (second.dtype, second.stride())
