"""Files that a disk or a copy has damaged are noticed before what they hold is used.

A ZIP archive, as torch.save and NumPy's savez write it, has a CRC-32 of each member, at which torch.load does not look.
Our own files with a JSON header (safetensors, indexes) have a seal in it: the CRC-32 of all their bytes, its own eight
digits counted as zeros. A CRC-32 finds any burst of up to 32 wrong bits and all but one in 4 billion of larger ones; it
is no proof against forgery.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

import distributed
import utils
from runtime.limits import BYTES

SEAL = "medslip_crc32"  # the header's key
_SEAL = re.compile(rb'"medslip_crc32": ?"([0-9a-f]{8})"')
UNSEALED = "00000000"  # what stands in a header until `seal` has run
_HEADER = 1 << 24  # bytes at a file's start in which a seal is looked for
_PIECE = 1 << 26  # bytes of one call; zlib works outside the GIL


def seal(data: bytearray | mmap.mmap) -> None:
    """Put the CRC-32 into a header that has UNSEALED as its SEAL."""
    found = _SEAL.search(data, 0, _HEADER)
    assert found is not None and found[1].decode() == UNSEALED
    data[found.start(1) : found.end(1)] = b"%08x" % zlib.crc32(data)


def seal_file(file: BinaryIO) -> None:
    """`seal` for a file that is open for writing and reading."""
    file.flush()
    with mmap.mmap(file.fileno(), 0) as data:
        seal(data)


def check_seal(path: Path) -> None:
    """ValueError where a file is not what was sealed; one without a seal, of an earlier version, passes."""
    if not path.stat().st_size:
        return  # whoever reads it says so
    with open(path, "rb") as file, _mapped(file.fileno()) as data:
        found = _SEAL.search(data, 0, _HEADER)
        if found is None:
            return
        start, end = found.span(1)
        crc = zlib.crc32(b"0" * (end - start), _crc32(data, 0, start))
        if b"%08x" % _crc32(data, end, len(data), crc) != found[1]:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written (CRC-32)")


def check_archive(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """ValueError where a member of a ZIP archive is not what was written; no archive, or one without CRCs, passes.

    Args:
        wanted: which members are looked at, by their names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # whoever reads it says what it is
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    BYTES.refuse(sum(member.file_size for member in packed), f"{path}, unpacked,")
    if not any(member.CRC for member in members):  # torch.serialization.set_crc32_options(False)
        return
    with open(path, "rb") as file, _mapped(file.fileno()) as data:

        def damaged(member: zipfile.ZipInfo) -> bool:
            start = _start(member, data[member.header_offset : member.header_offset + 30])
            return start + member.file_size > len(data) or _crc32(data, start, start + member.file_size) != member.CRC

        checked = [m for m in members if m.compress_type == zipfile.ZIP_STORED and wanted(m.filename)]
        with ThreadPoolExecutor(min(4, distributed.cores())) as pool:
            wrong = [m.filename for m, bad in zip(checked, pool.map(damaged, checked), strict=True) if bad]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong[:3])}: not the bytes that were written (CRC-32)")


def _start(member: zipfile.ZipInfo, header: bytes) -> int:
    """Where a stored member's own bytes begin, from its local header (30,)."""
    return member.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; ValueError names a file that is damaged, cut off or none.

    They are mapped into memory, and what is written to them stays in this process; a packed one is read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    utils.refuse_lfs_pointer(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file, or was cut off")
    check_archive(path)
    try:
        with np.load(path, allow_pickle=False) as stored, open(path, "rb") as file:
            return {name: _mapped_array(path, file, stored, name) for name in stored.files}
    except (OSError, ValueError, KeyError, AttributeError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error


def _mapped_array(path: Path, file: BinaryIO, stored: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """One array of an .npz, mapped where its member is stored as it is."""
    archive = stored.zip
    assert archive is not None  # it is open
    member = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    file.seek(member.header_offset)
    file.seek(_start(member, file.read(30)))
    if member.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
        return stored[name]
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not np.prod(shape) * dtype.itemsize:
        return stored[name]
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "c", file.tell(), shape, order).view(np.ndarray)


def stamp(path: str | Path) -> tuple[int, ...]:
    """What differs once a file has been written to or replaced; of one that is gone, nothing."""
    path = Path(path)
    found = path.stat() if path.exists() else None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if found else ()


def refuse_changed(path: str | Path, before: tuple[int, ...]) -> None:
    """ValueError where a file's `stamp` is no longer the one `before`."""
    if stamp(path) != before:
        raise ValueError(f"{path} was changed while it was read: run this again once it is whole")


# What `sha256sum -c` takes; of a folder for other programs, whose files have no place for a seal.
SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """The SHA-256 of each file of a new folder and of those in it, in SUMS."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / SUMS).write_text("".join(lines), encoding="utf8")


def check_sums(path: Path) -> None:
    """ValueError where a file is not what SUMS beside it says; one that nothing is said about passes."""
    sums = path.parent / SUMS
    lines = sums.read_text(encoding="utf8", errors="replace").splitlines() if sums.is_file() else []
    named = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if path.name in named and sha256(path) != named[path.name]:
        raise ValueError(f"{path} is not the file of which {sums} speaks: it is damaged, or was changed afterwards")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(handle: int) -> mmap.mmap:
    return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)


def _crc32(data: mmap.mmap, start: int, end: int, crc: int = 0) -> int:
    with memoryview(data) as view:
        for place in range(start, end, _PIECE):
            with view[place : min(place + _PIECE, end)] as piece:
                crc = zlib.crc32(piece, crc)
    return crc
