"""Which files of a folder are images, and how the disk spells a name, for every command that is given one."""

from __future__ import annotations

import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

log = logging.getLogger("medslip")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".ppm", ".bmp", ".pgm", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".dcm", ".dicom",
)  # fmt: skip


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or what an operating system or a disk station left there."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX", "#recycle", "Thumbs.db", "lost+found")


def on_disk(path: str | Path) -> Path:
    """`path`, or where it is absent the one that differs from it in the form of accented letters alone.

    macOS decomposes them (NFD) in the names of files, tables mostly hold them composed (NFC), and both look alike. A
    path that is absent in either form, or could be one of two, comes back as it is.
    """
    path = Path(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    folder = on_disk(path.parent)
    try:
        names = _accented(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return path
    return folder / names[name] if (name := composed(path.name)) in names else folder / path.name


@lru_cache(maxsize=64)
def _accented(folder: Path, _changed: int) -> dict[str, str]:
    """{composed: name} of the names in a folder that are not plain ASCII; without two that are composed alike."""
    names = [name for name in os.listdir(folder) if not name.isascii()]
    number = Counter(map(composed, names))
    return {key: name for name in names if number[key := composed(name)] == 1}


def composed(name: str) -> str:
    """A name with its accented letters in one form (NFC), to compare it."""
    return unicodedata.normalize("NFC", name)


def files_below(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> Iterator[str]:
    """Paths of all files below a folder, in order; linked folders are entered, each folder once.

    Args:
        leave_out: by its name, a file, or a folder with all below it.
    """
    seen = set()
    for where, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not leave_out(name))
        yield from (os.path.join(where, name) for name in sorted(files) if not leave_out(name))


def images_below(folder: Path) -> Iterator[str]:
    """Paths of all images below a folder, as `files_below`.

    An image is what one of IMAGE_SUFFIXES ends, and a DICOM file of any name: what scanners and archives export is
    called IM000001. At the end the log says how many files of which endings were passed over.
    """
    passed = Counter()
    for path in files_below(folder, leave_out=is_system):
        if path.lower().endswith(IMAGE_SUFFIXES) or _begins_as_dicom(path):
            yield path
        else:
            passed[os.path.splitext(path)[1] or "without one"] += 1
    if passed:
        endings = ", ".join(f"{count} {ending}" for ending, count in passed.most_common(5))
        log.info(f"{folder}: {passed.total()} files are no images and were passed over (by their endings: {endings})")


def _begins_as_dicom(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
