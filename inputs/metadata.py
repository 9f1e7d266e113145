"""Metadata files that others wrote, read without running what they may hold, and without guessing what they mean.

Tables are refused where a row is not what the header says. A pickle is a program: `read_pickle` executes only those
that build plain values and numpy arrays, and even these never reach numpy: its own functions would take addresses from
the file (an object array over given bytes is a list of pointers), so stand-ins below collect what the pickle states.
`iter_json` reads long JSON lists piece by piece, `JsonLines` a table of one JSON object a line. No path leaves its root
(`inside`).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TextIO

import numpy as np

import utils
from inputs.conventions import column_key
from inputs.workbook import Workbook
from runtime.limits import memory_for
from runtime.logs import progress


class RefusedPickle(ValueError):
    """A pickle that asks for more than plain values; the message names what it asks for."""


def inside(path: str, where: str) -> str:
    """`path` if it cannot leave the folder that it is relative to; else ValueError naming the row."""
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path and ".." in path.split("/"):
        raise ValueError(f"{where}: the path {path!r} may leave the data root ('/' first, '..', '\\')")
    return path


def plain_path(path: str) -> str:
    """A path without `./` and doubled slashes, to compare it; `..` stays, and an empty one is empty."""
    if "//" in path or "./" in path or path.endswith(("/", ".")):  # else it is plain: seldom is a table's path not
        return str(PurePosixPath(path))
    return path


def fields_of(item: object, where: str, **types: type | tuple[type, ...]) -> list:
    """The named fields of a dict; ValueError names the row and a field absent or of another type."""
    for name, kind in types.items():
        if not isinstance(item, dict) or not isinstance(item.get(name), kind):
            raise ValueError(f"{where} has no proper field {name!r}: {str(item)[:80]}")
    return [item[name] for name in types] if isinstance(item, dict) else []


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


csv.field_size_limit((1 << 31) - 1)  # a contour in run lengths passes 128 KiB, Python's own limit for a cell


class Table:
    """A CSV or TSV file in UTF-8 whose first row names the columns; iterating yields (where, fields).

    A line `sep=;` before the header, which Excel writes and reads, names the delimiter. Rows of blanks are left out.

    Raises:
        ValueError: naming file and line, for another encoding, a row that has not as many fields as the header, or a
            quotation mark that is never closed.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            try:
                header = _first_row(file)
                named = re.fullmatch(r'"?sep=([\t,;|])"?', header.strip(" \r\n"))
                header = _first_row(file) if named else header
            except UnicodeDecodeError as error:
                raise ValueError(self._not_utf8("in its first lines", error)) from error
        self.before = 2 if named else 1  # rows that hold no values
        bare = re.sub(r'"[^"]*"', "", header)  # a quoted name may hold a delimiter
        self.delimiter = named[1] if named else max("\t", ",", ";", key=bare.count)
        fields = next(csv.reader(io.StringIO(header, newline=""), delimiter=self.delimiter), [])
        self.names = [name.strip() for name in fields]  # as they are written
        self.header = [name.lower() for name in self.names]

    def _open(self) -> TextIO:
        utils.refuse_lfs_pointer(self.path)
        with open(self.path, "rb") as file:
            start = file.read(4096)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
            raise ValueError(
                f"{self.path} is in another encoding than UTF-8 (UTF-16, as spreadsheets call Unicode text, or no text "
                "at all): save it as CSV in UTF-8"
            )
        return open(self.path, encoding="utf-8-sig", newline="")

    def _not_utf8(self, place: str, error: UnicodeDecodeError) -> str:
        return f"{self.path} is not in the encoding UTF-8 {place} ({error}): save it as CSV in UTF-8"

    def column(self, *names: str) -> int:
        """Position of the first of `names` that the header holds, in any case; ValueError for none, or several.

        A name that the header lacks is also found with blanks, dots or hyphens in place of its `_`.
        """
        return find_column(self.path, self.header, names)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        with self._open() as file:
            rows = csv.reader(file, delimiter=self.delimiter, strict=True)
            try:
                for _ in range(self.before):
                    next(rows, None)
                for fields in rows:
                    if not any(map(str.strip, fields)):
                        continue
                    where = f"{self.path} line {rows.line_num}"
                    if len(fields) != len(self.header):
                        raise ValueError(
                            f"{where} has {len(fields)} fields, the header {len(self.header)}: a text that holds the "
                            f"separator {self.delimiter!r} has to be in quotation marks"
                        )
                    if self.delimiter == "\t" and any("\n" in field for field in fields):
                        raise ValueError(
                            f"{where} ends a quoted field of several lines: a tab-separated table with a "
                            "stray quotation mark; write the table as CSV, or remove the mark"
                        )
                    yield where, fields
            except csv.Error as error:
                why = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
                raise ValueError(f"{self.path} line {rows.line_num}: {why}") from error
            except UnicodeDecodeError as error:
                raise ValueError(self._not_utf8(f"after line {rows.line_num}", error)) from error


class JsonLines:
    """A file with a JSON object on each line, read as a `Table`: the columns are the keys of all lines.

    A key that a line lacks, or that holds null, is an empty cell. Blank lines are left out.

    Raises:
        ValueError: naming file and line, for what is no JSON object in UTF-8, a key that is there twice, or a list or
            an object in a column that `column` was asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        utils.refuse_lfs_pointer(path)
        names = dict.fromkeys(name for _, item in progress(self._objects(), path.name, unit=" lines") for name in item)
        self.names = list(names)
        self.header = [name.strip().lower() for name in self.names]
        self.asked: list[int] = []

    def column(self, *names: str) -> int:
        """As of a `Table`."""
        self.asked.append(find_column(self.path, self.header, names))
        return self.asked[-1]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        for where, item in self._objects():
            fields = [""] * len(self.names)
            for column in self.asked:
                value = item.get(self.names[column])
                if isinstance(value, list | dict):
                    raise ValueError(
                        f"{where}: {self.names[column]!r} holds no text but a "
                        f"{'list' if isinstance(value, list) else 'JSON object'}: {str(value)[:80]}"
                    )
                fields[column] = "" if value is None else str(value)
            yield where, fields

    def _objects(self) -> Iterator[tuple[str, dict]]:
        with open(self.path, "rb") as file:  # text mode knows no line of what is not UTF-8
            for number, line in enumerate(file, 1):
                where = f"{self.path} line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    item = json.loads(text, object_pairs_hook=_once) if text else None
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8: {error}") from error
                except json.JSONDecodeError as error:  # whose own text speaks of a line 1
                    raise ValueError(f"{where} is no JSON: {error.msg}, character {error.pos + 1}") from error
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is no JSON: {error}: {text[:80]}") from error
                if isinstance(item, dict):
                    yield where, item
                elif text:
                    raise ValueError(f"{where} is no JSON object, as each line has to be: {text[:80]}")


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError for a key that is there twice, of which Python keeps the last."""
    item = dict(pairs)
    if len(item) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} more than once")
    return item


def table_or_workbook(path: Path) -> Table | Workbook:
    """By its name: a workbook where it ends in .xlsx, else CSV or TSV."""
    return Workbook(path) if path.suffix.lower() == ".xlsx" else Table(path)


def open_table(path: Path) -> Table | JsonLines:
    """A table by its name: JSON lines where it ends in .jsonl, .ndjson or .json, else CSV or TSV."""
    return JsonLines(path) if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else Table(path)


def _first_row(file: TextIO) -> str:
    """The first row of a table: one line, or the lines of a quoted name with line breaks."""
    lines = [file.readline()]
    open_quote = lines[0].count('"') % 2
    while open_quote and (line := file.readline()):
        lines.append(line)
        open_quote ^= line.count('"') % 2
    return lines[0] if open_quote else "".join(lines)  # a mark that nothing closes belongs to a name


def find_column(path: Path, header: list[str], names: Iterable[str]) -> int:
    """As `Table.column` finds it in a header in lower case."""
    for name in names:
        for spelled, wanted in ((header, name.strip().lower()), (list(map(column_key, header)), column_key(name))):
            if wanted in spelled:
                refuse_twice(path, spelled, wanted)
                return spelled.index(wanted)
    raise ValueError(f"{path} has no column {' or '.join(names)}; its columns: {', '.join(header)}")


def refuse_twice(path: Path, header: list[str], name: str) -> None:
    """ValueError for a column that is there more than once, as in two tables joined in a spreadsheet."""
    if header.count(name) > 1:
        raise ValueError(f"{path} has the column {name!r} more than once, and nothing says which one counts")


def column_name(name: str) -> str:
    """A column's name in lower case, with `_` for blanks and line breaks."""
    return "_".join(name.lower().split())


def read_table(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """All rows of a table by the names of its columns, spelled as `column_name` does; every cell stripped.

    Raises:
        ImportError, ValueError: as `Table` and `Workbook`; a column of `required` is missing, or any is there twice.
    """
    table = table_or_workbook(path)
    names = [column_name(name) for name in table.header]
    for name in filter(None, names):
        refuse_twice(path, names, name)
    if missing := [name for name in required if name not in names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(names)}")
    rows = progress(table, path.name, unit=" rows")
    return [dict(zip(names, map(str.strip, fields), strict=True)) for _, fields in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Pickles
# ---------------------------------------------------------------------------------------------------------------------


class _Dtype:
    """For numpy.dtype: type code and byte order of numbers and strings."""

    def __init__(self, code: str, *_flags: bool):
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def values(self, data: bytes) -> list:
        if self.order not in ("|", "<", ">", "=") or not re.fullmatch(r"[biufSU]\d{1,4}", self.code):
            raise RefusedPickle(f"an array of type {self.order!r} {self.code!r}")
        return np.frombuffer(data, dtype=self.order.replace("|", "") + self.code).tolist()


class _Array(list):
    """For numpy.ndarray and the function that restores one: a one-dimensional array becomes a list."""

    def __init__(self, *_arguments: object):
        super().__init__()

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, _fortran, data = state
        if len(shape) != 1:
            raise RefusedPickle(f"an array of shape {shape}")
        self.extend(data if isinstance(data, list) else dtype.values(data))


class _Scalar:
    """For the function that restores a numpy number: a plain one."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> object:
        return dtype.values(data)[0]

    def __setstate__(self, state: object) -> None:
        raise RefusedPickle("a number with a state")


_STAND_INS = {"_reconstruct": _Array, "ndarray": _Array, "dtype": _Dtype, "scalar": _Scalar}
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if module not in _MODULES or name not in _STAND_INS:
            raise RefusedPickle(f"{module}.{name}")
        return _STAND_INS[name]


def read_pickle(path: str | Path) -> object:
    """The plain values in a `.pkl` or `.npy` file; arrays, of one dimension, come as lists.

    Raises RefusedPickle, naming it, for anything else that the file asks for, and ValueError for a damaged
    file.
    """
    utils.refuse_lfs_pointer(path)
    with open(path, "rb") as file, memory_for(path):
        try:
            if file.peek(6)[:6] == np.lib.format.MAGIC_PREFIX:
                return _read_npy(file)
            return _PlainUnpickler(file).load()
        except MemoryError:
            raise
        except RefusedPickle as error:
            raise RefusedPickle(f"{path} asks for {error}, not for plain values") from error
        except Exception as error:  # the unpickler raises any kind on damaged files
            raise ValueError(f"{path} is no readable pickle or .npy file: {error}") from error


def _read_npy(file: BinaryIO) -> list:
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    _shape, _fortran, dtype = formats[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        return _PlainUnpickler(file).load()
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------


def iter_json(path: str | Path, key: str = "", optional: bool = False) -> Iterator[object]:
    """The elements of a long JSON list, one by one: the file's own, or the one under `key` of its object.

    Memory holds one element and the other values of the object. Raises ValueError, naming file and byte,
    where the file is damaged or holds no such list.

    Args:
        optional: the list under `key` may be lacking, which gives no elements; the file's own does not stand in for it.
    """
    utils.refuse_lfs_pointer(path)
    with open(path, encoding="utf-8-sig") as file:
        stream = _JsonStream(file)
        try:
            if stream.take("[{") == "{":
                while True:
                    name = stream.value()
                    stream.take(":")
                    if name == key and stream.look() == "[":
                        stream.take("[")
                        break
                    stream.value()
                    if stream.take(",}") == "}":
                        if optional:
                            return
                        raise ValueError(f"no list {key!r}")
            elif optional:
                return
            if stream.look() == "]":
                return
            while True:
                yield stream.value()
                if stream.take(",]") == "]":
                    return
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} near character {stream.done + stream.at}: {error}") from error


class _JsonStream:
    """JSON values and punctuation from a text file that is read in pieces."""

    PIECE = 1 << 20  # characters

    def __init__(self, file):
        self.file, self.text, self.at, self.done, self.ended = file, "", 0, 0, False
        self.decode = json.JSONDecoder().raw_decode

    def _more(self, size: int) -> None:
        piece = self.file.read(size)
        self.ended = not piece
        self.done += self.at
        self.text, self.at = self.text[self.at :] + piece, 0

    def look(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._more(self.PIECE)

    def take(self, choices: str) -> str:
        found = self.look()
        if not found or found not in choices:
            raise ValueError(f"expected {' or '.join(choices)}, found {found or 'the end of the file'!r}")
        self.at += 1
        return found

    def value(self) -> object:
        self.look()
        size = self.PIECE
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number at the very end of a piece may go on
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
            self._more(size)
            size *= 2  # a value of n characters is tried O(log n) times
