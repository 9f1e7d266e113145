"""Where the breast lies in a whole mammogram."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 256  # pixels of the longer side on which it is looked for
LEAST = 0.05  # of the image that a breast takes at least, and of its width and height that are worth cutting off


def breast_box(img: Image.Image) -> tuple[int, int, int, int] | None:
    """(left, upper, right, lower) around the largest bright region of an RGB or grey image; None to leave it whole.

    Bright is what is above the background (the most frequent of the dark greys) by a twentieth of the way to the
    brightest. Markers and labels lie apart from the breast, and go. The image stays whole where it has no
    dark background, as a magnified view has none, where the region is small, or where hardly anything would go.
    """
    factor = math.ceil(max(img.size) / SIDE)
    grey = np.asarray(img.convert("L").reduce(factor))  # (h, w), means of squares
    counts = np.bincount(grey.ravel(), minlength=256)
    bright, background = np.percentile(grey, 99), int(counts[:128].argmax())
    if background > bright / 5 or counts[: background + 4].sum() < LEAST * grey.size:
        return None
    regions = np.zeros(grey.shape, np.int32)
    ndimage.label(grey > background + max(3, (bright - background) / 20), output=regions)
    if not regions.any():
        return None
    largest = 1 + np.bincount(regions.ravel())[1:].argmax()
    inside = regions == largest
    if inside.mean() < LEAST:
        return None
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    left, upper = ((max(own[0] - 1, 0)) * factor for own in (columns, rows))
    right, lower = (min((own[-1] + 2) * factor, side) for own, side in zip((columns, rows), img.size, strict=True))
    kept = (right - left) / img.width, (lower - upper) / img.height
    return None if min(kept) > 1 - LEAST else (int(left), int(upper), int(right), int(lower))
