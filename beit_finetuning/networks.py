"""The network that is fine-tuned, with the weights it starts from."""

from __future__ import annotations

import argparse
from typing import Any

import models
from beit_finetuning.modeling_finetune import BEIT_MODELS, create_beit, create_tower, tower_classifier
from beit_finetuning.views import beit_preprocess
from beit_finetuning.weights import load_weights
from runtime.command_line import UsageError


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[Any, Any, str]:
    """The network with the weights it starts from, its preprocessing, and what it is, for people."""
    if args.model in BEIT_MODELS:
        size = args.input_size or 224
        model = create_beit(
            args.model,
            img_size=size,
            num_classes=num_classes,
            use_abs_pos_emb=args.abs_pos_emb,
            use_rel_pos_bias=args.rel_pos_bias,
            use_mean_pooling=args.use_mean_pooling,
            init_values=args.layer_scale_init_value,
            init_scale=args.init_scale,
            drop=args.drop,
            attn_drop=args.attn_drop_rate,
            drop_path=args.drop_path,
        )
        if args.finetune:
            load_weights(model, args.finetune, args.model_key, args.model_prefix)
        source = f" from {args.finetune}" if args.finetune else ", fresh weights"
        return model, beit_preprocess(size, args.imagenet_default_mean_and_std), f"{args.model}{source}, fine-tuned"
    options = dict(init_scale=args.init_scale, freeze_batchnorm=not args.train_batchnorm, drop_path=args.drop_path)
    if args.model != "tower":
        tower = create_tower(args.model, num_classes, args.input_size or 224, **options)
        name = f"{args.model}, fresh weights"
    elif not args.finetune:
        raise UsageError("--model tower needs --finetune, or --model a name whose weights start afresh")
    else:
        loaded = models.load_pretrained(args.finetune)
        tower = tower_classifier(loaded.model, num_classes, image_size=args.input_size, **options)
        name = loaded.source
    return tower, tower.preprocess, f"{name}, fine-tuned"
