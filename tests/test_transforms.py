import io
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp

from transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MEDCLIP_MEAN,
    MEDCLIP_STD,
    Colour,
    Preprocess,
    UnreadableImage,
    _crop_box,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_colour,
    apply_colour_batch,
    box_blur,
    decode_image,
    decode_pixels,
    draw_colour,
    eval_view,
    grey_if_equal,
    luma,
    pad_to_square,
    pixels_of,
    random_resized_crop,
    read_image,
    ssl_pixels,
    ssl_view,
    to_rgb8,
    train_view,
    window_to_8bit,
)

SLIP = Preprocess(size=32)
MEDCLIP = Preprocess(size=32, mean=MEDCLIP_MEAN, std=MEDCLIP_STD, prepare="medclip")
NORMALIZE = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)


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


# --------------------------------------------------------------------------- random views against torchvision
def test_train_view_has_the_distribution_of_torchvisions_pipeline():
    torch.manual_seed(0)
    theirs = T.Compose([T.RandomResizedCrop(32, scale=(0.5, 1.0)), T.ToTensor(), NORMALIZE])
    img, view = image(), train_view(SLIP)
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
    view, n = ssl_view(SLIP), 1500
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


@pytest.mark.parametrize("size", [(90, 20), (20, 90), (40, 40), (40, 31)])
def test_a_crop_that_never_fits_is_the_largest_centred_part(size):
    scale = (50.0, 50.0)  # fifty times the image
    ours = _crop_box(*size, scale, np.random.default_rng(0))
    assert ours == T.RandomResizedCrop.get_params(image(*size), list(scale), [3 / 4, 4 / 3])


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


# ---------------------------------------------------------------------------- what follows the random numbers
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
    rows = torch.tensor([c.row() for c in colours], dtype=torch.float64)
    batch = apply_colour_batch(torch.stack(crops), rows)
    assert np.array_equal(batch, each) and not np.array_equal(torch.stack(crops), each)
    nothing = torch.tensor([Colour().row()] * 200, dtype=torch.float64)
    assert torch.equal(apply_colour_batch(batch, nothing), batch)


def test_the_ssl_view_equals_its_steps_in_torchvision():
    crop, jitter = (1.0, np.log(4 / 3), 0, 0), (0.79, 0.5, -0.25, 1.0, -1.0, (2, 0, 3, 1))
    grey, blur, flip = (0.2,), (0.49, 1.3), (0.49,)
    f = T.functional
    img = f.adjust_brightness(f.adjust_saturation(resized(image()), 1.4), 1.2)
    img = f.adjust_contrast(f.adjust_hue(img, -0.1), 0.9)
    expected = NORMALIZE(f.to_tensor(f.hflip(img.filter(ImageFilter.GaussianBlur(1.3)))))
    script = Script(*crop, *jitter, *grey, *blur, *flip)
    torch.testing.assert_close(ssl_view(SLIP)(image(), script), expected, rtol=0, atol=1e-6)
    assert script.numbers == []


def test_nothing_is_applied_beyond_its_probability():
    untouched = Script(1.0, np.log(4 / 3), 0, 0, 0.8, 0.2, 0.5, 0.5)
    expected = NORMALIZE(T.functional.to_tensor(resized(image())))
    torch.testing.assert_close(ssl_view(SLIP)(image(), untouched), expected, rtol=0, atol=1e-6)


def test_grey_views_have_three_equal_channels_before_normalisation():
    grey = Script(1.0, np.log(4 / 3), 0, 0, 0.8, 0.19, 0.5, 0.5)
    expected = T.functional.to_grayscale(resized(image()), 3)
    expected = NORMALIZE(T.functional.to_tensor(expected))
    torch.testing.assert_close(ssl_view(SLIP)(image(), grey), expected, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("make", [train_view, ssl_view, eval_view])
@pytest.mark.parametrize("preprocess", [SLIP, MEDCLIP])
def test_views_are_reproducible_picklable_and_leave_global_randomness_alone(make, preprocess):
    view = make(preprocess)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = view(image(), np.random.default_rng((0, 1, 2)))
    again = pickle.loads(pickle.dumps(view))(image(), np.random.default_rng((0, 1, 2)))
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


# -------------------------------------------------------------------------------------- MedCLIP's preparation
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
    assert pad_to_square(image(100, 50), 224).size == (224, 224)
    assert pad_to_square(image(100, 300), 224).size == (300, 300)


@pytest.mark.parametrize("make", [train_view, ssl_view])
def test_medclip_views_are_those_of_the_grey_square_in_colour(make):
    """Working on one channel changes nothing but the time it takes."""
    square = pad_to_square(image().convert("L"), 32).convert("RGB")
    in_colour = make(Preprocess(size=32, mean=MEDCLIP_MEAN, std=MEDCLIP_STD))
    for seed in range(20):
        got = make(MEDCLIP)(image(), np.random.default_rng(seed))
        expected = in_colour(square, np.random.default_rng(seed))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preprocess", [SLIP, MEDCLIP])
def test_preparing_twice_is_preparing_once(preprocess):
    once = preprocess.open(image())
    assert np.array_equal(preprocess.open(once), once)


# --------------------------------------------------------------------------------------------------- settings
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


# --------------------------------------------------------------------------------------- eight bits from more
def test_percentile_window_maps_the_middle_99_percent():
    array = np.random.default_rng(0).permutation(np.arange(2000)).reshape(40, 50) + 1000
    low, high = 1000 + 0.005 * 1999, 1000 + 0.995 * 1999
    expected = np.clip(np.round(255 * (array - low) / (high - low)), 0, 255)
    for dtype in (np.uint16, np.int32, np.float64):
        got = window_to_8bit(array.astype(dtype))
        assert got.dtype == np.uint8
        assert np.abs(got - expected).max() <= 1e-9
    assert np.array_equal(window_to_8bit(array.astype(np.uint16), invert=True), 255 - expected)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_equal_pydicoms(function):
    pydicom = pytest.importorskip("pydicom")
    array = np.arange(-300, 900, dtype=np.int16).reshape(30, 40)
    dataset = pydicom.Dataset()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 250, 401, function
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 16, 1
    theirs = pydicom.pixels.apply_windowing(array, dataset)  # -32768 to 32767
    expected = (theirs + 32768) / 65535 * 255
    got = window_to_8bit(array, 250, 401, function=function)
    assert np.abs(got - expected).max() <= 0.51


def test_flat_masked_and_empty_images():
    assert (window_to_8bit(np.full((3, 3), 700, dtype=np.uint16)) == 0).all()
    mask = np.zeros((100, 100), dtype=np.uint16)
    mask[0, 0] = 4095  # fewer than 0.5 percent: both percentiles are 0
    assert window_to_8bit(mask)[0, 0] == 255 and window_to_8bit(mask).sum() == 255
    odd = np.array([[np.nan, 0.0], [1.0, np.inf]])
    assert window_to_8bit(odd, 0.5, 1.0, function="LINEAR_EXACT").tolist() == [[0, 0], [255, 0]]
    assert (window_to_8bit(np.full((2, 2), np.nan)) == 0).all()


@pytest.mark.parametrize("width, function", [(0.5, "LINEAR"), (-1, "SIGMOID"), (10, "CUBIC")])
def test_impossible_windows_are_refused(width, function):
    with pytest.raises(ValueError, match="CUBIC|width"):
        window_to_8bit(np.zeros((2, 2)), 5, width, function=function)


def test_a_16_bit_png_keeps_its_contrast(tmp_path):
    array = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)  # 12 bits, as detectors give
    Image.fromarray(array).save(tmp_path / "deep.png")
    got = np.asarray(read_image(tmp_path / "deep.png"))
    assert got.shape == (64, 64, 3)
    assert 120 < got.mean() < 135 and got.std() > 70  # clipping at 255 would give a white image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_of_eight_bits_are_converted_as_pillow_does(mode):
    img = image().convert(mode)
    assert np.array_equal(to_rgb8(img), img.convert("RGB"))


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4"), ("F", "<f4")])
def test_deep_modes_are_windowed(mode, dtype):
    array = np.arange(40 * 50).reshape(40, 50).astype(dtype)
    img = Image.frombytes(mode, (50, 40), array.tobytes())
    assert np.array_equal(np.asarray(to_rgb8(img))[..., 1], window_to_8bit(array))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_on_white(mode):
    img = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    img.putpixel((0, 0), (0, 0, 0, 0))
    if mode == "P":
        img = Image.new("P", (4, 4), 1)
        img.putpalette([0, 0, 0, 10, 10, 10])
        img.putpixel((0, 0), 0)
        img.info["transparency"] = 0
    else:
        img = img.convert(mode)
    got = np.asarray(to_rgb8(img))
    assert got[0, 0].tolist() == [255] * 3 and got[3, 3].tolist() == [10] * 3


# ---------------------------------------------------------------------------------------------- reading files
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "I;16"])
def test_planes_are_the_image_that_pillow_reads(file_format, mode):
    img = image(83, 61)
    if mode == "I;16":
        img = Image.fromarray(np.arange(83 * 61).reshape(61, 83).astype(np.uint16))
    else:
        img = img.convert(mode)
    for options in [{}, {"progressive": True, "quality": 60, "subsampling": 2}, {"exif": b"Exif\0\0"}]:
        buffer = io.BytesIO()
        try:
            img.save(buffer, file_format, **options)
        except (OSError, ValueError):
            pytest.skip(f"there is no {file_format} of mode {mode}")
        expected = planes(decode_image(buffer.getvalue(), "x"))
        got = decode_pixels(buffer.getvalue(), "x").numpy()
        assert np.array_equal(np.broadcast_to(got, expected.shape), expected)
        assert (len(got) == 1) == (file_format == "JPEG" and Image.open(buffer).mode == "L")


def test_broken_files_are_named(tmp_path):
    buffer = io.BytesIO()
    image(200, 200).save(buffer, "JPEG")
    whole = buffer.getvalue()
    png = io.BytesIO()
    image(200, 200).save(png, "PNG")
    damaged = bytearray(png.getvalue())
    damaged[60:400] = bytes(340)
    cases = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "bad.png": damaged,
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImage, match=name):
            read_image(tmp_path / name)
        with pytest.raises(UnreadableImage, match=name):
            decode_pixels((tmp_path / name).read_bytes(), name)
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        read_image(tmp_path / "absent.jpg")


def write_dicom(path, array, **values):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    dataset.Rows, dataset.Columns = array.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PhotometricInterpretation = "MONOCHROME2"
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "values, window",
    [
        ({}, {}),
        ({"WindowCenter": 1000, "WindowWidth": 500}, {"center": 1000, "width": 500}),
        ({"WindowCenter": [1000, 3000], "WindowWidth": [500, 10]}, {"center": 1000, "width": 500}),
        ({"WindowCenter": 0, "WindowWidth": 0}, {}),
        ({"PhotometricInterpretation": "MONOCHROME1"}, {"invert": True}),
        (
            {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"},
            {"center": 1000, "width": 500, "function": "SIGMOID"},
        ),
    ],
)
def test_dicom_goes_through_its_window(tmp_path, values, window):
    array = np.arange(4000).reshape(50, 80)
    write_dicom(tmp_path / "a.dcm", array, **values)
    got = np.asarray(read_image(tmp_path / "a.dcm"))
    assert got.shape == (50, 80, 3)
    assert np.array_equal(got[..., 0], window_to_8bit(array.astype(np.uint16), **window))


def test_dicom_rescales_before_the_window(tmp_path):
    array = np.arange(4000).reshape(50, 80)
    values = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    write_dicom(tmp_path / "a.dcm", array, **values)
    got = np.asarray(read_image(tmp_path / "a.dcm"))[..., 2]
    assert np.array_equal(got, window_to_8bit(2.0 * array - 1024, 40, 400))


def test_a_broken_dicom_is_named(tmp_path):
    pytest.importorskip("pydicom")
    (tmp_path / "bad.dcm").write_bytes(b"no DICOM")
    with pytest.raises(UnreadableImage, match="bad.dcm"):
        read_image(tmp_path / "bad.dcm")
