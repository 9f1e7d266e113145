"""The index of a large source: its rows in one file, mapped into memory at the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from inputs.columns import Columns, Row, TextColumn
from runtime.integrity import SEAL, UNSEALED, check_seal, seal_file
from utils import replacing

log = logging.getLogger("medslip")
# One file of .npy arrays, mapped into memory, after a first one that holds JSON. It stays valid as long as
# the metadata keeps size and time; images that come or go later are not noticed: delete the file to index
# anew. Its version is the reader's.
ROWS_VERSION = 1  # of make_dataset.py's file of all rows


@dataclass
class RawFile:
    """An array that is too long for memory: its values one after the other in a file."""

    path: Path
    dtype: str


class Indexed(Protocol):
    """What an index asks of a reader."""

    root: Path
    split: str
    files: list[Path]
    index_version: int

    def columns(self) -> Columns:
        """The rows, read from the metadata."""
        ...

    def finder(self) -> Callable[[Row], bool]:
        """Whether a row's image is there."""
        ...


def rows_index(metadata: Path) -> tuple[Path, list]:
    """Where make_dataset.py puts all rows of the metadata, whether their images exist or not, and the key."""
    stat = metadata.stat()
    key = [ROWS_VERSION, "rows", stat.st_size, stat.st_mtime_ns]
    return metadata.with_name(f"{metadata.name}.rows"), key


def indexed_columns(reader: Indexed, cache_dir: str | Path) -> Columns:
    """The reader's columns from its index, which the first process to come here writes; the others wait.

    The index is a convenience: where it cannot be kept the metadata is read at every start, and the log says so.
    """
    files = [os.path.abspath(path) for path in reader.files]
    source = [reader.index_version, type(reader).__name__, reader.split, str(reader.root), *files]
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


def images_have_come(columns: Columns, reader: Indexed) -> bool:
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
    """Write the columns under `key`, which `load_index` compares."""
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
    described = np.frombuffer(json.dumps({SEAL: UNSEALED, **head, "arrays": list(arrays)}).encode(), dtype=np.uint8)
    with replacing(path) as file:
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
        seal_file(file)


def load_index(path: Path, key: list) -> Columns | None:
    """The columns, mapped into memory; None where no index belongs to this state of the metadata, or a damaged one."""
    if not path.is_file():
        return None
    try:
        check_seal(path)
    except ValueError as error:
        log.warning(f"{error}; the metadata is read again")
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
