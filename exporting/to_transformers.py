"""A folder that AutoModel, AutoTokenizer and AutoImageProcessor of transformers open, without code of its own.

A pair (CLIP, SigLIP) whose two towers are transformers' is written as that pair; of any other model the image tower
alone, where transformers has its architecture: its own, MedCLIP's Swin, and timm's plain ViTs.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
import utils
from exporting.parts import image_lines, refuse_other_objective
from inputs.sizes import height_width
from inputs.transforms import Preprocess
from tokenizer import LibraryTokenizer
from towers import library
from towers.files import PREPROCESS
from towers.library_tokenizers import quiet

log = logging.getLogger("medslip")


def to_transformers(loaded: models.Pretrained, folder: Path) -> list[str]:
    """The pair, or the image tower alone; ValueError, with what would work, for what transformers has no class for."""
    model: Any = loaded.model
    kinds = [model.config[f"{side}_tower"].removeprefix(library.TRANSFORMERS) for side in ("vision", "text")]
    names = [name for name, (_, image, text) in library.PAIRS.items() if [image, text] == kinds]
    whole = model.objective.text and bool(names)
    with quiet():
        theirs = _pair(model, names[0]) if whole else _image_tower(model)
        theirs.save_pretrained(folder)
    utils.write_json(folder / "preprocessor_config.json", _processor(loaded.preprocess, theirs.config))
    utils.write_json(folder / PREPROCESS, loaded.preprocess.to_dict())
    if whole:
        if not isinstance(loaded.tokenizer, LibraryTokenizer) or loaded.tokenizer.clean != "none":
            raise ValueError("transformers has no tokenizer that reads captions as this model's: choose --to onnx")
        write_tokenizer(loaded.tokenizer, folder)
        return _pair_lines(loaded, names[0], theirs.config.vision_config)
    if model.objective.text:
        log.info(
            "transformers has no pair of these two towers (its VisionTextDualEncoder reads a text by BERT's pooler): "
            "the image tower alone is written, without projection; --to safetensors and onnx hold both, --to open-clip "
            "a tower of timm with its text tower"
        )
    return _image_lines(loaded, theirs.config)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def _pair(model: Any, name: str) -> Any:
    import transformers

    image, text = dict(model.config["vision_kwargs"]), dict(model.config["text_kwargs"])
    sizes = {"projection_dim": image.pop("projection_dim_of_pair")} if "projection_dim_of_pair" in image else {}
    text.pop("projection_dim_of_pair", None)
    for side, kind in ((image, "vision_model"), (text, "text_model")):
        side["model_type"] = f"{name}_{kind}"
    config = transformers.AutoConfig.for_model(name, vision_config=image, text_config=text, **sizes)
    theirs = getattr(transformers, library.PAIRS[name][0])(config)
    weights = {f"vision_model.{k}": v for k, v in model.visual.model.state_dict().items()}
    weights |= {f"text_model.{k}": v for k, v in model.text_tower.model.state_dict().items()}
    if sizes:
        weights["visual_projection.weight"] = _projection(model.image_projection)
        weights["text_projection.weight"] = model.text_projection.T
    elif isinstance(model.image_projection, Tensor) or hasattr(model, "text_projection"):
        raise ValueError(
            f"transformers' {name} has no projection after its towers, which this model has: choose --to safetensors"
        )
    own = theirs.state_dict()
    refuse_other_objective(model, "logit_bias" in own, f"transformers' {name}")
    weights |= {k: getattr(model, k).reshape(own[k].shape) for k in ("logit_scale", "logit_bias") if k in own}
    theirs.load_state_dict(weights)
    return theirs


def _projection(projection: Any) -> Tensor:
    """As a linear layer has it, (embed_dim, width)."""
    return projection.T if isinstance(projection, Tensor) else projection.weight


def _image_tower(model: Any) -> Any:
    import transformers

    name, tower = model.config["vision_tower"], model.visual
    if name.startswith(library.TRANSFORMERS):
        return tower.model
    if name == "medclip-swin":
        theirs = transformers.SwinModel(tower.config)
        theirs.load_state_dict(tower.state_dict())
        return theirs
    if theirs := _plain_vit(tower, model):
        return theirs
    instead = "--to safetensors or --to onnx" if ":" in name or name.startswith("medclip-") else "--to timm"
    raise ValueError(f"transformers has no architecture that is {name} exactly: choose {instead}")


_VIT_NAMES = (  # timm's, transformers'
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"), ("blocks.", "layers."), (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."), ("attn.proj.", "attention.o_proj."),
)  # fmt: skip


def _plain_vit(tower: Any, model: Any) -> Any:
    """A ViT of timm as a ViTModel, where that computes the same; None where it does not."""
    import transformers

    if type(tower).__name__ != "VisionTransformer":
        return None
    size, block = height_width(model.config["image_size"]), tower.blocks[0]
    config = transformers.ViTConfig(
        hidden_size=tower.embed_dim, num_hidden_layers=len(tower.blocks), num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features, image_size=list(size),
        patch_size=list(tower.patch_embed.patch_size), layer_norm_eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
    )  # fmt: skip
    weights = {}
    for key, value in tower.state_dict().items():
        for ours, theirs in _VIT_NAMES:
            key = key.replace(ours, theirs)
        if "attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                weights[key.replace("attn.qkv.", f"attention.{part}_proj.")] = third
        else:
            weights["layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key] = value
    vit = transformers.ViTModel(config, add_pooling_layer=False).eval()
    try:
        vit.load_state_dict(weights)
    except RuntimeError:  # parts that a ViTModel has not, such as registers
        return None
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        expected = copy.deepcopy(tower).eval().double()(images)
        found = copy.deepcopy(vit).double()(pixel_values=images).last_hidden_state[:, 0]
    return vit if torch.allclose(found, expected, rtol=1e-6, atol=1e-8) else None  # another activation or read-out


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions
# ---------------------------------------------------------------------------------------------------------------------

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def _processor(preprocess: Preprocess, config: Any) -> dict[str, Any]:
    """preprocessor_config.json; ValueError for a preparation that transformers has no processor for.

    Of an image that is padded before, or of a model that takes patches, the processor takes an image of the final
    proportions: the card has the lines that make it.
    """
    h, w = preprocess.shape
    own_filter = preprocess.interpolation if preprocess.prepare not in ("slip", "medclip") else "bilinear"
    common = {
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": list(preprocess.mean), "image_std": list(preprocess.std),
        "resample": _RESAMPLE[own_filter],
    }  # fmt: skip
    vision = getattr(config, "vision_config", config)
    if vision.model_type == "siglip2_vision_model":
        patches = (h // vision.patch_size) * (w // vision.patch_size)
        own = {"patch_size": vision.patch_size, "max_num_patches": patches}
        return {**common, **own, "image_processor_type": "Siglip2ImageProcessor"}
    if preprocess.prepare == "fit":
        raise ValueError("transformers fits no image into a canvas, as this model's are: choose --to timm or onnx")
    if preprocess.prepare == "medclip":
        own = {"size": {"height": h, "width": w}, "resample": _RESAMPLE["bicubic"]}
        return {**common, **own, "image_processor_type": "ViTImageProcessor"}
    tall, wide = height_width(preprocess.resize_to or preprocess.size)
    if preprocess.prepare != "squash" and (tall != wide or h != w):
        raise ValueError(
            f"transformers covers squares alone, and this model takes {w} x {h} pixels: choose --to timm or --to onnx"
        )
    crop = {"do_center_crop": True, "crop_size": {"height": h, "width": w}}
    if preprocess.prepare == "squash":
        size, crop = {"height": tall, "width": wide}, crop if (tall, wide) != (h, w) else {}
    else:
        size = {"shortest_edge": tall}
    kind = "CLIPImageProcessor" if crop else "ViTImageProcessor"
    return {**common, **crop, "size": size, "image_processor_type": kind}


def write_tokenizer(tokenizer: LibraryTokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of transformers; its padding is the one that the model was trained on.

    A model that never reads what follows the end token gets that token as padding: id 0, which stands there in
    training, may be a word, and a padding token is cut out of the text that it stands in.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.definition)
    ends = backend.encode("").tokens
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    pad = backend.id_to_token(tokenizer.pad_id)
    names = {"pad_token": pad if pad in special else ends[-1], "eos_token": ends[-1]}
    if len(ends) > 1:
        names |= {"bos_token": ends[0], "cls_token": ends[0], "sep_token": ends[-1]}
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.context_length, padding_side=tokenizer.pad_side, **names
    )
    theirs.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What the card says
# ---------------------------------------------------------------------------------------------------------------------


def _resized(loaded: models.Pretrained, config: Any, kind: str) -> str:
    """The argument by which a tower takes images of another size than that of its position embeddings."""
    own = getattr(config, "image_size", None)
    own = height_width(own if isinstance(own, int) else tuple(own)) if own else None
    follows = kind in library.VISION and library.VISION[kind].follows_size
    return ", interpolate_pos_encoding=True" if follows and own != loaded.preprocess.shape else ""


def _made(loaded: models.Pretrained, config: Any) -> list[str]:
    """Lines that bring an image to the proportions that its processor leaves as they are."""
    squares = config.model_type == "siglip2_vision_model"
    if loaded.preprocess.prepare != "medclip" and not squares:
        return []
    lines = image_lines(loaded.preprocess)[1:-2]
    return lines if squares else [*lines[:-1], 'image = image.convert("RGB")']


def _pair_lines(loaded: models.Pretrained, name: str, vision: Any) -> list[str]:
    tokenizer: Any = loaded.tokenizer
    whole = tokenizer.pad_to == "context"
    padding = f'padding="max_length", max_length={tokenizer.context_length}' if whole else "padding=True"
    ids = 'input_ids=texts["input_ids"]' if name != "clip" else "**texts"
    return [
        "import torch", "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel, AutoTokenizer", "",
        "model = AutoModel.from_pretrained(folder).eval()", "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "processor = AutoImageProcessor.from_pretrained(folder)", *_made(loaded, vision),
        'images = processor(image, return_tensors="pt")',
        f'texts = tokenizer(captions, truncation=True, return_tensors="pt", {padding})', "with torch.inference_mode():",
        f"    out = model(**images, {ids}{_resized(loaded, vision, library.PAIRS[name][1])})",
        "vectors = out.image_embeds, out.text_embeds  # of length 1, (1, d) and (n, d)",
        "logits = out.logits_per_image  # (1, n), the scaled cosines",
    ]  # fmt: skip


def _image_lines(loaded: models.Pretrained, config: Any) -> list[str]:
    kind = config.model_type
    read, opened = "pooler_output", ""
    if kind == "vit":
        read, opened = "last_hidden_state[:, 0]", ", add_pooling_layer=False"
    elif kind == "resnet":
        read = "pooler_output.flatten(1)"
    return [
        "import torch", "from PIL import Image", "from transformers import AutoImageProcessor, AutoModel", "",
        f"model = AutoModel.from_pretrained(folder{opened}).eval()",
        "processor = AutoImageProcessor.from_pretrained(folder)", *_made(loaded, config),
        'images = processor(image, return_tensors="pt")', "with torch.inference_mode():",
        f"    out = model(**images{_resized(loaded, config, kind)})",
        f"features = out.{read}  # (1, d)",
    ]  # fmt: skip
