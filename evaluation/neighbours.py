"""What a model holds for close to an image: the nearest captions and images of a set of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import models
from evaluation.features import Loading, embed_pairs
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


QUERIES, VECTORS = 64, 65_536  # that are compared at a time, in 16 MiB


def nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of a bank with the largest product with each query; of equal ones the first in the bank.

    Args:
        queries: (Q, d), and bank (n, d), of length 1 where products are to be cosines.

    Returns:
        their numbers and products, each (Q, k), or (Q, n) of a smaller bank, largest first.
    """
    k = min(k, len(bank))
    numbers, products = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), QUERIES):
        part = queries[start : start + QUERIES]  # (q, d)
        n, c = np.empty((len(part), 0), np.int64), np.empty((len(part), 0), np.float32)
        for first in range(0, len(bank), VECTORS):
            block = part @ bank[first : first + VECTORS].T  # (q, b)
            found = _largest(block, k)
            # What was found before stands first, so that the stable order keeps it of two equal ones.
            n = np.concatenate([n, found + first], axis=1)
            c = np.concatenate([c, np.take_along_axis(block, found, 1)], axis=1)
            order = np.argsort(-c, axis=1, kind="stable")[:, :k]
            n, c = np.take_along_axis(n, order, 1), np.take_along_axis(c, order, 1)
        numbers[start : start + QUERIES], products[start : start + QUERIES] = n, c
    return numbers, products


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """(q, k) places of the k largest in each row of (q, b), largest first, of equal ones the first; all where b < k."""
    k = min(k, values.shape[1])
    least = np.partition(values, -k, axis=1)[:, -k]  # (q,) the k-th largest; partition alone would pick any of its ties
    found = np.empty((len(values), k), np.int64)
    for row, own, bound in zip(values, found, least, strict=True):
        places = np.flatnonzero(row >= bound)
        own[:] = places[np.argsort(-row[places], kind="stable")[:k]]
    return found
