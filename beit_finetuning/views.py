"""The views of fine-tuning, and what is mixed within a batch: timm's augmentations, drawn from the caller's generator.

timm draws from the process's own generators. Here they are seeded for the length of one view or one batch and put back
after it, so that a view depends on its seed, epoch and index alone, whichever process makes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torchvision import transforms

from inputs.sizes import Size
from inputs.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess, centre_crop, eval_view

INCEPTION = (0.5, 0.5, 0.5)  # BEiT's mean and std of each channel


@contextmanager
def drawn_from(rng: np.random.Generator) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's (CPU) generators from `rng` within the block; put them back after it."""
    seed = int(rng.integers(2**32))
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def beit_preprocess(size: Size, imagenet_mean_and_std: bool) -> Preprocess:
    """Images for the seed's models: normalised by 0.5 and 0.5, or by ImageNet's figures as SLIP's towers are."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet_mean_and_std else (INCEPTION, INCEPTION)
    return Preprocess(size=size, mean=mean, std=std)


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed; the defaults are those of BEiT's fine-tuning."""

    auto_augment: str = "rand-m9-mstd0.5-inc1"  # timm's notation; "" for none
    color_jitter: float = 0.4  # used where auto_augment is none
    interpolation: str = "bicubic"  # bicubic, bilinear or random
    erase_prob: float = 0.25
    erase_mode: str = "pixel"  # const, rand or pixel: what the erased part is filled with
    erase_count: int = 1
    flip_prob: float = 0.5  # of mirroring left and right


class TrainView:
    """An image to a normalised tensor (3, H, W): view(image, rng).

    Crop of 8% to all of the area, flip, rand-augment, erasing. Images of at most 32 pixels are padded by 4 and cropped
    in place of being resized, as is usual for CIFAR. MedCLIP's towers see the grey square that they know, in three
    equal channels until colours are changed.
    """

    def __init__(self, preprocess: Preprocess, augmentation: Augmentation = Augmentation()):  # noqa: B008, frozen
        self.preprocess = preprocess
        a, aspect = augmentation, preprocess.shape[1] / preprocess.shape[0]
        self.transform: Any = create_transform(
            preprocess.shape,
            is_training=True,
            ratio=(3 / 4 * aspect, 4 / 3 * aspect),
            color_jitter=a.color_jitter,
            auto_augment=a.auto_augment or None,
            interpolation=a.interpolation,
            re_prob=a.erase_prob,
            re_mode=a.erase_mode,
            re_count=a.erase_count,
            hflip=a.flip_prob,
            mean=preprocess.mean,
            std=preprocess.std,
        )
        for operation in operations(self.transform):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        if max(preprocess.shape) <= 32:
            self.transform.transforms[0] = transforms.RandomCrop(preprocess.shape, padding=4)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An RGB image to a normalised tensor (3, H, W); every random number comes from `rng`."""
        image = self.preprocess.whole(image).convert("RGB")
        with drawn_from(rng):
            return self.transform(image)


def operations(transform: Any) -> list[Any]:
    """The single augmentations of a policy of timm, where there is one."""
    return [op for step in transform.transforms for op in getattr(step, "ops", ())]


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, but for 0 bits, which the strongest level draws: black, as Pillow made of it before it refused that."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class EvalView:
    """An image to a normalised tensor (3, H, W), without chance: view(image).

    The image is resized (bicubic) to cover its size / `crop_pct` and the centre taken: 256 for 224, and all that covers
    from 384 pixels on. MedCLIP's towers see the whole image, as everywhere (inputs.transforms.eval_view).
    """

    def __init__(self, preprocess: Preprocess, crop_pct: float | None = None):
        shape = preprocess.shape
        if crop_pct is None:
            crop_pct = 224 / 256 if min(shape) < 384 else 1.0
        if not 0 < crop_pct <= 1:
            raise ValueError(f"the centre crop is a fraction above 0 and at most 1 of the short side, not {crop_pct:g}")
        self.preprocess = preprocess
        self.cover: Size | None = None  # for the evaluation view of pre-training
        if preprocess.prepare == "slip" and max(shape) > 32:
            self.cover = int(shape[0] / crop_pct), int(shape[1] / crop_pct)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """An RGB image to (3, H, W); the generator is not used."""
        if self.cover is None:
            return eval_view(self.preprocess)(image, rng)
        whole = self.preprocess.whole(image)
        return self.preprocess.tensor(centre_crop(whole, self.preprocess.size, self.cover, Image.Resampling.BICUBIC))


class Mix:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) within a batch, through timm.

    Args:
        mixup, cutmix: alpha of the Beta distribution of each; 0 for none.
        prob: of mixing a batch (or element) at all; `switch_prob` of CutMix where both are on.
        mode: batch, pair or elem: what shares one draw.
        smoothing: label smoothing inside the targets.
        minmax: CutMix by side fractions (low, high) in place of its alpha.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.1,
    ):
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"unknown way of mixing {mode!r}: choose batch, pair or elem")
        self.mix = Mixup(mixup, cutmix, minmax, prob, switch_prob, mode, True, smoothing, num_classes)

    def __call__(self, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), changed in place, and labels (B,) to images and soft targets (B, classes); B is even."""
        if len(images) % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, and {len(images)} is odd: --batch_size even"
            )
        with drawn_from(rng):
            return self.mix(images, labels)


class Criterion(nn.Module):
    """Cross-entropy in float32 against labels (B,) or soft targets (B, classes).

    Args:
        smoothing: of labels; soft targets of `Mix` carry theirs already, so that it is passed over for them.
        class_weights: (classes,), a factor on each class; None for none.
    """

    def __init__(self, smoothing: float = 0.1, class_weights: Tensor | None = None):
        super().__init__()
        self.smoothing = smoothing
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (B, classes) and labels (B,) or soft targets (B, classes) to the mean loss ()."""
        soft = target.is_floating_point()
        return nn.functional.cross_entropy(
            logits.float(),
            target.float() if soft else target,
            weight=self.class_weights,
            label_smoothing=0.0 if soft else self.smoothing,
        )
