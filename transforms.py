"""Images to tensors: reading at 8 bits, a model's own preparation, the views of training and evaluation.

The views follow SLIP (Mu et al. 2021), whose pipeline was torchvision's first transforms on Pillow
images: the same distribution, and once the random numbers are drawn the same values, to one of 256 levels
where the crop is resized and to the bit in everything after. Every random number comes from the generator
that the caller passes, so that a sample depends on nothing but its seed, epoch and index.

Views of training are computed on uint8 planes (C, H, W), C = 1 where an image is grey: three equal channels
would take three times the work. Colours are changed by the loader's worker (`apply_colour`) or for a whole
batch on the accelerator (`apply_colour_batch`), to the same bits.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEDCLIP_MEAN = (0.5862785803043838,) * 3
MEDCLIP_STD = (0.27950088968644304,) * 3
PREPARES = ("slip", "medclip")
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3
View = Callable[[Image.Image, np.random.Generator | None], Tensor]


# ------------------------------------------------------------------------------------------- reading images
class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it."""


# What the decoders of Pillow and pydicom raise on damaged files, and on files too large to be images.
_DECODE_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def window_to_8bit(
    array: np.ndarray,
    center: float | None = None,
    width: float | None = None,
    invert: bool = False,
    function: str = "LINEAR",
) -> np.ndarray:
    """Map grey values of any range and type to uint8, same shape.

    With `center` and `width` by that DICOM VOI window and its `function` (one of WINDOW_FUNCTIONS), else
    linearly from the 0.5 to the 99.5 percentile of the finite values. `invert` is for MONOCHROME1, whose
    low values are bright. An image of one value gives zeros; a value that is not finite gives 0. Inversion
    comes last.
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
    share = (x - low) / (high - low) if high > low else (x > low).astype(x.dtype)
    if function == "SIGMOID" and center is not None and high > low:
        share = 1 / (1 + np.exp(np.clip(2 - 4 * share, -80, 80)))  # share is 1/2 at the centre
    share = np.where(finite, share, 0).clip(0, 1)
    return np.rint(255 * (1 - share if invert else share)).astype(np.uint8)


def to_rgb8(img: Image.Image) -> Image.Image:
    """Any Pillow image as RGB with 8 bits.

    Modes with more than 8 bits are windowed (Pillow's own conversion clips them to white); transparent
    parts lie on white, the page on which a figure is printed.
    """
    if img.mode == "RGB":
        return img
    if img.mode.startswith("I") or img.mode == "F":  # I;16, I;16B, I;16L, I, F
        return Image.fromarray(window_to_8bit(np.asarray(img))).convert("RGB")
    if img.has_transparency_data:  # RGBA, LA, PA, and palettes with a transparent entry
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    return img.convert("RGB")


def decode_image(data: bytes, name: str) -> Image.Image:
    """The image in `data` (anything Pillow reads; DICOM where `name` ends in .dcm) as RGB with 8 bits.

    Raises UnreadableImage with `name` in the message.
    """
    if name.lower().endswith(".dcm"):
        return _decode_dicom(data, name)
    try:
        img = Image.open(io.BytesIO(data))
        img.load()
        return to_rgb8(img)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}") from error


def decode_pixels(data: bytes, name: str) -> Tensor:
    """What `decode_image` reads, as uint8 planes (3, H, W), the channels innermost; (1, H, W) of a grey JPEG."""
    from torchvision.io import decode_jpeg  # here, because a process that only reads captions needs 0.2 GB less

    try:
        img = Image.open(io.BytesIO(data))  # the header alone: refuses images too large to be one
        if img.format == "JPEG" and img.mode in ("L", "RGB"):
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except _DECODE_ERRORS:
        pass  # Pillow decides below whether it is broken, and says why
    return pixels_of(decode_image(data, name))


def pixels_of(img: Image.Image) -> Tensor:
    """An RGB or grey image as uint8 planes (3 or 1, H, W), the channels innermost."""
    pixels = torch.from_numpy(np.array(img))  # (H, W, 3) or (H, W)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def grey_if_equal(pixels: Tensor) -> Tensor:
    """The first of three planes if all are equal, as in a radiograph that is stored in colour."""
    if len(pixels) == 1:
        return pixels
    lines = pixels.permute(1, 2, 0).numpy()  # (H, W, 3), contiguous from decoders and from resizing
    for part in (lines[::32], lines):  # a few lines tell of most images that they have colours
        flat = part.ravel()
        same = flat[1:] == flat[:-1]
        same[2::3] = True  # the blue of one pixel beside the red of the next
        if not same.all():
            return pixels
    return pixels[:1].contiguous()


def read_bytes(path: str | Path) -> bytes:
    """An image's file. Raises FileNotFoundError, or UnreadableImage where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, or what the disk cannot read
        raise UnreadableImage(f"cannot read the image {path}: {error}") from error


def read_image(path: str | Path) -> Image.Image:
    """The image at `path` as RGB with 8 bits; raises as `read_bytes` and `decode_image` do."""
    return decode_image(read_bytes(path), str(path))


read_picture = read_image  # the name that scripts of others know it by


def _decode_dicom(data: bytes, name: str) -> Image.Image:
    """The first frame, through the first VOI window that the file states, else between percentiles."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.pixels import apply_rescale, pixel_array
    except ImportError as error:
        raise ImportError(f"{name} is a DICOM file; to read it, install pydicom") from error
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        frame = pixel_array(dataset, index=0)  # (H, W), or (H, W, 3) in RGB
        if frame.ndim == 3:
            return Image.fromarray(frame if frame.dtype == np.uint8 else window_to_8bit(frame))
        center, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
        if width is not None and width < 1:  # written by some devices to say that there is none
            center = width = None
        inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
        function = dataset.get("VOILUTFunction") or "LINEAR"
        grey = window_to_8bit(apply_rescale(frame, dataset), center, width, inverted, function)
    except (*_DECODE_ERRORS, InvalidDicomError) as error:
        raise UnreadableImage(f"cannot decode the image {name}: {error}") from error
    return Image.fromarray(grey).convert("RGB")


def _first(value: object) -> float | None:
    """The first of DICOM's one or many values."""
    if value is None or value == "":
        return None
    return float(value) if not hasattr(value, "__getitem__") else _first(value[0] if len(value) else None)


# ------------------------------------------------------------------------------------------------ preparation
@dataclass(frozen=True)
class Preprocess:
    """What an image tower expects: side in pixels, normalisation per channel, how an image becomes a square.

    `prepare="slip"`: RGB; evaluation resizes the short side to `size` and takes the centre.
    `prepare="medclip"`: grey, centred on a black square of at least `size`, in three equal channels.
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    prepare: str = "slip"

    def __post_init__(self) -> None:
        if self.prepare not in PREPARES:
            raise ValueError(f"unknown preparation {self.prepare!r}; choose from {', '.join(PREPARES)}")
        for name in ("mean", "std"):  # a checkpoint brings lists
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"{name} needs three values, one a channel, not {values}")
            object.__setattr__(self, name, values)

    def to_dict(self) -> dict:
        """Plain values for a checkpoint."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> Preprocess:
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown preprocessing settings: {', '.join(sorted(unknown))}")
        return cls(**values)

    def open(self, img: Image.Image) -> Image.Image:
        """The whole image as the views take it: RGB ("slip") or a grey square ("medclip"); idempotent."""
        if self.prepare == "slip":
            return to_rgb8(img)
        return pad_to_square(img if img.mode == "L" else to_rgb8(img).convert("L"), self.size)

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """`open` for uint8 planes (1 or 3, H, W), which the training views take; idempotent."""
        pixels = pixels_of(to_rgb8(image)) if isinstance(image, Image.Image) else image
        if self.prepare == "slip":
            return pixels
        pixels = grey_if_equal(pixels)
        grey = pixels if len(pixels) == 1 else torch.from_numpy(luma(pixels.numpy()))
        height, width = grey.shape[1:]
        side = max(self.size, height, width)
        if (height, width) == (side, side):
            return grey
        square = grey.new_zeros(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = grey
        return square

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 1 or 3, H, W) to normalised floats (..., 3, H, W), on the device where they are."""
        mean, std = _normalisation(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32).div_(255).sub(mean).div_(std)  # the subtraction makes three channels of one

    def tensor(self, img: Image.Image) -> Tensor:
        """A view, RGB or grey, as a normalised float tensor (3, H, W)."""
        pixels = torch.from_numpy(np.array(img))  # (H, W, 3) or (H, W), uint8
        pixels = pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels[None]
        return self.normalise(pixels)


@cache
def _normalisation(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: a copy for each batch would wait for it."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))


def pad_to_square(img: Image.Image, least: int) -> Image.Image:
    """The image in the middle of a black square of `least` pixels or more (MedCLIP's preparation)."""
    side = max(least, *img.size)
    if img.size == (side, side):
        return img
    square = Image.new(img.mode, (side, side))
    square.paste(img, ((side - img.width) // 2, (side - img.height) // 2))
    return square


# ---------------------------------------------------------------------------------------------- random crops
def random_resized_crop(pixels: Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A part of random area (share in `scale`) and aspect (3/4 to 4/3, log-uniform): uint8 (C, size, size).

    Resized with the antialiased triangle that Pillow calls bilinear, on 8 bits. C is 1 where the part is grey: what
    follows is the less work, and here, where there is little to look at, is the place to find out.
    """
    height, width = pixels.shape[1:]
    top, left, height, width = _crop_box(width, height, scale, rng)
    part = pixels[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # the layout in which it is fastest
    return grey_if_equal(F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0])


def _crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) by torchvision's rule: ten attempts, else the largest centred part."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))  # width over height
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


# ------------------------------------------------------------- colours, one view at a time, in the loader
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Colour(NamedTuple):
    """What happens to the colours of one view after its crop, in the order of the fields; plain numbers."""

    jitter: bool = False
    order: tuple[int, int, int, int] = (BRIGHTNESS, CONTRAST, SATURATION, HUE)  # in which the four are jittered
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)  # at BRIGHTNESS, ... HUE (a share of the circle)
    grey: bool = False
    sigma: float = 0.0  # of the blur, in pixels; 0 for none
    flip: bool = False

    def row(self) -> list[float]:
        """Fourteen numbers that a batch can hold as a tensor; the blur as `_box_weights`, -1 first for none."""
        box = _box_weights(self.sigma) if self.sigma else (-1, 0, 0)
        return [self.jitter, self.grey, self.flip, *self.order, *self.factors, *box]


def draw_colour(rng: np.random.Generator) -> Colour:
    """SLIP's numbers: jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grey at 0.2, blur of 0.1 to 2 and flip at 0.5 each."""
    jitter, order, factors = rng.random() < 0.8, (0, 1, 2, 3), (1.0, 1.0, 1.0, 0.0)
    if jitter:
        factors = (*(1 + 0.4 * rng.uniform(-1, 1) for _ in range(3)), 0.1 * rng.uniform(-1, 1))
        order = tuple(int(i) for i in rng.permutation(4))
    grey = rng.random() < 0.2
    sigma = rng.uniform(0.1, 2.0) if rng.random() < 0.5 else 0.0
    return Colour(jitter, order, factors, grey, sigma, rng.random() < 0.5)


def apply_colour(pixels: np.ndarray, colour: Colour) -> np.ndarray:
    """uint8 (1 or 3, H, W) to the same, to the bit what Pillow makes of it; three planes may become one."""
    pixels = np.ascontiguousarray(pixels)
    if colour.jitter:
        for operation in colour.order:
            if len(pixels) == 3 or operation < SATURATION:  # a grey image has no colour to change
                pixels = _JITTER[operation](pixels, colour.factors[operation])
    if colour.grey and len(pixels) == 3:
        pixels = luma(pixels)
    if colour.sigma:
        pixels = box_blur(pixels, colour.sigma)
    return pixels[..., ::-1] if colour.flip else pixels


def luma(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) to (1, H, W), uint8: ITU-R BT.601 in 16-bit fixed point, as Pillow's mode L."""
    if len(pixels) == 1:
        return pixels
    red, green, blue = pixels.astype(np.uint32)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[None]


def _blend(start: np.ndarray | float, end: np.ndarray, factor: float) -> np.ndarray:
    """start + factor * (end - start) in float32, cut to 0..255 and to whole numbers, as Pillow's enhancers do."""
    out = end.astype(np.float32)
    out -= start
    out *= np.float32(factor)
    out += start
    return out.clip(0, 255, out=out).astype(np.uint8)


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(np.float32(0), pixels, factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean grey of the view, or towards it."""
    return _blend(np.float32(int(luma(pixels).mean(dtype=np.float64) + 0.5)), pixels, factor)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(luma(pixels).astype(np.float32), pixels, factor)


def adjust_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """(3, H, W) with the hue moved by `turn` of the circle, in steps of 1/255 as torchvision does.

    Through HSV with 8 bits each, as Pillow goes: a channel is value minus a share of the chroma, which the
    hue gives.
    """
    hues, chromas, shares = hue_tables()
    red, green, blue = pixels
    value = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    spread, below = value - low, value - (red + green + blue - value - low)  # below: value minus the middle channel
    last = np.where(green == value, (blue != low) + np.uint8(2), (red != low) + np.uint8(4))
    index = np.where(red == value, blue != low, last).astype(np.uint32)  # which channel is highest, which lowest
    for part in (spread, below):
        index <<= 8
        index |= part
    hue = np.take(hues, index) + np.uint8(int(turn * 255) % 256)  # wraps around
    chroma = np.take(chromas, spread.astype(np.uint16) << 8 | value)
    value = value + np.float32(0.5)
    out = np.empty_like(pixels)
    for channel, share in zip(out, shares, strict=True):
        channel[...] = value - np.take(share, hue) * chroma
    return out


@cache
def hue_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `adjust_hue` reads, all from Pillow's own conversions.

    Hue (6 * 2^16,) uint8 by order of the channels, highest minus lowest, and highest minus middle; chroma
    after rounding to 8 bits of saturation (2^16,) float32 by highest minus lowest, and highest; the share
    of it that each channel lacks (3, 256) float32 by hue.
    """
    first, second = np.mgrid[:256, :256].astype(np.uint8)

    def converted(source: str, target: str, *channels: np.ndarray) -> np.ndarray:
        img = Image.fromarray(np.stack(np.broadcast_arrays(*channels), axis=-1))
        return np.asarray(Image.frombytes(source, img.size, img.tobytes()).convert(target))

    top, middle, low = np.full_like(first, 255), 255 - second, 255 - first
    orders = [(top, middle, low), (top, low, middle), (middle, top, low),
              (low, top, middle), (low, middle, top), (middle, low, top)]  # fmt: skip
    hues = np.stack([converted("RGB", "HSV", *order)[..., 0] for order in orders]).ravel()
    rest = np.where(second >= first, second - first, 0).astype(np.uint8)
    saturation = converted("RGB", "HSV", second, rest, rest)[..., 1]
    chromas = (second.astype(np.float32) * (saturation / 255).astype(np.float32)).ravel()
    sixths = np.arange(256) * 6 / 255
    part = (sixths % 1).astype(np.float32)
    none, whole, rising = np.zeros_like(part), np.ones_like(part), (1.0 - part.astype(np.float64)).astype(np.float32)
    cases = [(none, rising, whole), (part, none, whole), (whole, none, rising),
             (whole, part, none), (rising, whole, none), (none, whole, part)]  # fmt: skip
    shares = np.array(cases)[sixths.astype(int) % 6, :, np.arange(256)]  # (256, 3)
    return hues, chromas, np.ascontiguousarray(shares.T)


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _box_weights(sigma: float) -> tuple[int, int, int]:
    """(r, w, v): weights of one box pass in units of 2^-24, w within r of the centre and v at distance r + 1.

    Three such passes have the variance of a Gaussian (Gwosdek et al. 2011, "Theoretical foundations of
    Gaussian convolution by extended box filtering", section 3). In single precision where Pillow is.
    """
    single = np.float32
    variance = single(sigma) * single(sigma) / single(3)
    r = int((single(math.sqrt(12 * float(variance) + 1)) - 1) / 2)
    share = float(single((2 * r + 1) * (r * (r + 1) - 3 * float(variance))))
    radius = single(r) + single(share / (6 * float(variance - single((r + 1) ** 2))))
    r = int(radius)
    w = int(single(2**24) / (2 * radius + 1))
    return r, w, (2**24 - (2 * r + 1) * w) // 2


def box_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Pillow's GaussianBlur of uint8 (C, H, W): three box passes along each axis, each rounded to 8 bits.

    A true Gaussian has less of the highest frequencies, and would be another augmentation.
    """
    r, w, v = (np.uint32(value) for value in _box_weights(sigma))
    pad = int(r) + 1
    x = pixels.astype(np.uint32)
    for axis in (2, 1):
        n = x.shape[axis]
        shape = list(x.shape)
        shape[axis] += 2 * pad
        padded = np.empty(shape, dtype=np.uint32)
        shifted = [_along(padded, axis, i, i + n) for i in range(2 * pad + 1)]
        for _ in range(3):
            _along(padded, axis, pad, pad + n)[...] = x
            _along(padded, axis, 0, pad)[...] = _along(x, axis, 0, 1)
            _along(padded, axis, pad + n, None)[...] = _along(x, axis, n - 1, n)
            edges = shifted[0] + shifted[-1]
            edges *= v
            x = sum(shifted[2:-1], start=shifted[1]) * w
            x += edges
            x += np.uint32(1 << 23)
            x >>= np.uint32(24)
    return x.astype(np.uint8)


def _along(x: np.ndarray, axis: int, start: int, stop: int | None) -> np.ndarray:
    return x[:, start:stop] if axis == 1 else x[:, :, start:stop]


# ------------------------------------------------------------- the same for a batch, on any device, in torch
def apply_colour_batch(pixels: Tensor, colours: Tensor) -> Tensor:
    """`apply_colour` for uint8 (B, 3, H, W) on any device and rows of `Colour.row` (B, 14) in host memory.

    The images that undergo one operation are gathered by the host, so nothing waits for the device.
    """
    jitter, grey, flip = colours[:, :3].bool().unbind(1)
    order, values, reach = colours[:, 3:7], colours[:, [7, 8, 9, 10, 12, 13]], colours[:, 11]
    values[:, HUE] = (255 * values[:, HUE]).trunc()
    groups = [
        (operation, jitter & (order[:, place] == i)) for place in range(4) for i, operation in enumerate(_JITTER_BATCH)
    ]
    groups.append((_grey_batch, grey))
    groups += [(partial(_blur_batch, r), reach == r) for r in range(int(reach.max()) + 1)]
    groups.append((_flip_batch, flip))

    members = [chosen.nonzero()[:, 0] for _, chosen in groups]
    positions, values = torch.cat(members), values.float()  # float32 holds the integers up to 2^24
    if pixels.device.type == "cuda":
        positions, values = positions.pin_memory(), values.pin_memory()
    positions = positions.to(pixels.device, non_blocking=True)
    values = values.to(pixels.device, non_blocking=True)
    out, start = pixels.clone(), 0
    for (operation, _), member in zip(groups, members, strict=True):
        for part in positions[start : start + len(member)].split(256):  # bounds the memory of the steps between
            out[part] = operation(out[part], values[part])
        start += len(member)
    return out


def _column(values: Tensor, i: int) -> Tensor:
    return values[:, i].view(-1, 1, 1, 1)


def _blend_batch(start: Tensor | float, end: Tensor, factor: Tensor) -> Tensor:
    return (start + factor * (end - start)).clamp_(0, 255).to(torch.uint8)


def _luma_batch(x: Tensor) -> Tensor:
    red, green, blue = x.int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # (n, 1, H, W)


def _brightness_batch(x: Tensor, values: Tensor) -> Tensor:
    return _blend_batch(0.0, x.float(), _column(values, BRIGHTNESS))


def _contrast_batch(x: Tensor, values: Tensor) -> Tensor:
    mean = (_luma_batch(x).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _blend_batch(mean, x.float(), _column(values, CONTRAST))


def _saturation_batch(x: Tensor, values: Tensor) -> Tensor:
    return _blend_batch(_luma_batch(x).float(), x.float(), _column(values, SATURATION))


def _hue_batch(x: Tensor, values: Tensor) -> Tensor:
    hues, chromas, shares = _hue_tables_on(x.device)
    x = x.int()
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)  # (n, H, W)
    spread, below = value - low, 2 * value + low - x.sum(1, dtype=torch.int32)
    last = torch.where(green == value, (blue != low).int() + 2, (red != low).int() + 4)
    order = torch.where(red == value, (blue != low).int(), last)
    hue = (hues[order << 16 | spread << 8 | below] + values[:, HUE].int().view(-1, 1, 1)) & 0xFF
    chroma = chromas[spread << 8 | value]
    return torch.stack([value + 0.5 - share[hue] * chroma for share in shares], 1).to(torch.uint8)


@cache
def _hue_tables_on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hues, *others = (torch.from_numpy(table).to(device) for table in hue_tables())
    return hues.int(), *others


_JITTER_BATCH = (_brightness_batch, _contrast_batch, _saturation_batch, _hue_batch)


def _grey_batch(x: Tensor, _values: Tensor) -> Tensor:
    return _luma_batch(x).to(torch.uint8).expand_as(x)


def _flip_batch(x: Tensor, _values: Tensor) -> Tensor:
    return x.flip(-1)


def _blur_batch(r: int, x: Tensor, values: Tensor) -> Tensor:
    """`box_blur` of images whose boxes all reach as far; int32 wraps around at 2^32, and its top byte is right."""
    w, v = (_column(values, i).int() for i in (4, 5))
    x = x.int()
    for axis in (-1, -2):
        n, repeat = x.shape[axis], [1] * x.ndim
        repeat[axis] = r + 1
        for _ in range(3):
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
            padded = torch.cat([first.repeat(repeat), x, last.repeat(repeat)], axis)
            edges = padded.narrow(axis, 0, n) + padded.narrow(axis, 2 * r + 2, n)
            inner = sum((padded.narrow(axis, i, n) for i in range(2, 2 * r + 2)), start=padded.narrow(axis, 1, n))
            x = ((inner * w + edges * v + (1 << 23)) >> 24) & 0xFF
    return x.to(torch.uint8)


# ------------------------------------------------------------------------------------------------------ views
# A view is called as view(image, rng) -> (3, size, size): a partial, which a spawned worker can receive.
def train_view(preprocess: Preprocess) -> View:
    """SLIP's view for image and text: a crop of half to all of the image; no flip: captions name sides."""
    return partial(_train, preprocess)


def ssl_view(preprocess: Preprocess) -> View:
    """SLIP's view for SimCLR, drawn twice for each image: crop, colour jitter, grey, blur and flip."""
    return partial(_ssl, preprocess)


def eval_view(preprocess: Preprocess) -> View:
    """The image without chance: its centre ("slip") or all of it ("medclip"). Takes no generator."""
    return partial(_eval, preprocess)


def as_view(preprocess: Preprocess | View) -> View:
    """The evaluation view of a preparation; a view, another library's, stays what it is."""
    return eval_view(preprocess) if isinstance(preprocess, Preprocess) else preprocess


def train_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """`train_view` before normalisation: `preprocess.pixels(...)` to uint8 (1 or 3, size, size)."""
    return random_resized_crop(pixels, preprocess.size, (0.5, 1.0), rng)


def ssl_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Colour]:
    """The crop of `ssl_view` (1 or 3, size, size), and what has to happen to its colours."""
    return random_resized_crop(pixels, preprocess.size, (0.08, 1.0), rng), draw_colour(rng)


def _train(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator) -> Tensor:
    return preprocess.normalise(train_pixels(preprocess, preprocess.pixels(img), rng))


def _ssl(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator) -> Tensor:
    pixels, colour = ssl_pixels(preprocess, preprocess.pixels(img), rng)
    return preprocess.normalise(torch.from_numpy(apply_colour(pixels.numpy(), colour).copy()))


def _eval(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
    img = preprocess.open(img)
    if preprocess.prepare == "medclip":
        return preprocess.tensor(img.resize((preprocess.size, preprocess.size), Image.Resampling.BICUBIC))
    short, size = min(img.size), preprocess.size
    width, height = (size if side == short else int(size * side / short) for side in img.size)
    img = img.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return preprocess.tensor(img.crop((left, top, left + size, top + size)))
