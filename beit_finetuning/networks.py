"""The network that is fine-tuned: with the weights it starts from, or rebuilt from a run's checkpoint alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch

import models
from beit_finetuning.modeling_finetune import (
    BEIT_MODELS,
    TowerClassifier,
    create_beit,
    create_tower,
    tower_classifier,
    tower_settings,
)
from beit_finetuning.views import beit_preprocess
from beit_finetuning.weights import load_weights
from inputs.transforms import Preprocess
from runtime.command_line import UsageError
from towers import lora, pretrained
from towers.build import build_image_tower, check_settings


@dataclass(frozen=True)
class NetworkConfig:
    """All that determines a network's parameters and its images, as plain values: a checkpoint stores it."""

    num_classes: int
    preprocess: dict[str, Any]  # inputs.transforms.Preprocess.to_dict
    crop_pct: float | None = None  # of evaluation's views
    beit: dict[str, Any] | None = None  # arguments of create_beit, where it is BEiT's architecture
    tower: dict[str, Any] | None = None  # vision_tower, vision_kwargs and image_size, where it is any other


@dataclass(frozen=True)
class Network:
    """A network, what it is for people, and what it is rebuilt from."""

    model: Any
    name: str
    config: NetworkConfig

    @property
    def preprocess(self) -> Preprocess:
        """How its images are prepared."""
        return Preprocess.from_dict(self.config.preprocess)


def build_network(args: argparse.Namespace, num_classes: int) -> Network:
    """The network that the flags of run_class_finetuning.py describe, with the weights it starts from."""
    if args.model in BEIT_MODELS:
        settings = beit_settings(args)
        model = create_beit(**settings, num_classes=num_classes, init_scale=args.init_scale)
        if args.finetune:
            load_weights(model, args.finetune, args.model_key, args.model_prefix)
        source = f" from {args.finetune}" if args.finetune else ", fresh weights"
        preprocess = beit_preprocess(settings["img_size"], args.imagenet_default_mean_and_std)
        config = NetworkConfig(num_classes, preprocess.to_dict(), args.crop_pct, beit=settings)
        return Network(model, f"{args.model}{source}, fine-tuned", config)
    options = dict(init_scale=args.init_scale, freeze_batchnorm=not args.train_batchnorm, drop_path=args.drop_path)
    if args.model != "tower" and not args.finetune:
        tower = create_tower(args.model, num_classes, args.input_size or 224, **options)
        name = f"{args.model}, fresh weights"
    elif not args.finetune:
        raise UsageError("--model tower needs --finetune, or --model a name whose weights start afresh")
    else:
        start, name = named_tower(args.model, args.finetune)
        tower = tower_classifier(start, num_classes, image_size=args.input_size, **options)
    config = NetworkConfig(num_classes, tower.preprocess.to_dict(), args.crop_pct, tower=tower.tower)
    return Network(tower, f"{name}, fine-tuned", config)


def adapt_network(network: Network, rank: int) -> str:
    """Low-rank adapters in all of a network but its head (towers/lora.py); what learns then, for people.

    Raises:
        ValueError: no linear layers. ImportError: without peft.
    """
    model, image = network.model, torch.zeros(1, 3, *network.preprocess.shape)
    parts = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters())
    tower = [part for part in parts if part not in ("head", "fc_norm")]
    return lora.adapt(model, [lora.Tower(network.name, tower, lambda: model(image))], rank)


def named_tower(model: str, weights: str) -> tuple[models.ImageModel, str]:
    """The model whose image tower starts a run, with its weights, and what it is for people.

    Args:
        model: tower for what the weights say themselves, or a name of models.MODELS or timm, which they must be of.

    Raises:
        FileNotFoundError, ValueError: no such weights; those of another model.
    """
    if timm.is_model(model):
        expected = pretrained.vision_data(model, weights)
        around = dict(vision_tower=model, image_size=expected["size"], ssl_mlp_dim=1, ssl_emb_dim=1)
        start = models.create_model("SIMCLR", **around)
        pretrained.load_vision(start, weights)
        start.preprocess = replace(start.preprocess, mean=expected["mean"], std=expected["std"])
        return start, f"{model} from {weights}"
    loaded = models.load_pretrained(weights, model=None if model == "tower" else model)
    if model not in ("tower", loaded.model.name):
        raise ValueError(
            f"--finetune {weights} holds a {loaded.model.name}, not --model {model}: --model tower takes it"
        )
    return loaded.model, loaded.source


def beit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of BEiT's architecture, as create_beit takes it."""
    return dict(
        name=args.model,
        img_size=args.input_size or 224,
        use_abs_pos_emb=args.abs_pos_emb,
        use_rel_pos_bias=args.rel_pos_bias,
        use_mean_pooling=args.use_mean_pooling,
        init_values=args.layer_scale_init_value,
        drop=args.drop,
        attn_drop=args.attn_drop_rate,
        drop_path=args.drop_path,
    )


def rebuild(state: dict[str, Any], weights: str = "") -> Network:
    """The trained network of a run's checkpoint, in eval mode.

    Args:
        weights: where the weights that the run started from are now. Only earlier checkpoints, which hold flags and no
            description of their network, ask for them, and only for a tower's architecture.

    Raises:
        FileNotFoundError, ValueError: weights that are asked for and not there; tensors that do not fit.
    """
    if "network" in state:
        try:
            config = NetworkConfig(**state["network"])
        except TypeError as error:
            raise ValueError(f"the checkpoint describes no network of ours: {error}") from error
    else:
        config = config_of_flags(argparse.Namespace(**state["args"]), len(state["settings"]["classes"]), weights)
    if config.beit is not None:
        check_settings("beit", {key: value for key, value in config.beit.items() if key != "name"})
        model: Any = create_beit(**config.beit, num_classes=config.num_classes)
    elif config.tower is not None:
        tower = config.tower
        visual, width, _ = build_image_tower(tower["vision_tower"], tower["vision_kwargs"], tower["image_size"])
        preprocess = Preprocess.from_dict(config.preprocess)
        model = TowerClassifier(visual, width, config.num_classes, preprocess, tower)
    else:
        raise ValueError("the checkpoint describes no network")
    model.load_state_dict(state["state_dict"])
    return Network(model.eval(), "fine-tuned", config)


def config_of_flags(args: argparse.Namespace, num_classes: int, weights: str = "") -> NetworkConfig:
    """Of a run whose checkpoint holds its flags and no description of its network."""
    if args.model in BEIT_MODELS:
        settings = beit_settings(args)
        preprocess = beit_preprocess(settings["img_size"], args.imagenet_default_mean_and_std)
        return NetworkConfig(num_classes, preprocess.to_dict(), args.crop_pct, beit=settings)
    if args.model != "tower":
        start = create_tower(args.model, num_classes, args.input_size or 224, drop_path=args.drop_path)
        return NetworkConfig(num_classes, start.preprocess.to_dict(), args.crop_pct, tower=start.tower)
    model = models.load_pretrained(weights or args.finetune).model
    tower = tower_settings(model, args.input_size, args.drop_path)
    preprocess = {**model.preprocess.to_dict(), "size": tower["image_size"]}
    return NetworkConfig(num_classes, preprocess, args.crop_pct, tower=tower)


def described(network: Network) -> dict[str, Any]:
    """What a checkpoint stores of a network beside its weights."""
    return asdict(network.config)
