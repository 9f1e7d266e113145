"""Colours of SLIP's SimCLR views (Mu et al. 2021, after MoCo v2): jitter, grey, blur and flip, drawn and applied.

Twice, to the same bits: in NumPy for one view, as the loader's worker has it (`apply_colour`), and in torch for a batch
on the accelerator (`apply_colour_batch`). One implementation in torch for both was tried: on one view on a CPU it takes
so much longer that a worker delivers a third to a half of the samples (`bench_data.py`, "torch alone").

Both do to the bit what torchvision's first transforms made Pillow do, which the published models were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# What happens to a view
# ---------------------------------------------------------------------------------------------------------------------


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Colour(NamedTuple):
    """What happens to the colours of one view after its crop, in the order of the fields; plain numbers."""

    jitter: bool = False
    order: tuple[int, int, int, int] = (BRIGHTNESS, CONTRAST, SATURATION, HUE)  # in which the four are jittered
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)  # at BRIGHTNESS, ... HUE (of the circle)
    grey: bool = False
    sigma: float = 0.0  # of the blur, in pixels; 0 for none
    flip: bool = False


class Colours(NamedTuple):
    """`Colour` of each of B views, as tensors in host memory."""

    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) int64
    factors: Tensor  # (B, 3) float32, of brightness, contrast and saturation
    hue: Tensor  # (B,) int64, steps of 1/255 of the circle
    grey: Tensor  # (B,) bool
    reach: Tensor  # (B,) int64, of the blur's box in pixels; -1 for no blur
    weights: Tensor  # (B, 2) int64, of the box within its reach and at its edge, in units of 2^-24
    flip: Tensor  # (B,) bool

    @classmethod
    def of(cls, colours: Sequence[Colour]) -> Colours:
        """What `draw_colour` drew for each of B views, side by side."""
        boxes = [_box_weights(colour.sigma) if colour.sigma else (-1, 0, 0) for colour in colours]
        return cls(
            jitter=torch.tensor([colour.jitter for colour in colours]),
            order=torch.tensor([colour.order for colour in colours]),
            factors=torch.tensor([colour.factors[:HUE] for colour in colours], dtype=torch.float32),
            hue=torch.tensor([int(255 * colour.factors[HUE]) for colour in colours]),
            grey=torch.tensor([colour.grey for colour in colours]),
            reach=torch.tensor([reach for reach, _, _ in boxes]),
            weights=torch.tensor([weights for _, *weights in boxes]),
            flip=torch.tensor([colour.flip for colour in colours]),
        )


def draw_colour(rng: np.random.Generator) -> Colour:
    """SLIP's numbers: jitter (0.4, 0.4, 0.4, 0.1) at 0.8, grey at 0.2, blur of 0.1 to 2 and flip at 0.5 each."""
    jitter, order, factors = rng.random() < 0.8, (0, 1, 2, 3), (1.0, 1.0, 1.0, 0.0)
    if jitter:
        brightness, contrast, saturation = (1 + 0.4 * rng.uniform(-1, 1) for _ in range(3))
        factors = (brightness, contrast, saturation, 0.1 * rng.uniform(-1, 1))
        first, second, third, fourth = map(int, rng.permutation(4))
        order = (first, second, third, fourth)
    grey = rng.random() < 0.2
    sigma = rng.uniform(0.1, 2.0) if rng.random() < 0.5 else 0.0
    return Colour(jitter, order, factors, grey, sigma, rng.random() < 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# One view, in NumPy
# ---------------------------------------------------------------------------------------------------------------------


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


def _blend(start: Any, end: np.ndarray, factor: float) -> np.ndarray:
    """start + factor * (end - start) in float32, cut to 0..255 and to whole numbers, as Pillow's enhancers do."""
    out = end.astype(np.float32)
    out -= start
    out *= np.float32(factor)
    out += start
    return out.clip(0, 255, out=out).astype(np.uint8)


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """(C, H, W) uint8 times `factor`, as torchvision does it on Pillow images."""
    return _blend(np.float32(0), pixels, factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean grey of the view, or towards it."""
    return _blend(np.float32(int(luma(pixels).mean(dtype=np.float64) + 0.5)), pixels, factor)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """(3, H, W) away from its own grey, or towards it."""
    return _blend(luma(pixels).astype(np.float32), pixels, factor)


def adjust_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """(3, H, W) with the hue moved by `turn` of the circle, in steps of 1/255 as torchvision does.

    Through HSV with 8 bits each, as Pillow goes: a channel is value minus a part of the chroma, which the
    hue gives.
    """
    hues, chromas, parts = hue_tables()
    # The hue depends on the order of the three channels (six cases) and on two differences between them: together the
    # index into a table of 6 * 256 * 256 entries.
    red, green, blue = pixels
    value = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    # `below` is the value minus the middle channel. The sum of three wraps around at 256, and comes back when the other
    # two are taken away.
    spread, below = value - low, value - (red + green + blue - value - low)
    last = np.where(green == value, (blue != low) + np.uint8(2), (red != low) + np.uint8(4))
    index = np.where(red == value, blue != low, last).astype(np.uint32)  # which channel is highest, which lowest
    for part in (spread, below):
        index <<= 8
        index |= part
    hue = np.take(hues, index) + np.uint8(int(turn * 255) % 256)  # a circle: what passes 255 begins at 0
    chroma = np.take(chromas, spread.astype(np.uint16) << 8 | value)
    value = value + np.float32(0.5)  # the cast to uint8 below cuts off, so that this rounds
    out = np.empty_like(pixels)
    for channel, part in zip(out, parts, strict=True):
        channel[...] = value - np.take(part, hue) * chroma
    return out


@cache
def hue_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `adjust_hue` reads, all from Pillow's own conversions.

    Hue (6 * 2^16,) uint8 by order of the channels, highest minus lowest, and highest minus middle; chroma
    after rounding to 8 bits of saturation (2^16,) float32 by highest minus lowest, and highest; the part
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
    parts = np.array(cases)[sixths.astype(int) % 6, :, np.arange(256)]  # (256, 3)
    return hues, chromas, np.ascontiguousarray(parts.T)


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _box_weights(sigma: float) -> tuple[int, int, int]:
    """(r, w, v): weights of one box pass in units of 2^-24, w within r of the centre and v at distance r + 1.

    Three such passes have the variance of a Gaussian (Gwosdek et al. 2011, "Theoretical foundations of
    Gaussian convolution by extended box filtering", section 3). In single precision where Pillow is.
    """
    single = np.float32
    variance = single(sigma) * single(sigma) / single(3)
    r = int((single(math.sqrt(12 * float(variance) + 1)) - 1) / 2)
    part = float(single((2 * r + 1) * (r * (r + 1) - 3 * float(variance))))
    radius = single(r) + single(part / (6 * float(variance - single((r + 1) ** 2))))
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
    for axis in (2, 1):  # rows, then columns: a box is separable
        n = x.shape[axis]
        shape = list(x.shape)
        shape[axis] += 2 * pad
        padded = np.empty(shape, dtype=np.uint32)
        # Views of the padded lines, moved by -pad to pad pixels: the sum over them is the sum over the box.
        shifted = [_along(padded, axis, i, i + n) for i in range(2 * pad + 1)]
        for _ in range(3):
            _along(padded, axis, pad, pad + n)[...] = x
            # Beyond the edge the last pixel is repeated.
            _along(padded, axis, 0, pad)[...] = _along(x, axis, 0, 1)
            _along(padded, axis, pad + n, None)[...] = _along(x, axis, n - 1, n)
            edges = shifted[0] + shifted[-1]
            edges *= v
            x = sum(shifted[2:-1], start=shifted[1]) * w
            x += edges
            # Weights are in units of 2^-24: half of one for rounding, then the integer part.
            x += np.uint32(1 << 23)
            x >>= np.uint32(24)
    return x.astype(np.uint8)


def _along(x: np.ndarray, axis: int, start: int, stop: int | None) -> np.ndarray:
    return x[:, start:stop] if axis == 1 else x[:, :, start:stop]


# ---------------------------------------------------------------------------------------------------------------------
# A batch, on any device, in torch
# ---------------------------------------------------------------------------------------------------------------------


# Columns of the numbers that travel to the device in one copy, behind the three factors and the hue.
_INNER, _EDGE = 4, 5


def apply_colour_batch(pixels: Tensor, colours: Colours) -> Tensor:
    """`apply_colour` for uint8 (B, 3, H, W) on any device.

    The images that undergo one operation are gathered by the host, so nothing waits for the device.
    """
    return run_plan(pixels, plan_batch(colours))


def plan_batch(colours: Colours) -> tuple[list[tuple[Callable, int]], Tensor, Tensor]:
    """On the host: each operation and how many images undergo it, those images' places, and the numbers (B, 6)."""
    groups: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        (operation, colours.jitter & (colours.order[:, place] == i))
        for place in range(4)
        for i, operation in enumerate(_JITTER_BATCH)
    ]
    groups.append((_grey_batch, colours.grey))
    groups += [(partial(_blur_batch, r), colours.reach == r) for r in range(int(colours.reach.max()) + 1)]
    groups.append((_flip_batch, colours.flip))

    members = [chosen.nonzero()[:, 0] for _, chosen in groups]
    positions = torch.cat(members)
    # float32 holds the integers up to 2^24
    values = torch.cat([colours.factors, colours.hue[:, None].float(), colours.weights.float()], 1)
    sizes = [(operation, len(member)) for (operation, _), member in zip(groups, members, strict=True)]
    return sizes, positions, values


def run_plan(pixels: Tensor, plan: tuple[list[tuple[Callable, int]], Tensor, Tensor]) -> Tensor:
    """What `plan_batch` has planned, on the device of the pixels."""
    sizes, positions, values = plan
    if pixels.device.type == "cuda":
        positions, values = positions.pin_memory(), values.pin_memory()
    positions = positions.to(pixels.device, non_blocking=True)
    values = values.to(pixels.device, non_blocking=True)
    out, start = pixels.clone(), 0
    for operation, n in sizes:
        for part in positions[start : start + n].split(256):  # bounds the memory of the steps between
            out[part] = operation(out[part], values[part])
        start += n
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
    hues, chromas, parts = _hue_tables_on(x.device)
    x = x.int()
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)  # (n, H, W)
    spread, below = value - low, 2 * value + low - x.sum(1, dtype=torch.int32)  # as in adjust_hue, (n, H, W) each
    last = torch.where(green == value, (blue != low).int() + 2, (red != low).int() + 4)
    order = torch.where(red == value, (blue != low).int(), last)
    hue = (hues[order << 16 | spread << 8 | below] + values[:, HUE].int().view(-1, 1, 1)) & 0xFF
    chroma = chromas[spread << 8 | value]
    return torch.stack([value + 0.5 - part[hue] * chroma for part in parts], 1).to(torch.uint8)


@cache
def _hue_tables_on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hues, chromas, parts = (torch.from_numpy(table).to(device) for table in hue_tables())
    return hues.int(), chromas, parts


_JITTER_BATCH = (_brightness_batch, _contrast_batch, _saturation_batch, _hue_batch)


def _grey_batch(x: Tensor, values: Tensor) -> Tensor:
    return _luma_batch(x).to(torch.uint8).expand_as(x)


def _flip_batch(x: Tensor, values: Tensor) -> Tensor:
    return x.flip(-1)


def _blur_batch(r: int, x: Tensor, values: Tensor) -> Tensor:
    """`box_blur` of images whose boxes all reach as far; int32 wraps around at 2^32, and its top byte is right."""
    w, v = (_column(values, i).int() for i in (_INNER, _EDGE))  # (n, 1, 1, 1)
    x = x.int()
    for axis in (-1, -2):
        n, repeat = x.shape[axis], [1] * x.ndim
        repeat[axis] = r + 1
        for _ in range(3):
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
            padded = torch.cat([first.repeat(repeat), x, last.repeat(repeat)], axis)
            edges = padded.narrow(axis, 0, n) + padded.narrow(axis, 2 * r + 2, n)
            inner = sum((padded.narrow(axis, i, n) for i in range(2, 2 * r + 2)), start=padded.narrow(axis, 1, n))
            # The sum reaches 2^32 and int32 wraps into the negative; its bits are right, and the mask takes off those
            # that the arithmetic shift has filled with the sign.
            x = ((inner * w + edges * v + (1 << 23)) >> 24) & 0xFF
    return x.to(torch.uint8)
