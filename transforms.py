"""Images to tensors: a model's own preparation, the views of training and evaluation.

The views follow SLIP (Mu et al. 2021), whose pipeline was torchvision's first transforms on Pillow
images: the same distribution, and once the random numbers are drawn the same values, to one of 256 levels
where the crop is resized and to the bit in everything after. Every random number comes from the generator
that the caller passes, so that a sample depends on nothing but its seed, epoch and index.

Views of training are computed on uint8 planes (C, H, W), C = 1 where an image is grey: three equal channels
would take three times the work. Colours are changed by the loader's worker (`apply_colour`) or for a whole
batch on the accelerator (`apply_colour_batch`), to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from colour import Colour, draw_colour, luma
from images import UnreadableImage, decode_image, decode_pixels, pixels_of, read_image, read_picture, to_rgb8

__all__ = [  # with what others import from here
    "IMAGENET_MEAN", "IMAGENET_STD", "MEDCLIP_MEAN", "MEDCLIP_STD", "PREPARES", "Preprocess", "UnreadableImage", "View",
    "as_view", "centre_square", "decode_image", "decode_pixels", "eval_view", "pad_to_square", "random_resized_crop",
    "read_image", "read_picture", "ssl_pixels", "to_rgb8", "train_pixels",
]  # fmt: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MEDCLIP = 0.5862785803043838, 0.27950088968644304  # of grey images
MEDCLIP_MEAN = (_MEDCLIP[0], _MEDCLIP[0], _MEDCLIP[0])
MEDCLIP_STD = (_MEDCLIP[1], _MEDCLIP[1], _MEDCLIP[1])
PREPARES = ("slip", "medclip")
View = Callable[[Image.Image, np.random.Generator | None], Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Preparation
# ---------------------------------------------------------------------------------------------------------------------


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

    def whole(self, img: Image.Image) -> Image.Image:
        """The whole image as the views take it: RGB ("slip") or a grey square ("medclip"); idempotent."""
        if self.prepare == "slip":
            return to_rgb8(img)
        return pad_to_square(img if img.mode == "L" else to_rgb8(img).convert("L"), self.size)

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """`whole` for uint8 planes (1 or 3, H, W), which the training views take; idempotent."""
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
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def pad_to_square(img: Image.Image, least: int) -> Image.Image:
    """The image in the middle of a black square of `least` pixels or more (MedCLIP's preparation)."""
    side = max(least, *img.size)
    if img.size == (side, side):
        return img
    square = Image.new(img.mode, (side, side))
    square.paste(img, ((side - img.width) // 2, (side - img.height) // 2))
    return square


# ---------------------------------------------------------------------------------------------------------------------
# Random crops
# ---------------------------------------------------------------------------------------------------------------------


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


def random_resized_crop(pixels: Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A part of random area (fraction in `scale`) and aspect (3/4 to 4/3, log-uniform): uint8 (C, size, size).

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


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


# A view is called as view(image, rng) -> (3, size, size): a partial, which a spawned worker can receive.
def eval_view(preprocess: Preprocess) -> View:
    """The image without chance: its centre ("slip") or all of it ("medclip"). Takes no generator."""
    return partial(_eval, preprocess)


def as_view(preprocess: Preprocess | View) -> View:
    """The evaluation view of a preparation; a view, another library's, stays what it is."""
    return eval_view(preprocess) if isinstance(preprocess, Preprocess) else preprocess


def train_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """SLIP's view for image and text: a crop of half to all of the image; no flip, since captions name sides.

    `preprocess.pixels(...)` to uint8 (1 or 3, size, size).
    """
    return random_resized_crop(pixels, preprocess.size, (0.5, 1.0), rng)


def ssl_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Colour]:
    """SLIP's view for SimCLR, drawn twice for each image: a crop (1 or 3, size, size), and what happens to it then."""
    return random_resized_crop(pixels, preprocess.size, (0.08, 1.0), rng), draw_colour(rng)


EXTREME = 8  # times as long as wide: such an image is cropped before it is resized, or a strip would take gigabytes


def centre_square(img: Image.Image, short: int, size: int) -> Image.Image:
    """The short side resized to `short` pixels (bilinear, antialiased), then the central `size` x `size`.

    The same whether the whole image is resized, as torchvision does it, or only the part that stays.
    """
    width, height = (short if side == min(img.size) else int(short * side / min(img.size)) for side in img.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(img.size) <= EXTREME * min(img.size):
        return img.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    x, y = img.width / width, img.height / height
    box = (left * x, top * y, min((left + size) * x, img.width), min((top + size) * y, img.height))
    return img.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _eval(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
    img = preprocess.whole(img)
    if preprocess.prepare == "medclip":
        return preprocess.tensor(img.resize((preprocess.size, preprocess.size), Image.Resampling.BICUBIC))
    return preprocess.tensor(centre_square(img, preprocess.size, preprocess.size))
