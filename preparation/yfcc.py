"""YFCC15M's metadata: a list of wanted numbers and a table of 100 million rows to one pickle."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np

from datasets import create_reader
from inputs.index import RawFile, rows_index, write_index
from runtime.logs import progress
from utils import atomic_write, refuse_lfs_pointer

log = logging.getLogger("medslip")
YFCC_ROWS = 10**8  # numbers have at most 8 digits
YFCC_HTML = re.compile(r"<a.*?>|</a>|</?[bi]>")
YFCC_URL = re.compile(r"http\S+|www\S+")
YFCC_SOURCES = {
    "flickr_unique_ids.npy": "https://dl.fbaipublicfiles.com/deepcluster/flickr_unique_ids.npy",
    "yfcc100m_subset_data.tsv": "OpenAI's list, https://github.com/openai/CLIP/blob/main/data/yfcc100m.md",
    "yfcc100m_dataset.txt": "the core dataset, https://multimediacommons.wordpress.com/yfcc100m-core-dataset/, "
    "with the line number as its first column",
}


def run(args: argparse.Namespace) -> None:
    """Make both lists from the three sources."""
    captioned, listed = make_yfcc(args.ids, args.subset, args.dataset, args.output_dir)
    log.info(f"{captioned:,} captioned images in {args.output_dir / 'yfcc15m.pkl'}")
    log.info(f"{listed:,} images in {args.output_dir / 'yfcc100m.pkl'}")
    if args.root is not None:
        reader = create_reader("yfcc15m", args.root, str(args.output_dir / "yfcc15m.pkl"))
        log.info("\n".join(reader.log))


def make_yfcc(ids: Path, subset: Path, table: Path, output_dir: Path) -> tuple[int, int]:
    """Writes yfcc15m.pkl with its index and yfcc100m.pkl; returns how many rows each holds.

    The table is streamed and so is all that is written: beside `ids`, mapped while it is read, and two maps of the
    wanted numbers, 200 MB together, memory does not depend on any file's size. No list is replaced before both are
    complete. Raises FileNotFoundError naming what is missing, ValueError naming the line that is not of the table's
    form, and ValueError where the table holds none of the captioned images.
    """
    missing = [
        f"{path} is missing; it comes from {source}"
        for path, source in zip((ids, subset, table), YFCC_SOURCES.values(), strict=True)
        if not path.is_file()
    ]
    if missing:
        raise FileNotFoundError("; ".join(missing))
    downloaded, captioned = read_ids(ids), read_subset(subset)
    counts = [0, 0]

    def write(file15: BinaryIO, file100: BinaryIO, rows: RowFiles) -> None:
        with PickledList(file15) as captions, PickledList(file100) as numbers, rows:
            for number, fields in wanted_rows(table, downloaded):
                numbers.append(pickled_int(number))
                if captioned[number]:
                    texts = [clean_caption(field) for field in fields]
                    captions.append(pickled_int(number) + b"".join(map(pickled_str, texts)) + pickle.TUPLE3)
                    rows.append(number, texts)
        counts[:] = captions.count, numbers.count
        if not captions.count:
            raise ValueError(f"{table} holds no image that is in both {ids} ({numbers.count} found) and {subset}")

    output_dir.mkdir(parents=True, exist_ok=True)
    list15, list100 = output_dir / "yfcc15m.pkl", output_dir / "yfcc100m.pkl"
    with tempfile.TemporaryDirectory(prefix=".yfcc15m.", dir=output_dir) as folder:
        rows = RowFiles(Path(folder))
        atomic_write(list15, lambda file15: atomic_write(list100, lambda file100: write(file15, file100, rows)))
        rows.index(list15)
    return counts[0], counts[1]


def read_ids(path: Path) -> np.ndarray:
    """(YFCC_ROWS,) bool: which numbers the array lists. A hundredth of what a set of Python's integers takes."""
    refuse_lfs_pointer(path)
    try:
        numbers = np.load(path, "r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no array of image numbers: {error}") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {numbers.dtype} of shape {numbers.shape}, expected a row of whole numbers")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < YFCC_ROWS:
        raise ValueError(f"{path}: numbers must lie in 0..{YFCC_ROWS - 1}, found {numbers.min()}..{numbers.max()}")
    wanted = np.zeros(YFCC_ROWS, dtype=bool)
    wanted[numbers] = True
    return wanted


def read_subset(path: Path) -> np.ndarray:
    """(YFCC_ROWS,) bool: which numbers the subset's table has a row for."""
    refuse_lfs_pointer(path)
    wanted = np.zeros(YFCC_ROWS, dtype=bool)
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            wanted[row_number(line, path, line_number)] = True
    return wanted


def row_number(line: bytes, path: Path, line_number: int) -> int:
    """The image number that a line of a table begins with; ValueError names file and line."""
    text = line.partition(b"\t")[0].strip()
    if not text.isdigit() or len(text) > 8:
        raise ValueError(f"{path}, line {line_number}: {text[:40]!r} is not an image number of at most 8 digits")
    return int(text)


def wanted_rows(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, list[bytes]]]:
    """(number, [title, description]) of the table's wanted rows, with a progress bar over its bytes."""
    refuse_lfs_pointer(path)
    with (
        open(path, "rb") as file,
        progress(total=path.stat().st_size, desc=path.name, unit="B") as bar,
    ):
        for line_number, line in enumerate(file, 1):
            bar.update(len(line))
            number = row_number(line, path, line_number)
            if wanted[number]:
                fields = line.split(b"\t", 10)
                if len(fields) < 10:
                    raise ValueError(f"{path}, line {line_number}: {len(fields)} columns, expected 10 or more")
                yield number, fields[8:10]


def clean_caption(field: bytes) -> str:
    """URL-decoded text without anchors, bold and italic tags and URLs; a plus is a space, an encoded one too."""
    text = unquote(field.decode("utf-8", errors="replace").strip("\r\n")).replace("+", " ")
    return YFCC_URL.sub("", YFCC_HTML.sub("", text))


class PickledList:
    """A pickled list written item by item: `append` takes an item's opcodes; loads as pickle.dump's would."""

    BATCH = 1000  # items between two marks, as pickle itself writes lists

    def __init__(self, file: BinaryIO):
        self.file, self.count = file, 0

    def __enter__(self) -> PickledList:
        self.file.write(pickle.PROTO + bytes([2]) + pickle.EMPTY_LIST)
        return self

    def append(self, item: bytes) -> None:
        """One item, as its opcodes."""
        if self.count % self.BATCH == 0:
            self.file.write((pickle.APPENDS if self.count else b"") + pickle.MARK)
        self.file.write(item)
        self.count += 1

    def __exit__(self, *_error: object) -> None:
        self.file.write((pickle.APPENDS if self.count else b"") + pickle.STOP)


class RowFiles:
    """The rows of yfcc15m.pkl as three growing files in `folder`, which `index` joins to the reader's arrays."""

    ARRAYS = {"pictures": "<i4", "texts": "|u1", "text_offsets": "<i8"}

    def __init__(self, folder: Path):
        self.parts = {name: RawFile(folder / name, dtype) for name, dtype in self.ARRAYS.items()}
        self.length = 0  # of all texts, bytes

    def __enter__(self) -> RowFiles:
        self.images, self.texts, self.offsets = (open(part.path, "wb") for part in self.parts.values())
        self.offsets.write(struct.pack("<q", 0))
        return self

    def append(self, number: int, texts: list[str]) -> None:
        """One row: the image's number and its two texts."""
        self.images.write(struct.pack("<i", number))
        for text in texts:
            self.length += self.texts.write(text.encode("utf-8"))
            self.offsets.write(struct.pack("<q", self.length))

    def __exit__(self, *_error: object) -> None:
        for file in (self.images, self.texts, self.offsets):
            file.close()

    def index(self, metadata: Path) -> None:
        """Write the arrays beside the list, bound to its size and time, where the reader looks for them."""
        path, key = rows_index(metadata)
        first = np.array([0, 2], dtype=np.int64)  # two texts a row
        write_index(path, {"key": key, "dropped": 0, "log": []}, {**self.parts, "first": first})


def pickled_int(value: int) -> bytes:
    """Opcodes of a whole number of 32 bits."""
    return pickle.BININT + struct.pack("<i", value)


def pickled_str(text: str) -> bytes:
    """Opcodes of a text; half a surrogate pair is kept."""
    data = text.encode("utf-8", errors="surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
