"""Metadata files that others wrote, read without running what they may hold.

A pickle is a program. `read_pickle` executes only those that build plain values and numpy arrays, and even
these never reach numpy: its own functions would take addresses from the file (an object array over given
bytes is a list of pointers), so stand-ins below collect what the pickle states. `iter_json` reads long JSON
lists piece by piece.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


class RefusedPickle(ValueError):
    """A pickle that asks for more than plain values; the message names what it asks for."""


# ---------------------------------------------------------------------------------------------------- pickles
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
    with open(path, "rb") as file:
        try:
            if file.peek(6)[:6] == np.lib.format.MAGIC_PREFIX:
                return _read_npy(file)
            return _PlainUnpickler(file).load()
        except RefusedPickle as error:
            raise RefusedPickle(f"{path} asks for {error}, not for plain values") from error
        except (pickle.PickleError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} is no readable pickle or .npy file: {error}") from error


def _read_npy(file: BinaryIO) -> list:
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    _shape, _fortran, dtype = formats[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        return _PlainUnpickler(file).load()
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False).tolist()


# ------------------------------------------------------------------------------------------------------- JSON
def iter_json(path: str | Path, key: str = "") -> Iterator[object]:
    """The elements of a long JSON list, one by one: the file's own, or the one under `key` of its object.

    Memory holds one element and the other values of the object. Raises ValueError, naming file and byte,
    where the file is damaged or holds no such list.
    """
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
                        raise ValueError(f"no list {key!r}")
            if stream.look() == "]":
                return
            while True:
                yield stream.value()
                if stream.take(",]") == "]":
                    return
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        except ValueError as error:
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
