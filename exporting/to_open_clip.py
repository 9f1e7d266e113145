"""open_clip's folder: what `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

import models
import utils
from exporting.parts import refuse_other_objective, tensors
from exporting.to_transformers import write_tokenizer
from inputs.sizes import as_size, size_text
from inputs.transforms import Preprocess
from tokenizer import LibraryTokenizer, SimpleTokenizer
from towers import library


def to_open_clip(loaded: models.Pretrained, folder: Path) -> list[str]:
    """A pair of open_clip's own towers, or a timm tower with a linear projection beside CLIP's text transformer."""
    model: Any = loaded.model
    if not model.objective.text:
        raise ValueError(f"{model.name} has no text side, and open_clip's models have two: choose --to timm")
    towers = model.config["vision_tower"], model.config["text_tower"]
    if towers == (library.OPEN_CLIP, library.OPEN_CLIP):
        settings, weights = _own_pair(loaded, folder)
    else:
        settings, weights = _timm_and_clip(loaded)
    config = {"model_cfg": settings, "preprocess_cfg": _preprocess_cfg(loaded.preprocess)}
    save_file(tensors(weights), folder / "open_clip_model.safetensors")
    utils.write_json(folder / "open_clip_config.json", config)
    opened = 'open_clip.create_model_and_transforms(f"local-dir:{folder}")'
    here = []
    if "text_config" in model.config.get("text_kwargs", {}):
        here = ["os.chdir(folder)  # where open_clip looks for the configuration of the text tower"]
        opened = opened.replace('f"local-dir:{folder}"', '"local-dir:."')
    return [
        *["import os\n"] * bool(here), "import open_clip", "import torch", "from PIL import Image", "", *here,
        f"model, _, view = {opened}",
        f"tokenizer = {opened.replace('create_model_and_transforms', 'get_tokenizer')}",
        "with torch.inference_mode():",
        '    image = model.eval().encode_image(view(image)[None], normalize=True)  # (1, d)',
        "    text = model.encode_text(tokenizer(captions), normalize=True)  # (n, d)",
    ]  # fmt: skip


def _preprocess_cfg(preprocess: Preprocess) -> dict[str, Any]:
    """open_clip's words for a preparation; ValueError for one that it has none for."""
    modes = {"slip": "shortest", "cover": "shortest", "squash": "squash", "fit": "longest"}
    if preprocess.prepare not in modes:
        raise ValueError("open_clip does not pad images on black, as this model's are: choose --to safetensors or onnx")
    if preprocess.resize_to not in (None, preprocess.size):
        raise ValueError(
            f"open_clip crops images at the size that they are resized to, and this model's come from "
            f"{size_text(preprocess.resize_to)} pixels: choose --to timm or --to onnx"
        )
    if preprocess.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"open_clip resizes bilinearly or bicubically, not by {preprocess.interpolation}")
    if not isinstance(preprocess.size, int) and preprocess.prepare != "squash":
        raise ValueError(
            f"open_clip resizes to {size_text(preprocess.size)} pixels bicubically, whatever its configuration says; "
            "this model was trained on bilinear views: choose --to timm or --to onnx"
        )
    size = preprocess.size if isinstance(preprocess.size, int) else list(preprocess.size)
    return {
        "size": size, "mean": list(preprocess.mean), "std": list(preprocess.std),
        "interpolation": preprocess.interpolation if preprocess.prepare != "slip" else "bilinear",
        "resize_mode": modes[preprocess.prepare], "fill_color": preprocess.fill,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Towers of its own
# ---------------------------------------------------------------------------------------------------------------------


def _own_pair(loaded: models.Pretrained, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model: Any = loaded.model
    image, text = model.config["vision_kwargs"], model.config["text_kwargs"]
    if image != text or image["embed_dim"] != model.config["embed_dim"]:
        raise ValueError(
            "open_clip's folder holds one model, and the two towers are of different ones: choose --to safetensors"
        )
    settings = {**image, "text_cfg": dict(image["text_cfg"]), "custom_text": True}  # its text tower by `text.` names
    if (text_config := settings.pop("text_config", None)) is not None:
        # Of a text tower it takes a name of a hub or a path, which is the folder itself for whoever stands in it.
        settings["text_cfg"] |= {"hf_model_name": ".", "hf_tokenizer_name": "."}
        utils.write_json(folder / "config.json", text_config)
    if isinstance(loaded.tokenizer, LibraryTokenizer):
        _write_tokenizer(loaded.tokenizer, settings["text_cfg"], folder)
    elif not isinstance(loaded.tokenizer, SimpleTokenizer):
        raise ValueError(
            "open_clip reads captions with CLIP's tokenizer or one of transformers, this model with neither"
        )
    net = library.open_clip_net(image)
    weights = {f"visual.{k}": v for k, v in model.visual.model.state_dict().items()}
    matrix = "visual.proj" in net.state_dict() and not model.image_projection.state_dict().keys() - {"weight"}
    for key, value in model.image_projection.state_dict().items():
        weights["visual.proj" if matrix else f"visual.head.{key}"] = value
    weights |= {f"text.{k}": v for k, v in model.text_tower.model.state_dict().items()}
    refuse_other_objective(model, "logit_bias" in net.state_dict(), "open_clip's model")
    weights |= {name: getattr(model, name) for name in ("logit_scale", "logit_bias") if name in net.state_dict()}
    net.load_state_dict({k: v.reshape(net.state_dict()[k].shape) if "logit" in k else v for k, v in weights.items()})
    return settings, net.state_dict()


def _write_tokenizer(tokenizer: LibraryTokenizer, text: dict[str, Any], folder: Path) -> None:
    """The files of a tokenizer, and in open_clip's settings what it does to a caption before."""
    if tokenizer.clean == "none":
        raise ValueError(
            "open_clip cleans captions before it reads them, which this model's were not: choose --to onnx"
        )
    text.setdefault("hf_tokenizer_name", ".")
    text["tokenizer_kwargs"] = {"clean": tokenizer.clean}
    write_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------------------------------------------------------------
# A tower of timm beside CLIP's text transformer
# ---------------------------------------------------------------------------------------------------------------------


def _timm_and_clip(loaded: models.Pretrained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip builds a timm tower from its name alone, so a tower with settings of its own has no place in it."""
    model: Any = loaded.model
    if model.config["text_tower"] == "bert":
        raise ValueError(
            "open_clip averages a BERT's last layer, our text tower three of its layers: the embeddings would be others"
        )
    if model.config["text_tower"] != "clip" or not isinstance(loaded.tokenizer, SimpleTokenizer):
        raise ValueError(
            f"open_clip reads captions beside a tower of timm with CLIP's text tower and tokenizer, not with "
            f"{model.config['text_tower']}: choose --to safetensors or --to onnx"
        )
    name, size = model.config["vision_tower"], loaded.preprocess.size
    if not timm.is_model(name):
        raise ValueError(f"open_clip has no image tower {name} beside that text tower: choose --to safetensors or onnx")
    _refuse_settings(model, name, size)
    width, heads, layers = (model.config[f"text_{part}"] for part in ("width", "heads", "layers"))
    text = {"context_length": model.config["context_length"], "vocab_size": model.config["vocab_size"]}
    settings = {
        "embed_dim": model.config["embed_dim"],
        "quick_gelu": True,
        **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}),
        "vision_cfg": {
            "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
            "image_size": size,
        },
        "text_cfg": {**text, "width": width, "heads": heads, "layers": layers},
    }  # fmt: skip
    weights = {}
    for key, value in model.state_dict().items():
        if key == "image_projection":
            weights["visual.head.proj.weight"] = value.T
        elif key.startswith("visual."):
            weights["visual.trunk." + key.removeprefix("visual.")] = value
        elif not key.startswith("image_mlp."):
            weights[key] = value
    return settings, weights


def _refuse_settings(model: Any, name: str, size: Any) -> None:
    theirs: Any = timm.create_model(name, num_classes=0)
    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if fixed is not None and fixed.fixed_input_size and size != (theirs_size := as_size(fixed.input_size[1:])):
        raise ValueError(
            f"open_clip builds {name} for {size_text(theirs_size)} pixels alone, this one takes {size_text(size)}"
        )
    own, built = model.visual.state_dict(), theirs.state_dict()
    differ = [
        key for key in {**own, **built} if key not in own or key not in built or own[key].shape != built[key].shape
    ]
    settings = {k: v for k, v in model.config["vision_kwargs"].items() if not k.endswith(("drop_rate", "path_rate"))}
    if differ or settings or theirs.num_features != model.feature_dim:
        raise ValueError(
            f"open_clip builds {name} from its name alone, without the settings {settings}"
            + (f"; {differ[0]} would have another shape" if differ else "")
        )
