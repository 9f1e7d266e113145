"""Class names in prompts to a zero-shot classifier."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from distributed import ONEDNN, Processes
from runtime.integrity import read_arrays
from tokenizer import Tokenizer
from towers.weights import require_finite

log = logging.getLogger("medslip")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; the model's own mode again after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def zeroshot_classifier(
    model: Any,
    tokenizer: Tokenizer,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str],
    device: torch.device | str,
    batch_size: int = 256,
    cache: TextCache | None = None,
) -> Tensor:
    """One unit vector for each class: (d, C). CLIP, section 3.1.4: prompt ensembling in embedding space.

    Every template is filled ("{}") with the class's name, or with each of its synonyms where the name is a list; the
    text embeddings are normalised, averaged over the class and normalised again. Each distinct prompt is encoded once,
    batch_size at a time; with a cache once for all runs.
    """
    if not classnames or not templates:
        raise ValueError("zero-shot classification needs at least one class name and one template")
    names = [[name] if isinstance(name, str) else list(name) for name in classnames]
    prompts = [[t.replace("{}", synonym) for t in templates for synonym in synonyms] for synonyms in names]
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(p for of_class in prompts for p in of_class))}
    rows = [[row[p] for p in of_class] for of_class in prompts]  # of each class, among the distinct prompts
    tokens = tokenizer(list(row))  # (P, L)
    if cache and (kept := cache.read(tokens, rows)) is not None:
        return kept.to(device)
    with evaluating(model):
        parts = [model.encode_text(part.to(device)).float() for part in tokens.split(batch_size)]
        features = require_finite(torch.cat(parts), "a prompt")  # (P, d)
    features = F.normalize(features, dim=-1)  # (P, d)
    means = [features[of_class].mean(dim=0) for of_class in rows]
    classifier = F.normalize(torch.stack(means), dim=-1).T  # (d, C)
    if cache:
        cache.write(tokens, rows, classifier)
    return classifier


@dataclass(frozen=True)
class TextCache:
    """Classifiers of earlier runs, each in a file whose name is a hash of all that it depends on.

    That is the text side's weights and settings, the token ids of the prompts (hence the tokenizer, too), which of
    them make up each class, the kind of device and the libraries, oneDNN too: a stale one is never taken.
    """

    folder: Path
    model: str
    writes: bool

    @classmethod
    def of(cls, model: Any, processes: Processes, folder: Path) -> TextCache | None:
        """The cache for a model of models.py; None for another library's, whose settings are not known."""
        if not hasattr(model, "config"):
            return None
        text_side = {k: v for k, v in model.state_dict().items() if not k.startswith(("visual.", "image_"))}
        # The version without the import, which takes seconds.
        settings = (model.config, processes.device.type, torch.__version__, importlib.metadata.version("transformers"))
        if processes.precision == ONEDNN:
            settings += (ONEDNN,)
        key = f"{utils.weights_sha256(text_side)} {json.dumps(settings, sort_keys=True)}"
        return cls(folder, key, processes.is_main)

    def file(self, tokens: Tensor, rows: list[list[int]]) -> Path:
        """Where the classifier of these prompts is or would be kept."""
        key = hashlib.sha256(f"{self.model} {tuple(tokens.shape)} {rows}".encode())
        key.update(tokens.contiguous().numpy().tobytes())
        return self.folder / f"text_{key.hexdigest()[:32]}.npz"

    def read(self, tokens: Tensor, rows: list[list[int]]) -> Tensor | None:
        """The classifier (d, C) of an earlier run; None where there is none, or one that is damaged."""
        file = self.file(tokens, rows)
        earlier = file.with_suffix(".npy")  # until the files told whether they are damaged
        try:
            if file.is_file():
                return torch.from_numpy(read_arrays(file)["classifier"])
            return torch.from_numpy(np.load(earlier, allow_pickle=False)) if earlier.is_file() else None
        except (ValueError, KeyError) as error:
            log.warning(f"{error}; the prompts are embedded again")
            return None

    def write(self, tokens: Tensor, rows: list[list[int]], classifier: Tensor) -> None:
        """Keep a classifier (d, C), where this process is the one that writes."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            utils.atomic_write(self.file(tokens, rows), lambda out: np.savez(out, classifier=classifier.cpu().numpy()))
