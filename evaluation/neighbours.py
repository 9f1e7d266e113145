"""What a model holds for close to an image: the nearest captions and images of a set of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import models
from evaluation.features import Loading, embed_pairs
from evaluation.nearest import nearest
from inputs.reader import Reader
from inputs.transforms import eval_view
from towers.prompts import evaluating


class Neighbours:
    """A model and a set's embeddings; the set is passed once. ValueError for a model that reads no captions."""

    def __init__(self, weights: str | Path, reader: Reader, workers: int = 0):
        loaded = models.load_pretrained(weights)
        self.model: Any = loaded.model
        if not hasattr(self.model, "encode_text") or loaded.tokenizer is None:
            raise ValueError(f"{loaded.source} reads no captions, so none is near")
        self.reader, self.view = reader, eval_view(loaded.preprocess)
        images, texts, self.captions = embed_pairs(
            self.model, reader, loaded.preprocess, loaded.tokenizer, Loading(workers=workers)
        )
        self.images, self.texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)  # (N, d)

    def of(self, images: Sequence[Image.Image], k: int = 3) -> list[dict[str, list[tuple[int, float]]]]:
        """For each image the k nearest {"captions": [(number in the reader, cosine)], "images": [...]}, best first."""
        with evaluating(self.model):
            features = self.model.encode_image(torch.stack([self.view(img, None) for img in images])).float()
        queries = F.normalize(features, dim=-1).numpy()  # (Q, d)
        found = [{} for _ in images]
        for name, bank in (("captions", self.texts), ("images", self.images)):
            numbers, cosines = nearest(queries, bank.numpy(), k)
            for own, n, c in zip(found, numbers.tolist(), cosines.tolist(), strict=True):
                own[name] = list(zip(n, c, strict=True))
        return found
