"""Image files to RGB with 8 bits, whatever their format and depth.

Pillow reads what is not DICOM, pydicom the rest with its own value transformations. Values of more than 8 bits (12-bit
radiographs in 16-bit files, grey or in several equal channels) are windowed here, because Pillow cuts them off.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.limits import BYTES, PIXELS

# Pillow warns above this number and refuses twice of it, when a file is opened and before it is decoded.
Image.MAX_IMAGE_PIXELS = PIXELS.most // 2

WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it."""


# What the decoders of Pillow and pydicom raise on damaged files, and on files too large to be images.
_DECODE_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# More than 8 bits
# ---------------------------------------------------------------------------------------------------------------------


def window_to_8bit(
    array: np.ndarray,
    center: float | None = None,
    width: float | None = None,
    invert: bool = False,
    function: str = "LINEAR",
) -> np.ndarray:
    """Map grey values of any range and type to uint8, same shape.

    With `center` and `width` by that DICOM VOI window and its `function` (one of WINDOW_FUNCTIONS), else linearly from
    the 0.5 to the 99.5 percentile of the finite values. `invert` is for MONOCHROME1, whose low values are bright. An
    image of one value gives zeros; a value that is not finite gives 0. Inversion comes last.
    """
    if function not in WINDOW_FUNCTIONS:
        raise ValueError(f"unknown window function {function!r}; choose from {', '.join(WINDOW_FUNCTIONS)}")
    x = np.asarray(array, dtype=np.float32 if array.dtype.itemsize <= 2 else np.float64)
    finite = np.isfinite(x)
    if center is None or width is None:
        low, high = np.percentile(x[finite], (0.5, 99.5)) if finite.any() else (0.0, 0.0)
    elif function == "LINEAR":
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    else:
        low, high = center - width / 2, center + width / 2
    if high < low:
        raise ValueError(f"a window needs a positive width (at least 1 where LINEAR), not {width}")
    fraction = (x - low) / (high - low) if high > low else (x > low).astype(x.dtype)
    if function == "SIGMOID" and center is not None and high > low:
        fraction = 1 / (1 + np.exp(np.clip(2 - 4 * fraction, -80, 80)))  # 1/2 at the centre
    fraction = np.where(finite, fraction, 0).clip(0, 1)
    return np.rint(255 * (1 - fraction if invert else fraction)).astype(np.uint8)


def to_8bit(values: np.ndarray) -> np.ndarray:
    """Values of any depth to uint8, same shape: those of an 8-bit image as they are, others between percentiles.

    An 8-bit image may be stored in 16 bits as it is, or spread over their range (times 257, as PNG does it, or 256).
    """
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if 0 <= low and high <= 255 and (values.dtype.kind in "iu" or (values == np.rint(values)).all()):
        return values.astype(np.uint8)
    if values.dtype.kind in "iu" and 0 <= low and high <= 65535:
        for factor in (257, 256):
            if not (values % factor).any():
                return (values // factor).astype(np.uint8)
    return window_to_8bit(values)


def to_rgb8(img: Image.Image) -> Image.Image:
    """Any Pillow image as RGB with 8 bits.

    Modes with more than 8 bits go through `to_8bit` (Pillow's own conversion clips them to white); transparent parts
    lie on white, the page on which a figure is printed.
    """
    if img.mode == "RGB":
        return img
    if img.mode.startswith("I") or img.mode == "F":  # I;16, I;16B, I;16L, I, F
        return Image.fromarray(to_8bit(np.asarray(img))).convert("RGB")
    if img.has_transparency_data:  # RGBA, LA, PA, and palettes with a transparent entry
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    return img.convert("RGB")


def _channels_of_16_bits(data: bytes) -> np.ndarray | None:
    """(H, W, C) uint16, C = 2 (grey and alpha), 3 or 4, of a file with several channels of 16 bits; None for others.

    Pillow keeps the first byte of two. Its unpackers for the other byte order keep the second, so that reading the file
    once with each gives both; grey with alpha, four bytes a pixel, is read as if it were RGBA with 8 bits.
    """
    other = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    high, second = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
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


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0]) if tile.args else ""


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    return tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))


def _rgb8_of_channels(values: np.ndarray) -> Image.Image:
    """(H, W, 2, 3 or 4) uint16, the last of two or four an alpha channel, to RGB with 8 bits."""
    alpha = values[..., -1:] if values.shape[-1] in (2, 4) else None
    colours = to_8bit(values if alpha is None else values[..., :-1])  # one window for all, or the hue would change
    if alpha is not None:
        opaque = alpha.astype(np.float32) / 65535
        colours = np.rint(colours * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3))))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """An image's file. Raises FileNotFoundError, or UnreadableImage where it cannot be read or is a pipe or device."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise UnreadableImage(f"cannot read the image {path}: it is no regular file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, or what the disk cannot read
        raise UnreadableImage(f"cannot read the image {path}: {error}") from error


def read_image(path: str | Path) -> Image.Image:
    """The image at `path` as RGB with 8 bits; raises as `read_bytes` and `decode_image` do."""
    return decode_image(read_bytes(path), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The image in `data` (DICOM, by content or name, or anything that Pillow reads) as RGB with 8 bits.

    Raises:
        UnreadableImage: with `name` in the message.
    """
    if is_dicom(data, name):
        return _decode_dicom(data, name)
    try:
        img = Image.open(io.BytesIO(data))
        if img.mode in ("RGB", "RGBA", "LA") and (deep := _channels_of_16_bits(data)) is not None:
            return _rgb8_of_channels(deep)
        img.load()
        return to_rgb8(img)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}{PIXELS.advice}") from error
    except _DECODE_ERRORS as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}") from error


def image_size(path: str | Path) -> tuple[int, int] | None:
    """(width, height) in pixels from a file's header alone; None where there is none that can be read."""
    try:
        if not is_dicom(read_bytes(path)[:132], str(path)):
            with Image.open(path) as img:
                return img.size
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True)
        return int(header.Columns), int(header.Rows)
    except (ImportError, *_DECODE_ERRORS):
        return None


def decode_pixels(data: bytes, name: str) -> Tensor:
    """What `decode_image` reads, as uint8 planes (3, H, W), the channels innermost; (1, H, W) of a grey JPEG."""
    try:
        img = Image.open(io.BytesIO(data))
        if img.format == "JPEG" and img.mode in ("L", "RGB"):
            return pixels_of(img)
    except _DECODE_ERRORS:
        pass  # `decode_image` says what is wrong
    return pixels_of(decode_image(data, name))


def pixels_of(img: Image.Image) -> Tensor:
    """An RGB or grey image as uint8 planes (3 or 1, H, W), the channels innermost."""
    pixels = torch.from_numpy(np.array(img))  # (H, W, 3) or (H, W)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM
# ---------------------------------------------------------------------------------------------------------------------


def is_dicom(data: bytes, name: str) -> bool:
    """By its mark; many exports have no extension, or another one."""
    return data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def _decode_dicom(data: bytes, name: str) -> Image.Image:
    """The first frame as its file wants it displayed."""
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"{name} is a DICOM file; to read it, install pydicom") from error
    try:
        _refuse_inflated(data)
        return _displayed(pydicom.dcmread(io.BytesIO(data)))
    except Exception as error:  # pydicom raises any kind on damaged files
        raise UnreadableImage(f"cannot decode the image {name}: {error}") from error


def _refuse_inflated(data: bytes) -> None:
    """ValueError for a deflated data set (PS3.5, A.5) above the limit: pydicom inflates the whole at once."""
    deflated = b"1.2.840.10008.1.2.1.99" in data[132:4096]
    if not deflated or data[132:136] != b"\2\0\0\0":  # the length of the header, which comes first in it
        return
    rest, size = data[144 + int.from_bytes(data[140:144], "little") :], 0
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, 1 << 24))
        rest = inflate.unconsumed_tail
        BYTES.refuse(size, "it")


def _displayed(dataset: Any) -> Image.Image:
    """DICOM's steps from stored values to a screen (PS3.4, N.2): colour lookup, or modality, window, presentation."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    sides = (int(dataset.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel"))
    PIXELS.refuse(math.prod(sides), "it")
    frame = pixel_array(dataset, index=0)  # (H, W), or (H, W, 3) in RGB
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        frame = apply_color_lut(frame, dataset)[..., :3]
        frame = frame if frame.dtype == np.uint8 else (frame >> 8).astype(np.uint8)  # entries fill all 16 bits
    if frame.ndim == 3:
        return Image.fromarray(to_8bit(frame))
    padding = _padding(frame, dataset)
    values = np.asarray(apply_modality_lut(frame, dataset))
    grey = _windowed(values, dataset)
    if grey is None:
        # No window: 8-bit values as they are, others between percentiles of what is not padding.
        grey = np.zeros(values.shape, np.uint8)
        grey[~padding] = to_8bit(values[~padding])
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    grey[padding] = 0  # it is no part of the image, so black
    return Image.fromarray(grey).convert("RGB")


def _padding(frame: np.ndarray, dataset: Any) -> np.ndarray:
    """Where stored values only fill the rectangle (PS3.3, C.7.5.1.1.2): (H, W) bool."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(frame.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    return (frame >= min(first, last)) & (frame <= max(first, last))


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Through the first VOI LUT or window that the file states, to uint8; None where it states neither."""
    from pydicom.pixels import apply_voi, apply_windowing

    if tables := dataset.get("VOILUTSequence"):
        shown, low, high = apply_voi(np.rint(values).astype(np.int64), dataset), 0, 2 ** tables[0].LUTDescriptor[2] - 1
    else:
        width = dataset.get("WindowWidth")
        width = width[0] if hasattr(width, "__len__") and not isinstance(width, str) and len(width) else width
        # Some devices write a width below 1 to say that there is no window.
        if dataset.get("WindowCenter") in (None, "") or width in (None, "") or float(width) < 1:
            return None
        shown = apply_windowing(values, dataset)
        # The range of its output depends on half a dozen elements; what lies far outside of the window has its ends.
        low, high = apply_windowing(np.array([-1e30, 1e30]), dataset)
    return np.rint(255 * ((shown - low) / (high - low)).clip(0, 1)).astype(np.uint8)
