"""Low-rank adapters (LoRA, Hu et al. 2021) in towers, by peft: what learns, and plain weights out of it.

    adapt_model(model, rank=8)               a CLIP, SIMCLR or SLIP model
    state = stored(model.state_dict())       plain weights, as any reader takes them, and what continues the run exactly
    model.load_state_dict(restored(state))

An adapted layer computes W x + SCALE * B A x with its own W held fixed, B (out, rank) and A (rank, in). Where a tower
reads W itself and calls no layer, as torch's MultiheadAttention does, it reads W + SCALE * B A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SCALE = 2  # alpha / rank, so that a learning rate that fits one rank fits another
_BASE = ".base_layer."  # peft's names, between a layer's own and those of its tensors
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_READ, _ORIGINAL = ".parametrizations.", ".original"  # torch's, between a module's name and that of a weight it reads


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
    is a matrix or a convolution of 1x1 that the tower calls: peft adapts it. Of one whose weight is read past its own
    forward pass (in torch's MultiheadAttention, qkv of timm's BEiT), and of q, k and v in one piece, `in_proj_weight`,
    the sum is what is read.

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
    names, read = [], []
    for tower in towers:
        called = _linear_layers(model, tower, whole)
        names += (own := [name for name, is_called in called.items() if is_called])
        read += (own_read := _adapt_read(model, tower, whole, [name for name in called if name not in own], rank))
        if not own and not own_read:
            raise ValueError(
                f"--lora adapts linear layers and convolutions of 1x1, and {tower.name} has none of its own"
            )
    adapters_read = [value for name, value in model.named_parameters() if name.endswith((_A, _B))]
    learning = [v for v in model.parameters() if v.requires_grad and not any(v is own for own in adapters_read)]
    if names:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), model)
        del model.peft_config  # peft's note, which no one here reads
    for value in learning + adapters_read:  # peft leaves its adapters alone to learn
        value.requires_grad_(True)
    adapters = sum(value.numel() for name, value in model.named_parameters() if name.endswith((_A, _B)))
    rest, every = (sum(value.numel() for value in values) for values in (learning, model.parameters()))
    kinds = sorted({_kind(name) for name in [*names, *read]})
    return (
        f"LoRA of rank {rank}: {adapters:,} parameters in {len(names) + len(read)} adapted layers learn "
        f"({', '.join(kinds)}), and {rest:,} beside the towers; the towers' own {every - adapters - rest:,} stay fixed"
    )


def _kind(name: str) -> str:
    """What a layer is called in every block."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit()).split(".")[-1]


def _parameters(part: Any) -> Iterable[nn.Parameter]:
    """Of a module, or a parameter itself; of None nothing."""
    return part.parameters() if isinstance(part, nn.Module) else [part] if part is not None else []


def _linear_layers(model: Any, tower: Tower, whole: set[int]) -> dict[str, bool]:
    """The tower's linear layers but for those with weights in `whole`, and whether a run of the tower calls each."""

    def is_linear(module: Any) -> bool:
        if "weight" not in module._parameters or id(module.weight) in whole:
            return False
        if type(module).forward is nn.Conv2d.forward:
            return module.kernel_size == (1, 1) and module.groups == 1
        return type(module).forward is nn.Linear.forward

    layers = {name: layer for name, layer in _inside(model, tower) if is_linear(layer)}
    called = dict.fromkeys(layers, False)
    _run(model, tower, {layer: lambda *_, name=name: called.update({name: True}) for name, layer in layers.items()})
    return called


def _inside(model: Any, tower: Tower) -> list[tuple[str, nn.Module]]:
    """A tower's modules by their names in the model."""
    inside = tuple(f"{part}." for part in tower.parts)
    return [(name, module) for name, module in model.named_modules() if name.startswith(inside)]


def _run(model: Any, tower: Tower, hooks: dict[nn.Module, Callable[..., None]]) -> None:
    """The tower once, in eval mode, with a hook after each of some modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tower.run()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are read
# ---------------------------------------------------------------------------------------------------------------------


class _LowRank(nn.Module):
    """W to W + SCALE * B A, of any shape whose first dimension is the output's; the names of both are peft's."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        out, into = weight.flatten(1).shape
        a, b = nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
        nn.init.zeros_(b.weight)

    def forward(self, weight: Tensor) -> Tensor:
        """W (out, in) to the same shape."""
        a: Any = self.lora_A["default"]
        b: Any = self.lora_B["default"]
        change = b.weight @ a.weight  # (out, in)
        return weight + SCALE * change.reshape(weight.shape)


def _adapt_read(model: Any, tower: Tower, whole: set[int], layers: list[str], rank: int) -> list[str]:
    """Adapters of `layers`' weights, which no forward pass of theirs uses, and of attention's in_proj_weight, as far as
    the tower reads them; returns the names of these.
    """
    modules = dict(model.named_modules())
    wanted = [(name, modules[name], "weight") for name in layers]
    for name, module in _inside(model, tower):
        weight = module._parameters.get("in_proj_weight")
        if weight is not None and id(weight) not in whole:
            wanted.append((name, module, "in_proj_weight"))
    made, is_read = {}, set()
    for name, module, own in wanted:
        made[f"{name}.{own}"] = low = _LowRank(getattr(module, own), rank)
        parametrize.register_parametrization(module, own, low)
    _run(model, tower, {low: lambda *_, name=name: is_read.add(name) for name, low in made.items()})
    for name, module, own in wanted:
        if f"{name}.{own}" not in is_read:
            parametrize.remove_parametrizations(module, own, leave_parametrized=False)
    return sorted(is_read)


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

    def merged(value: Tensor, of: str) -> Tensor:
        change = weights[of + _B].flatten(1) @ weights[of + _A].flatten(1)  # (out, in)
        return value + SCALE * change.reshape(value.shape)

    for name, value in weights.items():
        layer, base, own = name.partition(_BASE)
        module, read, tensor = name.partition(_READ)
        if name.endswith((_A, _B)):
            adapters[name] = value
        elif base and own == "weight":
            adapters[name] = value
            plain[f"{layer}.weight"] = merged(value, layer)
        elif read:
            adapters[name] = value
            tensor = tensor.removesuffix(_ORIGINAL)
            plain[f"{module}.{tensor}"] = merged(value, f"{module}{_READ}{tensor}.0")
        else:
            plain[f"{layer}.{own}" if base else name] = value
    return {f"state_dict{suffix}": plain, **({f"adapters{suffix}": adapters} if adapters else {})}


def restored(state: dict[str, Any], suffix: str = "") -> dict[str, Tensor]:
    """The state dictionary that `stored` was given, bit for bit, from a checkpoint."""
    adapters = state.get(f"adapters{suffix}", {})
    adapted = {name.partition(_BASE)[0] for name in adapters if _BASE in name}
    read = {name.replace(_READ, ".").removesuffix(_ORIGINAL) for name in adapters if name.endswith(_ORIGINAL)}
    out = {}
    for name, value in state[f"state_dict{suffix}"].items():
        layer, _, own = name.rpartition(".")
        if name in read:
            continue
        out[f"{layer}{_BASE}{own}" if layer in adapted else name] = value
    return out | adapters
