"""The first sheet of an Excel workbook as a table, as publishers ship some (CMMD's clinical data); needs openpyxl."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from inputs.conventions import whole_number
from runtime.limits import BYTES
from utils import refuse_lfs_pointer


class Workbook:
    """An .xlsx file whose first sheet has the columns' names in its first row, read as metadata.Table reads a CSV.

    Cells are the values that were stored, a formula's its last one: whole numbers without a point, dates as ISO 8601
    has them. Rows and columns of blanks are left out.

    Raises:
        ImportError: without openpyxl.
        ValueError: naming the file, which is no workbook, unpacks to more than the limit, or has no such sheet.
    """

    def __init__(self, path: Path):
        self.path = path
        refuse_lfs_pointer(path)
        rows = [[_text(value) for value in row] for row in self._values()]
        rows = [(number, row) for number, row in enumerate(rows, 1) if any(row)]
        named = rows[0][1] if rows else []
        self._columns = [i for i in range(len(named)) if any(row[i] for _, row in rows)]
        self._rows = rows[1:]
        self.names = [named[i] for i in self._columns]  # as they are written
        self.header = [name.lower() for name in self.names]

    def _values(self) -> list[tuple[Any, ...]]:
        try:
            import openpyxl
        except ImportError as error:
            raise ImportError(
                f"{self.path} is an Excel workbook: pip install openpyxl, or save it as CSV in UTF-8"
            ) from error
        try:
            with zipfile.ZipFile(self.path) as parts:
                BYTES.refuse(sum(part.file_size for part in parts.infolist()), str(self.path))
            book = openpyxl.load_workbook(self.path, read_only=True, data_only=True)
            try:
                return list(book.worksheets[0].iter_rows(values_only=True))
            finally:
                book.close()
        except (zipfile.BadZipFile, KeyError, IndexError, OSError, SyntaxError) as error:  # of XML, a SyntaxError
            raise ValueError(f"{self.path} is no Excel workbook that can be read: {error}") from error

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        for number, row in self._rows:
            yield f"{self.path} row {number}", [row[i] for i in self._columns]


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    if isinstance(value, float):
        return whole_number(repr(value))
    return "" if value is None else str(value).strip()
