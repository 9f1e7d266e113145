"""ROCO as it is to be had today, to ROCO's layout: the Hub's parquet folders and Zenodo's zips of ROCO v2.

    python make_dataset.py unpack --source roco-radiology --output roco
    python make_dataset.py unpack --source zenodo --output rocov2 --short-side 448

One image out of a parquet file costs the decompression of its whole row group, 100 or 1,000 images
(benchmarks/bench_parquet.py), so training in random order from such files is many times slower than from image files;
written out once, the set is an ordinary ROCO.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from flags.preparing import COLUMNS
from inputs.archives import open_zip, read_member
from inputs.conventions import SPLIT_OF, no_value
from inputs.files import IMAGE_SUFFIXES, composed, on_disk
from inputs.images import UnreadableImage, decode_image, read_bytes
from inputs.metadata import Table, inside
from preparation.processes import keep_settings
from preparation.shrink import check_short_side, encode, format_of, shrink
from runtime.limits import BYTES
from runtime.logs import progress
from utils import atomic_write, refuse_full, refuse_lfs_pointer, write_json

log = logging.getLogger("medslip")


def run(args: argparse.Namespace) -> None:
    """Unpack the download that the flags name."""
    columns = {role: name for role in COLUMNS if (name := getattr(args, f"{role}_column"))}
    unpack(args.source, args.output, args.short_side, columns, args.workers)


# ---------------------------------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A row of a download, whose image is read when it is asked for."""

    where: str  # for messages
    id: str
    caption: str
    data: Callable[[], bytes]  # FileNotFoundError, UnreadableImage
    further: int = 0  # captions of the row beside the one, for which ROCO's layout has no place


@dataclass(frozen=True)
class Source:
    """One file of samples, read as a stream."""

    split: str
    path: Path
    samples: Callable[[], Iterator[Sample]]


def find_sources(folder: Path, columns: dict[str, str]) -> list[Source]:
    """The parts of a download by split, in order.

    Raises:
        FileNotFoundError, ValueError: none there; a parquet file whose split nothing names.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--source {folder} is not a folder")
    found = []
    for path in sorted(folder.rglob("*.parquet")):
        split = split_of(path.relative_to(folder))
        if split is None:
            raise ValueError(f"{path}: no split in its name or folder; they begin with {', '.join(SPLIT_OF)}")
        found.append(Source(split, path, partial(parquet_samples, path, columns)))
    for split in sorted({part.split for part in found}):
        names = [name for part in found if part.split == split for name in parquet_names(part.path, columns)]
        if None in names or len(set(names)) < len(names):  # as where each part counts its images from 0
            found = [by_row(part, folder, columns) if part.split == split else part for part in found]
            log.info(f"{split}: images that have no names of their own are called by file and row")
    for path in sorted(folder.glob("*_captions.csv")):
        split = SPLIT_OF.get(path.name.removesuffix("_captions.csv"))
        if split is not None:
            found.append(Source(split, path, partial(zenodo_samples, path)))
    if not found:
        raise FileNotFoundError(f"{folder} holds neither parquet files nor <split>_captions.csv")
    return found


def by_row(part: Source, folder: Path, columns: dict[str, str]) -> Source:
    """The same parquet file with its rows that have no ids called by its path and their numbers."""
    place = "_".join(part.path.relative_to(folder).with_suffix("").parts)
    return replace(part, samples=partial(parquet_samples, part.path, columns, f"{place}_"))


def split_of(path: Path) -> str | None:
    """The split that a file's name or a folder's begins with, the nearest first; None where none does."""
    for part in reversed(path.parts):
        match = re.match(r"([a-z]+)(?:[-_.]|$)", part.lower())
        if match and match[1] in SPLIT_OF:
            return SPLIT_OF[match[1]]
    return None


def parquet_samples(path: Path, given: dict[str, str], called: str = "") -> Iterator[Sample]:
    """The rows of a parquet file, a row group in memory at a time; ImportError, ValueError as `open_parquet`.

    Args:
        called: what the id of a row without one begins with, its number following; "" for the name of its image.
    """
    file, column = open_parquet(path, given)
    for group in range(file.num_row_groups):
        BYTES.refuse(file.metadata.row_group(group).total_byte_size, f"{path}: row group {group}")
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=[name for name in column.values() if name]):
        for row in batch.to_pylist():
            where = f"{path} row {number}"
            image, caption = row[column["image"]], row[column["caption"]]
            id = row[column["id"]] if column["id"] else None
            if id is None:
                id = f"{called}{number}" if called else name_in(image["path"])
            texts = caption if isinstance(caption, list) else [caption]
            texts = [text for text in texts if text and not no_value(text)]  # a null or blank one hides no other
            read = partial(_bytes_of, image, where)
            yield Sample(where, str(id), (texts or [""])[0], read, further=max(len(texts) - 1, 0))
            number += 1


def parquet_names(path: Path, given: dict[str, str]) -> Iterator[str | None]:
    """The name of each row's image, None where it has none; of a file with a column of ids a None for each null."""
    file, column = open_parquet(path, given)
    if column["id"]:
        for batch in file.iter_batches(columns=[column["id"]]):
            yield from [None] * batch.column(0).null_count
        return
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    if f"{column['image']}.path" not in paths:
        yield from [None] * file.metadata.num_rows
        return
    for batch in file.iter_batches(columns=[f"{column['image']}.path"]):
        for row in batch.to_pylist():
            name = (row[column["image"]] or {}).get("path")
            yield name_in(name) if name else None


def name_in(path: str) -> str:
    """An image's name without its folder and ending; a UID, which holds dots, has none."""
    name = PurePath(path)
    return name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name


def open_parquet(path: Path, given: dict[str, str]) -> tuple[Any, dict[str, str | None]]:
    """A parquet file, and its columns of the roles in COLUMNS.

    Args:
        given: the columns of roles, where they are none of the usual.

    Raises:
        ImportError, ValueError: without pyarrow; no readable file; no such column, or one of another type.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading parquet files needs pyarrow: pip install pyarrow") from error
    refuse_lfs_pointer(path)
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises many kinds for a torn or foreign file
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    names = file.schema_arrow.names
    column = {}
    for role, choices in COLUMNS.items():
        wanted = [given[role]] if role in given else list(choices)
        column[role] = next((name for name in wanted if name in names), None)
        if column[role] is None and role != "id":
            raise ValueError(f"{path} has no column {' or '.join(wanted)}: name one of {', '.join(names)} with "
                             f"--{role}-column")  # fmt: skip
        if name := column[role]:
            refuse_type(path, role, name, file.schema_arrow.field(name).type)
    return file, column


def refuse_type(path: Path, role: str, name: str, kind: Any) -> None:
    """ValueError where a column of a parquet file cannot be what it is taken for, by its type of Arrow's."""
    from pyarrow import types

    def bare(kind: Any) -> Any:
        return kind.value_type if types.is_dictionary(kind) else kind

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)

    def is_text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    kind = bare(kind)
    several = bare(kind.value_type) if types.is_list(kind) or types.is_large_list(kind) else kind
    index = kind.get_field_index("bytes") if types.is_struct(kind) else -1
    fits = {
        "image": is_bytes(bare(kind.field(index).type if index >= 0 else kind)),
        "caption": is_text(several),
        "id": is_text(kind) or types.is_integer(kind),
    }
    wanted = {"image": "the images' bytes", "caption": "text", "id": "text or whole numbers"}
    if not fits[role]:
        held = "text" if is_text(kind) else "bytes" if is_bytes(kind) else str(kind)
        raise ValueError(
            f"{path}: the column {name!r} holds {held}, and not {wanted[role]}: name another by --{role}-column"
        )


def _bytes_of(image: Any, where: str) -> bytes:
    """Of the Hub's struct of bytes and path, or of bytes alone."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or not data:
        raise UnreadableImage(f"{where} holds no image bytes")
    return data


def zenodo_samples(captions: Path) -> Iterator[Sample]:
    """`<split>_captions.csv` with ID and Caption, beside `<split>_images.zip` or folders of the same names."""
    name = captions.name.removesuffix("_captions.csv")
    table = Table(captions)
    id, caption = table.column("id"), table.column("caption")
    archive_path = captions.with_name(f"{name}_images.zip")
    folders = [
        captions.with_name(f"{name}_images") / name,
        captions.with_name(f"{name}_images"),
        captions.with_name(name),
    ]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None and not archive_path.is_file():
        raise FileNotFoundError(f"no {archive_path.name} and no folder {name}_images beside {captions}")
    archive, members = None, {}
    if folder is None:
        archive = open_zip(archive_path)
        # By the file's own name: nothing is written to a path that an archive names.
        members = {composed(Path(member).stem): member for member in archive.namelist() if not member.endswith("/")}

    def read(key: str, where: str) -> bytes:
        if archive is None:
            assert folder is not None
            paths = (on_disk(folder / f"{key}{suffix}") for suffix in (".jpg", ".jpeg", ".png"))
            found = [path for path in paths if path.is_file()]
            if not found:
                raise FileNotFoundError(f"{where}: no image {folder / key}.jpg")
            return read_bytes(found[0])
        member = members.get(composed(key))
        if member is None:
            raise FileNotFoundError(f"{where}: no image {key} in {archive_path}")
        try:
            return read_member(archive, member)
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError) as error:
            raise UnreadableImage(f"{archive_path}/{member}: {error}") from error

    for where, fields in table:
        key = inside(fields[id].strip(), where)
        yield Sample(where, key, "" if no_value(fields[caption]) else fields[caption], partial(read, key, where))


# ---------------------------------------------------------------------------------------------------------------------
# The copy
# ---------------------------------------------------------------------------------------------------------------------


def unpack(
    source: Path, output: Path, short_side: int | None = None, columns: dict[str, str] | None = None, workers: int = 1
) -> dict[str, Counter]:
    """Write the copy; returns for each split how many images were written, there already, and unreadable.

    A source file is done when its part of the captions is: captions.txt of a split is written when all of its parts
    are, so a cut-off copy has none.

    Raises:
        FileNotFoundError, ValueError: as `find_sources`; an id with white space or a path in it; a copy of another
            source or size; at the end, a split without one image that can be read.
    """

    check_short_side(short_side)
    sources = find_sources(source, columns or {})
    for part in sources:  # columns and archives, before the first image is written
        next(part.samples(), None)
    if short_side is None and not output.is_dir():  # images are copied as they are
        needed = sum(part.path.stat().st_size for part in sources if part.path.suffix == ".parquet")
        refuse_full(output, needed, "the images")
    output.mkdir(parents=True, exist_ok=True)
    names = [str(part.path.relative_to(source)) for part in sources]
    settings = {"source": str(source.resolve()), "files": names, "short_side": short_side, "columns": columns or {}}
    keep_settings(output / "unpack.json", settings, "*/radiology/captions.txt")
    counts: dict[str, Counter] = {}
    unreadable: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    with progress(desc="unpacking", total=sum(map(rows_of, sources)), unit=" images") as bar:
        for part in sources:
            done = unpack_part(part, source, output, short_side, workers, bar)
            counts.setdefault(part.split, Counter()).update(done["counts"])
            unreadable.setdefault(part.split, []).extend(done["unreadable"])
            lines.setdefault(part.split, []).extend(done["lines"])
    for split, rows in lines.items():
        first: dict[str, str] = {}  # a published copy has a few ids twice; the image that was written is the first's
        for row in rows:
            first.setdefault(row.split("\t", 1)[0], row)
        if repeated := len(rows) - len(first):
            log.warning(f"{split}: {repeated} rows have an id that was there already, and are left out")
        rows = list(first.values())
        text = "".join(f"{row}\n" for row in rows).encode("utf-8", "surrogateescape")
        atomic_write(output / split / "radiology" / "captions.txt", lambda file, text=text: file.write(text))
        log.info(f"{split}: {len(rows):,} pairs; " + ", ".join(f"{n:,} {what}" for what, n in counts[split].items()))
    empty = [split for split, rows in lines.items() if not rows]
    bad = [line for split in unreadable.values() for line in split]
    if bad:
        text = "".join(f"{line}\n" for line in bad).encode("utf-8", "surrogateescape")
        atomic_write(output / "bad_samples.txt", lambda file: file.write(text))
        log.warning(f"{len(bad)} images cannot be decoded or are missing: see {output / 'bad_samples.txt'}")
    if empty:
        raise ValueError(f"{source} gave no pair of {', '.join(empty)}: no image of theirs can be read")
    return counts


def rows_of(part: Source) -> int:
    """Of its table, for the time that is left."""
    if part.path.suffix != ".parquet":
        return sum(1 for _ in Table(part.path))
    import pyarrow.parquet as parquet

    return parquet.read_metadata(part.path).num_rows


def unpack_part(
    part: Source, source: Path, output: Path, short_side: int | None, workers: int, bar: Any
) -> dict[str, Any]:
    """One source file; its record in OUTPUT/parts is read again where it is complete and its images are there."""
    folder = output / part.split / "radiology" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(part.path.relative_to(source)).encode()).hexdigest()[:16]
    record = output / "parts" / f"{part.split}-{name}.json"
    stat = part.path.stat()
    if record.is_file():
        kept = json.loads(record.read_text(encoding="utf8"))
        there = all((folder / f"{row.split(chr(9), 1)[0]}.jpg").is_file() for row in kept["lines"])
        if there and kept["size"] == stat.st_size:
            bar.update(len(kept["lines"]))
            return {**kept, "counts": {"there already": len(kept["lines"]), "unreadable": len(kept["unreadable"])}}
    found: dict[str, Any] = {"size": stat.st_size, "counts": Counter(), "lines": [], "unreadable": []}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        samples = part.samples()
        while batch := list(islice(samples, 64)):  # what is in memory at a time
            for sample in batch:
                if not sample.id or re.search(r"\s|[/\\]", sample.id) or sample.id in (".", ".."):
                    raise ValueError(f"{sample.where}: the id {sample.id!r} is no name for a file")
            for sample, outcome in write_batch(pool, partial(write_image, folder, short_side), batch):
                if outcome.startswith("unreadable"):
                    found["counts"]["unreadable"] += 1
                    found["unreadable"].append(f"{sample.where}\t{outcome.removeprefix('unreadable: ')}")
                    continue
                found["counts"][outcome] += 1
                if sample.further:
                    found["counts"]["further captions left out"] += sample.further
                found["lines"].append(f"{sample.id}\t {' '.join(sample.caption.split())}")
            bar.update(len(batch))
    record.parent.mkdir(exist_ok=True)
    write_json(record, found)
    return found


def write_batch(
    pool: ThreadPoolExecutor, write: Callable[[Sample], str], batch: Sequence[Sample]
) -> Iterator[tuple[Sample, str]]:
    """Each sample with what `write` says of it, in order. An id's later rows wait for its first, whose image counts."""
    seen: set[str] = set()
    waiting: list[Callable[[], str]] = []
    for sample in batch:
        waiting.append(partial(write, sample) if sample.id in seen else pool.submit(write, sample).result)
        seen.add(sample.id)
    for sample, outcome in zip(batch, waiting, strict=True):
        yield sample, outcome()


def write_image(folder: Path, short_side: int | None, sample: Sample) -> str:
    """Write a sample's image under its id; returns written, there already, or unreadable and why."""
    target = folder / f"{sample.id}.jpg"
    if target.is_file():  # whole, since it was written atomically
        return "there already"
    try:
        data = sample.data()
        img = decode_image(data, sample.where)
    except (UnreadableImage, FileNotFoundError) as error:
        return f"unreadable: {error}"
    if short_side and (small := shrink(img, short_side)):
        data = encode(small, "PNG" if format_of(data) == "PNG" else "JPEG")
    atomic_write(target, lambda file: file.write(data))
    return "written"
