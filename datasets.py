"""Image-text sources, and what the training loop draws from them.

A reader is one source of images with captions: `len(r)`, `r.captions(i) -> list[str]`, `r.image(i)` in
RGB, `r.name(i) -> str` for messages, `r.dropped` absent images, `r.log` lines worth printing. Each
publisher's layout has a small class in READERS that yields its rows. The rest is shared: rows that leave
the root are refused, rows without an image are dropped and counted, captions are filtered, texts lie in
shared arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tarfile
import zipfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from colour import Colours, apply_colour
from images import UnreadableImage, decode_image, decode_pixels, read_bytes
from metadata import Table, fields_of, inside, iter_json, read_pickle
from transforms import Preprocess, View, as_view, ssl_pixels, train_pixels
from utils import Progress

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------------------------------------------------------------
# Text without Python objects
# ---------------------------------------------------------------------------------------------------------------------


class TextColumn:
    """Many texts as one UTF-8 buffer (uint8) and n + 1 offsets (uint32, or int64 beyond 4 GiB).

    A worker that reads a list of strings counts references, which copies the pages they lie on: these stay
    shared.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    @classmethod
    def from_strings(cls, texts: Iterable[str], paths: bool = False) -> TextColumn:
        builder = TextBuilder(paths)
        for text in texts:
            builder.append(text)
        return builder.column()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogateescape")


class TextBuilder:
    """A TextColumn in the making.

    Args:
        paths: keep names of files that are not UTF-8, which Python writes with lone surrogates, as they are. In texts
            such a character (JSON can hold one) becomes "?".
    """

    def __init__(self, paths: bool = False):
        self.data, self.offsets = bytearray(), array("q", [0])
        self.errors = "surrogateescape" if paths else "replace"

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", self.errors)
        self.offsets.append(len(self.data))

    def column(self) -> TextColumn:
        data, offsets = np.frombuffer(self.data, dtype=np.uint8), np.frombuffer(self.offsets, dtype=np.int64)
        return TextColumn(data, offsets.astype(np.uint32) if len(data) < 2**32 else offsets)


# ---------------------------------------------------------------------------------------------------------------------
# Caption filters
# ---------------------------------------------------------------------------------------------------------------------


# Stems of words that name the kind of image. "Mammary", mammoplasty and the Mammotome make no mammogram;
# panoramic and lateral views may be CT; angiography and fluoroscopy use x-rays but look like no radiograph.
MAMMO_WORDS = (
    r"mammogra",  # mammogram, -graphy, -graphic, French mammographie
    r"galactogra",  # a mammogram with contrast in the ducts
    r"breast tomosynthesis",
)
XRAY_WORDS = (
    r"\bx[\s\-\u2010-\u2015]{0,2}ray",  # X-ray, x ray, Xray, with any dash
    r"(?<!auto)(?<!micro)radio-?gra(?:ph|m|f)",  # radiograph, -graphy, -graphic, radiogram, radiografia
    r"r(?:oe|ö)ntgen",
    r"skiagra(?:m|ph)",
    r"\bcxr\b",
    r"\b(?:plain|chest)\b[\w\s]{0,12}\bfilms?\b",
    r"orthopanto",  # orthopantomogram, -graph, -graphy
    r"\bopg\b",
    r"\bcephalogra",
)
CAPTION_FILTERS = {"all": (), "mammo-xray": MAMMO_WORDS + XRAY_WORDS, "mammo": MAMMO_WORDS}


def caption_pattern(caption_filter: str) -> re.Pattern | None:
    """The pattern, blind to case, of a name in CAPTION_FILTERS or of a regular expression; None for all."""
    expression = "|".join(CAPTION_FILTERS.get(caption_filter, (caption_filter,)))
    try:
        return re.compile(expression, re.IGNORECASE) if expression else None
    except re.error as error:
        names = ", ".join(CAPTION_FILTERS)
        raise ValueError(
            f"the caption filter {caption_filter!r} is none of {names}, and no regular expression: {error}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# What readers share
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One image as its metadata states it."""

    where: str  # file and line, for messages
    image: Any  # path relative to the root, or a number where a rule gives the path
    captions: list[str]
    rows: int = 1  # of the metadata


@dataclass
class Columns:
    """The n rows that stay."""

    images: TextColumn | np.ndarray  # (n,)
    texts: TextColumn  # all captions, row after row
    first: np.ndarray  # (n + 1,) int64: row i has texts first[i]:first[i + 1]; (2,) if all have as many
    dropped: int  # rows whose image is absent
    log: list[str]
    absent: list = field(default_factory=list)  # images of at most ABSENT_SAMPLE of the rows dropped, drawn at random


class Listing:
    """Which relative paths exist under a root. A folder is listed once; no file is asked for by itself."""

    def __init__(self, root: Path):
        self.root = root
        self.folders: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self.folders:
            try:
                with os.scandir(self.root / folder) as entries:
                    self.folders[folder] = {entry.name for entry in entries}
            except (FileNotFoundError, NotADirectoryError):
                self.folders[folder] = set()
        return name in self.folders[folder]


def first_file(choices: list[Path], split: str) -> Path:
    """The first that is there, else FileNotFoundError naming them."""
    path = next((path for path in choices if path.is_file()), None)
    if path is None:
        tried = " or ".join(map(str, choices[:4])) + (" or under its other names" if len(choices) > 4 else "")
        raise FileNotFoundError(f"no captions of the split {split!r} at {tried}")
    return path


def grouped(rows: Iterable[Row]) -> Iterable[Row]:
    """Rows of the same image as one with all their captions, at the place of the first; rows without a caption stay."""
    first: dict[Any, Row] = {}
    out = []
    for row in rows:
        if not any(text.strip() for text in row.captions):
            out.append(row)
        elif (earlier := first.setdefault(row.image, row)) is row:
            out.append(row)
        else:
            earlier.captions = [*earlier.captions, *(text for text in row.captions if text not in earlier.captions)]
            earlier.rows += 1
    return out


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
    """

    splits: tuple[str, ...] = SPLITS
    indexed = False  # whether reading the rows takes so long that the result is kept in a file
    numbered = False  # whether rows give an image by number
    files: list[Path]  # of captions, set by `locate`

    def __init__(
        self,
        root: str | Path,
        metadata: str = "",
        split: str = "train",
        caption_filter: str = "all",
        cache_dir: str | Path = "",
        val_fraction: float = 0.1,
    ):
        if split not in self.splits:
            raise ValueError(f"this dataset has no split {split!r}; choose from {', '.join(self.splits)}")
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"the data root {self.root} is not a folder")
        self.split, self.val_fraction = split, val_fraction
        self.remarks: list[str] = []  # of `rows`, about the metadata
        pattern = caption_pattern(caption_filter)
        self.locate(metadata)
        columns = indexed_columns(self, cache_dir) if self.indexed else self.columns()
        self.images, self.texts, self.first = columns.images, columns.texts, columns.first
        self.dropped, self.log = columns.dropped, list(columns.log)
        self.kept: np.ndarray | None = None  # the rows that the caption filter leaves, None for all
        if pattern is not None:
            self._keep(pattern, caption_filter)

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
        first = array("q", [0])
        absent = silent = 0  # rows without an image, rows without a caption
        first_absent = first_silent = ""
        several = 0  # rows of images that have others
        absent_images: list = []  # some of them, to be looked for when an index is read again
        rng = random.Random(0)
        rows = Progress(self.rows(), "indexing", unit=" rows") if self.indexed else grouped(self.rows())
        for row in rows:
            several += row.rows * (row.rows > 1)
            captions = [text.strip() for text in row.captions]
            if not exists(row):
                absent += row.rows
                if len(absent_images) < ABSENT_SAMPLE:
                    absent_images.append(row.image)
                elif (place := rng.randrange(max(absent, 1))) < ABSENT_SAMPLE:
                    absent_images[place] = row.image
                first_absent = first_absent or f"{self.wanted(row)} ({row.where})".strip()
            elif not any(captions):
                silent += row.rows
                first_silent = first_silent or row.where
            else:
                images.append(row.image)
                for text in captions:
                    texts.append(text)
                first.append(first[-1] + len(captions))
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
        return Columns(kept, texts.column(), spans, absent, log, absent_images)

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
        for part in (*parts, self.texts.data, self.texts.offsets, self.first, self.kept):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# ROCO
# ---------------------------------------------------------------------------------------------------------------------


class Roco(Reader):
    """ROCO v1 (Pelka et al. 2018): `{train,validation,test}/{radiology,non-radiology}/images/<id>.jpg` beside
    `captions.txt`, or the first MedSLIP's `selected_pairs.txt`: lines of an id, white space and the caption.

    The root is the folder of the three splits, or its parent where it is called `data`, or one split, or a
    folder of captions itself; from the last two the other splits are found beside it. A folder of captions
    that belongs to no split is `train`. `metadata` is the name of another file of captions beside `images`.
    """

    kinds: tuple[str, ...] = ("radiology",)

    def locate(self, metadata: str) -> None:
        if Path(metadata).name != metadata:
            raise ValueError(f"ROCO's metadata is the name of a file beside images/, no path: {metadata!r}")
        names = (metadata,) if metadata else ("captions.txt", "selected_pairs.txt")

        def captions_in(folder: Path) -> Path | None:
            return next((folder / name for name in names if (folder / name).is_file()), None)

        given, own_split = self.root, "train"
        roots = [given, given / "data"]
        split_folder = given.parent if given.name in ("radiology", "non-radiology") else given
        if split_folder.name in SPLITS:
            own_split = split_folder.name
            roots.append(split_folder.parent)
        for root in roots:
            found = [path for kind in self.kinds if (path := captions_in(root / self.split / kind)) is not None]
            if len(found) == len(self.kinds):
                self.root, self.files = root, found
                return
        alone = captions_in(given)
        if alone is None or self.split != own_split:
            wanted = " and ".join(f"{self.split}/{kind}/{' or '.join(names)}" for kind in self.kinds)
            raise FileNotFoundError(f"no ROCO split {self.split!r} under {given}: expected {wanted}")
        self.files = [alone]

    def rows(self) -> Iterator[Row]:
        for path in self.files:
            images = (path.parent.relative_to(self.root) / "images").as_posix()
            with open(path, "rb") as lines:  # text mode would split a caption at a carriage return inside
                for number, line in enumerate(lines, 1):
                    where = f"{path} line {number}"
                    try:
                        fields = line.decode("utf-8-sig").split(None, 1)
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{where} is not UTF-8: {error}") from error
                    if fields:
                        yield Row(where, f"{images}/{inside(fields[0], where)}.jpg", fields[1:])


class RocoNonRadiology(Roco):
    """ROCO's other part: charts, photographs and drawings out of the same papers."""

    kinds = ("non-radiology",)


class RocoAll(Roco):
    """Both parts of ROCO."""

    kinds = ("radiology", "non-radiology")


class RocoV2(Reader):
    """ROCO v2 (Rückert et al. 2024): `<split>_captions.csv` with ID and Caption, and the images in
    `<split>_images/<split>/`, `<split>_images/` or `<split>/`; validation is called `valid`."""

    def locate(self, metadata: str) -> None:
        short = "valid" if self.split == "validation" else self.split
        self.find(metadata, f"{short}_captions.csv")
        folders = (f"{short}_images/{short}", f"{short}_images", short)
        self.images = next((folder for folder in folders if (self.root / folder).is_dir()), "")
        if not self.images:
            raise FileNotFoundError(f"no images at {self.root}/{{{','.join(folders)}}}")

    def rows(self) -> Iterator[Row]:
        table = Table(self.files[0])
        image, caption = table.column("id"), table.column("caption")
        for where, fields in table:
            yield Row(where, f"{self.images}/{inside(fields[image], where)}.jpg", [fields[caption]])


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


SPLIT_NAMES = {
    "train": ("train", "training", "restval"),  # restval: Karpathy's splits of COCO and Flickr30k
    "validation": ("validation", "valid", "val", "validate", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


class Csv(Reader):
    """Any table of captions and of image paths in the root; comma, semicolon or tab separated.

    The columns are the first that the header holds of IMAGE and of CAPTION. The table is `metadata`, with {split} in
    its name where each split has its own, or `<root>/<split>.csv` or `.tsv`. In one table for all splits a column
    `split` tells them apart; without one, `val_fraction` of the images are held out for validation, always the same.
    """

    IMAGE = ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "picture")
    CAPTION = ("caption", "title", "text", "report", "description", "sentence")

    def locate(self, metadata: str) -> None:
        names = SPLIT_NAMES[self.split]
        self.for_all_splits = bool(metadata) and "{split}" not in metadata
        if self.for_all_splits:
            self.find(metadata)
        elif metadata:
            places = [metadata.replace("{split}", name) for name in names]
            self.files = [first_file([Path(base, place) for place in places for base in ("", self.root)], self.split)]
        else:
            self.find("", *(f"{name}.{kind}" for name in names for kind in ("csv", "tsv")))

    def rows(self) -> Iterator[Row]:
        table = Table(self.files[0])
        image, caption = table.column(*self.IMAGE), table.column(*self.CAPTION)
        split = table.column("split") if "split" in table.header else None
        chosen, unknown = 0, Counter()
        for where, fields in table:
            path = fields[image].strip().removeprefix(f"{self.root}/")
            if split is not None:
                name = SPLIT_OF.get(fields[split].strip().lower())
                if name is None:
                    unknown[fields[split]] += 1
                belongs = name == self.split
            elif self.for_all_splits:
                belongs = self.split != "test" and held_out(path, self.val_fraction) == (self.split == "validation")
            else:
                belongs = True
            if belongs:
                chosen += 1
                yield Row(where, path, [fields[caption]])
        self._remark(split is not None, unknown)
        if not chosen:
            raise NoSplit("; ".join([f"{table.path} has no rows of the split {self.split!r}", *self.remarks]))

    def _remark(self, has_splits: bool, unknown: Counter) -> None:
        if unknown:
            named = ", ".join(f"{name!r} {n}" for name, n in unknown.most_common(10))
            self.remarks.append(
                f"{unknown.total()} rows of unknown splits left out: {named}; known are {', '.join(SPLIT_OF)}"
            )
        if self.for_all_splits and not has_splits:
            self.remarks.append(
                f"the table has no column split: {self.val_fraction:.0%} of the images, the same in every run, are "
                "held out for validation (--val-fraction)"
            )


def held_out(path: str, fraction: float) -> bool:
    """Whether an image belongs to the `fraction` that is not trained on: decided by its path alone."""
    return number_of(path.encode("utf-8", "surrogateescape")) < fraction * 2**63


# ---------------------------------------------------------------------------------------------------------------------
# Large sources
# ---------------------------------------------------------------------------------------------------------------------


class ArchivePool:
    """Open archives, the last `size` that were used; every process opens its own."""

    opener: Callable[[Path], Any]

    def __init__(self, size: int = 64):
        self.size, self.process = size, os.getpid()
        self.by_name: dict[Path, dict[str, list[str]]] = {}  # of zip archives whose members have other names
        self.archives: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"size": self.size, "process": -1, "by_name": {}, "archives": OrderedDict()}

    def archive(self, path: Path) -> Any:
        if self.process != os.getpid():  # a forked handle shares its position in the file with its parent
            self.archives, self.process = OrderedDict(), os.getpid()
        if path not in self.archives:
            self.archives[path] = self.opener(path)
            if len(self.archives) > self.size:
                self.archives.popitem(last=False)[1].close()
        self.archives.move_to_end(path)
        return self.archives[path]


class ZipPool(ArchivePool):
    """Members of zip archives by name."""

    opener = staticmethod(zipfile.ZipFile)

    def read(self, path: Path, member: str) -> bytes:
        """A member's bytes; FileNotFoundError for an absent archive, UnreadableImage for a damaged one."""
        try:
            archive = self.archive(path)
            return archive.read(member if member in archive.NameToInfo else self.alike(path, archive, member))
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile and zlib raise any kind on damaged archives
            raise UnreadableImage(f"cannot read the image {path}/{member}: {error}") from error

    def alike(self, path: Path, archive: zipfile.ZipFile, member: str) -> str:
        """The member of that name in any folder and case; KeyError where there is none, or more than one."""
        if path not in self.by_name:
            self.by_name[path] = members_by_name(archive.namelist())
        found = self.by_name[path].get(member.lower(), [])
        if len(found) != 1:
            raise KeyError(f"{len(found)} members are called {member}" + (f": {', '.join(found[:3])}" if found else ""))
        return found[0]


def members_by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """{file name in lower case: members of that name in any folder}, without what macOS adds."""
    members: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last and not last.startswith("._") and "__MACOSX" not in folder:
            members.setdefault(last.lower(), []).append(name)
    return members


class TarPool(ArchivePool):
    """Members of tar archives by their place in the file."""

    opener: Any = staticmethod(partial(open, mode="rb"))

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """A member's bytes; FileNotFoundError for an absent archive, UnreadableImage where it is shorter."""
        file = self.archive(path)
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise UnreadableImage(f"{path} ends before byte {offset + size}")
        return data


_YFCC = re.compile(r"[0-9]{3}\.jpg")


class Yfcc15m(Reader):
    """YFCC15M (Thomee et al. 2016): image 12345678 is `678.jpg` in `images/12/345.zip`; `metadata` is
    `yfcc15m.pkl`, a list of (number, title, description). Title and description are two captions."""

    splits = ("train",)
    indexed = numbered = True

    def locate(self, metadata: str) -> None:
        self.find(metadata, "yfcc15m.pkl")
        self.archives = ZipPool()

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(self._list()):
            where = f"{self.files[0]} row {number}"
            if not (isinstance(row, tuple | list) and list(map(type, row)) == [int, str, str]):
                raise ValueError(f"{where} is not (number, title, description): {str(row)[:80]}")
            if not 0 <= row[0] < 10**8:
                raise ValueError(f"{where}: the image number {row[0]} does not have at most 8 digits")
            yield Row(where, row[0], list(row[1:]))

    def _list(self) -> Iterable:
        """What the pickle holds, where it can be from the arrays that make_dataset.py writes beside it."""
        columns = load_index(*rows_index(self.files[0]))
        if columns is None:
            return read_list(self.files[0])
        texts = columns.texts
        images: Any = columns.images
        numbers = map(int, images)
        return ((number, texts[2 * i], texts[2 * i + 1]) for i, number in enumerate(numbers))

    def finder(self) -> Callable[[Row], bool]:
        present, listed = np.zeros(10**8, dtype=bool), np.zeros(10**5, dtype=bool)  # by image, by archive

        def exists(row: Row) -> bool:
            archive = row.image // 1000
            if not listed[archive]:
                listed[archive] = True
                path = self._archive(archive)
                if path.is_file():
                    try:
                        with zipfile.ZipFile(path) as file:
                            names = file.namelist()
                    except zipfile.BadZipFile as error:
                        raise ValueError(f"{path} is damaged: fetch it again or delete it") from error
                    found = members_by_name(names)
                    numbers = [
                        int(n[:3])
                        for n, places in found.items()
                        if _YFCC.fullmatch(n) and (len(places) == 1 or n in places)
                    ]
                    present[1000 * archive + np.array(numbers, dtype=int)] = True
            return bool(present[row.image])

        return exists

    def wanted(self, row: Row) -> str:
        archive, member = divmod(int(row.image), 1000)
        return f"{self._archive(archive)}/{member:03d}.jpg"

    def _archive(self, number: int) -> Path:
        return self.root / "images" / f"{number // 1000:02d}" / f"{number % 1000:03d}.zip"

    def _place(self, i: int) -> tuple[Path, str]:
        archive, member = divmod(int(self.images[self._row(i)]), 1000)
        return self._archive(archive), f"{member:03d}.jpg"

    def name(self, i: int) -> str:
        return "/".join(map(str, self._place(i)))

    def data(self, i: int) -> bytes:
        return self.archives.read(*self._place(i))


class Coco(Reader):
    """COCO Captions 2017 (Chen et al. 2015): `{train,val}2017/` and `annotations/captions_*.json`."""

    splits = ("train", "validation")
    indexed = True

    def locate(self, metadata: str) -> None:
        self.folder = "train2017" if self.split == "train" else "val2017"
        name = f"captions_{self.folder}.json"
        if metadata and self.split == "validation":  # the training file is given, the other lies beside it
            metadata = str(Path(metadata).with_name(name))
        self.find(metadata, f"annotations/{name}")

    def rows(self) -> Iterator[Row]:
        captions: dict[int, list[str]] = {}
        for number, item in enumerate(iter_json(self.files[0], "annotations")):
            where = f"{self.files[0]} annotation {number}"
            image, caption = fields_of(item, where, image_id=int, caption=str)
            captions.setdefault(image, []).append(caption)
        for image, texts in captions.items():
            yield Row(f"{self.files[0]} image {image}", f"{self.folder}/{image:012d}.jpg", texts)


class Cc3m(Reader):
    """CC3M (Sharma et al. 2018) as `cc3m.npy`: an array of {image_id: path, captions: [text]}."""

    splits = ("train",)
    indexed = True
    key = "image_id"

    def locate(self, metadata: str) -> None:
        self.find(metadata, f"{type(self).__name__.lower()}.npy")

    def rows(self) -> Iterator[Row]:
        for number, item in enumerate(read_list(self.files[0])):
            where = f"{self.files[0]} row {number}"
            path, texts = fields_of(item, where, **{self.key: (str, int), "captions": list})
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: the captions are not all text: {str(texts)[:80]}")
            yield Row(where, str(path), texts)


class Cc12m(Cc3m):
    """CC12M (Changpinyo et al. 2021) as `cc12m.npy`: an array of {image_name: path, captions: [text]}."""

    key = "image_name"


class RedCaps(Reader):
    """RedCaps (Desai et al. 2021): the merged list of annotations, and `images/<subreddit>/<id>.jpg` as the
    downloader writes them or `<subreddit>/<id>.jpg` as SLIP reads them; each subreddit may lie either way."""

    splits = ("train",)
    indexed = True

    def locate(self, metadata: str) -> None:
        self.find(metadata, "redcaps_v1.json")

    def rows(self) -> Iterator[Row]:
        images = self.root / "images"
        downloaded = {folder.name for folder in images.iterdir()} if images.is_dir() else set()
        for number, item in enumerate(iter_json(self.files[0], "annotations")):
            where = f"{self.files[0]} annotation {number}"
            image, folder, caption = fields_of(item, where, image_id=str, subreddit=str, caption=str)
            yield Row(where, f"{'images/' if folder in downloaded else ''}{folder}/{image}.jpg", [caption])


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards
# ---------------------------------------------------------------------------------------------------------------------


SHARD_IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")  # extensions of a sample's image


class WebDataset(Reader):
    """Tar shards as img2dataset and `make_dataset.py shards` write them: `key.jpg`, `key.txt`, `key.json`.

    The root is a folder of `*.tar` (of another split than train: in its folder `validation` or `test`), or
    the shards themselves: a brace pattern such as `shards/{00000..00331}.tar`, or several joined by `::`.
    With a folder as root, `metadata` may hold a pattern relative to it, or name a `.txt` of one shard a line.
    Captions are the list `captions` of the JSON, else the text, else `caption` of the JSON.

    The members' places are indexed once and a sample is read at its place, not in the stream's order: so
    shards are sources like all others, whose global batches do not depend on the number of processes and
    workers, whose epochs hold each sample once and whose runs continue at any step. A stream split over nodes
    and workers holds none of that. The price is a seek for each image: keep shards on a disk that seeks.
    """

    indexed = True

    def __init__(self, root: str | Path, metadata: str = "", *arguments: Any, **keywords: Any):
        if not metadata and root and not Path(root).is_dir():
            root, metadata = ".", str(root)
        super().__init__(root, metadata, *arguments, **keywords)

    def locate(self, metadata: str) -> None:
        self.archives = TarPool()
        if not metadata:
            folders = [self.root / self.split] + [self.root] * (self.split == "train")
            self.files = next(filter(None, (sorted(folder.glob("*.tar")) for folder in folders)), [])
            if not self.files:
                raise FileNotFoundError(f"no shards (*.tar) in {' or '.join(map(str, folders))}")
            return
        if self.split != "train":
            raise FileNotFoundError(f"the shards {metadata} are of the split 'train', not {self.split!r}")
        names = [metadata]
        if metadata.endswith(".txt"):
            self.find(metadata)
            names = self.files[0].read_text(encoding="utf-8").split("\n")
        names = [name for line in names if line.strip() for name in expand_shards(line.strip())]
        self.files = [self.root / name for name in names]
        absent = [str(path) for path in self.files if not path.is_file()]
        if absent or not names:
            raise FileNotFoundError(f"{len(absent)} of {len(names)} shards are absent: {', '.join(absent[:3])}")
        self.root = Path(os.path.commonpath([path.parent for path in self.files]))

    def rows(self) -> Iterator[Row]:
        for number, path in enumerate(self.files):
            with open(path, "rb") as file:
                for key, members in shard_samples(path, file).items():
                    where = f"{path} sample {key!r}"
                    kind = next((kind for kind in SHARD_IMAGES if kind in members), "")
                    place = f"{number} {' '.join(map(str, members[kind]))} {key}.{kind}" if kind else ""
                    yield Row(where, place, shard_captions(file, members, where))

    def finder(self) -> Callable[[Row], bool]:
        return lambda row: bool(row.image)

    def _place(self, i: int) -> tuple[Path, int, int, str]:
        shard, offset, size, member = self.images[self._row(i)].split(" ", 3)
        return self.files[int(shard)], int(offset), int(size), member

    def name(self, i: int) -> str:
        path, _offset, _size, member = self._place(i)
        return f"{path}/{member}"

    def data(self, i: int) -> bytes:
        return self.archives.read(*self._place(i)[:3])


def read_list(path: Path) -> list:
    """The list in a `.pkl` or `.npy`; only plain values are read."""
    rows = read_pickle(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}, not a list of rows")
    return rows


def expand_shards(pattern: str) -> list[str]:
    """The paths that a brace pattern, or several joined by `::`, stands for."""
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError(f"the pattern of shards {pattern} needs webdataset: pip install webdataset") from error
    return expand_urls(pattern)


def shard_samples(path: Path, file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """The samples of a shard: key -> extension in lower case -> (offset, size) in the file.

    Raises ValueError, naming the member, for one that a shard has no use for (a link, a device, a path that
    leaves the folder, a second file of the same name), and for a compressed or damaged archive.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        while True:  # archives one after the other (cat a.tar b.tar): each has its end mark
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    _take_member(member, samples, f"{path} member {member.name!r}")
                file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a damaged header ends the loop in silence
                raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
            if not _skip_zeros(file):
                return samples
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no complete, uncompressed tar archive: {error}") from error


def _take_member(member: tarfile.TarInfo, samples: dict[str, dict[str, tuple[int, int]]], where: str) -> None:
    name = inside(member.name, where).removeprefix("./")
    if member.isdir():
        return
    if not member.isreg() or member.issparse() or member.size < 0:
        raise ValueError(f"{where} is no plain file (type {member.type!r}): refused")
    folder, slash, last = name.rpartition("/")
    if last.startswith("._"):  # what macOS's tar adds beside each file
        return
    stem, _, kind = last.partition(".")
    kinds = samples.setdefault(folder + slash + stem, {})
    if kinds.setdefault(kind.lower(), place := (member.offset_data, member.size)) != place:
        raise ValueError(f"{where} is there twice")


def _skip_zeros(file: BinaryIO) -> bool:
    """Go to the next block that is not all zeros; False at the end of the file."""
    while blocks := file.read(1 << 20):
        if blocks.strip(b"\0"):
            first = next(i for i in range(0, len(blocks), tarfile.BLOCKSIZE) if any(blocks[i : i + tarfile.BLOCKSIZE]))
            file.seek(first - len(blocks), os.SEEK_CUR)
            return True
    return False


def shard_captions(file: BinaryIO, members: dict[str, tuple[int, int]], where: str) -> list[str]:
    """The captions of a sample, none where nothing states one."""

    def text(kind: str) -> str:
        offset, size = members[kind]
        file.seek(offset)
        return file.read(size).decode("utf-8")

    try:
        values = json.loads(text("json")) if "json" in members else None
        values = values if isinstance(values, dict) else {}
        several = values.get("captions")
        if isinstance(several, list) and all(isinstance(caption, str) for caption in several):
            return several
        caption = text("txt") if "txt" in members else values.get("caption")
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{where}: {error}") from error
    return [caption] if isinstance(caption, str) else []


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


# One file of .npy arrays, mapped into memory, after a first one that holds JSON. It stays valid as long as
# the metadata keeps size and time; images that come or go later are not noticed: delete the file to index
# anew.
INDEX_VERSION = 1
ABSENT_SAMPLE = 256


@dataclass
class RawFile:
    """An array that is too long for memory: its values one after the other in a file."""

    path: Path
    dtype: str


def rows_index(metadata: Path) -> tuple[Path, list]:
    """Where make_dataset.py puts all rows of the metadata, whether their images exist or not, and the key."""
    stat = metadata.stat()
    key = [INDEX_VERSION, "rows", stat.st_size, stat.st_mtime_ns]
    return metadata.with_name(f"{metadata.name}.rows"), key


def indexed_columns(reader: Reader, cache_dir: str | Path) -> Columns:
    """The reader's columns from its index, which the first process to come here writes; the others wait.

    The index is a convenience: where it cannot be kept the metadata is read at every start, and the log says so.
    """
    files = [os.path.abspath(path) for path in reader.files]
    source = [INDEX_VERSION, type(reader).__name__, reader.split, str(reader.root), *files]
    key = [*source, *([stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, files))]
    metadata = Path(files[0])
    folder = Path(cache_dir) if cache_dir else metadata.parent
    tag = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    path = folder / f"{metadata.name}.{tag}.index"
    columns = load_index(path, key)
    stale = columns is not None and images_have_come(columns, reader)
    made = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes") if columns is not None else ""
    if columns is not None and not stale:
        if columns.dropped:
            columns.log.append(f"that is what the index {path} of {made} says; delete it to look for every image again")
        return columns
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with one_process(path.with_suffix(".lock")):
        columns = load_index(path, key)  # which another process may have written meanwhile
        if columns is None or images_have_come(columns, reader):
            columns = reader.columns()
            try:
                save_index(path, key, columns)
            except OSError as error:
                columns.log.append(f"no index kept ({error}); with a folder in --cache-dir the next start is quick")
            else:
                columns = load_index(path, key) or columns
    if stale:
        columns.log.append(f"images that were absent in the index of {made} are there now: indexed anew")
    return columns


def images_have_come(columns: Columns, reader: Reader) -> bool:
    """Whether some of the images that were absent when an index was made are there now."""
    if not columns.absent:
        return False
    exists = reader.finder()
    return any(exists(Row("the index", image, [])) for image in columns.absent)


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Let the processes of a machine through one by one; the lock of one that dies is free.

    Where there are no locks (Windows, some network file systems, a folder that cannot be written) each process does the
    work itself.
    """
    with ExitStack() as stack:
        with suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(stack.enter_context(open(lock, "w")), fcntl.LOCK_EX)
        yield


def save_index(path: Path, key: list, columns: Columns) -> None:
    arrays: dict[str, np.ndarray | RawFile] = {
        "texts": columns.texts.data,
        "text_offsets": columns.texts.offsets,
        "first": columns.first,
    }
    if isinstance(columns.images, TextColumn):
        arrays |= {"pictures": columns.images.data, "picture_offsets": columns.images.offsets}
    else:
        arrays["pictures"] = columns.images
    write_index(path, {"key": key, "dropped": columns.dropped, "log": columns.log, "absent": columns.absent}, arrays)


def write_index(path: Path, head: dict, arrays: dict[str, np.ndarray | RawFile]) -> None:
    """The file that `load_index` maps: all of it or, where that fails, none."""
    described = np.frombuffer(json.dumps({**head, "arrays": list(arrays)}).encode(), dtype=np.uint8)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for values in (described, *arrays.values()):
                if isinstance(values, RawFile):
                    length = values.path.stat().st_size // np.dtype(values.dtype).itemsize
                    header = {"descr": values.dtype, "fortran_order": False, "shape": (length,)}
                    np.lib.format.write_array_header_1_0(file, header)
                    with open(values.path, "rb") as raw:
                        shutil.copyfileobj(raw, file, 1 << 20)
                else:
                    np.save(file, values, allow_pickle=False)
                file.write(b"\0" * (-file.tell() % 64))  # the next array starts aligned
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_index(path: Path, key: list) -> Columns | None:
    """The columns, mapped into memory; None where no index belongs to this state of the metadata."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        try:
            head = json.loads(np.lib.format.read_array(file, allow_pickle=False).tobytes())
            if head["key"] != key:
                return None
            arrays = {}
            for name in head["arrays"]:
                file.seek(-file.tell() % 64, os.SEEK_CUR)
                np.lib.format.read_magic(file)
                shape, _fortran, dtype = np.lib.format.read_array_header_1_0(file)
                values = np.memmap(path, dtype, "r", file.tell(), shape).view(np.ndarray)
                arrays[name] = values
                file.seek(values.nbytes, os.SEEK_CUR)
        except (ValueError, KeyError, TypeError):  # written by something else: index anew
            return None
    images = arrays["pictures"]
    if "picture_offsets" in arrays:
        images = TextColumn(images, arrays["picture_offsets"])
    texts = TextColumn(arrays["texts"], arrays["text_offsets"])
    return Columns(images, texts, arrays["first"], head["dropped"], head["log"], head.get("absent", []))


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


READERS: dict[str, type[Reader]] = {
    "roco": Roco,
    "roco_nonradiology": RocoNonRadiology,
    "roco_all": RocoAll,
    "rocov2": RocoV2,
    "csv": Csv,
    "yfcc15m": Yfcc15m,
    "coco": Coco,
    "cc3m": Cc3m,
    "cc12m": Cc12m,
    "redcaps": RedCaps,
    "webdataset": WebDataset,
}


def create_reader(
    name: str,
    root: str | Path,
    metadata: str = "",
    split: str = "train",
    caption_filter: str = "all",
    cache_dir: str | Path = "",
    val_fraction: float = 0.1,
) -> Reader:
    """The reader `name` of READERS; `Reader` explains the arguments.

    Raises ValueError for an unknown name, split or filter, FileNotFoundError where the split's files are
    absent.
    """
    if name not in READERS:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(READERS)}")
    return READERS[name](root, metadata, split, caption_filter, cache_dir, val_fraction)


# ---------------------------------------------------------------------------------------------------------------------
# What training draws
# ---------------------------------------------------------------------------------------------------------------------


class UnreadableImages:
    """The unreadable images of a run, one line each in a file that all workers and ranks append to.

    Raises UnreadableImage as soon as there are more than `limit`.
    """

    def __init__(self, path: Path, limit: float):
        self.path, self.limit = path, limit
        self.names: set[str] = set()
        self.position = 0  # how far the file was read

    def add(self, name: str, reason: str) -> None:
        name = name.replace("\n", " ").replace("\t", " ")
        if name in self.names:
            return
        self._read()
        if name not in self.names:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{name}\t{' '.join(reason.split())}\n")
            self._read()
        if len(self.names) > self.limit:
            raise UnreadableImage(
                f"{len(self.names)} images cannot be read, more than the {self.limit:g} that may be; "
                f"{self.path} names them"
            )

    def _read(self) -> None:
        """What others have added since."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                file.seek(self.position)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self.position += len(new)
            self.names.update(line.partition("\t")[0] for line in new.decode("utf-8").split("\n")[:-1])


class ContrastiveDataset(Dataset):
    """Samples for the contrastive objectives: `ds[epoch, index]` is a dict of `inputs` and "index".

    "image": (3, S, S), one training view; "view1", "view2": (3, S, S), two SSL views, all uint8 and with a
    single channel where the image is grey; "text": a caption, drawn if there are several. Every choice
    comes from (seed, epoch, index), so the number of workers or ranks changes no sample.

    With `colour_later` the SSL views are crops as they are, and "view1_colour", "view2_colour" say with what
    `colour.apply_colour_batch` finishes them on the accelerator.

    With `groups` a sample also has "groups", two whole numbers that are the same for the same file of an image
    and for the same caption.

    An unreadable image is an error. With `bad_samples`, a file, it is named there and another image, chosen
    from the same numbers, takes its place; more than `max_bad_fraction` of the reader's images end the run.
    """

    INPUTS = ("text", "image", "view1", "view2")  # in the order of their random numbers
    ATTEMPTS = 10

    def __init__(
        self,
        reader: Reader,
        inputs: tuple[str, ...],
        preprocess: Preprocess,
        seed: int,
        bad_samples: Path | None = None,
        max_bad_fraction: float = 0.01,
        colour_later: bool = False,
        groups: bool = False,
    ):
        unknown = sorted(set(inputs) - set(self.INPUTS))
        if unknown:
            raise ValueError(f"unknown inputs {', '.join(unknown)}; choose from {', '.join(self.INPUTS)}")
        self.reader, self.inputs, self.preprocess, self.seed = reader, inputs, preprocess, seed
        self.colour_later, self.groups = colour_later, groups
        self.unreadable = UnreadableImages(bad_samples, max_bad_fraction * len(reader)) if bad_samples else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        # The caption first, then the views as INPUTS orders them: CLIP and SLIP see the same caption and view.
        rng = np.random.default_rng((self.seed, epoch, index))
        index, data, pixels = self._pixels(epoch, index)
        pixels = self.preprocess.pixels(pixels)  # once for all views
        sample: dict = {"index": index}
        if "text" in self.inputs:
            captions = self.reader.captions(index)
            sample["text"] = captions[rng.integers(len(captions))]
            if self.groups:
                sample["groups"] = [number_of(data), number_of(sample["text"].encode())]
        if "image" in self.inputs:
            sample["image"] = train_pixels(self.preprocess, pixels, rng)
        for name in ("view1", "view2"):
            if name in self.inputs:
                sample[name], colour = ssl_pixels(self.preprocess, pixels, rng)
                if self.colour_later:
                    sample[f"{name}_colour"] = colour
                else:
                    sample[name] = torch.from_numpy(apply_colour(sample[name].numpy(), colour).copy())
        return sample

    def _pixels(self, epoch: int, index: int) -> tuple[int, bytes, torch.Tensor]:
        """The image at `index`, or the first of its stand-ins that can be read: its own index, file and planes."""
        for attempt in range(1, self.ATTEMPTS + 1):
            try:
                data = self.reader.data(index)
                return index, data, decode_pixels(data, self.reader.name(index))
            except (UnreadableImage, FileNotFoundError) as error:
                if self.unreadable is None:
                    raise
                self.unreadable.add(self.reader.name(index), str(error))
                stand_in = np.random.default_rng((self.seed, epoch, index, attempt))
                index = int(stand_in.integers(len(self.reader)))
        named = f": see {self.unreadable.path}" if self.unreadable else ""
        raise UnreadableImage(f"{self.ATTEMPTS} images in a row cannot be read{named}")


def number_of(data: bytes) -> int:
    """A whole number of 63 bits that stands for some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """This rank's part of each global batch, as lists of (epoch, index) for ContrastiveDataset.

    The permutation of an epoch depends on (seed, epoch) alone. A global batch is a slice of it, batch_size
    * world_size long, of which rank r takes the r-th part: N ranks see what one process with N times the
    batch sees. The last, incomplete one is dropped. `len()` is the number of steps in an epoch.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.global_batch = batch_size * world_size
        if n < self.global_batch:
            raise ValueError(
                f"{n} pairs do not fill one global batch of {self.global_batch} ({batch_size} for each of "
                f"{world_size} processes); choose a smaller batch"
            )
        self.n, self.batch_size, self.rank, self.seed = n, batch_size, rank, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its steps are done already."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.n // self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        # Every rank draws the same permutation and takes its own part of each global batch.
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        for step in range(self.start_step, len(self)):
            start = step * self.global_batch + self.rank * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class Collate:
    """Samples to a batch: views stacked to uint8 (B, 3, S, S), "text" tokenised to (B, L), "index" (B,), "groups"
    (B, 2).

    What happens to the views' colours becomes `colour.Colours`.

    With `trim`, for a text tower that never reads padding, what lies behind the longest caption, rounded up to a
    multiple of 8 tokens, is cut off: nothing to compute there, and few different lengths.
    """

    def __init__(self, tokenizer: Callable[[list[str]], torch.Tensor] | None = None, trim: bool = False):
        self.tokenizer = tokenizer  # None where no text is read
        self.trim = trim

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name in samples[0]:
            values = [sample[name] for sample in samples]
            if name == "text" and self.tokenizer is not None:
                tokens = self.tokenizer(values)  # (B, L)
                if self.trim:
                    longest = int(tokens.any(0).nonzero().max()) + 1  # every caption has its start and end token
                    tokens = tokens[:, : longest + -longest % 8].contiguous()
                batch[name] = tokens
            elif name in ("index", "groups"):
                batch[name] = torch.tensor(values)
            elif name.endswith("_colour"):
                batch[name] = Colours.of(values)
            else:
                # The channels innermost, as resizing leaves them and convolutions like them.
                views = [view.expand(3, -1, -1).permute(1, 2, 0) for view in values]
                batch[name] = torch.stack(views).permute(0, 3, 1, 2)
        return batch


class EvalPairs(Dataset):
    """The evaluation view of each image of a reader: `ds[i]` is ((3, S, S), i). An unreadable one raises."""

    def __init__(self, reader: Reader, preprocess: Preprocess | View):
        self.reader, self.view = reader, as_view(preprocess)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.view(self.reader.image(i), None), i
