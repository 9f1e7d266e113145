"""Colours of the SimCLR views: torchvision's distributions, and Pillow's and torchvision's bits."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import ImageFilter
from view_helpers import draws, grainy, image, least_p, planes

from inputs.colour import (
    Colour,
    Colours,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_colour,
    apply_colour_batch,
    box_blur,
    draw_colour,
    luma,
)
from inputs.images import pixels_of
from inputs.transforms import Preprocess, ssl_pixels

SLIP = Preprocess(size=32)


def test_color_jitter_has_the_distribution_of_torchvisions():
    torch.manual_seed(0)
    img, theirs = image(24, 24), T.ColorJitter(0.4, 0.4, 0.4, 0.1)

    def jittered(i):
        rng = np.random.default_rng(i)
        colour = next(c for c in iter(lambda: draw_colour(rng), None) if c.jitter)
        colour = colour._replace(grey=False, sigma=0.0, flip=False)
        return torch.from_numpy(apply_colour(planes(img), colour).copy()) / 255

    ours = draws(jittered)
    assert least_p(ours, draws(lambda i: T.functional.to_tensor(theirs(img)))) > 1e-3
    more = T.ColorJitter(0.4, 0.4, 0.4, 0.2)
    assert least_p(ours, draws(lambda i: T.functional.to_tensor(more(img)))) < 1e-6


def test_what_happens_to_colours_has_the_published_probabilities():
    rng = np.random.default_rng(0)
    drawn = [draw_colour(rng) for _ in range(4000)]
    for share, expected in [
        (np.mean([c.jitter for c in drawn]), 0.8),
        (np.mean([c.grey for c in drawn]), 0.2),
        (np.mean([c.sigma > 0 for c in drawn]), 0.5),
        (np.mean([c.flip for c in drawn]), 0.5),
    ]:
        assert share == pytest.approx(expected, abs=0.035)  # above four standard errors
    sigmas = [c.sigma for c in drawn if c.sigma]
    assert 0.1 <= min(sigmas) < 0.11 and 1.99 < max(sigmas) <= 2.0


@pytest.mark.parametrize("make", [image, grainy])
def test_jitter_equals_torchvisions_to_the_bit(make):
    img, f = make(), T.functional
    for factor in (0.6, 0.85, 1.0, 1.13, 1.4):
        assert np.array_equal(adjust_brightness(planes(img), factor), planes(f.adjust_brightness(img, factor)))
        assert np.array_equal(adjust_contrast(planes(img), factor), planes(f.adjust_contrast(img, factor)))
        assert np.array_equal(adjust_saturation(planes(img), factor), planes(f.adjust_saturation(img, factor)))
    for turn in (-0.1, -0.031, 0.0, 0.05, 0.1):
        assert np.array_equal(adjust_hue(planes(img), turn), planes(f.adjust_hue(img, turn)))
    assert np.array_equal(luma(planes(img)), planes(img.convert("L")))


@pytest.mark.parametrize("size", [(80, 60), (5, 3), (1, 1)])
def test_blur_equals_pillows_to_the_bit(size):
    for sigma in [*np.linspace(0.1, 2.0, 60).tolist(), 1.4142, 1.4143]:  # beside the radius where a box grows
        expected = planes(grainy(*size).filter(ImageFilter.GaussianBlur(sigma)))
        assert np.array_equal(box_blur(planes(grainy(*size)), sigma), expected)


@pytest.mark.parametrize("make", [image, grainy])
def test_a_batch_gets_the_colours_of_its_views_to_the_bit(make):
    views = [ssl_pixels(SLIP, pixels_of(make()), np.random.default_rng(i)) for i in range(200)]
    crops, colours = zip(*views, strict=True)
    each = np.stack([np.broadcast_to(apply_colour(x.numpy(), c), x.shape) for x, c in views])
    rows = Colours.of(colours)
    batch = apply_colour_batch(torch.stack(crops), rows)
    assert np.array_equal(batch, each) and not np.array_equal(torch.stack(crops), each)
    nothing = Colours.of([Colour()] * 200)
    assert torch.equal(apply_colour_batch(batch, nothing), batch)
