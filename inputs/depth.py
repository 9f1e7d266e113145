"""Grey values of more than 8 bits to 8: through a stated window, or between percentiles."""

from __future__ import annotations

import numpy as np

from inputs.display import AS_STORED, BY_HAND, STRETCHED

WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3


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


def to_8bit(values: np.ndarray, window: tuple[float, float] | None = None) -> tuple[np.ndarray, str]:
    """Values of any depth to uint8, same shape, and which of `display.SHOWN` they come from.

    Those of an 8-bit image are taken as they are: it may be stored in 16 bits, or spread over their range (times 257,
    as PNG does it, or 256). Others go through `window` (center, width) where it is given, else between percentiles.
    """
    if (stored := _of_8_bits(values)) is not None:
        return stored, AS_STORED
    if window is not None:
        return window_to_8bit(values, *window), BY_HAND
    return window_to_8bit(values), STRETCHED


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
