"""The views of training and evaluation against torchvision, and each model's own preparation."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torchvision.models import ResNet50_Weights
from view_helpers import Script, SslView, TrainView, draws, grainy, image, least_p, planes, resized

from inputs.colour import Colour, apply_colour
from inputs.images import pixels_of
from inputs.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MEDCLIP_MEAN,
    MEDCLIP_STD,
    PREPARES,
    Preprocess,
    _crop_box,
    centre_crop,
    eval_view,
    grey_if_equal,
    linear_eval_view,
    linear_train_view,
    pad_to_shape,
    padded_shape,
    random_resized_crop,
    ssl_pixels,
    takes_grey,
)

SLIP = Preprocess(size=32)
MEDCLIP = Preprocess(size=32, mean=MEDCLIP_MEAN, std=MEDCLIP_STD, prepare="medclip")
NORMALIZE = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------------------------------------------------------------------------------------
# Random views against torchvision
# ---------------------------------------------------------------------------------------------------------------------


def test_train_view_has_the_distribution_of_torchvisions_pipeline():
    torch.manual_seed(0)
    theirs = T.Compose([T.RandomResizedCrop(32, scale=(0.5, 1.0)), T.ToTensor(), NORMALIZE])
    img, view = image(), TrainView(SLIP)
    ours = draws(lambda i: view(img, np.random.default_rng(i)))
    assert least_p(ours, draws(lambda i: theirs(img))) > 1e-3
    wider = T.Compose([T.RandomResizedCrop(32, scale=(0.4, 1.0)), T.ToTensor(), NORMALIZE])
    assert least_p(ours, draws(lambda i: wider(img))) < 1e-6  # the comparison can tell


def torchvisions_ssl_view(blur):
    return T.Compose(
        [
            T.RandomResizedCrop(32, scale=(0.08, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([blur], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            NORMALIZE,
        ]
    )


@pytest.mark.parametrize("img", [image(), grainy()], ids=["smooth", "grainy"])
def test_ssl_view_has_the_distribution_of_torchvisions_pipeline(img):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    view, n = SslView(SLIP), 1500
    ours = draws(lambda i: view(img, np.random.default_rng(i)), n)
    pillow = torchvisions_ssl_view(lambda x: x.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))))
    theirs = draws(lambda i: pillow(img), n)
    assert least_p(theirs, draws(lambda i: pillow(img), n)) > 1e-3  # the control: the baseline with itself
    assert least_p(ours, theirs) > 1e-3
    no_blur = torchvisions_ssl_view(lambda x: x)
    assert least_p(ours, draws(lambda i: no_blur(img), n)) < 1e-6  # the comparison can tell


@pytest.mark.parametrize("size", [(80, 60), (37, 41), (200, 12), (12, 200), (3, 3)])
def test_crops_are_sampled_by_torchvisions_rule(size):
    torch.manual_seed(0)
    rng, img = np.random.default_rng(0), image(*size)
    ours = np.array([_crop_box(*size, (0.08, 1.0), rng) for _ in range(2000)])
    theirs = [T.RandomResizedCrop.get_params(img, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    assert least_p(ours, np.array(theirs)) > 1e-3
    top, left, height, width = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[1]).all() and (left + width <= size[0]).all()


@pytest.mark.parametrize("size", [(90, 20), (20, 90), (40, 40), (40, 31), (200, 1), (1, 200)])
def test_a_crop_that_never_fits_is_the_largest_centred_part(size):
    scale = (50.0, 50.0)  # fifty times the image
    ours = _crop_box(*size, scale, np.random.default_rng(0))
    assert ours == T.RandomResizedCrop.get_params(Image.new("RGB", size), list(scale), [3 / 4, 4 / 3])


def test_ten_crops_are_tried_and_the_first_that_fits_is_taken():
    """Of an image of one pixel, too: 1 wide is neither too small nor too large."""
    too_large, all_of_it = (3.0, 0.0), (1.0, 0.0, 0, 0)  # area and logarithm of the aspect; then where
    for size in (1, 40):
        script = Script(*too_large * 9, *all_of_it)
        assert _crop_box(size, size, (0.08, 1.0), script) == (0, 0, size, size) and script.numbers == []
    script = Script(*too_large * 11)
    assert _crop_box(40, 40, (0.08, 1.0), script) == (0, 0, 40, 40) and script.numbers == [*too_large]
    assert _crop_box(1, 1, (0.08, 1.0), Script(*(0.1, 0.0) * 10)) == (0, 0, 1, 1)  # less than a pixel never fits
    assert _crop_box(9, 1, (9, 9), Script(*(9, 0.0) * 10), shape=0.2) == (0, 4, 1, 1)  # nor is there less of it
    assert _crop_box(1, 9, (9, 9), Script(*(9, 0.0) * 10), shape=9.0) == (4, 0, 1, 1)


@pytest.mark.parametrize("number, flipped", [(0.49, True), (0.5, False)])
def test_slips_linear_training_view_is_flipped_half_of_the_time(number, flipped):
    script = Script(1.0, np.log(4 / 3), 0, 0, number)
    whole = resized(image())
    expected = NORMALIZE(T.functional.to_tensor(T.functional.hflip(whole) if flipped else whole))
    torch.testing.assert_close(linear_train_view(SLIP, image(), script), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What follows the random numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [image, grainy])
def test_a_crop_equals_torchvisions_to_rounding(make):
    img, differences = make(200, 150), []
    for seed in range(100):
        ours = random_resized_crop(pixels_of(img), 48, (0.08, 1), np.random.default_rng(seed)).numpy()
        box = _crop_box(200, 150, (0.08, 1), np.random.default_rng(seed))
        theirs = planes(T.functional.resized_crop(img, *box, [48, 48]))
        differences.append(ours.astype(int) - theirs)
    differences = np.stack(differences)
    assert np.abs(differences).max() <= 2 and np.abs(differences).mean() < 0.3
    assert abs(differences.mean()) < 0.02  # neither brighter nor darker


def test_the_ssl_view_equals_its_steps_in_torchvision():
    crop, jitter = (1.0, np.log(4 / 3), 0, 0), (0.79, 0.5, -0.25, 1.0, -1.0, (2, 0, 3, 1))
    grey, blur, flip = (0.2,), (0.49, 1.3), (0.49,)
    f = T.functional
    img = f.adjust_brightness(f.adjust_saturation(resized(image()), 1.4), 1.2)
    img = f.adjust_contrast(f.adjust_hue(img, -0.1), 0.9)
    expected = NORMALIZE(f.to_tensor(f.hflip(img.filter(ImageFilter.GaussianBlur(1.3)))))
    script = Script(*crop, *jitter, *grey, *blur, *flip)
    torch.testing.assert_close(SslView(SLIP)(image(), script), expected, rtol=0, atol=1e-6)
    assert script.numbers == []


def test_nothing_is_applied_beyond_its_probability():
    untouched = Script(1.0, np.log(4 / 3), 0, 0, 0.8, 0.2, 0.5, 0.5)
    expected = NORMALIZE(T.functional.to_tensor(resized(image())))
    torch.testing.assert_close(SslView(SLIP)(image(), untouched), expected, rtol=0, atol=1e-6)


def test_grey_views_have_three_equal_channels_before_normalisation():
    grey = Script(1.0, np.log(4 / 3), 0, 0, 0.8, 0.19, 0.5, 0.5)
    expected = T.functional.to_grayscale(resized(image()), 3)
    expected = NORMALIZE(T.functional.to_tensor(expected))
    torch.testing.assert_close(SslView(SLIP)(image(), grey), expected, rtol=0, atol=1e-6)


def test_views_of_a_grey_image_in_colour_are_one_plane_and_those_of_the_grey_image():
    grey = image().convert("L")
    in_colour = pixels_of(grey.convert("RGB"))
    assert in_colour.shape == (3, 60, 80)
    for seed in range(40):
        crop, colour = ssl_pixels(SLIP, pixels_of(grey), np.random.default_rng(seed))
        same_crop, same = ssl_pixels(SLIP, in_colour, np.random.default_rng(seed))
        assert crop.shape == (1, 32, 32) and same == colour and torch.equal(same_crop, crop)
        got = apply_colour(crop.numpy(), colour)
        three = np.repeat(crop.numpy(), 3, axis=0)
        assert np.array_equal(np.broadcast_to(got, (3, 32, 32)), planes_of_three(three, colour))


def test_one_coloured_pixel_makes_a_image_coloured():
    img = image().convert("L").convert("RGB")
    assert grey_if_equal(pixels_of(img)).shape == (1, 60, 80) and grey_if_equal(pixels_of(image())).shape[0] == 3
    img.putpixel((79, 59), (1, 1, 2))
    assert grey_if_equal(pixels_of(img)).shape == (3, 60, 80)


def planes_of_three(pixels: np.ndarray, colour: Colour) -> np.ndarray:
    return np.broadcast_to(apply_colour(np.ascontiguousarray(pixels), colour), (3, *pixels.shape[1:]))


@pytest.mark.parametrize("size", [(80, 60), (33, 90), (32, 32), (10, 14)])
def test_eval_view_is_resize_and_centre_crop(size):
    theirs = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor(), NORMALIZE])
    expected = theirs(image(*size))
    torch.testing.assert_close(eval_view(SLIP)(image(*size)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [TrainView, SslView, eval_view])
@pytest.mark.parametrize("preprocess", [SLIP, MEDCLIP])
def test_views_are_reproducible_picklable_and_leave_global_randomness_alone(make, preprocess):
    view = make(preprocess)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = view(image(), np.random.default_rng((0, 1, 2)))
    again = pickle.loads(pickle.dumps(view))(image(), np.random.default_rng((0, 1, 2)))
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Medclip's preparation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 31), (31, 20), (7, 7), (40, 13), (32, 32)])
def test_medclip_pads_to_a_centred_black_square_and_resizes(size):
    grey = image(*size).convert("L")
    side = max(32, *size)
    square = np.zeros((side, side), dtype=np.uint8)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(grey)
    square = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    expected = (square / 255 - 0.5862785803043838) / 0.27950088968644304
    got = eval_view(MEDCLIP)(image(*size))
    np.testing.assert_allclose(got, np.stack([expected] * 3), rtol=0, atol=2e-6)


def test_medclips_square_has_at_least_224_pixels():
    assert pad_to_shape(image(100, 50), 224).size == (224, 224)
    assert pad_to_shape(image(100, 300), 224).size == (300, 300)


@pytest.mark.parametrize("make", [TrainView, SslView])
def test_medclip_views_are_those_of_the_grey_square_in_colour(make):
    """Working on one channel changes nothing but the time it takes."""
    square = pad_to_shape(image().convert("L"), 32).convert("RGB")
    in_colour = make(Preprocess(size=32, mean=MEDCLIP_MEAN, std=MEDCLIP_STD))
    for seed in range(20):
        got = make(MEDCLIP)(image(), np.random.default_rng(seed))
        expected = in_colour(square, np.random.default_rng(seed))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("img", [image(), image().convert("L"), image(20, 31).convert("L").convert("RGB")])
@pytest.mark.parametrize("size", [32, (90, 20), (20, 90)])
def test_planes_are_prepared_as_images_are(img, size):
    medclip = Preprocess(size=size, prepare="medclip")
    assert np.array_equal(medclip.pixels(img), planes(medclip.whole(img)))
    assert np.array_equal(medclip.pixels(pixels_of(img)), planes(medclip.whole(img)))
    slip = Preprocess(size=size)
    assert np.array_equal(slip.pixels(img), planes(slip.whole(img)))
    assert np.array_equal(np.broadcast_to(slip.pixels(img), (3, img.height, img.width)), planes(img.convert("RGB")))


@pytest.mark.parametrize("preprocess", [SLIP, MEDCLIP])
def test_preparing_twice_is_preparing_once(preprocess):
    once = preprocess.whole(image())
    assert np.array_equal(preprocess.whole(once), once)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def test_preprocess_survives_the_checkpoint():
    for preprocess in (SLIP, MEDCLIP, Preprocess(96, (0.1, 0.2, 0.3), (1, 1, 1))):
        values = preprocess.to_dict()
        assert all(isinstance(value, int | str | list) for value in values.values())
        assert Preprocess.from_dict(values) == preprocess


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prepare": "imagenet"}, "slip, medclip"),
        ({"mean": (0.5,)}, "three"),
        ({"crop": 3}, "unknown .*crop"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.from_dict(values)


@pytest.mark.parametrize("size", [(2, 600), (600, 2), (3, 40)])
def test_a_strip_is_cropped_before_it_is_resized_and_looks_the_same(size):
    strip = grainy(*size)
    short, side = 40, 32
    width, height = (short if x == min(size) else int(short * x / min(size)) for x in size)
    whole = strip.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=int)
    assert abs(np.asarray(centre_crop(strip, side, short), dtype=int) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and constants
# ---------------------------------------------------------------------------------------------------------------------


def test_the_published_normalisation_and_size():
    theirs = ResNet50_Weights.DEFAULT.transforms()
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (theirs.mean, theirs.std)
    assert Preprocess() == Preprocess(224, theirs.mean, theirs.std, "slip")
    assert MEDCLIP_MEAN == (0.5862785803043838,) * 3 and MEDCLIP_STD == (0.27950088968644304,) * 3


@pytest.mark.parametrize("size", [(80, 60), (33, 90), (10, 14)])
def test_slips_linear_view_is_resize_by_eight_sevenths_and_centre_crop(size):
    theirs = T.Compose([T.Resize(32), T.CenterCrop(28), T.ToTensor(), NORMALIZE])
    got = linear_eval_view(Preprocess(size=28), image(*size))
    torch.testing.assert_close(got, theirs(image(*size)), rtol=0, atol=1e-6)


def test_padding_is_of_the_proportions_of_the_size_and_no_larger_than_it_must_be():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, h, w = (int(x) for x in rng.integers(1, 40, 4))
        found = padded_shape(height, width, (h, w))
        assert found[0] >= max(h, height) and found[1] >= max(w, width)
        assert found[0] == height or found[1] == width or found == (h, w)  # one side touches
        assert min(abs(found[0] - found[1] * h / w), abs(found[1] - found[0] * w / h)) <= 0.5
        assert padded_shape(*found, (h, w)) == found


@pytest.mark.parametrize("prepare", PREPARES)
def test_a_grey_image_in_one_plane_is_seen_as_in_three(prepare):
    preprocess = Preprocess(48, prepare=prepare, fill=90, interpolation="bicubic", resize_to=60)
    for size in ((83, 61), (30, 200)):
        grey = image(*size).convert("L")
        for view in (
            eval_view(preprocess),
            partial(linear_eval_view, preprocess),
            partial(linear_train_view, preprocess),
        ):
            assert takes_grey(view)
            one, three = (view(img, np.random.default_rng(0)) for img in (grey, grey.convert("RGB")))
            assert one.shape == (3, 48, 48) and torch.equal(one, three)
    assert not takes_grey(lambda img, rng: img) and not takes_grey(None)
