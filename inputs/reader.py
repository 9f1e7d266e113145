"""What all sources of images with captions share.

A reader is one source: `len(r)`, `r.captions(i) -> list[str]`, `r.image(i)` in RGB, `r.name(i) -> str` for messages,
`r.dropped` absent images, `r.log` lines worth printing. Each publisher's layout is a small subclass of `Reader` in
sources.py or archives.py that finds its files and yields its rows. The rest is here: rows that leave the root are
refused, rows without an image are dropped and counted, captions are filtered, texts lie in shared arrays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inputs.caption_filters import CAPTION_FILTERS, caption_pattern
from inputs.columns import ABSENT_SAMPLE, KNOWN_COLUMNS, Columns, PairColumns, Row, Studies, TextBuilder, TextColumn
from inputs.conventions import no_value
from inputs.files import on_disk
from inputs.images import decode_image, decode_pixels, read_bytes
from inputs.index import indexed_columns
from inputs.metadata import inside
from runtime.logs import progress

log = logging.getLogger("medslip")
SPLITS = ("train", "validation", "test")


class Listing:
    """Which relative paths exist under a root. A folder is listed once; no file is asked for by itself but links, which
    may lead to nothing (git-annex, DVC: not fetched)."""

    def __init__(self, root: Path):
        self.root = root
        self.folders: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self.folders:
            try:
                with os.scandir(self.root / folder) as entries:
                    self.folders[folder] = {e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)}
            except (FileNotFoundError, NotADirectoryError):
                self.folders[folder] = set()
        return name in self.folders[folder] or not path.isascii() and on_disk(self.root / path).exists()


def first_file(choices: list[Path], split: str) -> Path:
    """The first that is there, else FileNotFoundError naming them."""
    path = next((path for path in map(on_disk, choices) if path.is_file()), None)
    if path is None:
        tried = " or ".join(map(str, choices[:4])) + (" or under its other names" if len(choices) > 4 else "")
        raise FileNotFoundError(f"no captions of the split {split!r} at {tried}")
    return path


def grouped(rows: Iterable[Row]) -> Iterable[Row]:
    """Rows of the same image as one with all their captions, at the place of the first; rows without a caption stay.

    Raises ValueError where they tell different studies.
    """
    first: dict[Any, Row] = {}
    texts: dict[Any, dict[str, None]] = {}  # of an image with several rows, in order, to look a text up in
    out = []
    for row in rows:
        if not any(text.strip() for text in row.captions):
            out.append(row)
        elif (earlier := first.setdefault(row.image, row)) is row:
            out.append(row)
        else:
            if row.image not in texts:
                texts[row.image] = dict.fromkeys(earlier.captions)
            texts[row.image].update(dict.fromkeys(row.captions))
            earlier.rows += 1
            if row.study and earlier.study not in ("", row.study):
                raise ValueError(
                    f"{row.where}: the image {row.image} is of the study {row.study.expandtabs(1)!r} here, and of "
                    f"{earlier.study.expandtabs(1)!r} in {earlier.where}"
                )
            earlier.study = earlier.study or row.study
    for image, several in texts.items():
        first[image].captions = list(several)
    return out


def said(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with "" for a caption that stands for none, as nan and NA do."""
    for row in rows:
        stripped = [text.strip() for text in row.captions]
        row.captions = ["" if no_value(text) else text for text in stripped]
        yield row


class NothingKept(ValueError):
    """A caption filter that no caption of a split matches."""


class NoSplit(ValueError):
    """A table that holds no row of a split."""


class Reader:
    """A source of images with captions. A subclass finds its files in `locate` and yields them from `rows`.

    Args:
        root: the folder that the publisher's download makes.
        metadata: file of captions, relative to the working folder or the root; "" for the publisher's place.
        split: one of `splits`.
        caption_filter: a name in CAPTION_FILTERS or a regular expression; a row stays if one of its captions
            matches.
        cache_dir: where an `indexed` reader keeps its index; "" for beside the metadata.
        val_fraction: of the images, held out where one table names no splits; see Csv.
        by_image: hold out images one by one even where a column of patients tells what belongs together.
        named: the columns of a table; see Csv.
    """

    splits: tuple[str, ...] = SPLITS
    indexed = False  # whether reading the rows takes so long that the result is kept in a file
    index_version = 1  # counted up where a class reads other rows out of the same files than it did before
    numbered = False  # whether rows give an image by number
    files: list[Path]  # of captions, set by `locate`
    held_out_by = ""  # the column whose values are whole where `val_fraction` decides
    groups: frozenset[str] = frozenset()  # of patients or the like that the split's rows name

    def __init__(
        self,
        root: str | Path,
        metadata: str = "",
        split: str = "train",
        caption_filter: str = "all",
        cache_dir: str | Path = "",
        val_fraction: float = 0.1,
        by_image: bool = False,
        named: PairColumns = KNOWN_COLUMNS,
    ):
        if split not in self.splits:
            raise ValueError(f"this dataset has no split {split!r}; choose from {', '.join(self.splits)}")
        self.root = on_disk(os.path.abspath(root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"the data root {self.root} is not a folder")
        self.split, self.val_fraction, self.by_image, self.named = split, val_fraction, by_image, named
        self.remarks: list[str] = []  # of `rows`, about the metadata
        pattern = caption_pattern(caption_filter)
        self.locate(metadata)
        columns = indexed_columns(self, cache_dir) if self.indexed else self.columns()
        self.images, self.texts, self.first = columns.images, columns.texts, columns.first
        self.dropped, self.log = columns.dropped, list(columns.log)
        self.studies: Studies | None = None  # of the images that are left
        self.kept: np.ndarray | None = None  # the rows that the caption filter leaves, None for all
        if pattern is not None:
            self._keep(pattern, caption_filter)
        if columns.studies is not None:
            self.studies = Studies(columns.studies if self.kept is None else columns.studies[self.kept])
            _, sizes = np.unique(self.studies.of, return_counts=True)
            self.log.append(f"{sizes[sizes > 1].sum()} of {len(self)} images have another one of their study")
            if sizes.max() == 1:
                why = f"{self.files[0]}: no study has two images, so none can be the other's second view"
                raise ValueError("; ".join([why, *self.remarks]))
            if len(sizes) == 1:
                raise ValueError(f"{self.files[0]}: all images are of one study, so there is none to tell them from")

    def locate(self, metadata: str) -> None:
        """Set `files`, and `root` where it lies deeper; FileNotFoundError says what was expected."""
        raise NotImplementedError

    def find(self, metadata: str, *places: str) -> None:
        """Set `files` to the given metadata, or if there is none to the first of the places in the root."""
        choices = [Path(metadata), self.root / metadata]
        if not metadata:
            choices = [self.root / place for place in places]
        self.files = [first_file(choices, self.split)]

    def rows(self) -> Iterator[Row]:
        """The rows of `files` as they stand there."""
        raise NotImplementedError

    def wanted(self, row: Row) -> str:
        """A row's image, for messages."""
        return str(row.image)

    def finder(self) -> Callable[[Row], bool]:
        """Whether a row's image exists, for many rows."""
        listing = Listing(self.root)
        return lambda row: inside(row.image, row.where) in listing

    def columns(self) -> Columns:
        """Read `rows` once: those with image and caption stay; the others are counted, the first named."""
        exists = self.finder()
        images: Any = array("i") if self.numbered else TextBuilder(paths=True)
        texts = TextBuilder()
        first, studies = array("q", [0]), array("q")
        numbers: dict[str, int] = {}  # of studies
        absent = silent = 0  # rows without an image, rows without a caption
        first_absent = first_silent = ""
        several = 0  # rows of images that have others
        absent_images: list = []  # some of them, to be looked for when an index is read again
        rng = random.Random(0)
        rows = progress(said(self.rows()), "indexing" if self.indexed else "reading", unit=" rows")
        rows = rows if self.indexed else grouped(rows)
        for row in rows:
            several += row.rows * (row.rows > 1)
            if not exists(row):
                absent += row.rows
                if len(absent_images) < ABSENT_SAMPLE:
                    absent_images.append(row.image)
                elif (place := rng.randrange(max(absent, 1))) < ABSENT_SAMPLE:
                    absent_images[place] = row.image
                first_absent = first_absent or f"{self.wanted(row)} ({row.where})".strip()
            elif not any(row.captions):
                silent += row.rows
                first_silent = first_silent or row.where
            else:
                images.append(row.image)
                if self.named.study:  # an image of no study is one by itself
                    studies.append(numbers.setdefault(row.study, len(numbers)) if row.study else -len(first))
                for text in row.captions:
                    texts.append(text)
                first.append(first[-1] + len(row.captions))
        source, n = " and ".join(map(str, self.files)), len(first) - 1
        log = [f"{source}: {n} pictures with captions", *self.remarks]
        if several:
            log.append(f"{several} rows share their image with others: each image counts once, with all its captions")
        if absent:
            log.append(f"{absent} rows dropped because their image is absent; first: {first_absent}")
        if silent:
            log.append(f"{silent} rows dropped because they have no caption; first: {first_silent}")
        if n == 0:
            raise (FileNotFoundError if absent else ValueError)("; ".join(log))
        spans = np.frombuffer(first, dtype=np.int64)
        counts = np.diff(spans)
        if counts.min() == counts.max():
            spans = spans[:2].copy()
        kept = np.frombuffer(images, dtype=np.int32) if self.numbered else images.column()
        of = np.frombuffer(studies, dtype=np.int64) if self.named.study else None
        return Columns(kept, texts.column(), spans, absent, log, absent_images, of)

    def _keep(self, pattern: re.Pattern, caption_filter: str) -> None:
        total = len(self)
        matches = (any(map(pattern.search, self.captions(i))) for i in range(total))
        self.kept = np.flatnonzero(np.fromiter(matches, dtype=bool, count=total))
        message = f"the caption filter {caption_filter!r} keeps {len(self.kept)} of {total} images"
        if not len(self.kept):
            raise NothingKept(f"{message}; filters with a name: {', '.join(CAPTION_FILTERS)}")
        self.log.append(message)

    def _row(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return i if self.kept is None else int(self.kept[i])

    def __len__(self) -> int:
        return len(self.images) if self.kept is None else len(self.kept)

    def captions(self, i: int) -> list[str]:
        """One or more, none of them empty."""
        row = self._row(i)
        if len(self.first) == 2:
            start, stop = row * self.first[1], (row + 1) * self.first[1]
        else:
            start, stop = self.first[row], self.first[row + 1]
        return [text for j in range(start, stop) if (text := self.texts[j])]

    def name(self, i: int) -> str:
        """Where image i lies, for messages."""
        return str(self.root / self.images[self._row(i)])

    def data(self, i: int) -> bytes:
        """The image's file, byte for byte. Raises as `image` does where it cannot be had."""
        return read_bytes(self.name(i))

    def image(self, i: int) -> Image.Image:
        """RGB, 8 bits. Raises UnreadableImage or FileNotFoundError, naming the file."""
        return decode_image(self.data(i), self.name(i))

    def picture(self, i: int) -> Image.Image:
        """The name that scripts of others know `image` by."""
        return self.image(i)

    def pixels(self, i: int) -> torch.Tensor:
        """`image` as uint8 planes (3, H, W), or (1, H, W) of a grey JPEG."""
        return decode_pixels(self.data(i), self.name(i))

    def fingerprint(self) -> str:
        """SHA-256 over the paths and captions of all pairs, in their order."""
        digest = hashlib.sha256()
        parts = [self.images.data, self.images.offsets] if isinstance(self.images, TextColumn) else [self.images]
        studies = None if self.studies is None else self.studies.of
        for part in (*parts, self.texts.data, self.texts.offsets, self.first, self.kept, studies):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def number_of(data: bytes) -> int:
    """A whole number of 63 bits that stands for some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
