"""Near duplicates within a set of images or between two: what a test set shares with what a model was trained on.

    python make_dataset.py audit train=/path/to/roco/train test=/path/to/roco/test --output duplicates.csv
    python make_dataset.py audit roco=/path/to/roco/train                      a set against itself

Found are copies that were resized, re-encoded, mirrored, or cropped by up to a sixth of a side. Radiographs of one kind
are all alike, so what they share must not count. First each image's few nearest by a perceptual hash: 12 x 12 blurred
brightnesses, with crops and mirrored, whitened by the principal components of the sets, compared as a cosine. Then each
such pair is laid over one another at 48 x 48, coarse brightness taken out, at all shifts of a few crops; what fits is
laid over at 96 x 96, by fractions of a pixel, and this correlation decides.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distributed import onednn_linear, onednn_pays
from evaluation.predictions import Predictions, scheme_of
from evaluation.weighted import classification_metrics
from flags.preparing import THRESHOLD
from inputs import metadata
from inputs.files import IMAGE_SUFFIXES, composed, images_below
from inputs.images import UnreadableImage, decode_image, read_bytes
from preparation.processes import over_processes
from runtime.command_line import UsageError
from runtime.logs import progress
from utils import atomic_write, csv_text, csv_value

log = logging.getLogger("medslip")

SIDE = 96  # pixels of a kept image, whatever its shape
HASH = 12  # pixels of its perceptual hash
COMPONENTS = 64  # numbers that the hash is made of
KEPT = 5  # candidates of an image
FEW = 64**2  # pairs that are all compared: so few images say little about what is common
LEAST = 0.6  # cosine of hashes below which a pair is no candidate, unless it is an image's nearest
CROP = 0.9  # side of the crops of the first step
SCALES = (1.0, 0.95, 0.9, 0.85)  # sides of the crops of the second, which are refined to what lies between and below
WORTH_REFINING = 0.7  # coarse correlation to the pixel from which fractions of one are tried
WORTH_A_CLOSE_LOOK = 0.85  # and after that the fine one; pairs below are never listed
# Images that are multiplied at a time. oneDNN keeps memory for each number that it meets (benchmarks/RESULTS.md), so it
# is asked for this one alone.
TOGETHER = 64


def run(args: argparse.Namespace) -> None:
    """List the images of each set, compare them, write the pairs."""
    sets = {}
    for text in args.sets:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{text!r}: sets are given as NAME=PATH")
        if name in sets:
            raise UsageError(f"the set {name} is named twice")
        sets[name] = list_images(Path(path))
    tested = predicted_files(args.predictions, sets) if args.predictions else None  # refused before the long work
    pairs, unreadable = audit(sets, args.threshold, args.workers, args.pretrained)
    write_pairs(args.output, pairs)
    for name, paths in sets.items():
        touched = {p.first if p.sets[0] == name else p.second for p in pairs if name in p.sets}
        log.info(f"{name}: {len(paths):,} images, {len(touched):,} of them in a pair")
    log.info(f"{len(pairs):,} pairs at a correlation of {args.threshold:g} or more: {args.output}")
    if unreadable:
        log.warning(f"{len(unreadable)} images cannot be decoded, first {unreadable[0]}")
    if tested:
        log.info(without_copies(*tested, pairs))


def list_images(path: Path) -> list[Path]:
    """Images below a folder, or those of a table.

    Raises:
        FileNotFoundError, ValueError: neither is there; no image; a path outside of the table's folder.
    """
    if path.is_dir():
        found = [Path(file) for file in images_below(path)]
        if not found:
            raise FileNotFoundError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}, or DICOM of any name)")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder nor a table")
    rows = metadata.read_table(path, ["image"])
    return [path.parent / metadata.inside(csv_value(row["image"]), f"{path}, row {n}") for n, row in enumerate(rows, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Small images, and their hashes
# ---------------------------------------------------------------------------------------------------------------------


def small_image(side: int, path: Path) -> np.ndarray | str:
    """The image in grey on side x side uint8, or why it cannot be read."""
    try:
        data = read_bytes(path)
        try:
            img = Image.open(io.BytesIO(data))
            img.draft("L", (4 * side, 4 * side))  # a JPEG is decoded at an eighth of its size where that is enough
            if img.format != "JPEG":
                raise OSError
            img.load()
        except (OSError, Image.DecompressionBombError):
            img = decode_image(data, str(path))
    except (UnreadableImage, OSError) as error:
        return str(error)
    return np.asarray(img.convert("L").resize((side, side), Image.Resampling.BOX))


WHOLE = (0.0, 0.0, 1.0)  # left, top and side, in fractions
CROPS = [(x * (1 - CROP), y * (1 - CROP), CROP) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]


def blurred(images: Tensor, box: tuple[float, float, float] = WHOLE, mirrored: bool = False) -> Tensor:
    """uint8 (n, SIDE, SIDE) to (n, HASH ** 2): a part of each image, of mean 0 and deviation 1."""
    left, top, side = (round(v * SIDE) for v in box)
    part = images[:, top : top + side, left : left + side]
    small = torch.cat([F.interpolate(x[:, None].float(), (HASH, HASH), mode="area")[:, 0] for x in part.split(1024)])
    small = (small.flip(-1) if mirrored else small).flatten(1)
    small = small - small.mean(1, keepdim=True)
    return small / small.std(1, keepdim=True).clamp(min=1)


def whitening(images: Tensor, ridge: float = 0.01) -> Tensor:
    """(HASH ** 2, COMPONENTS): principal components, each divided by its deviation.

    Not about the mean, which is a component too. What the set hardly varies in is kept from growing by `ridge`, in
    shares of a pixel's variance.
    """
    small = blurred(images)
    variance, axes = torch.linalg.eigh(small.T @ small / len(small))
    variance, axes = variance[-COMPONENTS:].clamp(min=0), axes[:, -COMPONENTS:]
    return axes / (variance + ridge).sqrt()


def candidates(a: Tensor, b: Tensor, same: bool, block: int = 1024) -> Tensor:
    """(K, 3): places in a and b, and whether b is mirrored, of each image's nearest by any crop; each pair once."""
    if len(a) * len(b) <= FEW:
        everything = torch.cartesian_prod(torch.arange(len(a)), torch.arange(len(b)), torch.arange(2))
        return unique(everything, same)
    white = whitening(a if same else torch.cat([a, b]))

    def hashes(images: Tensor, box: tuple[float, float, float], mirrored: bool = False) -> Tensor:
        return F.normalize(blurred(images, box, mirrored) @ white, dim=1)

    views = [(WHOLE, box) for box in [WHOLE, *CROPS]]
    if not same:  # within a set the crop's own row has the pair the other way round
        views += [(box, WHOLE) for box in CROPS]
    of_a = {box: hashes(a, box) for box in {box for box, _ in views}}
    found = []

    def keep(cosine: Tensor, first: Any, of_a: Tensor, of_b: Tensor, mirrored: bool) -> None:
        kept = cosine >= LEAST
        kept[first] = True  # a crop between the nine places may lie lower, and is still the nearest
        places = [of_a.expand_as(kept)[kept], of_b.expand_as(kept)[kept]]
        found.append(torch.stack([*places, torch.full_like(places[0], mirrored)], 1))

    for mirrored in (False, True):
        of_b = {box: hashes(b, box, mirrored) for box in {box for _, box in views}}
        nearest, place = torch.empty(0, len(b)), torch.empty(0, len(b), dtype=torch.long)  # to each of b
        for start in progress(range(0, len(a), block), "comparing hashes", unit=" blocks"):
            rows = torch.arange(start, min(start + block, len(a)))
            best = torch.full((len(rows), len(b)), -1.0)
            for left, right in views:
                torch.maximum(best, of_a[left][rows] @ of_b[right].T, out=best)
            if same:  # an image is no copy of itself, not even where it is symmetric
                best[rows - start, rows] = -1
            cosine, column = best.topk(min(KEPT, len(b)))
            keep(cosine, (slice(None), 0), rows[:, None], column, mirrored)
            cosine, row = best.topk(min(KEPT, len(rows)), dim=0)
            nearest, place = torch.cat([nearest, cosine]), torch.cat([place, rows[row]])
            nearest, best_of = nearest.topk(min(KEPT, len(nearest)), dim=0)
            place = place.gather(0, best_of)
        keep(nearest, 0, place, torch.arange(len(b))[None], mirrored)
    return unique(torch.cat(found), same)


def unique(pairs: Tensor, same: bool) -> Tensor:
    """Each pair once, in order; within one set a pair has no direction."""
    if same:  # mirroring b onto a is mirroring a onto b
        low, high = pairs[:, :2].amin(1), pairs[:, :2].amax(1)
        pairs = torch.stack([low, high, pairs[:, 2]], 1)
        pairs = pairs[low != high]
    return torch.unique(pairs, dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Laying one image over another
# ---------------------------------------------------------------------------------------------------------------------


class WindowSums:
    """Sums over windows of images (n, H, W), by differences of running sums."""

    def __init__(self, x: Tensor):
        self.total = F.pad(x, (1, 0, 1, 0)).cumsum(1).cumsum(2)

    def of(self, h: int, w: int) -> Tensor:
        """(n, H - h + 1, W - w + 1)"""
        return self.total[:, h:, w:] - self.total[:, :-h, w:] - self.total[:, h:, :-w] + self.total[:, :-h, :-w]


def detail(images: Tensor, window: int = 13, least: float = 4.0) -> Tensor:
    """(n, h, w): what a window's mean does not say, over the window's deviation.

    All images of one kind share their coarse brightness, all mammograms the edge between breast and dark: texture must
    count as much as edges do. `least`, in grey levels, keeps noise on an even ground from counting too.
    """
    images = images - images.mean((1, 2), keepdim=True)  # the squares stay small
    rows, columns = (averaging(size, window) for size in images.shape[1:])
    mean, square = (times(beneath(rows, x), columns) for x in (images, images * images))
    return (images - mean) / ((square - mean**2).clamp(min=0).sqrt() + least)


def times(x: Tensor, columns: Tensor) -> Tensor:
    """x (n, H, W) @ columns (w, W) transposed: (n, H, w)."""
    return onednn_linear(x, columns) if len(x) == TOGETHER and onednn_pays() else x @ columns.T


def beneath(rows: Tensor, x: Tensor) -> Tensor:
    """rows (h, H) @ x (n, H, W): (n, h, W)."""
    if len(x) != TOGETHER or not onednn_pays():
        return rows @ x
    return onednn_linear(x.transpose(1, 2).contiguous(), rows).transpose(1, 2).contiguous()


@lru_cache(maxsize=32)
def averaging(size: int, window: int) -> Tensor:
    """(size, size): means of neighbours, reflected at the ends. Two products with it are the fastest blur on a CPU."""
    places = np.arange(size)[:, None] + np.arange(window) - window // 2
    places = size - 1 - np.abs(size - 1 - np.abs(places))
    matrix = np.zeros((size, size), np.float32)
    np.add.at(matrix, (np.arange(size)[:, None], places), 1 / window)
    return torch.from_numpy(matrix)


@lru_cache(maxsize=32)
def shrinking(size: int, to: int) -> Tensor:
    """(to, size): means of the pixels that each smaller one covers, also in part, as the area mode of PyTorch."""
    matrix = torch.zeros(to, size)
    for i in range(to):
        covered = slice(i * size // to, -(-(i + 1) * size // to))
        matrix[i, covered] = 1 / len(range(size)[covered])
    return matrix


def best_overlap(a: Tensor, b: Tensor, pairs: Tensor, batch: int = 128) -> tuple[Tensor, Tensor]:
    """The highest correlation (K,) of all of one image of `b` with a part of one of `a`, over SCALES of both sides and
    all shifts, and the part (K, 4): its left, top, width and height in pixels.

    What is computed of an image alone, most of the work, is computed once for all of its pairs.

    Args:
        a, b: square images (n, s, s) and (m, s, s) in float.
        pairs: (K, 2), places in a and b.
    """
    n, size = len(pairs), a.shape[-1]
    target = torch.cat([detail(part) for part in a.split(TOGETHER)])
    sums, squares = WindowSums(target), WindowSums(target * target)
    best, box = torch.full((n,), -1.0), torch.zeros(n, 4)
    for sy in SCALES:
        h = round(sy * size)
        flat = [beneath(shrinking(size, h), part) for part in b.split(TOGETHER)]
        for sx in SCALES:
            w = round(sx * size)
            template = torch.cat([detail(times(part, shrinking(size, w))) for part in flat])
            template = template - template.mean((1, 2), keepdim=True)
            template = template / template.flatten(1).norm(dim=1).clamp(min=1e-3)[:, None, None]
            length = (squares.of(h, w) - sums.of(h, w) ** 2 / (h * w)).clamp(min=1e-2).sqrt()
            for start in range(0, n, batch):
                own = slice(start, start + batch)
                in_a, in_b = pairs[own, 0], pairs[own, 1]
                # index_select copies whole images, where indexing copies number by number.
                under, over = target.index_select(0, in_a)[None], template.index_select(0, in_b)[:, None]
                product = F.conv2d(under, over, groups=len(in_a))[0]  # (k, size - h + 1, size - w + 1)
                highest, place = (product / length.index_select(0, in_a)).flatten(1).max(1)
                top, left = place // product.shape[2], place % product.shape[2]
                found = torch.stack([left, top, torch.full_like(left, w), torch.full_like(left, h)], 1).float()
                box[own] = torch.where((highest > best[own])[:, None], found, box[own])
                best[own] = torch.maximum(best[own], highest)
    return best, box


def refined(a: Tensor, b: Tensor, box: Tensor, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The correlation (n,) of `b` with the part `box` of `a`, moved and stretched by these pixels; the part."""
    size = a.shape[-1]
    template = F.normalize(_centred(detail(b)), dim=1)

    def at(box: Tensor) -> Tensor:
        scale, middle = box[:, 2:] / size, (2 * box[:, :2] + box[:, 2:]) / size - 1  # in grid_sample's units
        theta = torch.zeros(len(a), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], middle
        grid = F.affine_grid(theta, [len(a), 1, size, size], align_corners=False)
        part = F.grid_sample(a[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
        return (F.normalize(_centred(detail(part)), dim=1) * template).sum(1)

    best = at(box)
    along = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 2, 0], [0, -1, 0, 2]])  # stretched about the middle
    for step in steps:
        for axis in along:
            start = box
            for d in (-step, step):
                value = at(start + d * axis)
                box = torch.where((value > best)[:, None], start + d * axis, box)
                best = torch.maximum(best, value)
    return best, box


def _centred(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return x - x.mean(1, keepdim=True)


def overlay(a: Tensor, b: Tensor, pairs: Tensor) -> Tensor:
    """(K,): the fine correlation of all of one image with a part of the other, -1 where the coarse one is too low.

    Args:
        a, b: images (n, SIDE, SIDE) and (m, SIDE, SIDE) in float.
        pairs: (K, 2), places in a and b.
    """
    small_a, small_b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    in_a, box_a = best_overlap(small_a, small_b, pairs)
    in_b, box_b = best_overlap(small_b, small_a, pairs.flip(1))
    turned = (in_b > in_a)[:, None]
    coarse, box = torch.maximum(in_a, in_b), torch.where(turned, box_b, box_a)

    def pair(a: Tensor, b: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        a, b, swap = a[pairs[of, 0]], b[pairs[of, 1]], turned[of][:, :, None]
        return torch.where(swap, b, a), torch.where(swap, a, b)

    out = torch.full((len(pairs),), -1.0)
    likely = torch.nonzero(coarse >= WORTH_REFINING)[:, 0]
    for near in likely.split(TOGETHER) if len(likely) else ():
        fine, part = refined(*pair(small_a, small_b, near), box[near], (0.5,))
        close = fine >= WORTH_A_CLOSE_LOOK
        near, part = near[close], part[close]
        if len(near):
            out[near] = refined(*pair(a, b, near), 2 * part, (0.5, 0.5, 0.25))[0]
    return out


def correlations(a: Tensor, b: Tensor, pairs: Tensor, batch: int = 8192) -> Tensor:
    """(K,): the fine correlation of each candidate."""
    if not len(pairs):
        return torch.zeros(0)
    out = []
    for part in progress(pairs.split(batch), "comparing pixels", unit=" batches"):
        left, in_left = torch.unique(part[:, 0], return_inverse=True)
        right, in_right = torch.unique(part[:, 1:], dim=0, return_inverse=True)  # mirrored it is another image
        mirrored = b[right[:, 0]].float()
        mirrored = torch.where(right[:, 1, None, None] > 0, mirrored.flip(-1), mirrored)
        out.append(overlay(a[left].float(), mirrored, torch.stack([in_left, in_right], 1)))
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------------------------------
# The audit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two images that are copies of one another."""

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
    rows, kept, errors = [], [], []
    with over_processes(workers, SIDE, chunk=32) as each, progress(desc=name, total=len(paths), unit=" images") as bar:
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
    """(K, 3) as `candidates` has them: each of a's nearest in b by unit vectors (n, d), mirrored and not."""
    found = []
    for start in progress(range(0, len(a), block), "comparing features", unit=" blocks"):
        cosine = a[start : start + block] @ b.T
        if same:
            rows = torch.arange(len(cosine))
            cosine[rows, rows + start] = -2
        near = cosine.topk(min(KEPT, len(b))).indices
        rows = torch.arange(start, start + len(near))[:, None].expand_as(near)
        for mirrored in (0, 1):
            found.append(torch.stack([rows, near, torch.full_like(near, mirrored)], -1).flatten(0, 1))
    return unique(torch.cat(found), same)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """A line for each pair, most alike first."""
    lines: list[list] = [["set", "image", "other_set", "other_image", "correlation", "mirrored", "cosine"]]
    for pair in pairs:
        cosine = "" if pair.cosine is None else f"{pair.cosine:.4f}"
        lines.append([pair.sets[0], pair.first, pair.sets[1], pair.second, f"{pair.correlation:.4f}",
                      int(pair.mirrored), cosine])  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(csv_text(lines).encode("utf-8", "surrogateescape")))


def without_copies(tested: Predictions, files: Sequence[Path], pairs: Sequence[Pair]) -> str:
    """A run's metrics on all of its test images, which lie in `files`, and on those that no pair names."""
    touched = {file for pair in pairs for file in (pair.first, pair.second)}
    alone = np.flatnonzero([file not in touched for file in files])
    lines, classes = [], tested.scheme.classes
    for title, part in (("all", tested), ("without copies", tested[alone])):
        present = len(part.rows) and len(set(part.labels)) == len(classes)
        scores = classification_metrics(part.labels, part.prob, classes, None) if present else {}
        values = {"images": len(part.rows), **{k: round(100 * v, 2) for k, v in scores.items()}}
        lines.append(f"{title}: {json.dumps(values)}")
    return "\n".join(lines)


def _parts(path: str | Path) -> tuple[str, ...]:
    """Of a path, its accented letters in one form."""
    return Path(composed(str(path))).parts


def predicted_files(source: Path, sets: dict[str, list[Path]]) -> tuple[Predictions, list[Path]]:
    """A predictions.csv, and the files of its images, all in one of the sets: in `test` where several have them.

    An image is named relative to a folder that need not be the set's: whole parts of its path decide, from the end.

    Raises:
        ValueError: no predictions.csv; its images are in no set, or in several; an image may be one of two files.
    """
    found = Predictions.read(source, scheme_of(source))
    images = [row["image"] for row in found.rows]
    wanted = [_parts(image) for image in images]
    lengths = {len(parts) for parts in wanted}
    holding, missing = {}, {}
    for name, paths in sets.items():
        ends = defaultdict(list)
        for path in paths:
            for length in lengths:
                ends[_parts(path)[-length:]].append(path)
        holding[name] = [ends[parts] for parts in wanted]
        missing[name] = sum(not files for files in holding[name])
    whole = [name for name, number in missing.items() if not number]
    if len(whole) > 1 and "test" in whole:
        whole = ["test"]
    if len(whole) != 1:
        counts = ", ".join(f"{name} lacks {number}" for name, number in missing.items())
        raise ValueError(f"{source}: one set must hold all of its {len(images)} images, or be called test; {counts}")
    for image, files in zip(images, holding[whole[0]], strict=True):
        if len(files) > 1:
            raise ValueError(f"{source}: the image {image} may be {files[0]} or {files[1]}")
    return found, [files[0] for files in holding[whole[0]]]
