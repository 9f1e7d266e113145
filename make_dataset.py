"""Turns downloads into what the readers want, by subcommand.

python make_dataset.py                  YFCC15M, from the three files of its README section in this folder
python make_dataset.py yfcc15m ...      the same with paths: yfcc15m.pkl and yfcc100m.pkl
python make_dataset.py cbis --root R    CBIS-DDSM: R/calc.csv and R/mass.csv, one lesion a row
python make_dataset.py shards ...       any dataset of main.py as tar shards, shrunk if you like
python make_dataset.py shrink ...       a copy of a folder of images, shrunk
python make_dataset.py unpack ...       ROCO's parquet folders or zips to ROCO's layout
python make_dataset.py check ...        counts of a finished download, and the images that cannot be decoded
python make_dataset.py audit ...        near duplicates within a set of images, or between two
python make_dataset.py demo --root R    a small synthetic radiology world in the ROCO and CBIS-DDSM layouts
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import Image

import audit
import check
import unpack
from cbis import CBIS_COLUMNS, make_cbis
from datasets import (
    READERS,
    RawFile,
    Reader,
    UnreadableImages,
    create_reader,
    rows_index,
    write_index,
)
from images import UnreadableImage, decode_image
from utils import HelpFormatter, Progress, atomic_write, run_script, start_logging, write_json

log = logging.getLogger("medslip")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(title="datasets", dest="command", required=True)
    add_yfcc_parser(commands)
    add_cbis_parser(commands)
    add_shards_parser(commands)
    add_shrink_parser(commands)
    unpack.add_parser(commands, add_workers_argument)
    audit.add_parser(commands, add_workers_argument)
    check.add_parser(commands, add_workers_argument)
    add_demo_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_args_parser().parse_args(argv or ["yfcc15m"])
    with start_logging():
        args.run(args)


# ---------------------------------------------------------------------------------------------------------------------
# YFCC15M: a list of wanted numbers and a table of 100 million rows -> pickled metadata
# ---------------------------------------------------------------------------------------------------------------------

YFCC_ROWS = 10**8  # numbers have at most 8 digits
YFCC_HTML = re.compile(r"<a.*?>|</a>|</?[bi]>")
YFCC_URL = re.compile(r"http\S+|www\S+")
YFCC_SOURCES = {
    "flickr_unique_ids.npy": "https://dl.fbaipublicfiles.com/deepcluster/flickr_unique_ids.npy",
    "yfcc100m_subset_data.tsv": "OpenAI's list, https://github.com/openai/CLIP/blob/main/data/yfcc100m.md",
    "yfcc100m_dataset.txt": "the core dataset, https://multimediacommons.wordpress.com/yfcc100m-core-dataset/, "
    "with the line number as its first column",
}


def add_yfcc_parser(commands) -> None:
    parser = commands.add_parser(
        "yfcc15m",
        help="collect the captions of YFCC15M",
        description="Reads YFCC100M's table line by line and writes two pickled lists: yfcc15m.pkl with (number, "
        "title, description) of the captioned images, yfcc100m.pkl with the numbers of all that were downloaded. "
        "yfcc15m.pkl.rows holds the first once more as arrays, from which main.py starts without unpickling.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--ids", type=Path, default=Path("flickr_unique_ids.npy"), help="numbers of the downloaded images"
    )
    parser.add_argument(
        "--subset",
        type=Path,
        default=Path("yfcc100m_subset_data.tsv"),
        help="OpenAI's list of captioned images, number first",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("yfcc100m_dataset.txt"),
        help="YFCC100M's table: number, title and description in columns 1, 9 and 10, URL-encoded",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="where the lists are written")
    parser.add_argument(
        "--root",
        type=Path,
        default=None,
        help="folder that holds images/: its archives are indexed now instead of at the first training run",
    )
    parser.set_defaults(run=run_yfcc)


def run_yfcc(args: argparse.Namespace) -> None:
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
    wanted = np.zeros(YFCC_ROWS, dtype=bool)
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            wanted[row_number(line, path, line_number)] = True
    return wanted


def row_number(line: bytes, path: Path, line_number: int) -> int:
    text = line.partition(b"\t")[0].strip()
    if not text.isdigit() or len(text) > 8:
        raise ValueError(f"{path}, line {line_number}: {text[:40]!r} is not an image number of at most 8 digits")
    return int(text)


def wanted_rows(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, list[bytes]]]:
    """(number, [title, description]) of the table's wanted rows, with a progress bar over its bytes."""
    with (
        open(path, "rb") as file,
        Progress(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar,
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
    return pickle.BININT + struct.pack("<i", value)


def pickled_str(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


# ---------------------------------------------------------------------------------------------------------------------
# CBIS-DDSM: four case tables and a tree of series folders -> one table of lesions for each abnormality type; cbis.py
# ---------------------------------------------------------------------------------------------------------------------


def add_cbis_parser(commands) -> None:
    parser = commands.add_parser(
        "cbis",
        help="join CBIS-DDSM's case tables with its images",
        description="Joins the four case tables of CBIS-DDSM with the images of its JPEG edition (csv/ and "
        "jpeg/) or DICOM edition (CBIS-DDSM/ and metadata.csv) and writes calc.csv and mass.csv into --root: "
        f"one row a lesion with the columns {', '.join(CBIS_COLUMNS)}. The last three are paths relative to "
        "--root, empty where no image was found; those rows are named. Behind them stand what the radiologist noted "
        "(density, assessment, subtlety, descriptors) and the crop's size in pixels.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder of the download; the case tables lie in it or in its csv/",
    )
    parser.add_argument(
        "--val-folds",
        type=int,
        default=5,
        help="one part in this many of the training table's patients becomes the validation split",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws the validation patients; keep it for results that are to be compared",
    )
    parser.add_argument(
        "--merge-types",
        action="store_true",
        help="write both types into both.csv instead. Refused when a patient of one type's training table is "
        "in the other's test table, as 31 are in the published tables",
    )
    parser.set_defaults(run=run_cbis)


def run_cbis(args: argparse.Namespace) -> None:
    make_cbis(args.root, args.val_folds, args.seed, args.merge_types)


# ---------------------------------------------------------------------------------------------------------------------
# Shrunk images
# ---------------------------------------------------------------------------------------------------------------------

JPEG_QUALITY = 95
EXTENSIONS = {  # Pillow's name of a format that --dataset webdataset reads -> the extension in a shard
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp",
}  # fmt: skip


def shrink(img: Image.Image, short_side: int) -> Image.Image | None:
    """The image with this many pixels along its short side, antialiased; None where it has no more already."""
    scale = short_side / min(img.size)
    if scale >= 1:
        return None
    width, height = (max(short_side, round(side * scale)) for side in img.size)
    return img.resize((width, height), Image.Resampling.LANCZOS)


def encode(img: Image.Image, file_format: str) -> bytes:
    """An RGB image as a PNG or JPEG file, in one channel where all three are equal."""
    red, green, blue = (channel.tobytes() for channel in img.split())
    img = img.convert("L") if red == green == blue else img
    buffer = io.BytesIO()
    img.save(buffer, file_format, **({"quality": JPEG_QUALITY} if file_format == "JPEG" else {}))
    return buffer.getvalue()


def format_of(data: bytes) -> str:
    """Pillow's name for the format of an image that can be decoded; the file's name may say another."""
    with Image.open(io.BytesIO(data)) as img:
        return img.format or ""


@contextmanager
def over_processes(workers: int, shared: object, chunk: int = 1) -> Iterator[Callable]:
    """A `map` over this many processes, in each of which `_shared` is the given object; one works in this process.

    A process takes `chunk` items at a time.
    """
    if workers < 2:
        _share(shared)
        yield map
        return
    # Forked where the system can: a reader of many million rows is then inherited, not sent.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _share, (shared,)) as pool:
        yield partial(pool.map, chunksize=chunk)


_shared: Any = None


def _share(shared: object) -> None:
    global _shared
    _shared = shared


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j",
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; about one for each CPU core it may use",
    )


def check_short_side(short_side: int | None) -> None:
    if short_side is not None and short_side < 1:
        raise ValueError(f"--short-side {short_side}: give at least 1 pixel")


def keep_settings(path: Path, settings: dict, output: str) -> None:
    """Note the settings of what fills a folder with `output`; ValueError if it was begun with others."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path.parent} was begun with {name} {before.get(name)!r}, not {value!r}: choose another folder"
                )
    elif any(path.parent.glob(output)):
        raise ValueError(f"{path.parent} is not empty and not begun by this command: choose another folder")
    else:
        write_json(path, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Shards: any reader of main.py -> tar archives of key.jpg, key.txt and key.json
# ---------------------------------------------------------------------------------------------------------------------


def add_shards_parser(commands) -> None:
    parser = commands.add_parser(
        "shards",
        help="write any dataset of main.py as tar shards",
        description="Writes a dataset's images and captions as WebDataset shards in img2dataset's form: samples "
        "key.jpg, key.txt (its first caption) and key.json (all captions), in OUTPUT/00000.tar and so on, for "
        "--dataset webdataset. An image that is not shrunk is copied byte for byte; one that cannot be decoded is "
        "skipped and named in OUTPUT/bad_samples.txt. Run again after an interruption, it writes the shards that "
        "are missing.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--dataset", required=True, choices=list(READERS), help="which reader, as for main.py")
    parser.add_argument("--root", required=True, help="folder of the dataset, as for main.py")
    parser.add_argument("--metadata", default="", help="file of captions where the layout does not fix it")
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards; one for each split")
    parser.add_argument("--shard-size", type=int, default=5000, help="images in a shard; 1,000 to 10,000 are usual")
    parser.add_argument(
        "--short-side",
        type=int,
        default=None,
        metavar="PIXELS",
        help="shrink larger images to this short side, as JPEG of quality 95 (PNG stays PNG); twice the training "
        "size, 448, keeps what crops need. Default: copy",
    )
    add_workers_argument(parser)
    parser.set_defaults(run=run_shards)


def run_shards(args: argparse.Namespace) -> None:
    reader = create_reader(args.dataset, args.root, args.metadata, args.split)
    log.info("\n".join(reader.log))
    make_shards(reader, args.output, args.shard_size, args.short_side, args.workers)


@dataclass(frozen=True)
class Shards:
    """What the processes that write shards share."""

    reader: Reader
    output: Path
    size: int
    short_side: int | None
    unreadable: UnreadableImages

    def path(self, number: int) -> Path:
        return self.output / f"{number:05d}.tar"

    def rows(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, len(self.reader)))


def make_shards(
    reader: Reader, output: str | Path, shard_size: int = 5000, short_side: int | None = None, workers: int = 1
) -> int:
    """Writes the reader's pairs as shards, each complete or not there; returns how many images were skipped.

    Raises ImportError without webdataset, ValueError for a folder that holds other shards.
    """
    tar_writer()
    check_short_side(short_side)
    if shard_size < 1:
        raise ValueError(f"--shard-size {shard_size}: give at least 1 image")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {"reader": type(reader).__name__, "root": str(reader.root), "metadata": str(reader.files[0])}
    settings |= {"split": reader.split, "pairs": len(reader), "shard_size": shard_size, "short_side": short_side}
    keep_settings(output / "shards.json", settings, "*.tar")
    unreadable = UnreadableImages(output / "bad_samples.txt", limit=math.inf)
    shards = Shards(reader, output, shard_size, short_side, unreadable)
    numbers = range(math.ceil(len(reader) / shard_size))
    missing = [number for number in numbers if not shards.path(number).is_file()]
    with over_processes(workers, shards) as each, Progress(desc="writing", total=len(reader), unit=" images") as bar:
        bar.update(len(reader) - sum(len(shards.rows(number)) for number in missing))
        for count in each(write_shard, missing):
            bar.update(count)
    skipped = len(unreadable.path.read_bytes().splitlines()) if unreadable.path.is_file() else 0
    log.info(f"{output}: {len(numbers)} shards of up to {shard_size} images, {len(missing)} of them written now")
    if skipped:
        log.info(f"{skipped} images cannot be decoded and were skipped: see {unreadable.path}")
    return skipped


def write_shard(number: int) -> int:
    """Write one shard of the shared Shards; returns how many of the reader's images it covers."""
    shards: Shards = _shared
    rows, reader = shards.rows(number), shards.reader

    def write(file: BinaryIO) -> None:
        with tar_writer()(file, encoder=False, mtime=0) as tar:
            for i in rows:
                name, captions, key = reader.name(i), reader.captions(i), f"{i:09d}"
                try:
                    image, extension = pack(reader, i, shards.short_side)
                except (UnreadableImage, FileNotFoundError) as error:
                    shards.unreadable.add(name, str(error))
                    continue
                about = {"key": key, "name": name.removeprefix(f"{reader.root}/"), "captions": captions}
                about = json.dumps(about, ensure_ascii=False)
                tar.write({"__key__": key, extension: image, "txt": captions[0].encode(), "json": about.encode()})

    atomic_write(shards.path(number), write)
    return len(rows)


def pack(reader: Reader, i: int, short_side: int | None) -> tuple[bytes, str]:
    """An image's bytes for a shard and their extension; raises as `Reader.image` does."""
    img = reader.image(i)
    data = reader.data(i)
    file_format = "" if reader.name(i).lower().endswith(".dcm") else format_of(data)
    if short_side and (small := shrink(img, short_side)):
        return (encode(small, "PNG"), "png") if file_format == "PNG" else (encode(small, "JPEG"), "jpg")
    if file_format in EXTENSIONS:
        return data, EXTENSIONS[file_format]
    return encode(img, "PNG"), "png"


def tar_writer() -> type:
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise ImportError("writing shards needs webdataset: pip install webdataset") from error
    return TarWriter


# ---------------------------------------------------------------------------------------------------------------------
# Shrink: a folder of images -> the same folder with smaller images
# ---------------------------------------------------------------------------------------------------------------------


def add_shrink_parser(commands) -> None:
    parser = commands.add_parser(
        "shrink",
        help="copy a folder with its images shrunk",
        description="Copies a folder tree; JPEG and PNG files whose short side is longer than --short-side are shrunk "
        "to it (JPEG quality 95; more than 8 bits are windowed as in training), all other files are copied as they "
        "are, so that readers find the layout they know. Images inside zip or tar archives are not touched: for "
        "those there is `shards`. Run again after an interruption, it continues.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to copy")
    parser.add_argument("--output", type=Path, required=True, help="the copy; outside --root")
    parser.add_argument(
        "--short-side",
        type=int,
        default=448,
        metavar="PIXELS",
        help="448 is twice the usual training size, which leaves room for crops",
    )
    add_workers_argument(parser)
    parser.set_defaults(run=run_shrink)


def run_shrink(args: argparse.Namespace) -> None:
    shrink_tree(args.root, args.output, args.short_side, args.workers)


def shrink_tree(root: str | Path, output: str | Path, short_side: int = 448, workers: int = 1) -> Counter:
    """Copies the tree with its images shrunk; returns how many files were shrunk, copied, unreadable or there already.

    An unreadable image is copied as it is and named in bad_samples.txt. Raises FileNotFoundError for an absent root and
    ValueError for an output inside it or of another command.
    """
    root, output = Path(os.path.realpath(root)), Path(os.path.realpath(output))
    check_short_side(short_side)
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder")
    if output.is_relative_to(root) or root.is_relative_to(output):
        raise ValueError(f"--output {output} and --root {root} lie in each other: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(output / "shrink.json", {"root": str(root), "short_side": short_side}, "*")
    unreadable = UnreadableImages(output / "bad_samples.txt", limit=math.inf)
    counts: Counter = Counter()
    paths = (path for path in walk_files(root) if path not in ("shrink.json", "bad_samples.txt"))  # of an earlier copy
    with (
        over_processes(workers, (root, output, short_side, unreadable), chunk=16) as each,
        Progress(desc="shrinking", unit=" files") as bar,
    ):
        while batch := list(islice(paths, 4096)):  # a pool's map takes in all that it is given
            for outcome in each(shrink_file, batch):
                counts[outcome] += 1
                bar.update()
    outcomes = (f"{counts[outcome]:,} {outcome}" for outcome in SHRINK_OUTCOMES if counts[outcome])
    log.info(", ".join(outcomes) or "no files")
    if counts["unreadable"]:
        log.info(f"{unreadable.path} names the images that cannot be decoded; they were copied as they are")
    return counts


SHRINK_OUTCOMES = ("shrunk", "copied", "unreadable", "there already")
SHRUNK_SUFFIXES = (".jpg", ".jpeg", ".png")


def walk_files(root: Path) -> Iterator[str]:
    """Paths, relative to the root, of all files below it; linked folders are entered, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in sorted(names))


def shrink_file(name: str) -> str:
    """Copy one file of the shared root to the shared output; returns one of SHRINK_OUTCOMES."""
    root, output, short_side, unreadable = _shared
    source, target = root / name, output / name
    stat = source.stat()
    if target.is_file() and target.stat().st_mtime_ns == stat.st_mtime_ns:
        return "there already"
    target.parent.mkdir(parents=True, exist_ok=True)
    outcome, data = "copied", None
    if source.suffix.lower() in SHRUNK_SUFFIXES:
        data = source.read_bytes()
        try:
            if small := shrink(decode_image(data, str(source)), short_side):
                outcome, data = "shrunk", encode(small, "PNG" if format_of(data) == "PNG" else "JPEG")
        except UnreadableImage as error:
            unreadable.add(str(source), str(error))
            outcome = "unreadable"
    if data is None:
        with open(source, "rb") as file:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 20))
    else:
        atomic_write(target, lambda copy: copy.write(data))
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # last: marks the copy as complete
    return outcome


# ---------------------------------------------------------------------------------------------------------------------
# Demo: the synthetic world of synthetic/
# ---------------------------------------------------------------------------------------------------------------------


def add_demo_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="draw a small SYNTHETIC radiology world",
        description="Draws mammogram-like and other radiology-like phantoms with captions: --root/roco in the "
        "layout of ROCO v1, --root/cbis in that of CBIS-DDSM with its lesion tables. All of it is synthetic; "
        "results on it say nothing about patients.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder to draw into; a finished one of equal settings is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other patients")
    parser.add_argument("--pairs", type=int, default=6000, help="training pairs of the ROCO part")
    parser.add_argument("--size", type=int, default=64, help="pixels along the short side of an image")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; the result is the same")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    from synthetic.world import make_demo  # which needs none of the above, nor the above it

    make_demo(args.root, args.seed, args.pairs, size=args.size, workers=args.workers)
    make_cbis(args.root / "cbis")


if __name__ == "__main__":
    run_script(main)
