"""Which files of a folder are images, for every command that is given one."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger("medslip")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".gif", ".tif", ".tiff", ".webp", ".dcm", ".dicom",
)  # fmt: skip


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or what an operating system or a disk station left there."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX", "#recycle", "Thumbs.db", "lost+found")


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
