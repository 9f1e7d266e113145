"""Small models, their weights, and gradients of steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import GOLDENS

import distributed
import losses
import models
from runtime import checkpoints

GOLDEN_MODELS = torch.load(GOLDENS / "models_tiny.pt", weights_only=True)


def tiny_model(objective: str, **overrides):
    """The goldens' small towers, in the notation of our overrides."""
    c = GOLDEN_MODELS["config"]
    return models.create_model(
        f"{objective}_VITT16",
        **{
            "image_size": c["img"],
            "vision_kwargs": dict(patch_size=c["patch"], embed_dim=c["width"], depth=c["depth"], num_heads=c["heads"]),
            "embed_dim": c["embed_dim"],
            "context_length": c["ctx"],
            "vocab_size": c["vocab"],
            "text_width": c["twidth"],
            "text_heads": c["theads"],
            "text_layers": c["tlayers"],
            "ssl_mlp_dim": c["mlp"],
            "ssl_emb_dim": c["emb"],
            **overrides,
        },
    )


def tiny_medslip(**overrides):
    return models.create_model(
        "MEDSLIP_VIT",
        **{
            "image_size": 64,
            "vision_kwargs": dict(embed_dim=12, depths=[1, 1], num_heads=[2, 2]),
            "text_width": 32,
            "text_heads": 2,
            "text_layers": 3,
            "vocab_size": 50,
            "ssl_mlp_dim": 16,
            "ssl_emb_dim": 8,
            **overrides,
        },
    )


TOWERS = {"vit": "test_vit", "batchnorm": "test_resnet"}  # timm's miniatures


def write_checkpoint(path: Path, tower: str, seed: int = 0, name: str = "CLIP_VITT16", **overrides) -> Path:
    """A checkpoint of ours with random weights and, where there is BatchNorm, running statistics."""
    torch.manual_seed(seed)
    small = dict(vision_tower=TOWERS[tower], image_size=32, text_layers=1, text_width=64, vocab_size=64, embed_dim=32)
    model = models.create_model(name, **{**small, **overrides})
    model.visual.train()(torch.rand(16, 3, 32, 32))
    state = {
        "state_dict": model.state_dict(),
        "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(),
        "tokenizer": None,
    }
    checkpoints.save_checkpoint(state, path)
    return path


def image_side(path: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for k, v in checkpoints.load_checkpoint(path)["state_dict"].items() if k.startswith(("visual.", "image_"))
    }


def batches(model, n, seed=0, size=32):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(n, 3, size, size, generator=g, dtype=torch.float64) for key in ("image", "view1", "view2")
    }
    tokens = torch.randint(1, 50, (n, 10), generator=g)
    tokens[torch.arange(n), torch.randint(4, 10, (n,), generator=g)] = 127 if model.config["vocab_size"] > 127 else 49
    return [({**tensors, "text": tokens})[key] for key in model.objective.inputs]


def gradients(model, micro_batches, accumulate, processes=distributed.Processes()):  # noqa: B008
    run = SimpleNamespace(
        model=model,
        wrapped=model,
        processes=processes,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        loss=model.objective.loss(losses.LossSettings(ssl_scale=0.7)),
    )
    metrics = list(accumulate(run, micro_batches))
    return metrics, {n: p.grad for n, p in model.named_parameters()}


def split(inputs, k):
    return [list(part) for part in zip(*(x.chunk(k) for x in inputs), strict=True)]
