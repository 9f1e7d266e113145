"""Near duplicates within a set of images or between two: what a test set shares with what a model was trained on.

    python make_dataset.py audit train=/path/to/roco/train test=/path/to/roco/test --output duplicates.csv
    python make_dataset.py audit roco=/path/to/roco/train                      a set against itself

Found are copies that were resized, re-encoded, mirrored, or cropped by up to a sixth of a side. Two steps, because
radiographs of one kind are all alike. First each image's few nearest by a perceptual hash (its 8 x 8 blurred
brightnesses, with crops and mirrored, compared as a cosine). Then each such pair is laid over one another at 48 x 48,
coarse brightness taken out, at all shifts of a few crops, and the highest correlation decides.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import metadata
import metrics
from images import UnreadableImage, decode_image, read_bytes
from utils import HelpFormatter, Progress, UsageError, atomic_write

log = logging.getLogger("medslip")

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm"}
SIDE = 48  # pixels of a kept image, whatever its shape
HASH = 8  # pixels of its perceptual hash
NEAREST = 3  # candidates that each image has for each crop and its mirror image
KEPT = 8  # of all those
LEAST = 0.85  # cosine of hashes below which a pair is no candidate
CROP = 0.9  # side of the crops of the first step
SCALES = (1.0, 0.95, 0.9)  # sides of the crops of the second, which are refined to what lies between and below
# Correlation from which a pair counts as a copy; benchmarks/bench_audit.py chose it on one set and tested it on others.
THRESHOLD = 0.88
WORTH_REFINING = 0.6  # correlation to the pixel from which fractions of one are tried


def add_parser(commands: Any, add_workers: Callable[[argparse.ArgumentParser], None]) -> None:
    parser = commands.add_parser(
        "audit",
        help="near duplicates within a set of images, or between two",
        description="Lists pairs of images that are copies of one another: resized, re-encoded, mirrored or cropped by "
        "up to a sixth. One set is compared with itself, several with one another. Exit code 0 whether there are any "
        "or not; unreadable images are counted and named.",
        formatter_class=HelpFormatter,
    )
    # fmt: off
    parser.add_argument("sets", nargs="+", metavar="NAME=PATH",
                        help="a folder, searched with all below it, or a CSV with a column image")
    parser.add_argument("--output", type=Path, default=Path("duplicates.csv"), help="the pairs, most alike first")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="correlation from which a pair is listed")
    parser.add_argument("--pretrained", default="", metavar="PATH",
                        help="weights of a model: its nearest neighbours are candidates too, pairs get their cosine")
    parser.add_argument("--predictions", type=Path, default=None, metavar="PREDICTIONS.CSV",
                        help="of a set of type csv: its metrics on all test images, and without those that have a copy "
                        "in another set")
    # fmt: on
    add_workers(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    sets = {}
    for text in args.sets:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{text!r}: sets are given as NAME=PATH")
        if name in sets:
            raise UsageError(f"the set {name} is named twice")
        sets[name] = list_images(Path(path))
    pairs, unreadable = audit(sets, args.threshold, args.workers, args.pretrained)
    write_pairs(args.output, pairs)
    for name, paths in sets.items():
        touched = {p.first if p.sets[0] == name else p.second for p in pairs if name in p.sets}
        log.info(f"{name}: {len(paths):,} images, {len(touched):,} of them in a pair")
    log.info(f"{len(pairs):,} pairs at a correlation of {args.threshold:g} or more: {args.output}")
    if unreadable:
        log.warning(f"{len(unreadable)} images cannot be decoded, first {unreadable[0]}")
    if args.predictions:
        log.info(without_copies(args.predictions, pairs))


def list_images(path: Path) -> list[Path]:
    """Images below a folder, or those of a table.

    Raises:
        FileNotFoundError, ValueError: neither is there; no image; a path outside of the table's folder.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise FileNotFoundError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder nor a table")
    rows = metadata.read_table(path, ["image"])
    return [path.parent / metadata.inside(row["image"], f"{path}, row {n}") for n, row in enumerate(rows, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Small images, and their hashes
# ---------------------------------------------------------------------------------------------------------------------


def small_image(path: Path) -> np.ndarray | str:
    """The image in grey on SIDE x SIDE uint8, or why it cannot be read."""
    try:
        data = read_bytes(path)
        try:
            img = Image.open(io.BytesIO(data))
            img.draft("L", (4 * SIDE, 4 * SIDE))  # a JPEG is decoded at an eighth of its size where that is enough
            if img.format != "JPEG":
                raise OSError
            img.load()
        except OSError:
            img = decode_image(data, str(path))
    except (UnreadableImage, OSError) as error:
        return str(error)
    return np.asarray(img.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def boxes(side: float) -> list[tuple[float, float, float]]:
    """(left, top, side) of the whole and of crops of this side: the middle and the corners, in fractions."""
    rest = 1 - side
    return [(0.0, 0.0, 1.0), *((x * rest, y * rest, side) for x, y in ((0.5, 0.5), (0, 0), (1, 0), (0, 1), (1, 1)))]


def hashes(images: Tensor, box: tuple[float, float, float], mirrored: bool) -> Tensor:
    """uint8 (n, SIDE, SIDE) to unit vectors (n, HASH ** 2) of a part of each image."""
    left, top, side = (round(v * SIDE) for v in box)
    part = images[:, top : top + side, left : left + side].float()
    part = part.flip(-1) if mirrored else part
    blurred = F.interpolate(part[:, None], (HASH, HASH), mode="area")[:, 0].flatten(1)
    return F.normalize(blurred - blurred.mean(1, keepdim=True), dim=1)


def candidates(a: Tensor, b: Tensor, same: bool, block: int = 4096) -> Tensor:
    """(K, 3): places in a and b, and whether b is mirrored, of the nearest by any crop; each pair once."""
    whole, *crops = boxes(CROP)
    views = [(whole, whole), *((whole, crop) for crop in crops), *((crop, whole) for crop in crops)]
    right = {(box, mirrored): hashes(b, box, mirrored) for box in [whole, *crops] for mirrored in (False, True)}
    found = []
    for start in range(0, len(a), block):
        part = a[start : start + block]
        rows = torch.arange(len(part))
        near, places = [], []  # (block, NEAREST) of each view
        for mirrored in (False, True):
            for of_a, of_b in views:
                cosine = hashes(part, of_a, False) @ right[of_b, mirrored].T  # (block, m)
                if same:  # an image is no copy of itself, not even where it is symmetric
                    cosine[rows, rows + start] = -1
                top = cosine.topk(min(NEAREST, len(b)))
                near.append(top.values)
                places.append(2 * top.indices + mirrored)
        cosine, place = torch.cat(near, 1), torch.cat(places, 1)
        best = cosine.topk(min(4 * KEPT, cosine.shape[1]))  # one place may be there by several crops
        keys_of = place.gather(1, best.indices).tolist()
        for row, values, keys in zip((rows + start).tolist(), best.values.tolist(), keys_of, strict=True):
            kept = dict.fromkeys(key for key, value in zip(keys, values, strict=True) if value >= LEAST)
            found += [(row, key // 2, key % 2) for key in list(kept)[:KEPT]]
    return unique(torch.tensor(found, dtype=torch.long).reshape(-1, 3), same)


def unique(pairs: Tensor, same: bool) -> Tensor:
    if same:  # mirroring b onto a is mirroring a onto b
        low, high = pairs[:, :2].amin(1), pairs[:, :2].amax(1)
        pairs = torch.stack([low, high, pairs[:, 2]], 1)
        pairs = pairs[low != high]
    return torch.unique(pairs, dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Laying one image over another
# ---------------------------------------------------------------------------------------------------------------------


def detail(images: Tensor) -> Tensor:
    """(n, h, w) without its coarse brightness, which all images of one kind share: minus a blur of 13 pixels."""
    x = images[:, None]
    blurred = F.avg_pool2d(F.pad(x, (6, 6, 6, 6), mode="reflect"), 13, 1)
    return (x - blurred)[:, 0]


def best_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The highest correlation (n,) of all of `b` with a part of `a`, over SCALES of both sides and all shifts, and the
    part (n, 4): its left, top, width and height in pixels.

    Args:
        a, b: images (n, SIDE, SIDE) in float.
    """
    n = len(a)
    target = detail(a)
    best, box = torch.full((n,), -1.0), torch.zeros(n, 4)
    for sy in SCALES:
        for sx in SCALES:
            h, w = round(sy * SIDE), round(sx * SIDE)
            template = detail(F.interpolate(b[:, None], (h, w), mode="area")[:, 0])
            template = template - template.mean((1, 2), keepdim=True)
            template = template / template.flatten(1).norm(dim=1).clamp(min=1e-3)[:, None, None]
            product = F.conv2d(target[None], template[:, None], groups=n)[0]  # (n, SIDE - h + 1, SIDE - w + 1)
            mean = F.avg_pool2d(target[:, None], (h, w), 1)[:, 0]
            square = F.avg_pool2d(target[:, None] ** 2, (h, w), 1)[:, 0]
            spread = ((square - mean**2).clamp(min=1e-3) * (h * w)).sqrt()
            highest, place = (product / spread).flatten(1).max(1)
            top, left = place // product.shape[2], place % product.shape[2]
            found = torch.stack([left, top, torch.full((n,), w), torch.full((n,), h)], 1).float()
            box = torch.where((highest > best)[:, None], found, box)
            best = torch.maximum(best, highest)
    return best, box


def refined(a: Tensor, b: Tensor, box: Tensor) -> Tensor:
    """(n,): the correlation of `b` with the part `box` of `a`, moved and stretched by fractions of a pixel."""
    template = F.normalize(_centred(detail(b)), dim=1)

    def at(box: Tensor) -> Tensor:
        scale, middle = box[:, 2:] / SIDE, (2 * box[:, :2] + box[:, 2:]) / SIDE - 1  # in grid_sample's units
        theta = torch.zeros(len(a), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], middle
        grid = F.affine_grid(theta, [len(a), 1, SIDE, SIDE], align_corners=False)
        part = F.grid_sample(a[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
        return (F.normalize(_centred(detail(part)), dim=1) * template).sum(1)

    best = at(box)
    for step in (0.5, 0.25):
        for axes in ((0, 1), (2, 3)):  # where it lies, then how large it is
            start = box.clone()
            for dx in (-step, 0.0, step):
                for dy in (-step, 0.0, step):
                    tried = start.clone()
                    for axis, d in zip(axes, (dx, dy), strict=True):
                        tried[:, axis] += 2 * d if axis > 1 else d
                        if axis > 1:  # about its middle
                            tried[:, axis - 2] -= d
                    value = at(tried)
                    box = torch.where((value > best)[:, None], tried, box)
                    best = torch.maximum(best, value)
    return best


def _centred(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return x - x.mean(1, keepdim=True)


def correlations(a: Tensor, b: Tensor, pairs: Tensor, batch: int = 256) -> Tensor:
    """(K,): of each candidate, either image being the crop; what lies well apart is not refined."""
    out = []
    for part in pairs.split(batch):
        left, right = a[part[:, 0]].float(), b[part[:, 1]].float()
        right = torch.where(part[:, 2, None, None] > 0, right.flip(-1), right)
        best = torch.full((len(part),), -1.0)
        for whole, crop in ((left, right), (right, left)):
            value, box = best_overlap(whole, crop)
            near = value >= WORTH_REFINING
            if near.any():
                value[near] = torch.maximum(value[near], refined(whole[near], crop[near], box[near]))
            best = torch.maximum(best, value)
        out.append(best)
    return torch.cat(out) if out else torch.zeros(0)


# ---------------------------------------------------------------------------------------------------------------------
# The audit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    sets: tuple[str, str]
    first: Path
    second: Path
    correlation: float
    mirrored: bool
    cosine: float | None = None  # of a model's features


def audit(
    sets: dict[str, list[Path]], threshold: float = THRESHOLD, workers: int = 1, pretrained: str = ""
) -> tuple[list[Pair], list[str]]:
    """Pairs of copies, most alike first, and the unreadable images with their reasons."""
    images, kept, unreadable = {}, {}, []
    for name, paths in sets.items():
        small, names, errors = read_small(paths, name, workers)
        images[name], kept[name] = small, names
        unreadable += errors
    vectors = embed(kept, pretrained, workers) if pretrained else {}
    names = list(sets)
    over = [(names[0], names[0])] if len(names) == 1 else [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs = []
    for a, b in over:
        if not len(images[a]) or not len(images[b]):
            continue
        found = candidates(images[a], images[b], a == b)
        if vectors:
            found = unique(torch.cat([found, nearest_by_model(vectors[a], vectors[b], a == b)]), a == b)
        score = correlations(images[a], images[b], found)
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for (i, j, mirrored), value in zip(found.tolist(), score.tolist(), strict=True):
            if value >= threshold:
                best[i, j] = max(best.get((i, j), (-1.0, 0)), (value, mirrored))
        for (i, j), (value, mirrored) in best.items():
            cosine = float(vectors[a][i] @ vectors[b][j]) if vectors else None
            pairs.append(Pair((a, b), kept[a][i], kept[b][j], value, bool(mirrored), cosine))
    return sorted(pairs, key=lambda pair: -pair.correlation), unreadable


def read_small(paths: Sequence[Path], name: str, workers: int) -> tuple[Tensor, list[Path], list[str]]:
    """Small images (n, SIDE, SIDE) of those that can be read, their paths, and why others cannot."""
    from make_dataset import over_processes

    rows, kept, errors = [], [], []
    with over_processes(workers, None, chunk=32) as each, Progress(desc=name, total=len(paths), unit=" images") as bar:
        for path, found in zip(paths, each(small_image, paths), strict=True):
            if isinstance(found, str):
                errors.append(found)
            else:
                rows.append(found)
                kept.append(path)
            bar.update()
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, SIDE, SIDE), np.uint8)), kept, errors


def embed(kept: dict[str, list[Path]], pretrained: str, workers: int) -> dict[str, Tensor]:
    """Unit vectors (n, d) of the images by a model."""
    import models

    model = models.load_pretrained(pretrained)
    return {name: torch.from_numpy(model.embed_images([str(path) for path in paths])) for name, paths in kept.items()}


def nearest_by_model(a: Tensor, b: Tensor, same: bool, block: int = 4096) -> Tensor:
    found = []
    for start in range(0, len(a), block):
        cosine = a[start : start + block] @ b.T
        if same:
            rows = torch.arange(len(cosine))
            cosine[rows, rows + start] = -2
        near = cosine.topk(min(NEAREST, len(b))).indices
        rows = torch.arange(start, start + len(near))[:, None].expand_as(near)
        for mirrored in (0, 1):
            found.append(torch.stack([rows, near, torch.full_like(near, mirrored)], -1).flatten(0, 1))
    return unique(torch.cat(found), same)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "image", "other_set", "other_image", "correlation", "mirrored", "cosine"])
    for pair in pairs:
        cosine = "" if pair.cosine is None else f"{pair.cosine:.4f}"
        writer.writerow([pair.sets[0], pair.first, pair.sets[1], pair.second, f"{pair.correlation:.4f}",
                         int(pair.mirrored), cosine])  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def without_copies(predictions: Path, pairs: Sequence[Pair]) -> str:
    """A run's metrics on all of its test images, and on those that no pair names."""
    rows = metadata.read_table(predictions, ["image", "label", "predicted"])
    classes = [name.removeprefix("prob_") for name in rows[0] if name.startswith("prob_")]
    touched = {str(path) for pair in pairs for path in (pair.first, pair.second)}
    prob = np.array([[float(row[f"prob_{name}"]) for name in classes] for row in rows])
    lowered = [name.lower() for name in classes]
    labels = np.array([lowered.index(row["label"].lower()) for row in rows])
    alone = np.array([not any(path.endswith(row["image"]) for path in touched) for row in rows])
    found = {}
    for title, index in (("all", np.ones(len(rows), bool)), ("without copies", alone)):
        present = len(set(labels[index])) == len(classes)
        scores = metrics.classification_metrics(labels[index], prob[index], classes, None) if present else {}
        found[title] = {"images": int(index.sum()), **{k: round(100 * v, 2) for k, v in scores.items()}}
    return "\n".join(f"{title}: {json.dumps(values)}" for title, values in found.items())
