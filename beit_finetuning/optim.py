"""Optimizer groups and schedules of BEiT's fine-tuning (Bao et al. 2021, appendix H).

Not pre-training's rule (utils.parameter_groups): here the learning rate falls with the distance from the head, position
embeddings and the class token do not decay, and tables of relative positions do.
"""

from __future__ import annotations

import torch
from torch import nn

from towers.layer_decay import layer_ids, layer_scales
from utils import cosine_lr

_NO_DECAY = ("pos_embed", "cls_token", "reg_token", "dist_token", "absolute_pos_embed", "position_embeddings")
_RELATIVE = "relative_position_bias_table"


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 1.0, decay_relative_tables: bool = True
) -> list[dict]:
    """Optimizer groups, one for each layer id and weight decay, from the stem to the head.

    Args:
        weight_decay: of parameters with two dimensions or more, but for class tokens and position embeddings.
        layer_decay: factor on the learning rate from one layer to the one before (layer_decay.layer_ids); 1 for none,
            which any model takes.
        decay_relative_tables: whether tables of relative positions decay, as in the published code.

    Returns:
        groups with their `name`, their parameters' `names`, `weight_decay` and `lr_scale`, which `set_rates` reads.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids = dict.fromkeys(named, 0) if layer_decay == 1 else layer_ids(model)
    scales = layer_scales(ids, layer_decay)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in named.items():
        last = name.rsplit(".", 1)[-1]
        spared = parameter.ndim < 2 or last in _NO_DECAY or (last == _RELATIVE and not decay_relative_tables)
        group = groups.setdefault(
            (ids[name], not spared),
            {
                "name": f"layer {ids[name]}, {'no decay' if spared else 'decay'}",
                "names": [],
                "params": [],
                "weight_decay": 0.0 if spared else weight_decay,
                "lr_scale": scales[name],
            },
        )
        group["names"].append(name)
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def create_optimizer(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with BEiT's defaults; the rates are set by `set_rates` before each update."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None) -> None:
    """Give each group the learning rate `lr` times its scale; `weight_decay` goes to the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if weight_decay is not None and group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


def learning_rate(step: int, total: int, lr: float, min_lr: float = 1e-6, warmup: int = 0) -> float:
    """The rate of update `step` of `total`: linear from 0 to `lr` over `warmup` updates, then half a cosine to
    `min_lr`.

    `lr` is absolute: the recipe never scales it by the batch.
    """
    return cosine_lr(step, total, lr, min_lr, warmup)


def scheduled_weight_decay(step: int, total: int, weight_decay: float, end: float | None = None) -> float:
    """Weight decay at update `step`: constant, or half a cosine from `weight_decay` to `end`."""
    return weight_decay if end is None else cosine_lr(step, total, weight_decay, end)
