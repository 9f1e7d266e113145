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
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from inputs.colour import Colour, draw_colour, luma
from inputs.images import pixels_of, to_8_bits, to_rgb8
from inputs.sizes import Size, as_size, height_width

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MEDCLIP = 0.5862785803043838, 0.27950088968644304  # of grey images
MEDCLIP_MEAN = (_MEDCLIP[0], _MEDCLIP[0], _MEDCLIP[0])
MEDCLIP_STD = (_MEDCLIP[1], _MEDCLIP[1], _MEDCLIP[1])
PREPARES = ("slip", "medclip", "cover", "squash", "fit")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
View = Callable[[Image.Image, np.random.Generator | None], Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Preparation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """What an image tower expects: size, normalisation per channel, how an image of another shape is brought to it.

    `prepare="slip"`: RGB; evaluation resizes an image until it covers `size` and takes the centre.
    `prepare="medclip"`: grey, centred on black of the shape of `size` and at least as large, in three equal channels.

    Towers of other libraries are evaluated on images prepared as there: RGB, resized by `interpolation` to
    `resize_to` (None: `size`), which they cover, are squashed to, or fit into, and then the centre of `size`, on `fill`
    where they do not fill it. Of an odd margin transformers leaves the smaller part above and left (`floor`), the
    others round to an even pixel.
    """

    size: Size = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    prepare: str = "slip"
    interpolation: str = "bilinear"
    resize_to: Size | None = None
    fill: int = 0
    floor: bool = False

    def __post_init__(self) -> None:
        if self.prepare not in PREPARES:
            raise ValueError(f"unknown preparation {self.prepare!r}; choose from {', '.join(PREPARES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; choose from {', '.join(INTERPOLATIONS)}")
        object.__setattr__(self, "size", as_size(self.size))
        if self.resize_to is not None:
            object.__setattr__(self, "resize_to", as_size(self.resize_to))
        for name in ("mean", "std"):  # a checkpoint brings lists
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"{name} needs three values, one a channel, not {values}")
            object.__setattr__(self, name, values)

    def to_dict(self) -> dict:
        """Plain values for a checkpoint."""
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.prepare in ("slip", "medclip"):
            for name in ("interpolation", "resize_to", "fill", "floor"):
                del found[name]
        return found

    @classmethod
    def from_dict(cls, values: dict) -> Preprocess:
        """The reverse of `to_dict`; ValueError names settings that are not known."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown preprocessing settings: {', '.join(sorted(unknown))}")
        return cls(**values)

    def at(self, size: Size) -> Preprocess:
        """The same for images of another size."""
        if self.resize_to is None:
            return replace(self, size=size)
        pairs = zip(height_width(size), height_width(self.resize_to), height_width(self.size), strict=True)
        height, width = (round(new * before / old) for new, before, old in pairs)
        return replace(self, size=size, resize_to=(height, width))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return height_width(self.size)

    def whole(self, img: Image.Image) -> Image.Image:
        """The whole image as the views take it: RGB or grey, or ("medclip") grey and padded; idempotent."""
        if self.prepare != "medclip":
            return to_8_bits(img)
        return pad_to_shape(img if img.mode == "L" else to_rgb8(img).convert("L"), self.size)

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """`whole` for uint8 planes (1 or 3, H, W), which the training views take; idempotent."""
        pixels = pixels_of(to_8_bits(image)) if isinstance(image, Image.Image) else image
        if self.prepare != "medclip":
            return pixels
        pixels = grey_if_equal(pixels)
        grey = pixels if len(pixels) == 1 else torch.from_numpy(luma(pixels.numpy()))
        height, width = grey.shape[1:]
        canvas = padded_shape(height, width, self.size)
        if (height, width) == canvas:
            return grey
        black = grey.new_zeros(1, *canvas)
        top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
        black[:, top : top + height, left : left + width] = grey
        return black

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


def padded_shape(height: int, width: int, size: Size) -> tuple[int, int]:
    """The least (H, W) of the proportions of `size`, and no smaller than it, that hold `height` x `width` pixels.

    To the nearest pixel in one of the two: an image that has been padded is left as it is.
    """
    h, w = height_width(size)
    tall, wide = (height, round(height * w / h)), (round(width * h / w), width)
    if (height, width) in (tall, wide):
        found = height, width
    else:
        found = tall if tall[1] >= width else wide
    return found if found[0] >= h and found[1] >= w else (h, w)


def pad_to_shape(img: Image.Image, size: Size) -> Image.Image:
    """The image in the middle of black of `size` or more pixels (MedCLIP's preparation, there a square)."""
    height, width = padded_shape(img.height, img.width, size)
    if img.size == (width, height):
        return img
    black = Image.new(img.mode, (width, height))
    black.paste(img, ((width - img.width) // 2, (height - img.height) // 2))
    return black


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


def random_resized_crop(pixels: Tensor, size: Size, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A part of random area (fraction in `scale`) and aspect (3/4 to 4/3 of the size's own): uint8 (C, H, W).

    Resized with the antialiased triangle that Pillow calls bilinear, on 8 bits. C is 1 where the part is grey: what
    follows is the less work, and here, where there is little to look at, is the place to find out.
    """
    height, width = pixels.shape[1:]
    shape = height_width(size)
    top, left, height, width = _crop_box(width, height, scale, rng, shape[1] / shape[0])
    part = pixels[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # the layout in which it is fastest
    return grey_if_equal(F.interpolate(part, shape, mode="bilinear", antialias=True)[0])


def _crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator, shape: float = 1.0
) -> tuple[int, int, int, int]:
    """(top, left, height, width) by torchvision's rule: ten attempts, else the largest centred part.

    The aspect, width over height, is log-uniform from 3/4 to 4/3 of `shape`.
    """
    low, high = 3 / 4 * shape, 4 / 3 * shape
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))  # width over height
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


# A view is called as view(image, rng) -> (3, H, W): a partial, which a spawned worker can receive.
def eval_view(preprocess: Preprocess) -> View:
    """The image without chance: its centre ("slip") or all of it ("medclip"). Takes no generator."""
    return partial(_eval, preprocess)


def linear_eval_view(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
    """SLIP's view for linear evaluation: the image covers 8/7 of the size (256 for 224), then the centre."""
    if preprocess.prepare != "slip":  # all of the image
        return _eval(preprocess, img)
    h, w = preprocess.shape
    return preprocess.tensor(centre_crop(preprocess.whole(img), preprocess.size, (round(h * 8 / 7), round(w * 8 / 7))))


def linear_train_view(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator) -> Tensor:
    """SLIP's view for linear classification: a crop of 0.08 to 1 of the area, flipped half of the time."""
    view = random_resized_crop(preprocess.pixels(img), preprocess.size, (0.08, 1.0), rng)
    return preprocess.normalise(view.flip(-1) if rng.random() < 0.5 else view)


def takes_grey(view: object) -> bool:
    """Whether it is one of the views here, to which a grey image may come as one plane (L): the same view, sooner."""
    return isinstance(view, partial) and view.func in (_eval, linear_eval_view, linear_train_view)


def as_view(preprocess: Preprocess | View) -> View:
    """The evaluation view of a preparation; a view, another library's, stays what it is."""
    return eval_view(preprocess) if isinstance(preprocess, Preprocess) else preprocess


def train_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """SLIP's view for image and text: a crop of half to all of the image; no flip, since captions name sides.

    `preprocess.pixels(...)` to uint8 (1 or 3, H, W).
    """
    return random_resized_crop(pixels, preprocess.size, (0.5, 1.0), rng)


def ssl_pixels(preprocess: Preprocess, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Colour]:
    """SLIP's view for SimCLR, drawn twice for each image: a crop (1 or 3, H, W), and what happens to it then."""
    return random_resized_crop(pixels, preprocess.size, (0.08, 1.0), rng), draw_colour(rng)


EXTREME = 8  # times the pixels that count: then the part that stays is cut out first, or a strip would take gigabytes


def centre_crop(
    img: Image.Image,
    size: Size,
    cover: Size | None = None,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    floor: bool = False,
) -> Image.Image:
    """The image resized (antialiased) until it just covers `cover` (default: `size`), then the central `size`.

    For a square that is torchvision's Resize of the short side and CenterCrop, and the same whether the whole image is
    resized, as there, or only the part that stays.
    """
    (h, w), (tall, wide) = height_width(size), height_width(size if cover is None else cover)
    if tall * img.width >= wide * img.height:  # the height decides
        height, width = tall, tall * img.width // img.height
    else:
        height, width = wide * img.height // img.width, wide
    left, top = ((width - w) // 2, (height - h) // 2) if floor else (round((width - w) / 2), round((height - h) / 2))
    if width * height <= EXTREME * tall * wide:
        return img.resize((width, height), resample).crop((left, top, left + w, top + h))
    x, y = img.width / width, img.height / height
    box = (left * x, top * y, min((left + w) * x, img.width), min((top + h) * y, img.height))
    return img.resize((w, h), resample, box=box)


def _eval(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
    img = preprocess.whole(img)
    if preprocess.prepare == "medclip":
        return preprocess.tensor(img.resize((preprocess.shape[1], preprocess.shape[0]), Image.Resampling.BICUBIC))
    if preprocess.prepare == "slip":
        return preprocess.tensor(centre_crop(img, preprocess.size))
    resample, before = INTERPOLATIONS[preprocess.interpolation], preprocess.resize_to or preprocess.size
    if preprocess.prepare == "cover":
        return preprocess.tensor(centre_crop(img, preprocess.size, before, resample, preprocess.floor))
    height, width = height_width(before)
    if preprocess.prepare == "fit":
        ratio = max(img.height / height, img.width / width)
        height, width = round(img.height / ratio), round(img.width / ratio)
    return preprocess.tensor(_central(img.resize((width, height), resample), preprocess.shape, preprocess.fill))


def _central(img: Image.Image, shape: tuple[int, int], fill: int) -> Image.Image:
    """The central (H, W) of an image, on grey `fill` where it is smaller; torchvision's rounding."""
    height, width = shape
    if img.width < width or img.height < height:
        ground = Image.new(img.mode, (max(img.width, width), max(img.height, height)), (fill,) * len(img.getbands()))
        ground.paste(img, ((ground.width - img.width) // 2, (ground.height - img.height) // 2))
        img = ground
    x, y = round((img.width - width) / 2), round((img.height - height) / 2)
    return img.crop((x, y, x + width, y + height))
