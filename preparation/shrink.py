"""A folder of images to the same folder with smaller ones."""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISREG

from PIL import Image

from datasets import UnreadableImages
from inputs.files import files_below
from inputs.images import UnreadableImage, decode_shown
from preparation.breast import breast_box
from preparation.processes import keep_settings, over_processes, say_room
from preparation.small_dicom import frames_in, with_pixels
from runtime.logs import progress
from utils import atomic_write

log = logging.getLogger("medslip")
JPEG_QUALITY = 95


def shrink(img: Image.Image, short_side: int) -> Image.Image | None:
    """The image with this many pixels along its short side, antialiased; None where it has no more already."""
    scale = short_side / min(img.size)
    if scale >= 1:
        return None
    width, height = (max(short_side, round(side * scale)) for side in img.size)
    return img.resize((width, height), Image.Resampling.LANCZOS)


def encode(img: Image.Image, file_format: str) -> bytes:
    """An RGB image as a PNG or JPEG file, in one channel where all three are equal."""
    red, green, blue = (channel.tobytes() for channel in img.split())
    img = img.convert("L") if red == green == blue else img
    buffer = io.BytesIO()
    img.save(buffer, file_format, **({"quality": JPEG_QUALITY} if file_format == "JPEG" else {}))
    return buffer.getvalue()


def format_of(data: bytes) -> str:
    """Pillow's name for the format of an image that can be decoded, DICOM for that; the file's name may say another."""
    if data[128:132] == b"DICM":
        return "DICOM"
    with Image.open(io.BytesIO(data)) as img:
        return img.format or ""


def check_short_side(short_side: int | None) -> None:
    """ValueError for a short side below a pixel."""
    if short_side is not None and short_side < 1:
        raise ValueError(f"--short-side {short_side}: give at least 1 pixel")


def run(args: argparse.Namespace) -> None:
    """Shrink the tree that the flags name."""
    shrink_tree(args.root, args.output, args.short_side, args.workers, args.crop_breast)


def shrink_tree(
    root: str | Path, output: str | Path, short_side: int = 448, workers: int = 1, crop: bool = False
) -> Counter:
    """Copies the tree with its images shrunk; returns how many files were shrunk, copied, unreadable or there already.

    A DICOM file of one frame stays one, with its own header, so that tables and readers find it under its name. `crop`
    cuts every image to the breast first (breast.breast_box).

    An unreadable image is copied as it is and named in bad_samples.txt, as is a file that cannot be opened, such as a
    link to nothing. Raises FileNotFoundError for an absent root and ValueError for an output inside it or of another
    command.
    """
    root, output = Path(os.path.realpath(root)), Path(os.path.realpath(output))
    check_short_side(short_side)
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder")
    if output.is_relative_to(root) or root.is_relative_to(output):
        raise ValueError(f"--output {output} and --root {root} lie in each other: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(
        output / "shrink.json", {"root": str(root), "short_side": short_side, "crop_breast": crop or None}, "*"
    )
    unreadable = UnreadableImages(output / "bad_samples.txt", limit=math.inf)
    say_room(output, files_below(root), copied=False)
    counts: Counter = Counter()
    names = (os.path.relpath(path, root) for path in files_below(root))
    paths = (name for name in names if name not in ("shrink.json", "bad_samples.txt"))  # of an earlier copy
    with (
        over_processes(workers, Shrinking(root, output, short_side, unreadable, crop), chunk=16) as each,
        progress(desc="shrinking", unit=" files") as bar,
    ):
        while batch := list(islice(paths, 4096)):  # a pool's map takes in all that it is given
            for outcome in each(shrink_file, batch):
                counts[outcome] += 1
                bar.update()
    outcomes = (f"{counts[outcome]:,} {outcome}" for outcome in SHRINK_OUTCOMES if counts[outcome])
    log.info(", ".join(outcomes) or "no files")
    if counts["left out"]:
        log.warning("what was left out are pipes and devices")
    if counts["unreadable"]:
        log.info(f"{unreadable.path} names the images that cannot be decoded; they were copied as they are")
    if counts["missing"]:
        log.warning(f"{unreadable.path} names the files that cannot be opened (links to nothing): the copy lacks them")
    return counts


SHRINK_OUTCOMES = ("shrunk", "copied", "unreadable", "there already", "left out", "missing")
SHRUNK_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".dcm", ".dicom")


@dataclass(frozen=True)
class Shrinking:
    """What the processes that shrink a tree share."""

    root: Path
    output: Path
    short_side: int
    unreadable: UnreadableImages
    crop: bool = False  # to the breast


def shrink_file(tree: Shrinking, name: str) -> str:
    """Copy one file of the root to the output; returns one of SHRINK_OUTCOMES."""
    root, output, short_side, unreadable = tree.root, tree.output, tree.short_side, tree.unreadable
    source, target = root / name, output / name
    try:
        stat = source.stat()
        if not S_ISREG(stat.st_mode):  # a pipe or a device, which would be waited for
            return "left out"
        if target.is_file() and target.stat().st_mtime_ns == stat.st_mtime_ns:
            return "there already"
        file = open(source, "rb")
    except OSError as error:  # a link to what was not fetched (git-annex, DVC), or no right to read
        unreadable.add(str(source), str(error))
        return "missing"
    target.parent.mkdir(parents=True, exist_ok=True)
    outcome, data = "copied", None
    with file:
        if source.suffix.lower() in SHRUNK_SUFFIXES or file.peek(132)[128:132] == b"DICM":
            data = file.read()
            try:
                if small := smaller(data, str(source), short_side, tree.crop):
                    outcome, data = "shrunk", small
            except UnreadableImage as error:
                unreadable.add(str(source), str(error))
                outcome = "unreadable"
        if data is None:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 20))
        else:
            atomic_write(target, lambda copy: copy.write(data))
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # last: marks the copy as complete
    return outcome


def smaller(data: bytes, name: str, short_side: int, crop: bool) -> bytes | None:
    """An image's file with fewer pixels, in its own format; None where it has no more already, or several frames.

    Raises:
        UnreadableImage: with `name`, as decode_shown and with_pixels.
    """
    dicom = data[128:132] == b"DICM"
    if dicom and frames_in(data) > 1:
        return None
    img, how = decode_shown(data, name, grey=dicom)
    box = breast_box(img) if crop else None
    cut = img.crop(box) if box else img
    small = shrink(cut, short_side)
    if small is None and box is None:
        return None
    scale = 1.0 if small is None else min(small.size) / min(cut.size)
    small = small or cut
    if dicom:
        return with_pixels(data, small, how, scale, name)
    return encode(small.convert("RGB"), "PNG" if format_of(data) == "PNG" else "JPEG")
