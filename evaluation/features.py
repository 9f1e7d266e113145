"""Frozen towers and one pass through them: each sample once, on any number of processes.

Probes, zero-shot classification, retrieval and k nearest neighbours all read their features here, so that missing and
corrupt images, the order of the samples, loader processes and caches are the same for all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import distributed
import models
import utils
from datasets import EvalPairs
from evaluation import metrics
from evaluation.downstream import ZeroShotSet
from inputs import loader
from inputs.display import AS_STORED, DISPLAY
from inputs.files import on_disk
from inputs.images import UnreadableImage, decode_shown, read_bytes
from inputs.reader import Reader
from inputs.sizes import Size, as_size
from inputs.transforms import Preprocess, View
from runtime.integrity import read_arrays
from runtime.logs import progress
from tokenizer import TokenizedTexts, Tokenizer
from towers.prompts import TextCache, evaluating, zeroshot_classifier
from towers.weights import require_finite

log = logging.getLogger("medslip")

# ---------------------------------------------------------------------------------------------------------------------
# The tower
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Backbone:
    """A frozen image tower: images (B, 3, H, W) prepared by `preprocess` to features (B, d)."""

    encode: Callable[[Tensor], Tensor]
    model: nn.Module  # what holds the weights
    preprocess: Preprocess
    features: str  # backbone or projection
    name: str  # for people
    training: dict[str, Any] = field(default_factory=dict)  # how far the weights were trained, where the file says it
    source: dict[str, Any] = field(default_factory=dict)  # where `load_backbone` had it from, by its arguments' names

    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of all weights and buffers on the image side."""
        image_side = ("visual.", "image_projection")
        weights = self.model.state_dict()
        return utils.weights_sha256({name: weights[name] for name in weights if name.startswith(image_side)})

    @torch.inference_mode()
    def width(self) -> int:
        """The number of features, d."""
        device = next(self.model.parameters()).device
        return self.encode(torch.zeros(1, 3, *self.preprocess.shape, device=device)).shape[1]


def load_backbone(
    pretrained: str | Path = "",
    *,
    model: str | None = None,
    arch: str = "vit_base_patch16_224",
    untrained: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    features: str = "backbone",
    size: Size | Sequence[int] | None = None,
) -> Backbone:
    """The image tower of some weights, or an untrained one, frozen and in eval mode.

    Args:
        pretrained: any weights that models.load_pretrained reads; "" for an untrained tower.
        model: name from models.MODELS: what a published file that does not say holds, or the untrained model.
        arch: timm's name of the untrained tower where neither of the two is given.
        untrained: the model of `pretrained` with fresh weights.
        seed: of fresh weights.
        features: backbone, or projection for the space shared with captions.
        size: of the images in pixels, a side or (height, width), where it is not the model's own.

    Raises:
        FileNotFoundError, ValueError: as models.load_pretrained and create_model; a model without the projection.
    """
    fresh = f"untrained (seed {seed})"
    stored = os.path.abspath(pretrained) if os.path.exists(pretrained) else str(pretrained)
    source = dict(pretrained=stored, model=model, arch=arch, untrained=untrained, seed=seed)
    tower: Any
    training: dict[str, Any] = {}
    if pretrained:
        loaded = models.load_pretrained(pretrained, model=model)
        tower, name, training = loaded.model, loaded.source, loaded.training
        if untrained:
            training = {}
            tower, name = models.rebuilt(tower, seed), f"{tower.title}, {fresh}"
    else:
        utils.seed_everything(seed)
        # `arch` names a timm tower only; a CLIP model around it has the projection as well.
        tower = models.create_model(model) if model else models.create_model("CLIP_VITB16", vision_tower=arch)
        name = f"{model or arch}, {fresh}"
    if features == "projection" and not tower.objective.text:
        raise ValueError(f"{name} has no projection: use --features backbone")
    if size is not None and as_size(size) != tower.preprocess.size:
        tower = models.at_size(tower, as_size(size))
    tower = tower.eval().requires_grad_(False).to(device)
    encode = tower.encode_image if features == "projection" else tower.visual
    return Backbone(encode, tower, tower.preprocess, features, name, training, source)


# ---------------------------------------------------------------------------------------------------------------------
# One pass over each sample
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loading:
    """How samples reach the tower: in batches, by loader processes, on which of several processes."""

    batch_size: int = 256  # images in one pass, a process; memory and speed only
    workers: int = 0  # loader processes wanted for each process
    skip_broken: bool = False  # skip and count images that are missing or corrupt, instead of an error
    processes: distributed.Processes = field(default_factory=distributed.Processes)

    @property
    def device(self) -> torch.device:
        """Where the tower computes."""
        return self.processes.device

    def encode(self, tower: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Features (B, d) in float32 of images on the device, computed in the precision of the processes."""
        with self.processes.autocast():
            return tower(images).float()

    def loader_processes(self) -> int:
        """Of this process."""
        return loader.loader_processes(self.workers, self.processes)


NAMED = 100  # images that were skipped, with the reason
LOADING = Loading()  # in this process, on the CPU


class _Numbered(Dataset):
    """`ds[i] -> (number, image, target, None)`, or (number, None, -1, error) for a missing or corrupt image."""

    def __init__(self, dataset: Any, numbers: range):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, int, Exception | None]:
        number = self.numbers[i]
        try:
            image, target = self.dataset[number][:2]
        except (UnreadableImage, FileNotFoundError) as error:
            return number, None, -1, error
        return number, image, int(target), None


def _collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[Exception]]:
    """Numbers (B,), images (B, 3, S, S) and targets (B,) of the readable samples, and the others' errors."""
    errors = [error for *_, error in samples if error is not None]
    kept = [sample[:3] for sample in samples if sample[1] is not None]
    if not kept:
        return torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0, dtype=torch.long), errors
    numbers, images, targets = zip(*kept, strict=True)
    batch = torch.stack(images)  # (B, 3, H, W)
    return torch.tensor(numbers), batch, torch.tensor(targets), errors


def each_once(
    model: nn.Module,
    dataset: Any,
    compute: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]],
    loading: Loading,
    title: str = "",
) -> list[Tensor]:
    """Send every sample of a dataset once through a model in eval mode, on any number of processes.

    Rank r takes samples r, r + world_size, ... without padding, so ranks may differ by one batch: the model must be
    the bare module, not its DistributedDataParallel wrapper.

    Args:
        dataset: items begin with an image tensor (3, S, S) and a whole number, its target.
        compute: numbers (B,), images (B, 3, S, S) on the device and targets (B,) to columns (B, ...).
        title: of the progress bar; "" for none.

    Returns:
        on every rank the numbers (n,) of the samples in order, then the columns (n, ...) on the CPU. Numbers are
        missing only where missing or corrupt images are skipped.

    Raises:
        FileNotFoundError, UnreadableImage: a missing or corrupt image, named, without `skip_broken`.
        ValueError: there is no image.
    """
    processes = loading.processes
    numbered = _Numbered(dataset, range(processes.rank, len(dataset), processes.world_size))
    source = loader.make_loader(
        numbered,
        batch_size=loading.batch_size,
        workers=loading.loader_processes(),
        device=loading.device,
        collate=_collate,
    )
    rows: list[list[Tensor]] = []
    skipped = 0
    steps = loader.batches(source)
    if title and processes.is_main:
        steps = progress(steps, title, total=len(source), unit=" batches")
    with evaluating(model):
        for numbers, images, targets, errors in steps:
            for error in errors:
                if not loading.skip_broken:
                    raise type(error)(f"{error}; --skip-broken skips, names and counts such images")
                skipped += 1
                if skipped <= NAMED:
                    log.warning(f"skipped: {error}")
            if len(numbers):
                columns = compute(numbers, images.to(loading.device, non_blocking=True), targets)
                # On the host, where they are waited for in any case.
                rows.append([numbers, *(finite(column.cpu(), numbers, dataset, title) for column in columns)])
    if skipped > NAMED:
        log.warning(f"skipped: {skipped - NAMED} more")
    own = [torch.cat(column) for column in zip(*rows, strict=True)]  # (n_r, ...); empty where this rank has no samples
    parts = [part for part in distributed.gather_objects(processes, own) if part]
    if not parts:
        why = f": all {len(dataset)} are missing or corrupt" if len(dataset) else ""
        raise ValueError(f"{title + ': ' if title else ''}there is no image to evaluate{why}")
    # Ranks interleave their samples, and some may have skipped some; sorting by number restores the dataset's order.
    order = torch.cat([part[0] for part in parts]).argsort()  # (n,)
    return [torch.cat(column)[order] for column in zip(*parts, strict=True)]  # (n, ...) each


# ---------------------------------------------------------------------------------------------------------------------
# Image features, kept on disk
# ---------------------------------------------------------------------------------------------------------------------


def finite(column: Tensor, numbers: Tensor, dataset: Any, title: str) -> Tensor:
    """The column (B, ...) of samples (B,) as it is; ValueError naming the first image with NaN or infinity in it."""
    sound = column.isfinite().reshape(len(column), -1).all(1)
    if not sound.all():
        number = int(numbers[~sound][0])
        paths = getattr(dataset, "paths", None)
        image = f"image {number}" if paths is None else Path(getattr(dataset, "root", ""), paths[number])
        require_finite(column, f"{image}{f' ({title})' if title else ''}")
    return column


def extract(backbone: Backbone, dataset: Any, title: str, loading: Loading) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) in float32 and the numbers (n,) of their samples, in order, on every process; see `each_once`."""

    def compute(numbers: Tensor, images: Tensor, targets: Tensor) -> list[Tensor]:
        return [loading.encode(backbone.encode, images)]

    numbers, features = each_once(backbone.model, dataset, compute, loading, title)
    return features.numpy(), numbers.numpy()


def extract_or_reuse(
    backbone: Backbone, dataset: Any, title: str, loading: Loading, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """As `extract`, or from `folder` where the same weights have seen the same images before.

    The file's name carries a hash of the weights, the preparation, the kind of features and the images (path, size and
    time of each, or the bytes of those in memory): another run's features are never taken.
    """
    file = folder / f"{utils.file_name(title)}_{features_key(backbone, dataset, loading)}.npz"
    kept: dict[str, np.ndarray] = {}
    if file.is_file():
        try:
            kept = read_arrays(file)
        except ValueError as error:
            log.warning(f"{error}; {title}: extracted again")
    if all(distributed.gather_objects(loading.processes, {"features", "numbers"} <= set(kept))):
        return kept["features"], kept["numbers"]
    utils.refuse_full(folder, 4 * len(dataset) * backbone.width(), "the features")
    features, numbers = extract(backbone, dataset, title, loading)
    if loading.processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        utils.atomic_write(file, lambda out: np.savez(out, features=features, numbers=numbers))
    return features, numbers


def features_key(backbone: Backbone, dataset: Any, loading: Loading) -> str:
    """32 hex digits of a hash over all that the features of a dataset depend on."""
    key = hashlib.sha256()
    # Equal weights compute something else with another number of heads, or under another release.
    architecture = (getattr(backbone.model, "config", None), timm.__version__)
    prepared = backbone.preprocess.to_dict()
    settings: tuple = (backbone.fingerprint(), architecture, backbone.features, prepared, loading.skip_broken)
    if loading.processes.precision != "fp32":
        settings += (loading.processes.precision,)
    key.update(json.dumps(settings).encode())
    for part in identify(dataset):
        key.update(part)
    return key.hexdigest()[:32]


def identify(dataset: Any) -> Iterator[bytes]:
    """What tells this dataset's images, in their order, from any others."""
    if hasattr(dataset, "pixels"):  # downstream.ImageArray
        yield f"{dataset.pixels.shape} {dataset.upsample}".encode()
        yield np.ascontiguousarray(dataset.pixels).tobytes()
        return
    if (display := getattr(dataset, "display", DISPLAY)) != DISPLAY:
        yield repr(display).encode()
    for i in range(len(dataset)):
        path = _path_of(dataset, i)
        status = path.stat() if path.exists() else None  # absent: the pass says so, or skips it
        yield f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode()


def greys_of(dataset: Any, most: int = 16) -> dict[str, int]:
    """Where the grey values of a dataset's images come from, of `display.SHOWN`: counts of up to `most`, evenly spread.

    It is kept beside what was trained on them: images that are shown otherwise look otherwise to the tower.
    """
    if hasattr(dataset, "pixels"):
        return {AS_STORED: min(len(dataset), most)}
    found: Counter = Counter()
    for i in sorted({int(place) for place in np.linspace(0, len(dataset) - 1, min(len(dataset), most))}):
        try:
            path = _path_of(dataset, i)
            found[decode_shown(read_bytes(path), str(path), getattr(dataset, "display", DISPLAY))[1]] += 1
        except (UnreadableImage, FileNotFoundError):
            continue  # the pass over the images says so, or skips it
    return dict(found)


def _path_of(dataset: Any, i: int) -> Path:
    """CbisLesions has whole paths, downstream.ImageFiles relative ones."""
    return on_disk(Path(getattr(dataset, "root", ""), dataset.paths[i]).absolute())


# ---------------------------------------------------------------------------------------------------------------------
# Image-text pairs
# ---------------------------------------------------------------------------------------------------------------------


def embed_pairs(
    model: Any,
    reader: Reader,
    preprocess: Preprocess | View,
    tokenizer: Tokenizer,
    loading: Loading = LOADING,
) -> tuple[Tensor, Tensor, list[str]]:
    """Embed every pair of a reader once; of an image with several captions the first is taken.

    Returns:
        image features (N, d) and text features (N, d), both in float32 on the CPU, and the N captions, in the reader's
        order on every rank. With `skip_broken` the pair of a missing or corrupt image is skipped.

    Raises:
        As `each_once`.
    """
    captions = [reader.captions(i)[0] for i in range(len(reader))]
    if not captions:
        raise ValueError("there are no candidates for retrieval: the reader is empty")
    tokens = TokenizedTexts(tokenizer, captions)

    def compute(numbers: Tensor, images: Tensor, targets: Tensor) -> list[Tensor]:
        texts = tokens[numbers].to(loading.device, non_blocking=True)  # (B, L)
        return [loading.encode(model.encode_image, images), loading.encode(model.encode_text, texts)]

    numbers, images, texts = each_once(model, EvalPairs(reader, preprocess), compute, loading, "retrieval")
    return images, texts, [captions[i] for i in numbers.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification
# ---------------------------------------------------------------------------------------------------------------------


def classify_zeroshot(
    model: Any,
    tokenizer: Tokenizer,
    labelled: ZeroShotSet,
    loading: Loading,
    cache: TextCache | None = None,
) -> metrics.Scores:
    """Zero-shot metrics of a labelled set as fractions, each sample once on any number of processes.

    Returns:
        `metrics.classification_scores`, "score" being the value that the set's metric names; "samples" counts those
        that `skip_broken` has not skipped.

    Raises:
        ValueError: a label outside the class names; else as `each_once`.
    """
    names = labelled.classnames

    def compute(logits: Tensor, targets: Tensor) -> list[Tensor]:
        return [targets, metrics.target_ranks(logits, targets), metrics.binary_margins(logits), logits.argmax(1)]

    _, targets, ranks, margins, first = _zeroshot_pass(model, tokenizer, labelled, loading, cache, compute)
    return metrics.classification_scores(
        targets, ranks, margins, len(names), labelled.metric, predicted=first
    )  # fmt: skip


def zeroshot_probabilities(
    model: Any, tokenizer: Tokenizer, labelled: ZeroShotSet, loading: Loading, cache: TextCache | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (n,) of the readable samples and their probabilities (n, C), softmax at the model's own temperature.

    Of a sigmoid's model too: the classes of these sets exclude one another, and their probabilities sum to 1.
    """
    scale = float(model.logit_scale.detach().exp()) if hasattr(model, "logit_scale") else 100.0

    def compute(logits: Tensor, targets: Tensor) -> list[Tensor]:
        return [(scale * logits.double()).softmax(dim=1)]

    numbers, prob = _zeroshot_pass(model, tokenizer, labelled, loading, cache, compute)
    return numbers.numpy(), prob.numpy()


def _zeroshot_pass(
    model: Any, tokenizer: Tokenizer, labelled: ZeroShotSet, loading: Loading, cache: TextCache | None,
    compute: Callable[[Tensor, Tensor], list[Tensor]],
) -> list[Tensor]:  # fmt: skip
    """What `compute` makes of the cosines (B, C) and the labels (B,) of every sample, after the samples' numbers."""
    names = labelled.classnames
    classifier = zeroshot_classifier(
        model, tokenizer, names, labelled.templates, loading.device, loading.batch_size, cache
    )  # (d, C)

    def of_batch(numbers: Tensor, images: Tensor, targets: Tensor) -> list[Tensor]:
        if (out_of_range := (targets < 0) | (targets >= len(names))).any():
            raise ValueError(f"label {int(targets[out_of_range][0])} in the data, but {len(names)} class names")
        features = loading.encode(model.encode_image, images)  # (B, d)
        cosines = (F.normalize(features, dim=-1) @ classifier).cpu()
        return compute(finite(cosines, numbers, labelled.dataset, "zero-shot"), targets)

    return each_once(model, labelled.dataset, of_batch, loading, "zero-shot")
