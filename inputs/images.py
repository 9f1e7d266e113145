"""Image files to RGB with 8 bits, whatever their format and depth.

Pillow reads what is not DICOM, pydicom the rest with its own value transformations. Values of more than 8 bits (12-bit
radiographs in 16-bit files, grey or in several equal channels) are windowed here, because Pillow cuts them off.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from inputs import dicom
from inputs.depth import to_8bit
from inputs.display import AS_STORED, DISPLAY, Display, say_first_of
from inputs.files import on_disk
from runtime.limits import PIXELS
from utils import lfs_pointer

# Pillow warns above this number and refuses twice of it, when a file is opened and before it is decoded.
Image.MAX_IMAGE_PIXELS = PIXELS.most // 2


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it."""


EMPTY = "it is empty"

# What the decoders of Pillow and pydicom raise on damaged files, and on files too large to be images.
_DECODE_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Any mode of Pillow
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb8(img: Image.Image) -> Image.Image:
    """Any Pillow image as RGB with 8 bits."""
    img = to_8_bits(img)
    return img if img.mode == "RGB" else img.convert("RGB")


def to_8_bits(img: Image.Image) -> Image.Image:
    """Any Pillow image as RGB with 8 bits, or as L where it has one plane of grey values.

    Modes with more than 8 bits go through `to_8bit` (Pillow's own conversion clips them to white); transparent parts
    lie on white, the page on which a figure is printed.
    """
    if img.mode == "RGB":
        return img
    if _is_deep(img):
        return Image.fromarray(to_8bit(np.asarray(img))[0])
    if img.has_transparency_data:  # RGBA, LA, PA, and palettes with a transparent entry
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    return img if img.mode == "L" else img.convert("RGB")


def _is_deep(img: Image.Image) -> bool:
    """Whether it has more than 8 bits: I;16, I;16B, I;16L, I, F."""
    return img.mode.startswith("I") or img.mode == "F"


def _channels_of_16_bits(data: bytes, frame: int) -> np.ndarray | None:
    """(H, W, C) uint16, C = 2 (grey and alpha), 3 or 4, of a file with several channels of 16 bits; None for others.

    Pillow keeps the first byte of two. Its unpackers for the other byte order keep the second, so that reading the file
    once with each gives both; grey with alpha, four bytes a pixel, is read as if it were RGBA with 8 bits.
    """
    if data[:2] == b"P6" and (planes := _wide_ppm(data)) is not None:
        return planes
    other = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    high, second = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    if frame:
        high.seek(frame)
        second.seek(frame)
    raws = {_raw_mode(tile) for tile in high.tile}
    if len(raws) != 1 or high.mode not in ("RGB", "RGBA", "LA"):
        return None
    channels, _, depth = raws.pop().partition(";")
    if channels == "LA" and depth == "16B":
        high._mode = "RGBA"  # type: ignore[attr-defined]
        high.tile = [tile._replace(args="RGBA") for tile in high.tile]
        grey, low, alpha, low_alpha = np.moveaxis(np.asarray(high).astype(np.uint16), -1, 0)
        return np.stack([grey << 8 | low, alpha << 8 | low_alpha], -1)
    if depth not in other or channels not in ("RGB", "RGBA", "RGBX"):
        return None
    second.tile = [_with_raw_mode(tile, f"{channels};{other[depth]}") for tile in second.tile]
    return np.asarray(high).astype(np.uint16) << 8 | np.asarray(second)


def _wide_ppm(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint16 of a PPM whose values have two bytes, which Pillow scales to one; None for others."""
    img = Image.open(io.BytesIO(data))
    found = re.match(rb"P6(?:\s+(?:#[^\n]*\n\s*)*)(\d+)\s+(\d+)\s+(\d+)\s", data[:512])
    if not found or int(found[3]) < 256 or len(data) < found.end() + 6 * img.width * img.height:
        return None
    values = np.frombuffer(data, ">u2", 3 * img.width * img.height, found.end())
    return values.reshape(img.height, img.width, 3).astype(np.uint16)


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0]) if tile.args else ""


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    return tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))


def _rgb8_of_channels(values: np.ndarray, window: tuple[float, float] | None) -> tuple[Image.Image, str]:
    """(H, W, 2, 3 or 4) uint16, the last of two or four an alpha channel, to RGB with 8 bits, and how it is shown."""
    alpha = values[..., -1:] if values.shape[-1] in (2, 4) else None
    # One window for all, or the hue would change.
    colours, how = to_8bit(values if alpha is None else values[..., :-1], window)
    if alpha is not None:
        opaque = alpha.astype(np.float32) / 65535
        colours = np.rint(colours * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))), how


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """An image's file. Raises FileNotFoundError, or UnreadableImage where it cannot be read or is a pipe or device."""
    path = on_disk(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise UnreadableImage(f"cannot read the image {path}: it is no regular file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, or what the disk cannot read
        raise UnreadableImage(f"cannot read the image {path}: {error}") from error


def read_image(path: str | Path, display: Display = DISPLAY, grey: bool = False) -> Image.Image:
    """The image at `path` as `decode_image` gives it; raises as that and `read_bytes` do."""
    return decode_image(read_bytes(path), str(path), display, grey)


def as_image(image: Any) -> Image.Image:
    """A path, a Pillow image or an array of any depth as RGB with 8 bits, or L where it is grey."""
    if isinstance(image, (str, Path)):
        return read_image(image, grey=True)
    return to_8_bits(image if isinstance(image, Image.Image) else Image.fromarray(to_8bit(np.asarray(image))[0]))


def decode_image(data: bytes, name: str, display: Display = DISPLAY, grey: bool = False) -> Image.Image:
    """The image in `data` (DICOM, by content or name, or anything that Pillow reads) as RGB with 8 bits.

    Args:
        grey: leave an image of grey values in one plane (L), a third of the work and memory; our views take it.

    Raises:
        UnreadableImage: with `name` in the message.
    """
    return decode_shown(data, name, display, grey)[0]


def decode_shown(data: bytes, name: str, display: Display = DISPLAY, grey: bool = False) -> tuple[Image.Image, str]:
    """What `decode_image` gives, and where its grey values come from, one of `display.SHOWN`."""
    img, how = _decoded(data, name, display)
    return img if grey else img.convert("RGB"), how


def _decoded(data: bytes, name: str, display: Display) -> tuple[Image.Image, str]:
    if dicom.is_dicom(data, name) and not _is_another(data):
        return _dicom_image(data, name, display)
    try:
        img = Image.open(io.BytesIO(data))
        frames = getattr(img, "n_frames", 1) if img.format == "TIFF" else 1
        say_first_of(frames, name, display)
        if frame := display.index(frames):
            img.seek(frame)
        _refuse_planes(img)
        if (
            img.format != "JPEG"
            and img.mode in ("RGB", "RGBA", "LA")
            and (deep := _channels_of_16_bits(data, frame)) is not None
        ):
            return _rgb8_of_channels(deep, display.window)
        _refuse_lost_bits(img)
        img.load()
        if not _is_deep(img):
            return to_8_bits(img), AS_STORED
        grey, how = to_8bit(_unsigned(img), display.window)
        return Image.fromarray(255 - grey if _white_is_zero(img) else grey), how
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}{PIXELS.advice}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"cannot decode the image {name}: {lfs_pointer(data) or _what_it_is(data)}") from error
    except _DECODE_ERRORS as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}") from error


def _is_another(data: bytes) -> bool:
    """Whether a file that is called DICOM, without the mark of one, is an image that Pillow knows."""
    if data[128:132] == b"DICM":
        return False
    try:
        Image.open(io.BytesIO(data))
        return True
    except _DECODE_ERRORS:
        return False


def _what_it_is(data: bytes) -> str:
    """Why Pillow knows no image in this, in a user's words."""
    if not data:
        return EMPTY
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "it is a TIFF of a kind that Pillow does not read (bits, sample format or compression)"
    if b"\0" not in data[:512] and all(byte >= 32 or byte in b"\t\r\n" for byte in data[:512]):
        return f"it is text, which begins {data[:40].decode('utf-8', 'replace')!r}"
    return "it is no image of a kind that Pillow reads"


def _bits_of_channels(img: Image.Image) -> int:
    """Of a TIFF with several channels; 8 of all else."""
    bits = getattr(img, "tag_v2", {}).get(258, 8)
    return max(bits) if img.format == "TIFF" and isinstance(bits, tuple) and len(bits) > 1 else 8


def _refuse_planes(img: Image.Image) -> None:
    """ValueError for a deep TIFF whose channels lie one after the other: Pillow scrambles them."""
    if _bits_of_channels(img) > 8 and getattr(img, "tag_v2", {}).get(284) == 2:
        raise ValueError(f"its channels of {_bits_of_channels(img)} bits lie in planes: store them interleaved")


def _refuse_lost_bits(img: Image.Image) -> None:
    """ValueError for a TIFF of which Pillow would keep one byte of each value, and not say so."""
    if _bits_of_channels(img) > 8 and not _is_deep(img):
        raise ValueError(f"of its channels of {_bits_of_channels(img)} bits Pillow keeps 8: store them without alpha")


def _unsigned(img: Image.Image) -> np.ndarray:
    """Values of a deep image; Pillow holds those of 32 bits without a sign as if they had one."""
    values = np.asarray(img)
    tags = getattr(img, "tag_v2", {})
    if img.format == "TIFF" and img.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        return values.view(np.uint32)
    return values


def _white_is_zero(img: Image.Image) -> bool:
    """Whether a deep TIFF's low values are bright, as film digitisers write them; Pillow turns those of 8 bits."""
    return img.format == "TIFF" and getattr(img, "tag_v2", {}).get(262) == 0  # PhotometricInterpretation


def _dicom_image(data: bytes, name: str, display: Display) -> tuple[Image.Image, str]:
    try:
        img, how, frames = dicom.displayed(data, display)
        say_first_of(frames, name, display)
        return img, how
    except ImportError as error:
        raise ImportError(f"{name} is a DICOM file; to read it, install pydicom") from error
    except Exception as error:  # pydicom raises any kind on damaged files
        why = lfs_pointer(data) or (dicom.reason(error) if data else EMPTY)
        raise UnreadableImage(f"cannot decode the image {name}: {why}") from error


def frames_of(path: str | Path) -> int:
    """How many frames or pages a DICOM file or a TIFF holds, by its header; 1 for other images, and unreadable ones."""
    path = on_disk(path)
    try:
        with open(path, "rb") as file:
            start = file.read(132)
        if dicom.is_dicom(start, str(path)):
            return dicom.frames_of(path)
        with Image.open(path) as img:
            return getattr(img, "n_frames", 1) if img.format == "TIFF" else 1
    except Exception:  # of any kind, on a damaged file; reading it says what is wrong
        return 1


def image_size(path: str | Path) -> tuple[int, int] | None:
    """(width, height) in pixels from a file's header alone; None where there is none that can be read."""
    path = on_disk(path)
    try:
        if not dicom.is_dicom(read_bytes(path)[:132], str(path)):
            with Image.open(path) as img:
                return img.size
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True)
        return int(header.Columns), int(header.Rows)
    except (ImportError, *_DECODE_ERRORS):
        return None


def decode_pixels(data: bytes, name: str) -> Tensor:
    """What `decode_image` reads, as uint8 planes (3, H, W), the channels innermost; (1, H, W) of a grey image."""
    if (colours := _colours_of_jpeg(data)) is not None:
        return torch.from_numpy(colours).permute(2, 0, 1)
    return pixels_of(decode_image(data, name, grey=True))


def _colours_of_jpeg(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 of a whole JPEG in colour, by simplejpeg where it is installed; None for all else.

    Pillow's bits, from the same library, without the two copies that make an array of Pillow's image. It refuses a file
    that is cut off or has more in it, which Pillow then reads or names.
    """
    if data[:3] != b"\xff\xd8\xff" or data[128:132] == b"DICM" or (simplejpeg := _simplejpeg()) is None:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space != "YCbCr" or height * width > PIXELS.most:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return simplejpeg


def pixels_of(img: Image.Image) -> Tensor:
    """An RGB or grey image as uint8 planes (3 or 1, H, W), the channels innermost."""
    pixels = torch.from_numpy(np.array(img))  # (H, W, 3) or (H, W)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
