"""Grey values of more than 8 bits, by their levels: as each pixel by itself."""

import numpy as np
import pytest

from inputs import depth
from inputs.depth import PERCENTILES, levels_of, to_8bit, window_to_8bit
from inputs.display import AS_STORED, BY_HAND, STRETCHED

SHAPE = (400, 500)


def drawn(dtype: str, seed: int) -> np.ndarray:
    rng, info = np.random.default_rng(seed), np.iinfo(dtype)
    center, width = rng.uniform(info.min / 2, info.max / 2), rng.uniform(1, info.max / 4)
    return rng.normal(center, width, SHAPE).clip(info.min, info.max).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint16", "int16", ">u2", "uint8", "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_levels_give_what_each_pixel_gives(dtype, seed, monkeypatch):
    values = drawn(dtype, seed)
    by_levels = to_8bit(values), to_8bit(values, (300, 900))
    monkeypatch.setattr(depth, "levels_of", lambda image: None)
    for (got, how), (expected, same) in zip(by_levels, (to_8bit(values), to_8bit(values, (300, 900))), strict=True):
        assert got.dtype == np.uint8 and how == same and np.array_equal(got, expected)
    if dtype != "uint8":
        low, high = np.percentile(values.astype(np.float32), PERCENTILES)
        formula = np.rint(255 * ((values.astype(np.float32) - low) / (high - low)).clip(0, 1))
        assert np.array_equal(by_levels[0][0], formula) and by_levels[0][1] == STRETCHED


@pytest.mark.parametrize("factor", [1, 256, 257])
def test_values_of_8_bits_in_16_are_found_by_levels(factor):
    values = (np.random.default_rng(0).integers(0, 256, SHAPE) * factor).astype(np.uint16)
    shown, how = to_8bit(values, (10, 20))
    assert how == AS_STORED and np.array_equal(shown, values // factor)


@pytest.mark.parametrize("dtype", ["uint16", "int16", ">u2", ">i2", "uint8", "int8"])
def test_levels_count_an_image_and_spread_over_it(dtype):
    values = drawn(dtype, 9)
    levels = levels_of(values)
    there, counts = np.unique(values, return_counts=True)
    assert levels is not None and all(map(np.array_equal, levels.counted(), (there, counts)))
    assert np.array_equal(levels.range, np.arange(values.min(), values.max() + 1))
    shown = np.random.default_rng(1).integers(0, 256, len(there)).astype(np.uint8)
    assert np.array_equal(levels.spread(there, shown), shown[np.searchsorted(there, values)])
    assert levels_of(values.astype(np.int32)) is None and levels_of(values.astype(np.float32)) is None
    same, how = to_8bit(np.full(SHAPE, 4000, np.uint16), (4000, 2))
    assert how == BY_HAND and (same == window_to_8bit(np.array([4000.0]), 4000, 2)[0]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_percentiles_by_counts_are_those_of_the_pixels(dtype):
    rng = np.random.default_rng(0)
    for trial in range(300):
        pixels = (rng.normal(0, 30, int(rng.integers(1, 3000))).astype(int) * rng.choice([1.0, 0.37, -2.1])).astype(
            dtype
        )
        values, counts = np.unique(pixels, return_counts=True)
        mixed = rng.permutation(len(values))
        got = depth._percentiles(values[mixed], counts[mixed])
        assert tuple(got) == tuple(np.percentile(pixels, PERCENTILES)), trial
