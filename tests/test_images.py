"""Image files of every kind to RGB with 8 bits."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from view_helpers import grainy, image, planes

from inputs import display, images
from inputs.depth import window_to_8bit
from inputs.display import AS_STORED, BY_HAND, STRETCHED, Display
from inputs.images import UnreadableImage, decode_image, decode_pixels, decode_shown, frames_of, read_image, to_rgb8


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------


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
        assert (len(got) == 1) == (Image.open(buffer).mode in ("L", "I", "I;16"))


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


# ---------------------------------------------------------------------------------------------------------------------
# More than 8 bits in several channels
# ---------------------------------------------------------------------------------------------------------------------


def png_of_16_bits(samples: np.ndarray) -> bytes:
    """(H, W, C) written by hand, as Pillow writes no such file: C = 1 to 4 are grey, grey and alpha, RGB, RGBA."""
    height, width, channels = samples.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of_16_bits(samples: np.ndarray, order: str) -> bytes:
    height, width, channels = samples.shape
    data, bits = samples.astype(f"{order}u2").tobytes(), struct.pack(f"{order}{channels}H", *[16] * channels)
    values = {256: width, 257: height, 259: 1, 262: 2, 273: 8, 277: channels, 278: height, 279: len(data)}
    values |= {258: 8 + len(data)} | ({338: 2} if channels == 4 else {})
    kinds = {258: (3, channels), 273: (4, 1), 279: (4, 1)}
    entries = b""
    for tag, value in sorted(values.items()):
        kind, count = kinds.get(tag, (3, 1))
        short = kind == 3 and count == 1
        entries += struct.pack(f"{order}HHI", tag, kind, count)
        entries += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data) + len(bits))
    return start + data + bits + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (64, 1))[..., None]  # 12 bits
OPAQUE = np.full_like(RAMP, 65535)


@pytest.mark.parametrize(
    "write", [png_of_16_bits, partial(tiff_of_16_bits, order="<"), partial(tiff_of_16_bits, order=">")]
)
@pytest.mark.parametrize("parts", [[RAMP, OPAQUE], [RAMP] * 3, [RAMP, RAMP, RAMP, OPAQUE]], ids=["LA", "RGB", "RGBA"])
def test_twelve_bits_in_several_channels_look_like_the_grey_image(write, parts):
    if write is not png_of_16_bits and len(parts) == 2:
        pytest.skip("Pillow reads no such TIFF, and says so")
    expected = np.broadcast_to(window_to_8bit(RAMP), (64, 64, 3))
    data = write(np.concatenate(parts, -1))
    assert np.array_equal(np.asarray(decode_image(data, "x")), expected)
    assert np.array_equal(decode_pixels(data, "x").permute(1, 2, 0).numpy(), expected)


def test_colours_of_16_bits_share_one_window_and_transparent_parts_are_white():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 3000, (9, 7, 3)).astype(np.uint16)
    alpha = np.where(np.arange(7) < 3, 65535, 0).astype(np.uint16)[None, :, None].repeat(9, 0)
    got = np.asarray(decode_image(png_of_16_bits(np.concatenate([colours, alpha], -1)), "x"))
    assert np.array_equal(got[:, :3], window_to_8bit(colours)[:, :3]) and (got[:, 3:] == 255).all()


@pytest.mark.parametrize("factor", [1, 256, 257])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_8_bit_image_in_16_bits_is_that_image(factor, channels):
    small = np.asarray(grainy())[..., :channels] // 2 + 20  # neither black nor white: a window would stretch it
    got = np.asarray(decode_image(png_of_16_bits(small.astype(np.uint16) * factor), "x"))
    assert np.array_equal(got, np.broadcast_to(small, got.shape))


@pytest.mark.parametrize("dtype, mode", [("<u2", "I;16"), ("<f4", "F")])
def test_a_deep_tiff_whose_white_is_zero_is_no_negative(tmp_path, dtype, mode):
    """Film digitisers write them; Pillow turns those of 8 bits round and leaves the deeper ones."""
    array = np.linspace(0, 4095, 4096).reshape(64, 64).astype(dtype)
    for photometric in (0, 1):
        Image.fromarray(array).save(tmp_path / f"{photometric}.tif", tiffinfo={262: photometric})
    img = Image.open(tmp_path / "0.tif")
    assert img.mode == mode and img.tag_v2[262] == 0
    white, black = (np.asarray(read_image(tmp_path / f"{photometric}.tif")) for photometric in (0, 1))
    assert np.array_equal(black[..., 0], window_to_8bit(array)) and np.array_equal(white, 255 - black)


def test_of_several_pages_the_first_is_read_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(display, "_said_first_of", False)
    pages = [Image.new("L", (8, 8), value) for value in (10, 20, 30)]
    for name in ("one.tif", "other.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert np.asarray(read_image(tmp_path / name)).max() == 10
    (line,) = caplog.messages
    assert "one.tif holds 3 frames or pages: of such files the first is read" in line


@pytest.mark.parametrize("kind", ["L", "I;16", "RGB"])
def test_a_page_that_is_asked_for_is_read(tmp_path, kind, caplog):
    values = (10, 20, 30)
    pages = [Image.fromarray(np.full((8, 8), value * 257, np.uint16)) if kind == "I;16" else
             Image.new(kind, (8, 8), value if kind == "L" else (value,) * 3) for value in values]  # fmt: skip
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert frames_of(tmp_path / "a.tif") == 3
    for wanted, value in (("middle", 20), (1, 10), (3, 30)):
        assert (np.asarray(read_image(tmp_path / "a.tif", Display(frame=wanted))) == value).all()
    with pytest.raises(UnreadableImage, match="a.tif: it holds 3 frames"):
        read_image(tmp_path / "a.tif", Display(frame=4))


def test_where_grey_values_come_from(tmp_path):
    deep = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, array in {"eight": eight, "spread": eight.astype(np.uint16) * 257, "deep": deep}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    given = Display(window=(1000, 500))
    for name, greys, by_hand in (("eight", AS_STORED, AS_STORED), ("spread", AS_STORED, AS_STORED),
                                 ("deep", STRETCHED, BY_HAND)):  # fmt: skip
        data = (tmp_path / f"{name}.png").read_bytes()
        assert decode_shown(data, name)[1] == greys
        image, how = decode_shown(data, name, given)
        assert how == by_hand
    assert np.array_equal(np.asarray(image)[..., 0], window_to_8bit(deep, 1000, 500))


def test_a_ppm_of_two_bytes_is_windowed_as_any_deep_image(tmp_path):
    colours = np.concatenate([RAMP, RAMP // 2, RAMP // 4], -1).astype(">u2")  # (64, 64, 3)
    header = "P6\n# a comment\n64 64 65535\n"
    (tmp_path / "a.ppm").write_bytes(header.encode() + colours.tobytes())
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.ppm")), window_to_8bit(colours.astype(np.uint16)))


def test_a_deep_tiff_in_planes_is_refused_and_not_scrambled(tmp_path):
    """Pillow writes no such file: a header by hand, of three strips of 16 bits."""
    h, w = 8, 8
    planes = [np.full((h, w), 1000 * (i + 1), "<u2").tobytes() for i in range(3)]
    entries = [(256, 4, [w]), (257, 4, [h]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2]), (273, 4, [0, 0, 0]),
               (277, 3, [3]), (278, 4, [h]), (279, 4, [128] * 3), (284, 3, [2])]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    extra, body = b"", struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        if tag == 273:
            values = [start + 100 + 128 * i for i in range(3)]
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", value) for value in values)
        if len(packed) > 4:
            body += struct.pack("<HHII", tag, kind, len(values), start + len(extra))
            extra += packed
        else:
            body += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    data = b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0) + extra.ljust(100, b"\0") + b"".join(planes)
    with pytest.raises(UnreadableImage, match="a.tif: its channels of 16 bits lie in planes"):
        decode_image(data, "a.tif")


@pytest.mark.parametrize(
    "data, why", [(b"", "it is empty"), (b"<html>404</html>", "it is text, which begins '<html>404")]
)
def test_what_is_no_image_is_called_what_it_is(data, why):
    with pytest.raises(UnreadableImage, match=f"a.png: {why}"):
        decode_image(data, "a.png")


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size, progressive", [((64, 48), False), ((61, 47), True), ((1, 33), False)])
def test_colour_jpegs_by_simplejpeg_are_pillows_to_the_bit(size, progressive, subsampling, quality):
    pytest.importorskip("simplejpeg")
    values, buffer = np.random.default_rng(quality).integers(0, 256, (*size, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    data = buffer.getvalue()
    found = images._colours_of_jpeg(data)
    assert found is not None and np.array_equal(found, np.asarray(Image.open(buffer)))
    assert torch.equal(decode_pixels(data, "a"), images.pixels_of(decode_image(data, "a")))
    for other in (data[:-2], data[: len(data) // 2], data[:200], b"\xff\xd8\xff"):  # cut off: Pillow has the word
        assert images._colours_of_jpeg(other) is None
    with pytest.raises(UnreadableImage, match="cannot decode the image a: "):
        decode_pixels(data[: len(data) // 2], "a")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_without_plain_colours_are_pillows(mode):
    buffer = io.BytesIO()
    Image.new(mode, (40, 30), 90 if mode == "L" else (10, 60, 90, 20)).save(buffer, "JPEG")
    assert images._colours_of_jpeg(buffer.getvalue()) is None
    expected = images.pixels_of(decode_image(buffer.getvalue(), "a", grey=True))
    assert torch.equal(decode_pixels(buffer.getvalue(), "a"), expected)
