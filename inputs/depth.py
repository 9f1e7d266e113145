"""Grey values of more than 8 bits to 8: through a stated window, or between percentiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from inputs.display import AS_STORED, BY_HAND, STRETCHED

WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3
PERCENTILES = (0.5, 99.5)  # what an image without a window is shown between


def window_to_8bit(
    array: np.ndarray,
    center: float | None = None,
    width: float | None = None,
    invert: bool = False,
    function: str = "LINEAR",
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Map grey values of any range and type to uint8, same shape.

    With `center` and `width` by that DICOM VOI window and its `function` (one of WINDOW_FUNCTIONS), else linearly from
    the 0.5 to the 99.5 percentile of the finite values. `invert` is for MONOCHROME1, whose low values are bright. An
    image of one value gives zeros; a value that is not finite gives 0. Inversion comes last. `counts`, of the same
    shape, says how often each value stands in the image, where `array` holds each once.
    """
    if function not in WINDOW_FUNCTIONS:
        raise ValueError(f"unknown window function {function!r}; choose from {', '.join(WINDOW_FUNCTIONS)}")
    x = np.asarray(array, dtype=np.float32 if array.dtype.itemsize <= 2 else np.float64)
    finite = np.isfinite(x)
    if center is None or width is None:
        low, high = _percentiles(x[finite], None if counts is None else counts[finite])
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


def _percentiles(values: np.ndarray, counts: np.ndarray | None) -> tuple[Any, Any]:
    """The 0.5 and 99.5 percentiles of floats, each standing `counts` times; zeros where there are none."""
    if not values.size:
        return 0.0, 0.0
    if counts is None:
        low, high = np.percentile(values, PERCENTILES)
        return low, high
    # As NumPy has it: between two neighbours in the sorted image. The counts say which values those are.
    order = np.argsort(values)
    upto = np.cumsum(counts[order])
    places = (int(upto[-1]) - 1) * np.true_divide(PERCENTILES, 100)
    below = np.floor(places).astype(np.int64)
    first, second = (
        values[order[np.searchsorted(upto, k, "right")]] for k in (below, np.minimum(below + 1, upto[-1] - 1))
    )
    part, step = places - below, second - first
    low, high = np.where(part < 0.5, first + step * part, second - step * (1 - part))  # NumPy's rounding too
    return low, high


def to_8bit(
    values: np.ndarray, window: tuple[float, float] | None = None, counts: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Values of any depth to uint8, same shape, and which of `display.SHOWN` they come from.

    Those of an 8-bit image are taken as they are: it may be stored in 16 bits, or spread over their range (times 257,
    as PNG does it, or 256). Others go through `window` (center, width) where it is given, else between percentiles.
    `counts` as in `window_to_8bit`.
    """
    if counts is None and values.dtype != np.uint8 and (levels := levels_of(values)) is not None:
        each, counts = levels.counted()
        shown, how = to_8bit(each, window, counts)
        return levels.spread(each, shown), how
    if (stored := _of_8_bits(values)) is not None:
        return stored, AS_STORED
    if window is not None:
        return window_to_8bit(values, *window), BY_HAND
    return window_to_8bit(values, counts=counts), STRETCHED


@dataclass(frozen=True)
class Levels:
    """An image of whole numbers by its different values: what is done to each value is done once, and not per pixel."""

    image: np.ndarray  # of 8 or 16 bits, any shape, contiguous
    first: int
    last: int  # its least and greatest value

    @property
    def range(self) -> np.ndarray:
        """(n,) all values from the first to the last, of the image's type, whether they occur or not."""
        return np.arange(self.first, self.last + 1).astype(self.image.dtype)

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the values that occur, ascending, of the image's type, and (n,) int64 how often each does."""
        bits = _unsigned(self.range)
        counts = np.zeros(int(bits.max()) + 1, np.int64)
        for part in _parts(_unsigned(self.image), 1 << 17):
            counts += np.bincount(part, minlength=len(counts))
        there = counts[bits] > 0
        return self.range[there], counts[bits][there]

    def spread(self, values: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """`shown`, uint8 (n,), one for each of `values`, to uint8 of the image's shape."""
        table = np.zeros(1 << 8 * self.image.dtype.itemsize, np.uint8)
        table[_unsigned(values)] = shown
        out = np.empty(self.image.shape, np.uint8)
        for part, into in zip(_parts(_unsigned(self.image)), _parts(out), strict=True):
            np.take(table, part, out=into, mode="clip")  # unlike "raise", without a copy of `into`
        return out


def levels_of(image: np.ndarray) -> Levels | None:
    """An image's `Levels`; None where it has no whole numbers of 8 or 16 bits, or is too small to pay."""
    if image.dtype.kind not in "iu" or image.dtype.itemsize > 2 or image.size < 1 << 17:
        return None
    image = np.ascontiguousarray(image)
    return Levels(image, int(image.min()), int(image.max()))


def _unsigned(values: np.ndarray) -> np.ndarray:
    """The same bits as numbers without a sign, by which tables are read."""
    return values.view(values.dtype.str.replace("i", "u"))


def _parts(image: np.ndarray, size: int = 1 << 14) -> list[np.ndarray]:
    """Views of a contiguous image, one after the other: NumPy makes 8 bytes of each number that it looks up, which
    should stay in the cache."""
    flat = image.reshape(-1)
    return [flat[i : i + size] for i in range(0, flat.size, size)]


def _of_8_bits(values: np.ndarray) -> np.ndarray | None:
    """The values as uint8 where they are those of an 8-bit image."""
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if 0 <= low and high <= 255 and (values.dtype.kind in "iu" or (values == np.rint(values)).all()):
        return values.astype(np.uint8)
    if values.dtype.kind in "iu" and 0 <= low and high <= 65535:
        for factor in (257, 256):
            if not (values % factor).any():
                return (values // factor).astype(np.uint8)
    return None
