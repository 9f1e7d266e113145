"""The formats by name. Each writes a model into a new folder and returns the Python by which it is used there.

The lines of a card stand behind `folder`, where the folder lies, `image`, a Pillow image, and `captions`, a list.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
import utils
from exporting.parts import image_lines, tensors, token_lines, tokenizers_definition
from exporting.to_open_clip import to_open_clip
from exporting.to_transformers import to_transformers
from inputs.sizes import height_width, size_text
from inputs.transforms import Preprocess
from runtime.checkpoints import save_checkpoint
from towers.files import PREPROCESS, SAFETENSORS_FORMAT


def to_timm(loaded: models.Pretrained, folder: Path) -> list[str]:
    """timm's folder of the image tower: create_model("local-dir:FOLDER", pretrained=True) gives its features (B, d)."""
    model: Any = loaded.model
    name, tower = model.config["vision_tower"], model.visual
    if not timm.is_model(name):
        raise ValueError(f"timm has no image tower {name}, which is not one of timm's")
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    arguments = dict(model.config["vision_kwargs"])
    if cfg is not None and cfg.fixed_input_size:
        arguments["img_size"] = loaded.preprocess.to_dict()["size"]
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": model.feature_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0, **_timm_data(loaded.preprocess),
            "fixed_input_size": bool(cfg is not None and cfg.fixed_input_size),
            "first_conv": cfg.first_conv if cfg is not None else None,
            "classifier": cfg.classifier if cfg is not None else None,
        },
    }  # fmt: skip
    save_file(tensors(tower.state_dict()), folder / "model.safetensors")
    utils.write_json(folder / "config.json", config)
    utils.write_json(folder / PREPROCESS, loaded.preprocess.to_dict())
    return [
        "import timm", "import torch", "from PIL import Image", "",
        'tower = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(tower), is_training=False)",
        "with torch.inference_mode():", f"    features = tower(view(image)[None])  # (1, {model.feature_dim})",
    ]  # fmt: skip


def _timm_data(preprocess: Preprocess) -> dict[str, Any]:
    """A preparation as timm's data configuration; ValueError for one that it has no words for."""
    modes = {"slip": "center", "cover": "center", "squash": "squash", "fit": "border"}
    if preprocess.prepare not in modes:
        raise ValueError("timm does not pad images on black, as this model's are: choose --to safetensors or --to onnx")
    own = preprocess.prepare != "slip"
    (before, _), (side, _) = height_width((preprocess.resize_to if own else None) or preprocess.size), preprocess.shape
    part = side / before
    return {
        "input_size": [3, *preprocess.shape], "mean": list(preprocess.mean), "std": list(preprocess.std),
        "interpolation": preprocess.interpolation if own else "bilinear", "crop_mode": modes[preprocess.prepare],
        "crop_pct": part if int(side / part) == before else side / (before + 0.5),  # timm cuts side / crop_pct off
    }  # fmt: skip


def to_safetensors(loaded: models.Pretrained, folder: Path) -> list[str]:
    """Weights, and in config.json all that models.load_pretrained reads of a checkpoint beside them."""
    model = loaded.model
    save_file(tensors(model.state_dict()), folder / "model.safetensors")
    about = {
        "format": SAFETENSORS_FORMAT,
        "model": {"name": model.name, "config": model.config},
        "preprocess": loaded.preprocess.to_dict(),
        "tokenizer": loaded.tokenizer.spec() if loaded.tokenizer else None,
        "training": loaded.training,
    }
    utils.write_json(folder / "config.json", about)
    return [
        "import models  # in a checkout of MedSLIP", "", "model = models.load_pretrained(folder)",
        "vectors = model.embed_images([image])  # unit vectors (1, d); paths, DICOM too, and arrays as well",
        *["cosines = vectors @ model.embed_captions(captions).T  # (1, n)"] * model.objective.text,
    ]  # fmt: skip


def to_medclip(loaded: models.Pretrained, folder: Path) -> list[str]:
    """MedCLIP's own pytorch_model.bin; ValueError for what its code cannot hold."""
    model: Any = loaded.model
    if not models.is_medclip(model.config):
        tower, objective = (model.config[name] for name in ("vision_tower", "objective"))
        raise ValueError(f"MedCLIP's code holds its own two towers alone, with a softmax, not {tower} of {objective}")
    if model.config["vocab_size"] != models.BERT_VOCABULARY:
        raise ValueError(
            f"MedCLIP reads Bio_ClinicalBERT's {models.BERT_VOCABULARY} tokens, this model {model.config['vocab_size']}"
        )
    if not isinstance(loaded.preprocess.size, int):
        raise ValueError(
            f"MedCLIP makes a square of every image, this model {size_text(loaded.preprocess.size)} pixels"
        )
    from towers import medclip  # transformers takes seconds to import, and only this format needs it

    save_checkpoint(medclip.export_medclip(model), folder / medclip.WEIGHTS_NAME)
    tower = "MedCLIPVisionModelViT" if model.config["vision_tower"] == "medclip-swin" else "MedCLIPVisionModel"
    return [
        f"from medclip import MedCLIPModel, {tower}", "", f"model = MedCLIPModel(vision_cls={tower})",
        "model.from_pretrained(folder)  # images and captions are prepared by its MedCLIPProcessor",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------


class _Image(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_image(image), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_text(tokens), dim=-1)


def to_onnx(loaded: models.Pretrained, folder: Path) -> list[str]:
    """image.onnx: normalised images (B, 3, H, W) to unit vectors (B, d); text.onnx: token ids (B, L), L the context."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--to onnx needs {' and '.join(missing)}: pip install onnx onnxscript")
    model: Any = loaded.model
    if hasattr(model.visual, "set_attn_implementation"):  # the fused one of Hugging Face's Swin has no graph
        model.visual.set_attn_implementation("eager")
    graphs: dict[str, tuple[nn.Module, Tensor]] = {
        "image": (_Image(model), torch.zeros(2, 3, *loaded.preprocess.shape))
    }
    if model.objective.text:
        tokens = torch.zeros(2, model.config["context_length"], dtype=torch.long)
        tokens[:, :3] = torch.tensor([1, 2, model.config["vocab_size"] - 1])
        graphs["text"] = (_Text(model), tokens)
    for name, (module, example) in graphs.items():
        program = torch.onnx.export(
            module.eval(), (example,), dynamo=True, input_names=[name], output_names=["unit_vector"], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
        assert program is not None  # what the dynamo exporter returns
        shape: Any = program.model.graph.inputs[0].shape
        if isinstance(shape[0], int):  # a number that the code has asked for becomes a constant, without an error
            raise RuntimeError(f"{name}.onnx would take {shape[0]} rows alone: the tower's code asks for their number")
        program.save(folder / f"{name}.onnx")
    utils.write_json(folder / PREPROCESS, loaded.preprocess.to_dict())
    lines = [
        "import numpy as np", "import onnxruntime", "from PIL import Image", "", *image_lines(loaded.preprocess),
        'session = onnxruntime.InferenceSession(f"{folder}/image.onnx")',
        '(vector,) = session.run(None, {"image": pixels})  # (1, d), of length 1',
    ]  # fmt: skip
    if loaded.tokenizer is None:
        return lines
    (folder / "tokenizer.json").write_text(tokenizers_definition(loaded.tokenizer), encoding="utf8")
    read = token_lines(loaded.tokenizer, model.config["context_length"])
    used = [name for name in ("ftfy", "html", "string") if any(f"{name}." in line for line in read)]
    return [
        *(f"import {name}" for name in used), *lines[:3], "from tokenizers import Tokenizer", *lines[3:], "",
        'session = onnxruntime.InferenceSession(f"{folder}/text.onnx")', 
        'tokenizer, texts = Tokenizer.from_file(f"{folder}/tokenizer.json"), []', "for caption in captions:",
        *(f"    {line}" for line in read), '    texts += session.run(None, {"text": tokens})',
        "cosines = vector @ np.concatenate(texts).T  # (1, n)",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How a format is written, and what a hub calls the library that reads it."""

    write: Callable[[models.Pretrained, Path], list[str]]
    library: str
    image_alone: bool = False  # the image tower, and nothing of the rest


FORMATS = {
    "open-clip": Format(to_open_clip, "open_clip"),
    "transformers": Format(to_transformers, "transformers"),
    "timm": Format(to_timm, "timm", image_alone=True),
    "safetensors": Format(to_safetensors, "medslip"),
    "onnx": Format(to_onnx, "onnx"),
    "medclip": Format(to_medclip, "medclip"),
}
