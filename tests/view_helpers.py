"""Images, and statistics of the views that are drawn of them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_2samp

from inputs.colour import apply_colour
from inputs.images import pixels_of
from inputs.transforms import Preprocess, random_resized_crop, ssl_pixels, train_pixels


def image(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards, blue is a fine pattern: every step leaves its mark."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), 255 * ((x // 2 + y // 2) % 2))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def grainy(width: int = 80, height: int = 60) -> Image.Image:
    """Noise on every pixel, in which a blur that is nearly the right one shows."""
    noise = np.random.default_rng(5).normal(128, 50, (height, width, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def planes(img: Image.Image) -> np.ndarray:
    array = np.asarray(img)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def resized(img: Image.Image, size: int = 32) -> Image.Image:
    """The whole image as our crop resizes it, for torchvision's colour operations to start from."""
    script = Script(1.0, np.log(img.width / img.height), 0, 0)
    pixels = random_resized_crop(pixels_of(img), size, (0.08, 1), script)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def statistics(view: torch.Tensor) -> list[float]:
    """Means and std of the channels, asymmetry left to right and high-frequency energy."""
    columns = torch.arange(view.shape[-1], dtype=torch.float32) - (view.shape[-1] - 1) / 2
    return [
        *view.mean((1, 2)).tolist(),
        *view.std((1, 2)).tolist(),
        (view[0].mean(0) * columns).mean().item(),
        view[2].diff(dim=1).abs().mean().item(),
    ]


def draws(view, n: int = 400) -> np.ndarray:
    return np.array([statistics(view(i)) for i in range(n)])  # (n, statistics)


def least_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    return min(ks_2samp(a, b, method="asymp").pvalue for a, b in zip(ours.T, theirs.T, strict=True))


class Script:
    """A generator that returns the numbers of a list, one for each call."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def __call__(self, *_):
        return self.numbers.pop(0)

    random = uniform = integers = permutation = __call__


class TrainView:
    """SLIP's view for image and text, from an image to normalised floats, as the loader and the device make it."""

    def __init__(self, preprocess: Preprocess):
        self.preprocess = preprocess

    def __call__(self, img, rng) -> torch.Tensor:
        return self.preprocess.normalise(train_pixels(self.preprocess, self.preprocess.pixels(img), rng))


class SslView(TrainView):
    """SLIP's view for SimCLR."""

    def __call__(self, img, rng) -> torch.Tensor:
        pixels, colour = ssl_pixels(self.preprocess, self.preprocess.pixels(img), rng)
        return self.preprocess.normalise(torch.from_numpy(apply_colour(pixels.numpy(), colour).copy()))
