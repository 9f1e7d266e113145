"""Any source of main.py as tar shards of key.jpg, key.txt and key.json."""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from datasets import UnreadableImages, create_reader
from inputs.columns import PairColumns
from inputs.dicom import is_dicom
from inputs.display import DISPLAY, Display
from inputs.images import UnreadableImage, decode_image
from inputs.reader import Reader
from preparation.processes import keep_settings, over_processes, say_room
from preparation.shrink import check_short_side, encode, format_of, shrink
from runtime.logs import progress
from utils import atomic_write

log = logging.getLogger("medslip")
EXTENSIONS = {  # Pillow's name of a format that --dataset webdataset reads -> the extension in a shard
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp",
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Open the source and write its shards."""
    named = PairColumns(args.image_column, tuple(args.caption_columns))
    reader = create_reader(args.dataset, args.root, args.metadata, args.split, named=named)
    log.info("\n".join(reader.log))
    make_shards(reader, args.output, args.shard_size, args.short_side, args.workers, args.frame)


@dataclass(frozen=True)
class Shards:
    """What the processes that write shards share."""

    reader: Reader
    output: Path
    size: int
    short_side: int | None
    unreadable: UnreadableImages
    display: Display = DISPLAY

    def path(self, number: int) -> Path:
        """Of shard `number`."""
        return self.output / f"{number:05d}.tar"

    def rows(self, number: int) -> range:
        """The reader's images that shard `number` covers."""
        return range(number * self.size, min((number + 1) * self.size, len(self.reader)))


def make_shards(
    reader: Reader,
    output: str | Path,
    shard_size: int = 5000,
    short_side: int | None = None,
    workers: int = 1,
    frame: int | str = "first",
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
    settings |= {} if frame == "first" else {"frame": frame}
    settings |= {"held_out_by": reader.held_out_by} if reader.held_out_by else {}
    settings |= {"image_column": reader.named.image} if reader.named.image else {}
    settings |= {"caption_columns": list(reader.named.captions)} if reader.named.captions else {}
    keep_settings(output / "shards.json", settings, "*.tar")
    unreadable = UnreadableImages(output / "bad_samples.txt", limit=math.inf)
    shards = Shards(reader, output, shard_size, short_side, unreadable, Display(frame))
    numbers = range(math.ceil(len(reader) / shard_size))
    missing = [number for number in numbers if not shards.path(number).is_file()]
    there = len(reader) - sum(len(shards.rows(number)) for number in missing)
    named = (reader.name(i) for number in missing for i in shards.rows(number))  # of an archive's members no file
    say_room(output, named, copied=short_side is None and frame == "first")
    with (
        over_processes(workers, shards) as each,
        progress(desc="writing", total=len(reader), initial=there, unit=" images") as bar,
    ):
        for count in each(write_shard, missing):
            bar.update(count)
    skipped = len(unreadable.path.read_bytes().splitlines()) if unreadable.path.is_file() else 0
    log.info(f"{output}: {len(numbers)} shards of up to {shard_size} images, {len(missing)} of them written now")
    if skipped:
        log.info(f"{skipped} images cannot be decoded and were skipped: see {unreadable.path}")
    return skipped


def write_shard(shards: Shards, number: int) -> int:
    """Write one shard; returns how many of the reader's images it covers."""
    rows, reader = shards.rows(number), shards.reader

    def write(file: BinaryIO) -> None:
        with tar_writer()(file, encoder=False, mtime=0) as tar:
            for i in rows:
                name, captions, key = reader.name(i), reader.captions(i), f"{i:09d}"
                try:
                    image, extension = pack(reader, i, shards.short_side, shards.display)
                except (UnreadableImage, FileNotFoundError) as error:
                    shards.unreadable.add(name, str(error))
                    continue
                about = {"key": key, "name": name.removeprefix(f"{reader.root}/"), "captions": captions}
                about = json.dumps(about, ensure_ascii=False)
                tar.write({"__key__": key, extension: image, "txt": captions[0].encode(), "json": about.encode()})

    atomic_write(shards.path(number), write)
    return len(rows)


def pack(reader: Reader, i: int, short_side: int | None, display: Display = DISPLAY) -> tuple[bytes, str]:
    """An image's bytes for a shard and their extension; raises as `Reader.image` does."""
    data = reader.data(i)
    img = decode_image(data, reader.name(i), display)
    file_format = "DICOM" if is_dicom(data, reader.name(i)) else format_of(data)
    if short_side and (small := shrink(img, short_side)):
        return (encode(small, "PNG"), "png") if file_format == "PNG" else (encode(small, "JPEG"), "jpg")
    if file_format in EXTENSIONS and (display == DISPLAY or file_format != "TIFF"):
        return data, EXTENSIONS[file_format]
    return encode(img, "PNG"), "png"


def tar_writer() -> type:
    """webdataset's writer of tar archives; ImportError says what to install."""
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise ImportError("writing shards needs webdataset: pip install webdataset") from error
    return TarWriter
