"""Low-rank adapters (LoRA, Hu et al. 2021) in towers, by peft: what learns, and plain weights out of it.

    adapt_model(model, rank=8)               a CLIP, SIMCLR or SLIP model
    state = stored(model.state_dict())       plain weights, as any reader takes them, and what continues the run exactly
    model.load_state_dict(restored(state))

An adapted layer computes W x + SCALE * B A x with its own W held fixed, B (out, rank) and A (rank, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 2  # alpha / rank, so that a learning rate that fits one rank fits another
_BASE = ".base_layer."  # peft's names, between a layer's own and those of its tensors
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Tower:
    """A tower of a model: its name for people, the attributes it consists of, and one run of it on anything."""

    name: str
    parts: Sequence[str]
    run: Callable[[], object]


def adapt_model(model: Any, rank: int) -> str:
    """Adapt the towers of a models.ImageModel that are not frozen; see `adapt`.

    Raises:
        ValueError: all of them are frozen; as `adapt`. ImportError: without peft.
    """
    runs: dict[str, Callable[[], object]] = {
        "image": lambda: model.visual(torch.zeros(1, 3, *model.preprocess.shape)),
        "text": lambda: model.encode_text(torch.ones(1, model.text.context_length, dtype=torch.long)),
    }
    names = {"image": model.config["vision_tower"], "text": f"text tower {model.config['text_tower']}"}
    towers = [
        Tower(names[side], parts, runs[side]) for side, parts in model.parts.items() if parts[0] not in model.frozen
    ]
    if not towers:
        raise ValueError("--lora adapts the towers that are not frozen, and --freeze leaves none")
    return adapt(model, towers, rank)


def adapt(model: Any, towers: Sequence[Tower], rank: int) -> str:
    """Hold the towers' own parameters fixed and give their linear layers adapters, which change nothing yet.

    All beside the towers learns in full, as does what a part of a tower calls its `projection`. A layer is linear if it
    is a matrix or a convolution of 1x1 that the tower calls; one whose weight the tower reads past the layer's own
    forward pass (torch's MultiheadAttention, BEiT's qkv) would pass its adapter over, and stays fixed.

    Returns:
        what learns now, for people.

    Raises:
        ValueError: a tower without such a layer. ImportError: without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("--lora needs peft: pip install peft") from error
    fixed = [value for tower in towers for part in tower.parts for value in _parameters(getattr(model, part))]
    whole = {
        id(value)
        for tower in towers
        for part in tower.parts
        for value in _parameters(getattr(getattr(model, part), "projection", None))
    }
    for value in fixed:
        value.requires_grad_(id(value) in whole)
    names, passed_over = [], []
    for tower in towers:
        for name, is_called in _linear_layers(model, tower, whole).items():
            (names if is_called else passed_over).append(name)
    learning = [value for value in model.parameters() if value.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), model)
    del model.peft_config  # peft's note, which no one here reads
    for value in learning:  # peft leaves its adapters alone to learn
        value.requires_grad_(True)
    adapters = sum(value.numel() for name, value in model.named_parameters() if name.endswith((_A, _B)))
    rest, every = (sum(value.numel() for value in values) for values in (learning, model.parameters()))
    return (
        f"LoRA of rank {rank}: {adapters:,} parameters in {len(names)} adapted layers learn, and {rest:,} beside the "
        f"towers; the towers' own {every - adapters - rest:,} stay fixed"
        + (f", and {len(passed_over)} layers that they do not call (as {passed_over[0]})" if passed_over else "")
    )


def _parameters(part: Any) -> Iterable[nn.Parameter]:
    """Of a module, or a parameter itself; of None nothing."""
    return part.parameters() if isinstance(part, nn.Module) else [part] if part is not None else []


def _linear_layers(model: Any, tower: Tower, whole: set[int]) -> dict[str, bool]:
    """The tower's linear layers, but for those whose weights are in `whole`, and whether a run of the tower calls each.

    Raises:
        ValueError: it calls none.
    """

    def is_linear(module: Any) -> bool:
        if "weight" not in module._parameters or id(module.weight) in whole:
            return False
        if type(module).forward is nn.Conv2d.forward:
            return module.kernel_size == (1, 1) and module.groups == 1
        return type(module).forward is nn.Linear.forward

    inside = tuple(f"{part}." for part in tower.parts)
    layers = {name: layer for name, layer in model.named_modules() if name.startswith(inside) and is_linear(layer)}
    called = dict.fromkeys(layers, False)
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.update({name: True})) for name, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tower.run()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not any(called.values()):
        raise ValueError(f"--lora adapts linear layers and convolutions of 1x1, and {tower.name} has none of its own")
    return called


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def stored(weights: dict[str, Tensor], suffix: str = "") -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of a model's state dictionary: `state_dict`, in which each adapted layer's weight is
    W + SCALE * B A, as any reader takes it, and where there are adapters `adapters`, with W, A and B as they are.

    Args:
        suffix: of both names.
    """
    plain, adapters = {}, {}
    for name, value in weights.items():
        layer, base, own = name.partition(_BASE)
        if name.endswith((_A, _B)):
            adapters[name] = value
        elif base and own == "weight":
            adapters[name] = value
            change = weights[layer + _B].flatten(1) @ weights[layer + _A].flatten(1)  # (out, in)
            plain[f"{layer}.weight"] = value + SCALE * change.reshape(value.shape)
        else:
            plain[f"{layer}.{own}" if base else name] = value
    return {f"state_dict{suffix}": plain, **({f"adapters{suffix}": adapters} if adapters else {})}


def restored(state: dict[str, Any], suffix: str = "") -> dict[str, Tensor]:
    """The state dictionary that `stored` was given, bit for bit, from a checkpoint."""
    adapters = state.get(f"adapters{suffix}", {})
    adapted = {name.partition(_BASE)[0] for name in adapters if _BASE in name}
    out = {}
    for name, value in state[f"state_dict{suffix}"].items():
        layer, _, own = name.rpartition(".")
        out[f"{layer}{_BASE}{own}" if layer in adapted else name] = value
    return out | adapters
