"""Pictures to tensors: reading at 8 bits, a model's own preparation, the views of training and evaluation.

The views follow SLIP (Mu et al. 2021), whose pipeline was torchvision's first transforms on Pillow
pictures: the same distribution, and the same values once the random numbers are drawn. Every random number
comes from the generator that the caller passes, so that a sample depends on nothing but its seed, epoch and
index.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEDCLIP_MEAN = (0.5862785803043838,) * 3
MEDCLIP_STD = (0.27950088968644304,) * 3
PREPARES = ("slip", "medclip")
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3
View = Callable[[Image.Image, np.random.Generator | None], torch.Tensor]


# ------------------------------------------------------------------------------------------- reading pictures
class BrokenPicture(ValueError):
    """A picture that cannot be decoded; the message names it."""


# What the decoders of Pillow and pydicom raise on damaged files, and on files too large to be pictures.
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
    low values are bright. A picture of one value gives zeros; a value that is not finite gives 0. Inversion
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
    """Any Pillow picture as RGB with 8 bits.

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


def decode_picture(data: bytes, name: str) -> Image.Image:
    """The picture in `data` as RGB with 8 bits. Raises BrokenPicture with `name` in the message."""
    try:
        img = Image.open(io.BytesIO(data))
        img.load()
        return to_rgb8(img)
    except _DECODE_ERRORS as error:
        raise BrokenPicture(f"cannot decode the picture {name}: {error}") from error


def read_picture(path: str | Path) -> Image.Image:
    """The picture at `path` (anything Pillow reads, or a `.dcm`) as RGB with 8 bits.

    Raises FileNotFoundError for an absent file and BrokenPicture for one that cannot be decoded; both name
    it.
    """
    decode = _decode_dicom if Path(path).suffix.lower() == ".dcm" else decode_picture
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, or what the disk cannot read
        raise BrokenPicture(f"cannot read the picture {path}: {error}") from error
    return decode(data, str(path))


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
        raise BrokenPicture(f"cannot decode the picture {name}: {error}") from error
    return Image.fromarray(grey).convert("RGB")


def _first(value: object) -> float | None:
    """The first of DICOM's one or many values."""
    if value is None or value == "":
        return None
    return float(value) if not hasattr(value, "__getitem__") else _first(value[0] if len(value) else None)


# ------------------------------------------------------------------------------------------------ preparation
@dataclass(frozen=True)
class Preprocess:
    """What an image tower expects: side in pixels, normalisation per channel, how a picture becomes a square.

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
        """The whole picture as the views take it: RGB ("slip") or a grey square ("medclip"); idempotent."""
        if self.prepare == "slip":
            return to_rgb8(img)
        return pad_to_square(img if img.mode == "L" else to_rgb8(img).convert("L"), self.size)

    def tensor(self, img: Image.Image) -> torch.Tensor:
        """A view, RGB or grey, as a normalised float tensor (3, H, W)."""
        pixels = torch.from_numpy(np.array(img))  # (H, W, 3) or (H, W), uint8
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]  # (3 or 1, H, W)
        x = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (x - mean).div_(std)  # (3, H, W)


def pad_to_square(img: Image.Image, least: int) -> Image.Image:
    """The picture in the middle of a black square of `least` pixels or more (MedCLIP's preparation)."""
    side = max(least, *img.size)
    if img.size == (side, side):
        return img
    square = Image.new(img.mode, (side, side))
    square.paste(img, ((side - img.width) // 2, (side - img.height) // 2))
    return square


# ------------------------------------------------------------------------------------------ random operations
def random_resized_crop(
    img: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A part of random area (share in `scale`) and aspect (3/4 to 4/3, log-uniform), at size x size."""
    top, left, height, width = _crop_box(*img.size, scale, rng)
    return img.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)


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


def color_jitter(
    img: Image.Image,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    rng: np.random.Generator,
) -> Image.Image:
    """Scale brightness, contrast, saturation by 1 - x to 1 + x, turn hue by -x to x, in random order."""
    factors = [1 + x * rng.uniform(-1, 1) for x in (brightness, contrast, saturation)]
    factors.append(hue * rng.uniform(-1, 1))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(4):
        if img.mode == "RGB" or i < 2:  # a grey picture has no colour to change
            img = enhancers[i](img).enhance(factors[i]) if i < 3 else turn_hue(img, factors[3])
    return img


def turn_hue(img: Image.Image, turn: float) -> Image.Image:
    """An RGB picture with its hue moved by `turn` of the colour circle, in steps of 1/255 as torchvision does."""
    hue, saturation, value = img.convert("HSV").split()
    moved = np.array(hue) + np.array(int(turn * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


# ------------------------------------------------------------------------------------------------------ views
# A view is called as view(picture, rng) -> (3, size, size): a partial, which a spawned worker can receive.
def train_view(pre: Preprocess) -> View:
    """SLIP's view for image and text: a crop of half to all of the picture; no flip: captions name sides."""
    return partial(_train, pre)


def ssl_view(pre: Preprocess) -> View:
    """SLIP's view for SimCLR, drawn twice for each picture: crop, colour jitter, grey, blur and flip."""
    return partial(_ssl, pre)


def eval_view(pre: Preprocess) -> View:
    """The picture without chance: its centre ("slip") or all of it ("medclip"). Takes no generator."""
    return partial(_eval, pre)


def _train(pre: Preprocess, img: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    return pre.tensor(random_resized_crop(pre.open(img), pre.size, (0.5, 1.0), rng))


def _ssl(pre: Preprocess, img: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    img = random_resized_crop(pre.open(img), pre.size, (0.08, 1.0), rng)
    if rng.random() < 0.8:
        img = color_jitter(img, 0.4, 0.4, 0.4, 0.1, rng)
    if rng.random() < 0.2:
        img = img.convert("L")  # tensor() repeats it over the channels
    if rng.random() < 0.5:
        # Pillow's three box passes: a true Gaussian is another augmentation.
        img = img.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < 0.5:
        img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pre.tensor(img)


def _eval(pre: Preprocess, img: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
    img = pre.open(img)
    if pre.prepare == "medclip":
        return pre.tensor(img.resize((pre.size, pre.size), Image.Resampling.BICUBIC))
    short, size = min(img.size), pre.size
    width, height = (size if side == short else int(size * side / short) for side in img.size)
    img = img.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pre.tensor(img.crop((left, top, left + size, top + size)))
