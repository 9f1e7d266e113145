"""Drawing tools: a scene in millimetres seen through a frame, random fields, soft points, blur."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True)
class Frame:
    """A window on a scene: `shape` (H, W) pixels of size `mm`, upper left corner `top`, `left` in mm."""

    shape: tuple[int, int]
    mm: float
    top: float = 0.0
    left: float = 0.0

    @cached_property
    def y(self) -> np.ndarray:  # (H, 1) pixel centres, mm
        """(H, 1) pixel centres in mm."""
        return (self.top + self.mm * (np.arange(self.shape[0]) + 0.5))[:, None]

    @cached_property
    def x(self) -> np.ndarray:  # (1, W)
        """(1, W) pixel centres in mm."""
        return (self.left + self.mm * (np.arange(self.shape[1]) + 0.5))[None, :]


def logistic(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


@lru_cache(maxsize=256)
def spline_weights(n: int, mm: float, start: float, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Cubic B-spline weights (n, m) of n pixel centres, `mm` apart, on the lattice points (m,) in reach."""
    u = (start + mm * (np.arange(n) + 0.5)) / spacing
    cell = np.floor(u).astype(int)
    t = u - cell
    s = 1 - t
    taps = np.stack([s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3], axis=1) / 6
    lattice = np.arange(cell[0] - 1, cell[-1] + 3)
    weights = np.zeros((n, len(lattice)))
    weights[np.arange(n)[:, None], (cell - cell[0])[:, None] + np.arange(4)] = taps
    return weights, lattice


def power_law(tile: np.ndarray, frame: Frame, longest: float) -> np.ndarray:
    """A random field (H, W) of about unit variance whose power falls as 1 / f^3, as that of breast tissue.

    (Burgess, Jacobson and Judy, Medical Physics 28, 2001.) Octaves of smooth noise over lattices of `longest`
    mm, half of it, and so on down to the pixel. The lattice values come from `tile` (n, n), repeated and
    shifted from octave to octave, so that every frame sees the same field.
    """
    field, spacing, octave = np.zeros(frame.shape), longest, 0
    while spacing >= max(2 * frame.mm, 0.2):
        wy, rows = spline_weights(frame.shape[0], frame.mm, frame.top, spacing)
        wx, columns = spline_weights(frame.shape[1], frame.mm, frame.left, spacing)
        values = tile[np.ix_((rows + 17 * octave) % len(tile), (columns + 29 * octave) % len(tile))]
        # Power 1 / f^3 in two dimensions: the variance of an octave is proportional to its wavelength.
        field += math.sqrt(spacing / longest) * (wy @ values @ wx.T)
        spacing, octave = spacing / 2, octave + 1
    # The spline divides std by 2.09; the octaves' variances 1 + 1/2 + 1/4 ... add up to 2.
    return field * (2.09 / math.sqrt(2.0))


@lru_cache(maxsize=32)
def gaussian_response(shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Fourier response (H, W // 2 + 1) of a Gaussian blur of `sigma` pixels."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    return np.exp(-2.0 * (math.pi * sigma) ** 2 * (fy**2 + fx**2))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W) convolved with a Gaussian of deviation `sigma` pixels, periodic at the edges."""
    return np.fft.irfft2(np.fft.rfft2(image) * gaussian_response(image.shape, sigma), s=image.shape)


def deposit(points: np.ndarray, amounts: np.ndarray, frame: Frame) -> np.ndarray:
    """Spread amounts (n,), mm^2, at points (n, 2) of (y, x), mm, over pixels (H, W); blur as film does."""
    height, width = frame.shape
    v = (points - (frame.top, frame.left)) / frame.mm - 0.5  # pixel units
    cell = np.floor(v).astype(int)
    near = ((cell >= 0) & (cell < (height - 1, width - 1))).all(axis=1)
    cell, part, amounts = cell[near], (v - cell)[near], amounts[near] / frame.mm**2
    canvas = np.zeros(height * width)
    for dy in (0, 1):
        for dx in (0, 1):  # bilinear: each point reaches four pixels
            fraction = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
            pixel = (cell[:, 0] + dy) * width + cell[:, 1] + dx
            canvas += np.bincount(pixel, amounts * fraction, height * width)
    return blur(canvas.reshape(height, width), round(max(0.6, 0.08 / frame.mm), 2))


def turn(points: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Rotate points (..., 2) of (y, x) by an angle that broadcasts over them."""
    c, s = np.cos(angle), np.sin(angle)
    y, x = points[..., 0], points[..., 1]
    return np.stack([c * y + s * x, c * x - s * y], axis=-1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """0 to 1 as 0 to 255, rounded; what lies outside is cut."""
    return np.clip(np.rint(255.0 * image), 0, 255).astype(np.uint8)
