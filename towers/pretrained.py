"""Towers that start from others' weights: image towers from timm's, text towers from a Hugging Face BERT folder.

    load_vision(model, "tf_efficientnet_lite0.pt")     a file or folder; "timm" for what timm itself has
    settings = read_bert("/path/to/pubmedbert")        its sizes, tokenizer and where its weights lie
    load_text(model, "/path/to/pubmedbert")

Every tensor of a tower must come from the file, whose classifier and pre-training heads alone may be left over.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import Tensor

import utils
from inputs.sizes import as_size
from runtime.checkpoints import (
    load_checkpoint,
    refuse_finetuned,
    refuse_not_finite,
    strip_wrappers,
    take_average,
)
from runtime.integrity import check_sums
from tokenizer import read_vocab
from towers.weights import Mismatch, resize_position_embeddings

log = logging.getLogger("medslip")

FROM_TIMM = "timm"  # in place of a path: the weights that timm fetches, or has in its cache


# ---------------------------------------------------------------------------------------------------------------------
# Image towers
# ---------------------------------------------------------------------------------------------------------------------


def vision_data(tower: str, source: str | Path) -> dict[str, Any]:
    """What weights of a timm tower expect of an image: `mean` and `std` a channel, and `size` (inputs.sizes.Size).

    Of timm's own record for the tower's name (a tag after the dot chooses among several weights), or of config.json
    where `source` is a folder that timm wrote.

    Raises:
        ValueError: no timm tower; a folder whose weights are another tower's.
    """
    if not timm.is_model(tower):
        raise ValueError(f"--vision-weights is for towers of timm, not {tower}: add --vision-tower NAME")
    if Path(source).is_file() and (Path(source).parent / "open_clip_config.json").is_file():
        folder = Path(source).parent
        raise ValueError(f"{source} is a part of open_clip's model in {folder}, which says how images are prepared: "
                         f"--vision-weights {folder}")  # fmt: skip
    cfg = timm.get_pretrained_cfg(tower, allow_unregistered=True)
    found = dict(mean=cfg.mean, std=cfg.std, input_size=cfg.input_size) if cfg else {}
    if Path(source).is_dir():
        file = Path(source) / "config.json"
        written = utils.read_json(file)
        if (theirs := written.get("architecture", tower)) != tower.partition(".")[0]:
            raise ValueError(
                f"{file} describes {theirs}, but the run's image tower is {tower}: --vision-tower {theirs}"
            )
        found |= {k: v for k, v in timm_data(written).items() if k in ("mean", "std", "input_size")}
    if len(found) < 3 or not found["mean"]:
        raise ValueError(f"timm does not say what images {tower} expects: give a folder with a config.json")
    return {
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        "size": as_size([int(side) for side in found["input_size"][1:]]),
    }


def timm_data(written: dict[str, Any]) -> dict[str, Any]:
    """What config.json of a folder of timm's says of images: under pretrained_cfg, in older ones at its top."""
    return written["pretrained_cfg"] or {} if "pretrained_cfg" in written else written


def load_vision(model: Any, source: str | Path) -> None:
    """Copy a timm tower's weights to `model.visual`; position embeddings follow the model's image size.

    Args:
        source: a state dictionary (`.pt`, `.pth`, `.bin`; also inside a training checkpoint) or `.safetensors`, a
            folder with such a file, or "timm".

    Raises:
        FileNotFoundError, ValueError: nothing there; unreadable; tensors missing, left over or of another shape.
    """
    load_tower(model.visual, model.config["vision_tower"], source)


def load_tower(tower: Any, name: str, source: str | Path) -> None:
    """The same for timm's tower `name`."""
    if str(source) == FROM_TIMM:
        try:  # the constructor of the model has none of its settings: only the weights are taken
            weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # timm and the hub raise many kinds
            raise ValueError(
                f"timm has no weights of {name} in its cache and cannot fetch them ({type(error).__name__}: {error}); "
                "give --vision-weights a file"
            ) from error
    else:
        weights = _in_timms_names(_without_prefix(read_state(_weights_file(Path(source))), tower), name, tower)
    weights = resize_position_embeddings(weights, tower, vision_data(name, source)["size"], prefix="")
    own, heads = tower.state_dict(), _classifiers(name)
    spare = sorted(key for key in weights if key not in own and key.startswith(heads))
    _copy(tower, {k: v for k, v in weights.items() if k not in spare}, f"{source} as {name}")
    if spare:
        log.info(f"{source}: {', '.join(spare)} not used")


def _without_prefix(weights: dict[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """The tower's names as they are where it was a part of another network, whose name for it was before each.

    What that network has beside it keeps its names, and is left over.
    """
    own = list(tower.state_dict())
    prefixes = ["", *(key.removesuffix(own[0]) for key in weights if key.endswith(own[0]))]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in weights for name in own))  # of equals the first
    return {key.removeprefix(prefix): value for key, value in weights.items()}


# What timm calls the function of a family that renames what older releases and other publishers wrote.
_TIMMS_FILTERS = ("checkpoint_filter_fn", "_filter_torchvision_pretrained", "_filter_fn")


def _in_timms_names(weights: dict[str, Tensor], name: str, tower: Any) -> dict[str, Tensor]:
    """By the filter of the tower's family, where this release of timm has one by a name that we know.

    Names that are not changed are refused as missing, one by one, when they are copied.
    """
    homes = [sys.modules[timm.models.model_entrypoint(name).__module__], sys.modules[type(tower).__module__]]
    filters = [getattr(home, called, None) for home in homes for called in _TIMMS_FILTERS]
    rename: Any = next(filter(None, filters), None)
    if rename is None:
        return weights
    takes_tower = len(inspect.signature(rename).parameters) > 1
    return rename(dict(weights), tower) if takes_tower else rename(dict(weights))


def _classifiers(name: str) -> tuple[str, ...]:
    """What the names of a tower's classifiers begin with."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = cfg.classifier if cfg and cfg.classifier else ()
    return tuple(f"{part}." for part in ([own] if isinstance(own, str) else own)) + ("head.", "head_dist.", "fc.")


# ---------------------------------------------------------------------------------------------------------------------
# Text towers
# ---------------------------------------------------------------------------------------------------------------------

# What medclip.BertText does not vary: fields of a BERT's config.json. One with others is transformers' own module.
_FIXED = {
    "model_type": "bert", "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
}  # fmt: skip
_HEADS = ("cls.", "pooler.", "classifier.", "qa_outputs.")


def read_bert(folder: str | Path) -> dict[str, Any]:
    """A Hugging Face BERT folder as `config`, fields of models.ModelConfig, and `tokenizer`, settings of WordPiece.

    Raises:
        FileNotFoundError, ValueError: no config.json or vocabulary; a model that our text tower cannot hold.
    """
    folder = Path(folder)
    config = utils.read_json(folder / "config.json")
    if other := _other(config):
        raise ValueError(f"{folder} is no BERT that the text tower can hold: {', '.join(other)}")
    vocab = _bert_vocabulary(folder)
    if (size := config.get("vocab_size", len(vocab))) != len(vocab):
        raise ValueError(f"{folder}: config.json counts {size} tokens, its vocabulary {len(vocab)}")
    return {
        "config": {
            "text_tower": "bert",
            "text_width": config.get("hidden_size", 768),
            "text_heads": config.get("num_attention_heads", 12),
            "text_layers": config.get("num_hidden_layers", 12),
        },
        "tokenizer": {"vocab": vocab, "lowercase": _lowercase(folder)},
    }


def _lowercase(folder: Path) -> bool:
    """Whether a BERT's captions become lower case, their accents dropped; ValueError where they are split otherwise."""
    files = (folder / name for name in ("tokenizer_config.json", "tokenizer.json"))
    settings, whole = (utils.read_json(file) if file.is_file() else {} for file in files)
    lower = bool(settings.get("do_lower_case", True))
    said = {"lowercase": lower, "strip_accents": settings.get("strip_accents"),
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}  # fmt: skip
    said |= whole.get("normalizer") or {}  # what transformers reads first
    if said["strip_accents"] not in (None, said["lowercase"]) or not said["handle_chinese_chars"]:
        raise ValueError(
            f"{folder} is no BERT whose captions are split as the text tower's: strip_accents {said['strip_accents']}, "
            f"lowercase {said['lowercase']}, handle_chinese_chars {said['handle_chinese_chars']}"
        )
    return bool(said["lowercase"])


def is_medclips(folder: str | Path) -> bool:
    """Whether MedCLIP's text tower can hold a folder's model: a BERT of any width and heads, by its config.json."""
    file = Path(folder) / "config.json"
    return not file.is_file() or not _other(utils.read_json(file))


def _other(config: dict[str, Any]) -> list[str]:
    """What MedCLIP's text tower has no place for."""
    fixed = {**_FIXED, "intermediate_size": 4 * config.get("hidden_size", 768)}
    other = [f"{k} {config[k]!r} instead of {v!r}" for k, v in fixed.items() if config.get(k, v) != v]
    layers = config.get("num_hidden_layers", 12)
    return other + [f"{layers} layer where it reads two and the last"] * (layers < 2)


def _bert_vocabulary(folder: Path) -> list[str]:
    """The tokens by id, of vocab.txt or, where there is none, of tokenizer.json."""
    file = folder / "tokenizer.json"
    if (folder / "vocab.txt").is_file() or not file.is_file():
        utils.refuse_lfs_pointer(folder / "vocab.txt")
        return read_vocab(folder / "vocab.txt")
    model = utils.read_json(file).get("model", {})
    ids = model.get("vocab")
    if model.get("type") != "WordPiece" or not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{file} holds no WordPiece vocabulary, which BERT's text tower reads")
    return sorted(ids, key=lambda token: ids[token])


def load_text(model: Any, folder: str | Path) -> None:
    """Copy a Hugging Face BERT's weights to `model.bert`; its pooler and pre-training heads are left out.

    Raises:
        FileNotFoundError, ValueError: as `load_vision`.
    """
    weights = {}
    for key, value in read_state(_weights_file(Path(folder))).items():
        key = key.removeprefix("bert.")
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
        if not key.startswith(_HEADS) and key != "embeddings.position_ids":
            weights[key] = value
    _copy(model.bert, weights, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("model.safetensors", "pytorch_model.bin")
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(names)}")
    return found[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name: the file's own, or those under state_dict or model, without wrappers' prefixes.

    Of a training checkpoint with a moving average of its weights, that.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist")
    utils.refuse_lfs_pointer(path)
    if path.suffix == ".safetensors":
        check_sums(path)
        try:
            weights = safetensors.torch.load_file(path)
        except Exception as error:  # SafetensorError has no public base
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        refuse_not_finite(weights, path)
        return weights
    state: Any = load_checkpoint(path)
    refuse_finetuned(state, path)
    state = take_average(state, path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dictionary; its keys begin {list(state)[:5]}")
    return strip_wrappers(state)


def _copy(module: Any, weights: dict[str, Tensor], source: str) -> None:
    if differ := Mismatch.between(module.state_dict(), weights):
        raise ValueError(f"{source} does not fit: {differ}")
    module.load_state_dict(weights)
