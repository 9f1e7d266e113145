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
from inputs.sizes import Size, height_width, size_text
from inputs.transforms import Preprocess
from tokenizer import LibraryTokenizer, SimpleTokenizer
from towers import library
from towers.files import PREPROCESS
from towers.sources import FOLDER_OF_TIMM


def to_open_clip(loaded: models.Pretrained, folder: Path) -> list[str]:
    """A pair of open_clip's own towers, or a timm tower beside CLIP's text transformer, a BERT or a RoBERTa."""
    model: Any = loaded.model
    if not model.objective.text:
        raise ValueError(f"{model.name} has no text side, and open_clip's models have two: choose --to timm")
    towers = model.config["vision_tower"], model.config["text_tower"]
    if towers == (library.OPEN_CLIP, library.OPEN_CLIP):
        settings, weights = _own_pair(loaded, folder)
    else:
        settings, weights = _timm_and_text(loaded, folder)
    config = {"model_cfg": settings, "preprocess_cfg": _preprocess_cfg(loaded.preprocess)}
    save_file(tensors(weights), folder / "open_clip_model.safetensors")
    utils.write_json(folder / "open_clip_config.json", config)
    utils.write_json(folder / PREPROCESS, loaded.preprocess.to_dict())
    opened = 'open_clip.create_model_and_transforms(f"local-dir:{folder}")'
    here = []
    if any((folder / place).is_file() for place in ("config.json", f"{IMAGE}/config.json")):
        here = ["os.chdir(folder)  # where open_clip looks for the configurations of the towers"]
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
    settings["vision_cfg"] = {**image["vision_cfg"], "image_size": _size(model.config["image_size"])}
    # Of a tower it takes a name of a hub or a path, which is the folder itself for whoever stands in it.
    if (text_config := settings.pop("text_config", None)) is not None:
        length = model.config["context_length"]
        settings["text_cfg"] |= {"hf_model_name": ".", "hf_tokenizer_name": ".", "context_length": length}
        utils.write_json(folder / "config.json", text_config)
    trunk = getattr(model.visual.model, "trunk", None)
    if trunk is not None:
        named = settings.pop("timm_config", {"architecture": image["vision_cfg"].get("timm_model_name")})
        settings["vision_cfg"]["timm_model_name"] = _timm_name(
            named["architecture"], named.get("model_args", {}), trunk, model.config["image_size"], folder
        )
    if isinstance(loaded.tokenizer, LibraryTokenizer):
        _write_tokenizer(loaded.tokenizer, settings["text_cfg"], folder)
    elif not isinstance(loaded.tokenizer, SimpleTokenizer):
        raise ValueError(
            "open_clip reads captions with CLIP's tokenizer or one of transformers, this model with neither"
        )
    net = library.open_clip_net(image, model.config["image_size"])
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
    text.setdefault("hf_tokenizer_name", ".")
    # It always cleans; the least is mojibake, HTML entities and white space. Captions without them are read alike.
    text["tokenizer_kwargs"] = {"clean": "whitespace" if tokenizer.clean == "none" else tokenizer.clean}
    write_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------------------------------------------------------------
# A tower of timm beside CLIP's text transformer, or beside one of transformers
# ---------------------------------------------------------------------------------------------------------------------

IMAGE = "image"  # folder of a tower of timm with settings of its own
_TEXTS = ("bert", "roberta", "xlm-roberta")  # of transformers, those that open_clip builds


def _timm_and_text(loaded: models.Pretrained, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model: Any = loaded.model
    name, kind = model.config["vision_tower"], model.config["text_tower"]
    if kind == "bert":
        raise ValueError(
            "open_clip averages a BERT's last layer, this text tower MedCLIP's three: the embeddings would be others; "
            "--to safetensors and onnx hold it, and --model CLIP or SLIP with --vision-weights and --text-weights "
            "trains one that averages the last"
        )
    theirs = kind.removeprefix(library.TRANSFORMERS) in _TEXTS and isinstance(loaded.tokenizer, LibraryTokenizer)
    if not theirs and not (kind == "clip" and isinstance(loaded.tokenizer, SimpleTokenizer)):
        raise ValueError(
            "open_clip reads captions beside a tower of timm with CLIP's text tower and tokenizer, or with "
            f"transformers' {', '.join(_TEXTS)}, not with {kind}: choose --to safetensors or --to onnx"
        )
    if not timm.is_model(name):
        raise ValueError(f"open_clip has no image tower {name} beside that text tower: choose --to safetensors or onnx")
    size = model.config["image_size"]
    text = {"context_length": model.config["context_length"]}
    if theirs:
        text |= {"hf_model_name": ".", "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
        utils.write_json(folder / "config.json", model.config["text_kwargs"])
        _write_tokenizer(loaded.tokenizer, text, folder)  # type: ignore[arg-type]
    else:
        sizes = {part: model.config[f"text_{part}"] for part in ("width", "heads", "layers")}
        text |= {"vocab_size": model.config["vocab_size"], **sizes}
    settings = {
        "embed_dim": model.config["embed_dim"],
        "quick_gelu": not theirs,
        **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}),
        "vision_cfg": {
            "timm_model_name": _timm_name(name, model.config["vision_kwargs"], model.visual, size, folder),
            "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": _size(size),
        },
        "text_cfg": text,
    }  # fmt: skip
    places = {"image_projection": "visual.head.proj.weight", "text_projection": "text.proj.weight"}
    prefixes = {"visual.": "visual.trunk.", "text_tower.model.": "text.transformer."}
    weights = {}
    for key, value in model.state_dict().items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        if key in places and (theirs or key != "text_projection"):
            weights[places[key]] = value.T
        elif not key.startswith("image_mlp."):
            weights[prefixes.get(prefix, "") + key.removeprefix(prefix)] = value
    return settings, weights


def _size(size: Size) -> Any:
    return size if isinstance(size, int) else list(size)


def _timm_name(name: str, arguments: dict[str, Any], tower: Any, size: Size, folder: Path) -> str:
    """What open_clip calls a tower of timm: its name, or where that alone would be another tower, a folder of timm's.

    Such a folder, IMAGE in the export, holds timm's configuration with the tower's settings and its image size.
    """
    arguments = {k: v for k, v in arguments.items() if not k.endswith(("drop_rate", "path_rate"))}
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = cfg is not None and cfg.fixed_input_size
    if fixed and height_width(size) != tuple(cfg.input_size[1:]):  # type: ignore[union-attr]
        arguments["img_size"] = _size(size)
    named = {key: value.shape for key, value in timm.create_model(name, num_classes=0).state_dict().items()}
    if not arguments and named == {key: value.shape for key, value in tower.state_dict().items()}:
        return name
    (folder / IMAGE).mkdir()
    about = {"architecture": name.partition(".")[0], "model_args": arguments, "pretrained_cfg": {"num_classes": 0}}
    utils.write_json(folder / IMAGE / "config.json", about)
    return f"{FOLDER_OF_TIMM}{IMAGE}"
