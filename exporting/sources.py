"""What is known of the checkpoints that are exported, and the mean of several."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
import utils
from exporting.parts import file_name
from runtime.checkpoints import load_checkpoint
from runtime.integrity import sha256
from runtime.logs import ROWS_FILE, read_rows
from runtime.one_run import KINDS, SETTINGS
from towers.weights import Mismatch

log = logging.getLogger("medslip")

STARTS = ("init", "medclip_weights", "vision_weights", "text_weights")  # flags of main.py that name weights
# Settings by which it is known that the files beside a checkpoint are of its own run: one copied elsewhere has others.
_OWN = ("model", "dataset", "caption_filter", "seed", "lr", "epochs", "batch_size", *STARTS)


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what it and the files of its run say of it; empty where nothing does."""

    name: str  # of its file and folder
    sha256: str  # of the file; of a folder, of its weights
    args: dict[str, Any] = field(default_factory=dict)  # flags of its training
    derived: dict[str, Any] = field(default_factory=dict)  # what the run made of them
    versions: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)  # validation of these very weights

    @classmethod
    def of(cls, path: Path) -> Source:
        """All that is known of a checkpoint that models.load_pretrained has read."""
        if not path.exists():  # another library's, by name
            return cls(str(path), "")
        name, digest = file_name(path), _digest(path)
        if path.is_dir() or path.suffix in (".zip", ".bin"):  # of other programs
            return cls(name, digest)
        state = load_checkpoint(path, mmap=zipfile.is_zipfile(path))  # torch maps no older kind of file
        args = state.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        args = dict(args) if isinstance(args, dict) else {}
        beside = path.parent / SETTINGS
        settings = utils.read_json(beside) if beside.is_file() else {}
        theirs, derived = settings.get("args"), settings.get("derived")
        if not isinstance(theirs, dict) or KINDS["training"] not in theirs:
            theirs = {}  # another command's
        own = bool(theirs) and all(theirs.get(key) == args.get(key) for key in _OWN)
        versions = state.get("versions")
        return cls(
            name, digest, args, derived if own and isinstance(derived, dict) else {},
            versions if isinstance(versions, dict) else {}, _scores(path.parent, state.get("step")) if own else {},
        )  # fmt: skip

    @property
    def starts(self) -> dict[str, str]:
        """The weights that its training started from, by the flag that named them."""
        return {key: str(self.args[key]) for key in STARTS if self.args.get(key)}


def _digest(path: Path) -> str:
    """Of a file, or of the largest file in a folder, which holds the weights."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sha256(max(files, key=lambda file: file.stat().st_size)) if files else ""


def _scores(run: Path, step: Any) -> dict[str, Any]:
    """What validation measured after `step` updates."""
    if step is None or not (run / ROWS_FILE).is_file():
        return {}
    rows = [row for row in read_rows(run / ROWS_FILE, "epoch") if row["step"] == step]
    return {k.removeprefix("val_"): v for row in rows for k, v in row.items() if k.startswith("val_") and v is not None}


# ---------------------------------------------------------------------------------------------------------------------
# The mean of several
# ---------------------------------------------------------------------------------------------------------------------


def load_mean(
    paths: Sequence[Path], bert_vocab: str | None, image_alone: bool = False
) -> tuple[models.Pretrained, list[Source]]:
    """The model at `paths`, of several with the mean of their weights (Wortsman et al. 2022, section 2, uniform soup).

    Their mean is only of use where they went out from the same weights: from others, equal functions lie in other
    units. The statistics of BatchNorm of a mean are not the mean of the statistics, but have to be measured on images
    of the training (Izmailov et al. 2018, section 3.2), which an export does not have: a tower's have to be equal, as
    --hold-batchnorm leaves them. Those of the SimCLR head are averaged, since nothing reads them outside training.

    Args:
        image_alone: nothing but the image tower is of use, so it alone is averaged and has to have one start: runs of
            other seeds with the same --vision-weights have it.

    Raises:
        ValueError: naming two of them and what differs: model, settings, preparation, tokenizer, names, shapes, start,
            statistics; one given twice.
    """
    first = models.load_pretrained(paths[0], bert_vocab=bert_vocab)
    sources = [Source.of(path) for path in paths]
    if len(paths) == 1:
        return first, sources
    _refuse_other_starts(paths, sources, image_alone)
    buffers = {name for name, _ in first.model.named_buffers() if not name.startswith("image_mlp.")}
    own = _averaged(first.model.state_dict(), image_alone)
    total = {name: value.double() for name, value in own.items() if value.is_floating_point()}
    for path in paths[1:]:
        other = models.load_pretrained(path, bert_vocab=bert_vocab)
        _refuse_others(first, other, paths[0], path)
        theirs = _averaged(other.model.state_dict(), image_alone)
        if differ := Mismatch.between(own, theirs):
            raise ValueError(f"{paths[0]} and {path} cannot be averaged: {differ}")
        for name, value in theirs.items():
            if name in buffers and not name.endswith("num_batches_tracked") and not torch.equal(value, own[name]):
                raise ValueError(
                    f"{paths[0]} and {path} cannot be averaged: {name} differs, and BatchNorm's statistics of the mean "
                    "would have to be measured on images of the training; train with --hold-batchnorm, or a tower "
                    "without BatchNorm"
                )
            if name in total:
                total[name] += value
    means = {name: (value / len(paths)).to(own[name].dtype) for name, value in total.items()}
    first.model.load_state_dict({**first.model.state_dict(), **means})
    name = f"mean of {', '.join(map(str, paths))}"
    return replace(first, source=name, training={"averaged": len(paths)}), sources


def _averaged(weights: dict[str, Tensor], image_alone: bool) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("visual.") or not image_alone}


def _refuse_other_starts(paths: Sequence[Path], sources: Sequence[Source], image_alone: bool) -> None:
    seen: dict[str, Path] = {}
    for path, source in zip(paths, sources, strict=True):
        if source.sha256 and (before := seen.setdefault(source.sha256, path)) is not path:
            raise ValueError(f"{before} and {path} hold the same bytes: each checkpoint is averaged once")
    silent = [str(path) for path, source in zip(paths, sources, strict=True) if not source.args]
    if silent:
        log.warning(
            f"{', '.join(silent)}: it is not recorded what they started from; the mean of weights that went out from "
            "different ones is of no use, so compare it with each of them"
        )
    told = [(path, source) for path, source in zip(paths, sources, strict=True) if source.args]
    for path, source in told[1:]:
        first_path, first = told[0]
        ours, theirs = (_start(s, image_alone) for s in (first, source))
        if ours.keys() != theirs.keys() or not all(_same_place(ours[key], theirs[key]) for key in ours):
            raise ValueError(
                f"{first_path} and {path} cannot be averaged, they did not start from the same weights: "
                f"{_start_text(ours)} and {_start_text(theirs)}"
            )


def _start(source: Source, image_alone: bool) -> dict[str, str]:
    """What a training, or its image tower, started from: files, and the seed where some of the weights were fresh."""
    starts = {key: path for key, path in source.starts.items() if not (image_alone and key == "text_weights")}
    files = ("init", "medclip_weights", *["vision_weights"] * image_alone)
    return starts if any(starts.get(key) for key in files) else {**starts, "seed": str(source.args.get("seed"))}


def _start_text(start: dict[str, str]) -> str:
    return ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in start.items())


def _same_place(first: str, second: str) -> bool:
    return first == second or os.path.realpath(first) == os.path.realpath(second)


def _refuse_others(first: models.Pretrained, other: models.Pretrained, path: Path, other_path: Path) -> None:
    """ValueError where two are not the same model with the same inputs."""
    for what, ours, theirs in (
        ("model", first.model.name, other.model.name),
        ("settings", first.model.config, other.model.config),
        ("preparation of images", first.preprocess.to_dict(), other.preprocess.to_dict()),
        ("tokenizer", _spec(first), _spec(other)),
    ):
        if ours != theirs:
            raise ValueError(
                f"{path} and {other_path} cannot be averaged, they differ in {_difference(what, ours, theirs)}"
            )


def _difference(what: str, ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        return f"{what}: " + "; ".join(
            f"{key} {str(ours.get(key))[:60]} and {str(theirs.get(key))[:60]}" for key in keys
        )
    return f"{what}: {ours} and {theirs}"


def _spec(loaded: models.Pretrained) -> dict[str, Any] | None:
    """A tokenizer's settings; of its vocabulary a hash, which a message has room for."""
    if loaded.tokenizer is None:
        return None
    texts = {key: str(value) for key, value in loaded.tokenizer.spec().items()}
    return {k: v if len(v) < 60 else hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in texts.items()}
