"""Small images for the page: within it, up to a limit, and in files beside it from there on."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from inputs.display import DISPLAY, Display
from inputs.images import UnreadableImage, read_image

FOLDER = "report_images"  # beside the page
SIDE = 224  # pixels
WITHIN = 8 << 20  # bytes of JPEG within a page: it stays a file that mail takes and a phone opens


def jpeg(img: Image.Image, side: int = SIDE) -> bytes:
    """The image at most `side` pixels large, its pixels alone: a comment or EXIF may name a patient."""
    img = img.copy()
    img.info = {}
    img.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    img.save(data, "JPEG", quality=85)
    return data.getvalue()


def data_uri(data: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def thumbnail(path: Path, side: int = 160) -> str | None:
    """A small JPEG as a data URI; None for an image that is missing or corrupt."""
    try:
        return data_uri(jpeg(read_image(path), side))
    except (UnreadableImage, FileNotFoundError):
        return None


class Pictures:
    """The images of one page. `files` are those beside it: name -> bytes."""

    def __init__(self, within: int = WITHIN):
        self.left, self.files, self.known = within, {}, {}

    def add(self, path: Path, display: Display = DISPLAY) -> str:
        """The address of an image for the page; "" where it is missing or corrupt."""
        if (path, display) not in self.known:
            self.known[path, display] = self._address(path, display)
        return self.known[path, display]

    def _address(self, path: Path, display: Display) -> str:
        try:
            data = jpeg(read_image(path, display))
        except (UnreadableImage, FileNotFoundError):
            return ""
        if len(data) <= self.left:
            self.left -= len(data)
            return data_uri(data)
        name = f"{FOLDER}/{len(self.files):05d}.jpg"
        self.files[name] = data
        return name
