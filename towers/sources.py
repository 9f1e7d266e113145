"""What a folder or a hub's name of another library holds, read by that library: weights, preparation, tokenizer.

    found = read_source("/path/to/biomedclip")      open_clip_config.json: a pair of open_clip
    found = read_source("/path/to/medsiglip")       config.json with a model_type: a pair or a tower of transformers
    found = read_source("timm:vit_small_patch16_224.dino")     or a folder that timm wrote
    found = read_source("hf:google/siglip-base-patch16-224"), read_source("open-clip:ViT-B-32/laion2b_s34b_b79k")

Names are looked up in the library's cache first, then at a hub, if one answers. No code of a folder is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.data.config import resolve_data_config, resolve_model_data_config
from torch import Tensor, nn

import utils
from inputs.sizes import as_size
from inputs.transforms import Preprocess
from runtime.checkpoints import refuse_not_finite
from runtime.integrity import check_sums
from tokenizer import CONTEXT_LENGTH, SimpleTokenizer, Tokenizer
from towers import library, pretrained
from towers.build import build_timm_tower
from towers.files import PREPROCESS
from towers.library_tokenizers import hf_tokenizer, own_tokenizer, quiet, there
from towers.weights import Mismatch, resize_position_embeddings, with_fitting_scale

log = logging.getLogger("medslip")

HF, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
FOLDER_OF_TIMM = "local-dir:"  # in place of timm's name for a tower


_FIELDS = {
    "image": ("vision_tower", "vision_kwargs", "image_size"),
    "text": ("text_tower", "text_kwargs", "context_length", "vocab_size"),
}


@dataclass
class Found:
    """A model of another library."""

    name: str  # for people
    config: dict[str, Any]  # fields of models.ModelConfig
    preprocess: Preprocess | None = None  # None: a text tower alone
    tokenizer: Tokenizer | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)  # by the names that they have in a model of models.py

    def side(self, wanted: str) -> Found:
        """Its `image` or its `text` tower alone, without the weights of projections into the space of both."""
        tower = {"image": "visual.", "text": "text_tower."}[wanted]
        config = {name: value for name, value in self.config.items() if name in _FIELDS[wanted]}
        if config and "embed_dim" in self.config and (wanted == "image" or config["text_tower"] == library.OPEN_CLIP):
            config["embed_dim"] = self.config["embed_dim"]  # where the tower's own last layer ends
        weights = {name: value for name, value in self.weights.items() if name.startswith(tower)}
        if not config:
            raise ValueError(f"{self.name} has no {wanted} tower")
        found = Found(f"the {wanted} tower of {self.name}", config, weights=weights)
        return replace(
            found, **{"image": {"preprocess": self.preprocess}, "text": {"tokenizer": self.tokenizer}}[wanted]
        )

    @property
    def has_image(self) -> bool:
        """Whether there is an image tower."""
        return "vision_tower" in self.config

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return "text_tower" in self.config


NAMES = {"timm:": "timm", "hf:": "hub", "open-clip:": "open-clip"}  # what a model begins with that is no file


def is_name(path: str | Path) -> bool:
    """Whether this is a name of a library's or a hub's, and no file or folder."""
    return str(path).startswith(tuple(NAMES))


def library_of(path: str | Path) -> str:
    """Whose model this names: open-clip, transformers, timm, hub for one of unknown kind; "" for all else, and ours."""
    for prefix, name in NAMES.items():
        if str(path).startswith(prefix):
            return name
    folder = Path(path)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open-clip"
    written = utils.read_json(folder / HF) if str(path) and (folder / HF).is_file() else {}
    return "transformers" if "model_type" in written else "timm" if "architecture" in written else ""


def read_source(path: str | Path) -> Found:
    """The model that a source names, its weights whole and finite.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no network where one is needed; a model that is none of the
            library's known towers; weights that are missing, left over or of another shape.
        ImportError: without open_clip, where it is open_clip's.
    """
    text = str(path)
    if text.startswith("timm:"):
        found = _timm(text.removeprefix("timm:"))
    elif text.startswith("open-clip:"):
        found = _open_clip_by_name(text.removeprefix("open-clip:"))
    else:
        folder = _hub_folder(text.removeprefix("hf:")) if text.startswith("hf:") else Path(path)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            found = _open_clip(utils.read_json(folder / OPEN_CLIP_CONFIG), folder, text)
        elif "architecture" in (written := utils.read_json(folder / HF)) and "model_type" not in written:
            found = _timm(str(written["architecture"]), folder)
        else:
            found = _transformers(folder, written, text)
        if found.preprocess is not None and (folder / PREPROCESS).is_file():
            found = _as_exported(found, folder)
    refuse_not_finite(found.weights, path)
    return found


def _as_exported(found: Found, folder: Path) -> Found:
    """With the preparation that export.py wrote beside the library's own, which may have no words for it: a probe of a
    SLIP tower sees another crop than its other uses, MedCLIP's images are padded.
    """
    for file in folder.glob("*.json"):
        check_sums(file)
    try:
        preprocess = Preprocess.from_dict(utils.read_json(folder / PREPROCESS))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / PREPROCESS} is no preparation of images: {error}") from error
    return replace(found, preprocess=preprocess, config={**found.config, "image_size": preprocess.size})


def load(found: Found, model: Any) -> None:
    """Copy what was found to a model that was made from its settings, its preparation too.

    Position embeddings follow the model's image size. What the model has besides (a SimCLR head, a projection that the
    source lacks) stays as it is, so do scale and bias of the logits where they belong to another loss
    (`with_fitting_scale`), and what the model has no place for (the text side, of a model without one) is left out.
    Raises ValueError, naming them, for tensors of a part that both have which do not fit.
    """
    own = model.state_dict()
    weights = with_fitting_scale(found.weights, own)
    if found.preprocess is not None:
        weights = resize_position_embeddings(weights, model.visual, found.preprocess.size)
    parts = {name.partition(".")[0] for name in own} & {name.partition(".")[0] for name in weights}
    place, given = ({k: v for k, v in some.items() if k.partition(".")[0] in parts} for some in (own, weights))
    if differ := Mismatch.between(place, given):
        raise ValueError(f"{found.name} does not fit {model.name}: {differ}")
    model.load_state_dict({**own, **given})
    if found.preprocess is not None:
        model.preprocess = found.preprocess.at(as_size(model.config["image_size"]))


# ---------------------------------------------------------------------------------------------------------------------
# timm
# ---------------------------------------------------------------------------------------------------------------------


def _timm(name: str, folder: Path | None = None) -> Found:
    """A tower of timm with the weights that its name stands for, or those in a folder that timm wrote."""
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r} (timm.list_models() names them)")
    written = utils.read_json(folder / HF) if folder else {}
    overlay = {key: value for key, value in pretrained.timm_data(written).items() if key != "url"}
    settings = library.plain_settings(written.get("model_args") or {})
    for name_of_data in ("num_classes", "img_size", "in_chans"):  # this project has its own words for them
        settings.pop(name_of_data, None)
    if folder:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
        data = {**(cfg.to_dict() if cfg else {}), **overlay}
        data = resolve_data_config({}, pretrained_cfg=data)
        tower = build_timm_tower(name, settings, as_size(list(data["input_size"][1:])))
        pretrained.load_tower(tower, name, folder)
    else:
        try:
            with _online("timm", name):
                tower = timm.create_model(name, pretrained=True, num_classes=0)
        except RuntimeError as error:  # timm's, without weights of that name
            raise ValueError(f"timm has no weights of {name}: {error}") from error
        data = resolve_model_data_config(tower)
    preprocess = _timm_preprocess(data)
    weights = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    config = {"vision_tower": name.partition(".")[0], "vision_kwargs": settings, "image_size": preprocess.size}
    return Found(f"timm's {name}", config, preprocess, weights=weights)


def _timm_preprocess(data: dict[str, Any]) -> Preprocess:
    """timm's own evaluation transform of a tower, from its data configuration."""
    modes = {"center": "cover", "squash": "squash", "border": "fit"}
    mode, (_, *shape) = data.get("crop_mode") or "center", data["input_size"]
    if mode not in modes:
        raise ValueError(f"timm's crop_mode {mode!r} is not known here; choose from {', '.join(modes)}")
    if mode == "border" and len({round(255 * mean) for mean in data["mean"]}) > 1:
        raise ValueError("timm pads each channel with its own mean in the crop_mode border, which is not known here")
    resize_to = as_size([int(side / data["crop_pct"]) for side in shape])
    fill = round(255 * data["mean"][0]) if mode == "border" else 0
    return Preprocess(
        as_size(shape), data["mean"], data["std"], modes[mode], data["interpolation"], resize_to, fill
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def _transformers(folder: Path, written: dict[str, Any], name: str) -> Found:
    """A pair, an image tower or a text tower of transformers."""
    import transformers

    kind = written.get("model_type")
    if kind in library.PAIRS:
        cls, image, text = library.PAIRS[kind]
        model = _from_pretrained(getattr(transformers, cls), folder)
        return _hf_pair(model, image, text, folder, name)
    if kind in library.VISION:
        vision = library.VISION[kind]
        model = _from_pretrained(getattr(transformers, vision.cls), folder, **dict(vision.extra))
        preprocess = _hf_preprocess(folder)
        settings = library.plain_settings(model.config.to_dict())
        config = {"vision_tower": f"{library.TRANSFORMERS}{kind}", "vision_kwargs": settings}
        config["image_size"] = preprocess.size
        weights = {f"visual.model.{key}": value for key, value in model.state_dict().items()}
        return Found(name, config, preprocess, weights=weights)
    if kind in library.TEXT:
        settings, cls = dict(written), getattr(transformers, library.TEXT[kind])
        no_pooler = {} if kind.endswith("_text_model") or kind == "modernbert" else {"add_pooling_layer": False}
        model = _from_pretrained(cls, folder, **no_pooler)
        settings = library.plain_settings(model.config.to_dict())
        longest = min(CONTEXT_LENGTH, library.positions(model.config))
        siglip, clip = kind.startswith("siglip"), kind == "clip_text_model"
        tokenizer = hf_tokenizer(folder, longest, model.config, whole=siglip, causal=clip)
        if settings.get("pad_token_id") is None:
            settings["pad_token_id"] = tokenizer.pad_id
        config = _text_config(f"{library.TRANSFORMERS}{kind}", settings, tokenizer)
        weights = {f"text_tower.model.{key}": value for key, value in model.state_dict().items()}
        return Found(name, config, None, tokenizer, weights)
    known = ", ".join([*library.PAIRS, *library.VISION, *library.TEXT])
    raise ValueError(f"{folder} is a {kind} of transformers, which is none that can be a tower: {known}")


def _hf_pair(model: Any, image: str, text: str, folder: Path, name: str) -> Found:
    """CLIP or SigLIP of transformers."""
    preprocess = _hf_preprocess(folder)
    sides = {"vision": model.config.vision_config, "text": model.config.text_config}
    settings = {side: library.plain_settings(config.to_dict()) for side, config in sides.items()}
    settings["vision"]["model_type"], settings["text"]["model_type"] = image, text
    weights = {f"visual.model.{key}": value for key, value in model.vision_model.state_dict().items()}
    weights |= {f"text_tower.model.{key}": value for key, value in model.text_model.state_dict().items()}
    weights["logit_scale"] = model.logit_scale.detach().reshape(())
    siglip = hasattr(model, "logit_bias")
    if siglip:
        weights["logit_bias"] = model.logit_bias.detach().reshape(())
        embed_dim = sides["vision"].hidden_size
    else:
        embed_dim = settings["vision"]["projection_dim_of_pair"] = model.config.projection_dim
        weights["image_projection.weight"] = model.visual_projection.weight.detach()
        weights["text_projection"] = model.text_projection.weight.detach().T.contiguous()
    text_side = sides["text"]
    tokenizer = hf_tokenizer(folder, text_side.max_position_embeddings, text_side, whole=siglip, causal=not siglip)
    config = {
        "vision_tower": f"{library.TRANSFORMERS}{image}", "vision_kwargs": settings["vision"],
        "image_size": preprocess.size, "embed_dim": embed_dim,
        **_text_config(f"{library.TRANSFORMERS}{text}", settings["text"], tokenizer),
    }  # fmt: skip
    return Found(name, config, preprocess, tokenizer, weights)


def _text_config(name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    length = tokenizer.context_length  # type: ignore[attr-defined]
    return {
        "text_tower": name, "text_kwargs": settings, "context_length": length, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip


def _from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers with all its weights, in float32; ValueError where the folder lacks some of them."""
    with quiet():
        try:
            model, report = cls.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
        except Exception as error:  # of many kinds: no weights, another shape, a damaged file
            why = str(error).strip().splitlines()
            raise ValueError(f"transformers cannot read {folder}: {why[0] if why else type(error).__name__}") from error
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(lacking)} tensors of a {cls.__name__}: {', '.join(lacking[:8])}")
    if other := sorted(report["mismatched_keys"]):
        name, theirs, ours = other[0]
        raise ValueError(f"{folder}: {name} is {tuple(theirs)}, where its config.json says {tuple(ours)}")
    spare = sorted(report["unexpected_keys"])
    if layers := [name for name in spare if _OF_A_LAYER.search(name)]:  # of more layers than are said, or adapters
        raise ValueError(f"{folder}: {len(layers)} tensors have no place in its config.json's model, first {layers[0]}")
    if spare:
        log.info(f"{folder}: {len(spare)} tensors are not used, as of heads: {', '.join(spare[:5])}")
    return model


_OF_A_LAYER = re.compile(r"(layers?|blocks?|stages?)\.\d+\.|lora_|adapter")


_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _hf_preprocess(folder: Path) -> Preprocess:
    """What a folder's image processor does, with its library's defaults; ValueError for more than Preprocess knows."""
    from transformers import AutoImageProcessor

    given = there(AutoImageProcessor, folder, "does not say how images are prepared").to_dict()
    scaled = given.get("do_rescale", True) and abs(given.get("rescale_factor", 1 / 255) * 255 - 1) <= 1e-3
    if not given.get("do_resize", True) or not scaled:
        raise ValueError(f"{folder}: its images are not resized, or not scaled to 1: no preparation that is known")
    normalised = given.get("do_normalize", True)
    if normalised and (given.get("image_mean") is None or given.get("image_std") is None):
        raise ValueError(f"{folder}: its images are normalised, and it does not say by which image_mean and image_std")
    mean = _of_channels(given["image_mean"]) if normalised else (0.0, 0.0, 0.0)
    std = _of_channels(given["image_std"]) if normalised else (1.0, 1.0, 1.0)
    if side := given.get("max_num_patches"):  # SigLIP 2's towers of any shape: here all images become squares
        size, how, resize_to = given["patch_size"] * int(side**0.5), "squash", None
        log.warning(f"{folder}: its images keep their shape there; here all are squashed to {size} pixels a side")
    else:
        size, how, resize_to = _hf_shape(given, folder)
    number = 2 if given.get("resample") is None else int(given["resample"])
    if number not in _RESAMPLE:
        raise ValueError(
            f"{folder}: images are resized by Pillow's filter {number}, which is not known here: {_RESAMPLE}"
        )
    interpolation = _RESAMPLE[number]
    return Preprocess(size, mean, std, how, interpolation, resize_to, floor=True)


def _hf_shape(given: dict[str, Any], folder: Path) -> tuple[Any, str, Any]:
    """Of an image processor's settings: the size of an image, how it is brought to it, and by way of which size."""
    size, crop = given["size"], given.get("crop_size")
    short = size.get("shortest_edge")
    if short and size.get("longest_edge"):
        raise ValueError(f"{folder}: images are resized to {size}: no preparation that is known")
    if short and (fraction := given.get("crop_pct")):  # ConvNeXt's
        return (short, "cover", int(short / fraction)) if short < 384 else (short, "squash", None)
    if not (short or {"height", "width"} <= set(size)):
        raise ValueError(f"{folder}: images are resized to {size}: no preparation that is known")
    resized = short or as_size([size["height"], size["width"]])
    how = "cover" if short else "squash"
    if not given.get("do_center_crop"):
        if short:
            raise ValueError(f"{folder}: images are resized to {size} and not cropped: no one shape")
        return resized, how, None
    cropped = as_size([crop["height"], crop["width"]]) if crop else resized
    return cropped, how, None if resized == cropped else resized


# ---------------------------------------------------------------------------------------------------------------------
# open_clip
# ---------------------------------------------------------------------------------------------------------------------


def _open_clip(written: dict[str, Any], folder: Path, name: str, weights: Path | None = None) -> Found:
    """A pair of open_clip from its configuration, and the weights beside it, or those that are named."""
    if not all(isinstance(written.get("model_cfg", {}).get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise ValueError(f"{name}: {OPEN_CLIP_CONFIG} has no model_cfg with a vision_cfg and a text_cfg")
    settings, given = dict(written["model_cfg"]), written.get("preprocess_cfg") or {}
    if "multimodal_cfg" in settings:
        raise ValueError(f"{name} is a CoCa of open_clip, which is no pair of towers")
    text_name = settings["text_cfg"].get("hf_model_name")
    tokenizer = _open_clip_tokenizer(settings["text_cfg"], folder, name)
    config = library.plain_settings(settings)
    timm_name = str(settings["vision_cfg"].get("timm_model_name") or "")
    if timm_name.startswith(FOLDER_OF_TIMM):  # of a folder beside, as this project exports a tower with settings
        about = utils.read_json(folder / timm_name.removeprefix(FOLDER_OF_TIMM) / HF)
        config["timm_config"] = library.plain_settings({k: about[k] for k in ("architecture", "model_args")})
    file = weights or _open_clip_weights(folder)
    if text_name:
        config["text_config"] = library.plain_settings(_text_settings(str(text_name), folder, file))
    net = library.open_clip_net(config)
    from open_clip import load_checkpoint

    try:
        load_checkpoint(net, str(file), strict=True, weights_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(f"open_clip cannot read {file}: {str(error).strip()[:600]}") from error
    preprocess = _open_clip_preprocess(given, config["vision_cfg"])
    tower = library.OpenCLIPImageTower(net.visual)
    projection = tower.projection
    tower.projection = nn.Identity()
    found = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    found |= {f"image_projection.{key}": value for key, value in projection.state_dict().items()}
    found |= {f"text_tower.model.{key}": value for key, value in net.text.state_dict().items()}
    found["logit_scale"] = net.logit_scale.detach().reshape(())
    if net.logit_bias is not None:
        found["logit_bias"] = net.logit_bias.detach().reshape(())
    fields = {
        "vision_tower": library.OPEN_CLIP, "vision_kwargs": config, "image_size": preprocess.size,
        "embed_dim": config["embed_dim"],
        **_text_config(library.OPEN_CLIP, config, tokenizer),
    }  # fmt: skip
    return Found(name, fields, preprocess, tokenizer, found)


def _open_clip_weights(folder: Path) -> Path:
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")
    return found[0]


def _open_clip_preprocess(given: dict[str, Any], vision: dict[str, Any]) -> Preprocess:
    """open_clip's evaluation transform, with its defaults."""
    from open_clip.transform import PreprocessCfg

    known = PreprocessCfg.__dataclass_fields__  # the library leaves out what else is there, and takes the tower's size
    given = {key: value for key, value in given.items() if key in known and value is not None}
    filled = PreprocessCfg(**{**given, "size": vision.get("image_size", 224)})
    modes = {"shortest": "cover", "squash": "squash", "longest": "fit"}
    if filled.resize_mode not in modes:
        raise ValueError(f"open_clip's resize_mode {filled.resize_mode!r} is none of {', '.join(modes)}")
    how = modes[filled.resize_mode]
    size = as_size(filled.size if isinstance(filled.size, int) else list(filled.size))
    interpolation = "bilinear" if filled.interpolation == "bilinear" else "bicubic"
    mean, std = (_of_channels(values) for values in (filled.mean, filled.std))
    return Preprocess(size, mean, std, how, interpolation, None, filled.fill_color)


def _of_channels(values: Any) -> tuple[float, float, float]:
    """A value for each channel, of one for all or of three."""
    red, green, blue = values if isinstance(values, (tuple, list)) else (values,) * 3
    return float(red), float(green), float(blue)


def _open_clip_tokenizer(text: dict[str, Any], folder: Path, name: str) -> Any:
    """What open_clip reads captions with: CLIP's own, or one of transformers' in the folder."""
    length = text.get("context_length", CONTEXT_LENGTH)
    kwargs = text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        if kwargs:
            raise ValueError(f"{name}: CLIP's tokenizer with {', '.join(kwargs)} is not known here")
        return SimpleTokenizer(context_length=length)
    if other := set(kwargs) - {"clean"}:
        raise ValueError(f"{name}: a tokenizer with {', '.join(sorted(other))} is not known here")
    from transformers import AutoTokenizer

    hub = str(text["hf_tokenizer_name"])
    there = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    with quiet(), _online(f"the tokenizer of {name}", hub):
        theirs = AutoTokenizer.from_pretrained(
            folder if there else hub, local_files_only=there, trust_remote_code=False
        )
    clean = kwargs.get("clean", "whitespace")
    return own_tokenizer(theirs, folder, length, theirs.pad_token_id or 0, True, clean)


def _text_settings(name: str, folder: Path, weights: Path) -> dict[str, Any]:
    """The configuration of a text tower of transformers that open_clip names by a hub's id.

    Where neither the folder nor the hub or its cache has it, a BERT's sizes are read off its tensors, and that is said:
    its heads are 64 wide then, as those of every published BERT.
    """
    for place in (folder, Path(name)):
        if (place / HF).is_file() and "model_type" in (written := utils.read_json(place / HF)):
            return written
    from transformers import AutoConfig

    with quiet(), contextlib.suppress(Exception):  # it is not in the cache
        return AutoConfig.from_pretrained(name, local_files_only=True).to_dict()
    with quiet(), contextlib.suppress(Exception), _online("the text tower's configuration", name):  # no hub answers
        return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    shapes = {key: tuple(value.shape) for key, value in pretrained.read_state(weights).items()}
    prefix = "text.transformer."
    words = shapes.get(f"{prefix}embeddings.word_embeddings.weight")
    places = shapes.get(f"{prefix}embeddings.position_embeddings.weight", (0,))[0]
    kinds = shapes.get(f"{prefix}embeddings.token_type_embeddings.weight", (0,))[0]
    query = f"{prefix}encoder.layer.0.attention.self.query.weight"
    # A RoBERTa has the same names, with two positions more and one kind of token.
    if words is None or query not in shapes or words[1] % 64 or (places, kinds) != (512, 2):
        raise ValueError(
            f"{folder}: the configuration of its text tower, {name}, is neither there nor in a cache: put its "
            f"config.json into {folder}"
        )
    log.warning(f"{folder}: no configuration of its text tower, {name}: taken for a BERT with heads of 64 and GELU")
    pattern = re.compile(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.")
    layers = {int(found[1]) for key in shapes if (found := pattern.match(key))}
    return {
        "model_type": "bert", "vocab_size": words[0], "hidden_size": words[1], "num_attention_heads": words[1] // 64,
        "num_hidden_layers": len(layers), "pad_token_id": 0,
        "max_position_embeddings": places,
        "intermediate_size": shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
        "type_vocab_size": kinds,
    }  # fmt: skip


def _open_clip_by_name(name: str) -> Found:
    """`NAME/TAG` of open_clip's own lists, the weights from its cache or fetched; or `NAME/FILE`."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"open-clip:{name} needs open_clip: pip install open_clip_torch") from error
    model, _, tag = name.partition("/")
    settings, cfg = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    if settings is None:
        raise ValueError(f"unknown open_clip model {model!r}; choose from {', '.join(open_clip.list_models())}")
    if Path(tag).is_file():
        cfg, weights = {}, Path(tag)
    elif not cfg:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"open-clip:{name}: {tag!r} is no file and no weights of {model}: {tags}")
    else:
        with _online("open_clip", name):
            weights = Path(open_clip.download_pretrained(cfg))
    given = {key: value for key, value in cfg.items() if key in ("mean", "std", "interpolation", "resize_mode")}
    settings = {**settings, "quick_gelu": settings.get("quick_gelu", False) or cfg.get("quick_gelu", False)}
    return _open_clip({"model_cfg": settings, "preprocess_cfg": given}, weights.parent, f"open-clip:{name}", weights)


# ---------------------------------------------------------------------------------------------------------------------
# Hubs
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _online(owner: str, name: str) -> Iterator[None]:
    """A block that takes weights from the hub's cache, or fetches them; at once an error where no hub answers."""
    from huggingface_hub import constants

    silent = not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or silent  # or it tries again for minutes
    try:
        yield
    except Exception as error:  # of many kinds
        host = urlsplit(constants.ENDPOINT).hostname
        why = f"{host} does not answer" if silent else str(error).strip().splitlines()[0]
        raise ValueError(f"{owner} has no weights of {name} in its cache and cannot fetch them: {why}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(endpoint: str, seconds: float = 5) -> bool:
    """Whether a hub takes a connection."""
    parts = urlsplit(endpoint)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # the proxy knows
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=seconds):
            return True
    except OSError:
        return False


def _hub_folder(name: str) -> Path:
    """Where a hub's repository lies, in its cache or fetched: configurations, tokenizers, one set of weights."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    with contextlib.suppress(Exception):  # it is not in the cache
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return folder
    with _online("the hub", name):
        files = HfApi().list_repo_files(name)
        if not any(file.endswith(".safetensors") for file in files):
            wanted[-1] = "*.bin"
        return Path(snapshot_download(name, allow_patterns=wanted))
