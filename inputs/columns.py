"""The rows of a source in arrays that loader processes share, without a Python object for each text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class TextColumn:
    """Many texts as one UTF-8 buffer (uint8) and n + 1 offsets (uint32, or int64 beyond 4 GiB).

    A worker that reads a list of strings counts references, which copies the pages they lie on: these stay
    shared.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    @classmethod
    def from_strings(cls, texts: Iterable[str], paths: bool = False) -> TextColumn:
        """The texts in their order; `paths` as for TextBuilder."""
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
        """One text more."""
        self.data += text.encode("utf-8", self.errors)
        self.offsets.append(len(self.data))

    def column(self) -> TextColumn:
        """All of them so far."""
        data, offsets = np.frombuffer(self.data, dtype=np.uint8), np.frombuffer(self.offsets, dtype=np.int64)
        return TextColumn(data, offsets.astype(np.uint32) if len(data) < 2**32 else offsets)


@dataclass(frozen=True)
class PairColumns:
    """What the columns of somebody's own table of pairs are called, where the reader shall not look for itself."""

    image: str = ""  # "" for the first name that the reader knows
    captions: tuple[str, ...] = ()  # the sections of a report, in the order in which they are joined; () as above
    study: bool = False  # whether the column of studies is read


KNOWN_COLUMNS = PairColumns()


@dataclass(slots=True)
class Row:
    """One image as its metadata states it."""

    where: str  # file and line, for messages
    image: Any  # path relative to the root, or a number where a rule gives the path
    captions: list[str]
    rows: int = 1  # of the metadata
    study: str = ""  # which other images show the same; "" where it is not known, or not read


@dataclass
class Columns:
    """The n rows that stay."""

    images: TextColumn | np.ndarray  # (n,)
    texts: TextColumn  # all captions, row after row
    first: np.ndarray  # (n + 1,) int64: row i has texts first[i]:first[i + 1]; (2,) if all have as many
    dropped: int  # rows whose image is absent
    log: list[str]
    absent: list = field(default_factory=list)  # images of at most ABSENT_SAMPLE of the rows dropped, drawn at random
    studies: np.ndarray | None = None  # (n,) int64, the same number for rows of one study


class Studies:
    """Which of n rows show the same together; `of` (n,) int64 has the same number for the rows of one study."""

    def __init__(self, of: np.ndarray):
        self.of = of
        self.order = np.argsort(of, kind="stable")
        self.sorted = of[self.order]

    def others(self, i: int) -> np.ndarray:
        """The rows of the same study as row i, without itself."""
        first, stop = (np.searchsorted(self.sorted, self.of[i], side) for side in ("left", "right"))
        rows = self.order[first:stop]
        return rows[rows != i]


ABSENT_SAMPLE = 256
