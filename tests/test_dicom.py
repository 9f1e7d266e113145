"""What a DICOM file says about its display, against windows and tables worked out here."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from inputs import codecs, dicom, display
from inputs.depth import window_to_8bit
from inputs.display import Display
from inputs.images import UnreadableImage, frames_of, read_image


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
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, int(array.min() < 0)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PhotometricInterpretation = "MONOCHROME2"
    if array.ndim == 3:
        dataset.NumberOfFrames = len(array)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.astype("<i2" if array.min() < 0 else "<u2").tobytes()
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


def test_padding_does_not_set_the_contrast_and_is_black(tmp_path):
    inside = np.arange(3000).reshape(50, 60) % 1000 + 500
    array = np.pad(inside, ((0, 0), (0, 40)), constant_values=4000)
    array[:, 80:] = 3990
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        values = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 3980, "PhotometricInterpretation": photometric}
        write_dicom(tmp_path / "a.dcm", array, **values)
        got = np.asarray(read_image(tmp_path / "a.dcm"))[..., 0]
        expected = window_to_8bit(inside.astype(np.uint16), invert=photometric == "MONOCHROME1")
        assert np.array_equal(got[:, :60], expected) and not got[:, 60:].any()


def test_a_voi_lut_is_looked_up(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    curve = (np.linspace(0, 1, 4096) ** 2 * 1023).astype(np.uint16)
    table.LUTDescriptor, table.LUTData = [4096, 0, 10], curve.tobytes()
    array = np.arange(4000).reshape(50, 80)
    write_dicom(tmp_path / "a.dcm", array, VOILUTSequence=pydicom.Sequence([table]))
    got = np.asarray(read_image(tmp_path / "a.dcm"))[..., 0]
    assert np.array_equal(got, np.rint(curve[array] * (255 / 1023)).astype(np.uint8))


def test_a_presentation_of_inverse_shape_is_inverted(tmp_path):
    array = np.arange(4000).reshape(50, 80)
    write_dicom(tmp_path / "a.dcm", array, PresentationLUTShape="INVERSE")
    got = np.asarray(read_image(tmp_path / "a.dcm"))[..., 0]
    assert np.array_equal(got, window_to_8bit(array.astype(np.uint16), invert=True))


def test_a_palette_shows_its_colours(tmp_path):
    pytest.importorskip("pydicom")
    red, green, blue = (np.random.default_rng(i).integers(0, 65536, 256).astype("<u2") for i in range(3))
    tables = {f"{name}PaletteColorLookupTableData": table.tobytes() for name, table in
              (("Red", red), ("Green", green), ("Blue", blue))}  # fmt: skip
    descriptors = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    array = np.arange(4000).reshape(50, 80) % 256
    write_dicom(tmp_path / "a.dcm", array, PhotometricInterpretation="PALETTE COLOR", **tables, **descriptors)
    expected = np.stack([table[array] >> 8 for table in (red, green, blue)], -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.dcm")), expected)


@pytest.mark.parametrize("name", ["a.dicom", "IM0001", "a.jpg"])
def test_dicom_is_known_by_its_content(tmp_path, name):
    array = np.arange(4000).reshape(50, 80)
    write_dicom(tmp_path / name, array)
    got = np.asarray(read_image(tmp_path / name))[..., 0]
    assert np.array_equal(got, window_to_8bit(array.astype(np.uint16)))


# ---------------------------------------------------------------------------------------------------------------------
# As hospitals' files have it
# ---------------------------------------------------------------------------------------------------------------------

LINE = np.linspace(0, 4095, 4096).reshape(64, 64).astype(np.uint16)


def grey(path) -> np.ndarray:
    return np.asarray(read_image(path))[..., 0]


def sequence(*items):
    """Of data sets, each given by its elements."""
    pydicom = pytest.importorskip("pydicom")
    found = []
    for elements in items:
        item = pydicom.Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
            if name in ("LUTDescriptor", "LUTData"):  # pydicom chooses it by the value, and fails without one
                item[name].VR = "US" if name == "LUTDescriptor" else "OW"
        found.append(item)
    return pydicom.Sequence(found)


def table(entries: np.ndarray, bits: int, first: int = 0) -> dict:
    return {"LUTDescriptor": [len(entries), first, bits], "LUTData": entries.astype("<u2").tobytes()}


@pytest.mark.parametrize("name", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_window_and_rescale_of_functional_groups_count_as_those_of_the_data_set(tmp_path, name):
    def group(center, slope):
        window = sequence({"WindowCenter": center, "WindowWidth": 200})
        values = sequence({"RescaleSlope": slope, "RescaleIntercept": -100})
        return {"FrameVOILUTSequence": window, "PixelValueTransformationSequence": values}

    groups = sequence(group(1000, 1), *([group(5, 9)] if name.startswith("Per") else []))
    write_dicom(tmp_path / "groups.dcm", np.stack([LINE, LINE[::-1]]), **{name: groups})
    assert np.array_equal(grey(tmp_path / "groups.dcm"), window_to_8bit(LINE - 100.0, 1000, 200))


def test_the_frames_own_group_comes_before_the_shared_one(tmp_path):
    both = {
        "SharedFunctionalGroupsSequence": sequence(
            {"FrameVOILUTSequence": sequence({"WindowCenter": 5, "WindowWidth": 7})}
        ),
        "PerFrameFunctionalGroupsSequence": sequence(
            {"FrameVOILUTSequence": sequence({"WindowCenter": 900, "WindowWidth": 300})}, {}
        ),
    }
    write_dicom(tmp_path / "a.dcm", np.stack([LINE, LINE]), **both)
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(LINE, 900, 300))


@pytest.mark.parametrize("bits, top, levels", [(12, 4095, 256), (16, 65535, 256), (16, 4095, 256), (12, 1023, 65)])
def test_a_table_that_declares_more_bits_than_it_uses_fills_the_screen(tmp_path, bits, top, levels):
    """Of fewer than 16 bits the declared number counts: a table may well be dark."""
    entries = np.linspace(0, top, 4096)
    write_dicom(tmp_path / "a.dcm", LINE, VOILUTSequence=sequence(table(entries, bits)))
    got = grey(tmp_path / "a.dcm")
    high = 4095 if top == 1023 else top
    assert (
        np.array_equal(got, np.rint(255 * (entries.astype(np.uint16)[LINE] / high))) and len(np.unique(got)) == levels
    )


def test_entries_of_8_bits_are_two_to_a_word(tmp_path):
    entries = np.arange(4096) % 251
    packed = {"LUTDescriptor": [4096, 0, 8], "LUTData": entries.astype(np.uint8).tobytes()}
    write_dicom(tmp_path / "a.dcm", LINE, VOILUTSequence=sequence(packed))
    assert np.array_equal(grey(tmp_path / "a.dcm"), entries[LINE])


def test_a_modality_table_of_12_bits_is_looked_up_and_what_lies_outside_has_its_ends(tmp_path):
    entries = 4095 - np.arange(1000) * 4
    modality = sequence({**table(entries, 12, first=1500), "ModalityLUTType": "US"})
    write_dicom(tmp_path / "a.dcm", LINE, ModalityLUTSequence=modality, WindowCenter=2048, WindowWidth=4096)
    values = entries[np.clip(LINE.astype(int) - 1500, 0, 999)]
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(values, 2048, 4096))


def test_padding_that_was_written_unsigned_is_found_in_a_signed_image(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    inside = np.linspace(-500, 500, 4096).reshape(64, 64).astype(np.int16)
    array = np.pad(inside, ((0, 0), (0, 40)), constant_values=-2048)
    write_dicom(tmp_path / "a.dcm", array, BitsStored=16, HighBit=15)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.add_new("PixelPaddingValue", "US", 63488)  # -2048
    dataset.save_as(tmp_path / "a.dcm")
    got = grey(tmp_path / "a.dcm")
    assert np.array_equal(got[:, :64], window_to_8bit(inside)) and not got[:, 64:].any()


@pytest.mark.parametrize("elements", [
    {"RescaleSlope": None, "RescaleIntercept": None},
    {"RescaleSlope": 1, "RescaleIntercept": None},
    {"NumberOfFrames": None},
    {"WindowCenter": 2048, "WindowWidth": None},
    {"WindowCenter": None, "WindowWidth": None},
    {"PixelPaddingValue": None},
    {"PixelPaddingValue": 5000, "PixelPaddingRangeLimit": None},
    {"VOILUTSequence": []},
    {"VOILUTSequence": [{"LUTDescriptor": None, "LUTData": None}]},
    {"ModalityLUTSequence": [{"LUTDescriptor": None, "LUTData": None}]},
    {"VOILUTFunction": None},
    {"PresentationLUTShape": None},
])  # fmt: skip
def test_an_empty_element_is_an_absent_one(tmp_path, elements):
    elements = {name: sequence(*value) if isinstance(value, list) else value for name, value in elements.items()}
    write_dicom(tmp_path / "empty.dcm", LINE, **elements)
    write_dicom(tmp_path / "absent.dcm", LINE)
    assert np.array_equal(grey(tmp_path / "empty.dcm"), grey(tmp_path / "absent.dcm"))


def test_an_empty_function_is_the_linear_one(tmp_path):
    write_dicom(tmp_path / "a.dcm", LINE, WindowCenter=2048, WindowWidth=1000, VOILUTFunction=None)
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(LINE, 2048, 1000))


def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(display, "_said_first_of", False)
    write_dicom(tmp_path / "tomo.dcm", np.stack([LINE, LINE[::-1]]))
    assert np.array_equal(grey(tmp_path / "tomo.dcm"), window_to_8bit(LINE))
    assert "tomo.dcm holds 2 frames or pages" in caplog.text


def test_a_frame_that_is_asked_for_has_its_own_window(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(display, "_said_first_of", False)
    frames = np.stack([LINE // 2, LINE // 2 + 7, LINE // 2 + 90])
    windows = [(500, 400), (1500, 400), (2500, 400)]
    groups = sequence(
        *(
            {"FrameVOILUTSequence": sequence({"WindowCenter": center, "WindowWidth": width})}
            for center, width in windows
        )
    )
    write_dicom(tmp_path / "tomo.dcm", frames, PerFrameFunctionalGroupsSequence=groups)
    assert frames_of(tmp_path / "tomo.dcm") == 3
    for wanted, number in ((1, 0), ("middle", 1), (3, 2)):
        got = read_image(tmp_path / "tomo.dcm", Display(frame=wanted))
        assert np.array_equal(np.asarray(got)[..., 0], window_to_8bit(frames[number], *windows[number]))
    assert not caplog.text  # it was asked for
    with pytest.raises(UnreadableImage, match="tomo.dcm: it holds 3 frames, so there is none of number 4"):
        read_image(tmp_path / "tomo.dcm", Display(frame=4))


def test_a_given_window_is_in_what_the_device_measured(tmp_path):
    values = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 2000, "WindowWidth": 10}
    write_dicom(tmp_path / "a.dcm", LINE, **values)
    got = np.asarray(read_image(tmp_path / "a.dcm", Display(window=(40, 400))))[..., 0]
    assert np.array_equal(got, window_to_8bit(LINE - 1024.0, 40, 400))


@pytest.mark.parametrize("sign_of_header", [0, 1])
def test_the_codestream_of_jpeg_2000_says_what_is_signed(tmp_path, sign_of_header):
    """pydicom's decoders disagree where the header denies it: one moves the values by half their range, two wrap."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    array = np.linspace(-32000, 32000, 64 * 64).astype(np.int16).reshape(64, 64)
    code = io.BytesIO()
    Image.fromarray(array.view(np.uint16)).save(code, "JPEG2000", no_jp2=True, signed=True)
    write_dicom(tmp_path / "a.dcm", array, BitsStored=16, HighBit=15)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = encapsulate([code.getvalue()])
    dataset.PixelRepresentation = sign_of_header
    dataset.WindowCenter, dataset.WindowWidth = 0, 20000
    dataset.save_as(tmp_path / "a.dcm")
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(array, 0, 20000))


@pytest.mark.parametrize(
    "elements, size",
    [
        ({"PixelAspectRatio": [2, 1]}, (64, 128)),  # width and height; the ratio is of a pixel's height to its width
        ({"PixelAspectRatio": [3, 4]}, (85, 64)),
        ({"PixelSpacing": [0.1, 0.15]}, (96, 64)),
        ({"ImagerPixelSpacing": [0.3, 0.1]}, (64, 192)),
        ({"PixelSpacing": [0.1, 0.1002]}, (64, 64)),
        ({"PixelSpacing": None, "PixelAspectRatio": [1, 1]}, (64, 64)),
        ({"PixelSpacing": [0.2, 0.1], "PixelAspectRatio": [1, 1]}, (64, 128)),  # a ratio is for files without distances
    ],
)
def test_pixels_that_are_no_squares_are_shown_as_long_as_they_are(tmp_path, elements, size):
    write_dicom(tmp_path / "a.dcm", LINE.reshape(64, 64), WindowCenter=2048, WindowWidth=4096, **elements)
    got = read_image(tmp_path / "a.dcm")
    assert got.size == size
    bright = np.asarray(got)[..., 0].mean()
    assert abs(bright - window_to_8bit(LINE, 2048, 4096).mean()) < 1


def test_a_missing_decoder_is_named_and_the_file_is_not_called_damaged(tmp_path, monkeypatch):
    """JPEG Lossless, which most mammography archives send."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGLosslessSV1

    if find_spec("pylibjpeg"):
        pytest.skip("it is there")
    monkeypatch.setattr(codecs, "is_available", lambda uid: False)
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    write_dicom(tmp_path / "a.dcm", LINE)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableImage) as refused:
        read_image(tmp_path / "a.dcm")
    kind = "JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 [Selection Value 1])"
    advice = (
        f"it is {kind} and not damaged: to read it, pip install imagecodecs (grey), "
        "or pip install pylibjpeg pylibjpeg-libjpeg (colour too)"
    )
    assert str(refused.value) == f"cannot decode the image {tmp_path / 'a.dcm'}: {advice}"


def test_a_file_without_preamble_says_what_to_do(tmp_path):
    write_dicom(tmp_path / "whole.dcm", LINE)
    (tmp_path / "bare.dcm").write_bytes((tmp_path / "whole.dcm").read_bytes()[132:])
    with pytest.raises(UnreadableImage, match="bare.dcm: it does not begin as a DICOM file .* can rewrite it"):
        read_image(tmp_path / "bare.dcm")


def test_a_tables_first_value_is_signed_by_what_values_can_be(tmp_path):
    """-2048 written as 63488, of a signed image that happens to have no negative value."""
    values = np.arange(4096, dtype=np.int16).reshape(64, 64) % 2048
    entries = np.arange(4096, dtype="<u2") // 16
    voi = sequence({"LUTDescriptor": [4096, 63488, 8], "LUTData": entries.astype("<u2").tobytes()})
    write_dicom(tmp_path / "a.dcm", values, PixelRepresentation=1, VOILUTSequence=voi)
    assert np.array_equal(grey(tmp_path / "a.dcm"), (values + 2048) // 16)


@pytest.mark.parametrize("declared", [8, 16])
def test_a_palette_of_bytes_in_words_is_read_by_its_length(tmp_path, declared):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64) % 256
    write_dicom(tmp_path / "a.dcm", ramp, PhotometricInterpretation="PALETTE COLOR")
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    for i in (1, 2, 3):
        dataset.add_new(0x00281100 + i, "US", [256, 0, declared])
        dataset.add_new(0x00281200 + i, "OW", np.arange(256).astype("<u2").tobytes())
    dataset.save_as(tmp_path / "a.dcm")
    assert np.array_equal(grey(tmp_path / "a.dcm"), ramp)


@pytest.mark.parametrize("entries", [255, 256])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("big", [False, True])
def test_a_palette_is_read_whatever_its_length_and_the_order_of_its_bytes(tmp_path, entries, bits, big):
    """Entries of 8 bits are two to a word, with a byte behind an odd number of them; a word has the file's order."""
    pydicom = pytest.importorskip("pydicom")
    index = np.arange(4096, dtype=np.uint16).reshape(64, 64) % entries
    write_dicom(tmp_path / "a.dcm", index, PhotometricInterpretation="PALETTE COLOR")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    colours = [np.random.default_rng(i).integers(0, 1 << bits, entries) for i in range(3)]
    for i, colour in enumerate(colours, 1):
        data = (
            colour.astype("<u2").tobytes() if bits == 16 else colour.astype(np.uint8).tobytes() + b"\0" * (entries % 2)
        )
        words = np.frombuffer(data, "<u2")
        dataset.add_new(0x00281100 + i, "US", [entries, 0, bits])
        dataset.add_new(0x00281200 + i, "OW", words.astype(">u2" if big else "<u2").tobytes())
    if big:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        dataset.PixelData = index.astype(">u2").tobytes()
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, implicit_vr=False, little_endian=not big)
    expected = np.stack([colour[index] >> bits - 8 for colour in colours], -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.dcm")), expected)


def test_values_above_the_low_bits_are_moved_down(tmp_path):
    write_dicom(tmp_path / "high.dcm", LINE.astype(np.uint16) << 4, HighBit=15)
    write_dicom(tmp_path / "low.dcm", LINE)
    assert np.array_equal(grey(tmp_path / "high.dcm"), grey(tmp_path / "low.dcm"))


def test_a_mask_of_few_bits_is_white(tmp_path):
    mask = (LINE > 2000).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", mask, BitsStored=1, HighBit=0)
    assert np.array_equal(grey(tmp_path / "a.dcm"), 255 * mask)


def test_what_a_device_measured_in_few_bits_is_not_spread(tmp_path):
    values = (LINE // 16).astype(np.uint16) % 16
    write_dicom(tmp_path / "a.dcm", values, BitsStored=4, HighBit=3, RescaleSlope=0.5, RescaleIntercept=0)
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(values * 0.5))


@pytest.mark.parametrize("bits", [0, 8, 10, 12])
def test_a_table_whose_entries_have_more_bits_than_it_declares_is_shown_by_its_entries(tmp_path, bits):
    voi = sequence(table(np.arange(4096) * 4, bits))
    write_dicom(tmp_path / "a.dcm", LINE, VOILUTSequence=voi)
    assert np.array_equal(grey(tmp_path / "a.dcm"), np.rint(255 * (LINE * 4.0 / 16383)))


def test_the_output_of_a_modality_table_has_no_sign(tmp_path):
    """So neither has the first value of the table behind it, in a signed image either."""
    values = LINE.astype(np.int16) - 2048
    measured, shown = np.arange(4096) * 16, np.arange(25536) // 100
    tables = {"ModalityLUTSequence": sequence(table(measured, 16, -2048 & 0xFFFF)),
              "VOILUTSequence": sequence(table(shown, 8, 40000))}  # fmt: skip
    write_dicom(tmp_path / "a.dcm", values, BitsStored=16, HighBit=15, **tables)
    assert np.array_equal(grey(tmp_path / "a.dcm"), shown[(measured[LINE] - 40000).clip(0)])


def test_padding_that_was_written_signed_is_found_in_an_unsigned_image(tmp_path):
    values = LINE.copy()
    values[:3] = 65536 - 2000
    write_dicom(tmp_path / "a.dcm", values, BitsStored=16, HighBit=15)
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    dataset.save_as(tmp_path / "a.dcm")
    assert (grey(tmp_path / "a.dcm")[:3] == 0).all()
    assert np.array_equal(grey(tmp_path / "a.dcm")[3:], window_to_8bit(values[3:]))


@pytest.mark.parametrize("place", ["data set", "shared"])
def test_nothing_is_left_of_what_counts_less_than_a_frames_own_window(tmp_path, place):
    less = {"VOILUTSequence": sequence(table(np.arange(4096)[::-1], 12)), "VOILUTFunction": "SIGMOID"}
    shared = {"SharedFunctionalGroupsSequence": sequence({"FrameVOILUTSequence": sequence(less)})}
    own = sequence({"FrameVOILUTSequence": sequence({"WindowCenter": 1500, "WindowWidth": 900})})
    given = less if place == "data set" else shared
    write_dicom(tmp_path / "a.dcm", LINE, PerFrameFunctionalGroupsSequence=own, **given)
    assert np.array_equal(grey(tmp_path / "a.dcm"), window_to_8bit(LINE, 1500, 900))


def test_the_retired_name_of_a_jpegs_colours_is_read(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    colours = Image.radial_gradient("L").resize((64, 48))
    colours = Image.merge("RGB", [colours, colours.rotate(180), Image.new("L", colours.size, 40)])
    code = io.BytesIO()
    colours.save(code, "JPEG", quality=95)
    write_dicom(tmp_path / "a.dcm", np.zeros((48, 64), np.uint8), SamplesPerPixel=3, PlanarConfiguration=0)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PhotometricInterpretation = "YBR_PARTIAL_422"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = encapsulate([code.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    code.seek(0)
    found, expected = (np.asarray(image).astype(int) for image in (read_image(tmp_path / "a.dcm"), Image.open(code)))
    assert np.abs(found - expected).max() <= 2  # pydicom and libjpeg round otherwise


def test_frames_of_single_bits_begin_inside_a_byte(tmp_path):
    masks = np.random.default_rng(0).integers(0, 2, (3, 13, 11)).astype(np.uint8)
    pydicom = pytest.importorskip("pydicom")
    write_dicom(tmp_path / "a.dcm", masks)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 1, 0
    dataset.PixelData = np.packbits(masks.ravel(), bitorder="little").tobytes()
    dataset.save_as(tmp_path / "a.dcm")
    for number, mask in enumerate(masks, 1):
        shown = np.asarray(read_image(tmp_path / "a.dcm", Display(number)))[..., 0]
        assert np.array_equal(shown, 255 * mask)


def test_an_empty_file_is_called_so(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="a.dcm: it is empty$"):
        read_image(tmp_path / "a.dcm")


def test_jpeg_of_12_bits_says_what_reads_it(tmp_path):
    if find_spec("pylibjpeg"):
        pytest.skip("it is there")
    said = "Unable to decode: Pillow does not support 'JPEG Extended' for samples with 12-bit precision"
    assert dicom.reason(NotImplementedError(said)).endswith(
        "not damaged: to read it, pip install pylibjpeg pylibjpeg-libjpeg"
    )


def test_a_narrow_window_counts_where_its_function_allows_one(tmp_path):
    values = dict(RescaleSlope="0.00025", RescaleIntercept=0, WindowCenter=0.25, WindowWidth=0.5)
    write_dicom(tmp_path / "a.dcm", LINE, VOILUTFunction="LINEAR_EXACT", **values)
    expected = window_to_8bit(LINE * 0.00025, 0.25, 0.5, function="LINEAR_EXACT")
    assert np.array_equal(grey(tmp_path / "a.dcm"), expected)


def test_a_spacing_of_nothing_is_no_spacing(tmp_path):
    write_dicom(tmp_path / "a.dcm", LINE, PixelSpacing=[0, 0], ImagerPixelSpacing=[0.1, 0.2], NumberOfFrames=None)
    assert read_image(tmp_path / "a.dcm", Display("middle")).size == (128, 64)


def test_an_image_under_a_dicom_files_name_is_read(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.dcm")
    assert (grey(tmp_path / "a.dcm") == 77).all()


# ---------------------------------------------------------------------------------------------------------------------
# imagecodecs' decoders
# ---------------------------------------------------------------------------------------------------------------------

ENCODED = {
    "1.2.840.10008.1.2.4.57": lambda ic, values, bits: ic.ljpeg_encode(values, bitspersample=bits),
    "1.2.840.10008.1.2.4.70": lambda ic, values, bits: ic.ljpeg_encode(values, bitspersample=bits),
    "1.2.840.10008.1.2.4.80": lambda ic, values, bits: ic.jpegls_encode(values),
    "1.2.840.10008.1.2.4.201": lambda ic, values, bits: ic.htj2k_encode(values),
    "1.2.840.10008.1.2.5": None,  # pydicom's own encoder
}


def compressed(path, uid, values, bits):
    ic, pydicom = pytest.importorskip("imagecodecs"), pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    write_dicom(path, values, BitsStored=bits, HighBit=bits - 1)
    dataset = pydicom.dcmread(path)
    if ENCODED[uid] is None:
        dataset.compress(uid)
    else:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(uid)
        dataset.PixelData = encapsulate([ENCODED[uid](ic, values, bits)])
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)


@pytest.mark.parametrize(
    "uid, bits",
    # pydicom 3.0.2 writes RLE of 8 bits in 16 that it cannot read (findings/)
    [(uid, bits) for uid in ENCODED for bits in (8, 12, 16) if ENCODED[uid] or bits > 8],
)
def test_frames_decode_to_what_was_encoded(uid, bits, tmp_path, monkeypatch):
    from pydicom import dcmread

    values = np.random.default_rng(bits).integers(0, 1 << bits, (37, 53)).astype(np.uint8 if bits == 8 else np.uint16)
    compressed(tmp_path / "a.dcm", uid, values, bits)
    get_decoder = pytest.importorskip("pydicom.pixels").get_decoder
    monkeypatch.setattr(get_decoder(uid), "_available", {})
    assert np.array_equal(codecs.stored_values(dcmread(tmp_path / "a.dcm"), 0), values)
    assert get_decoder(uid).available_plugins == (codecs.LABEL,)


def test_signed_values_are_decoded(tmp_path, monkeypatch):
    """HTJ2K says of its values whether they have a sign."""
    from pydicom import dcmread

    values = np.random.default_rng(0).integers(-2048, 2048, (37, 53)).astype(np.int16)
    uid = "1.2.840.10008.1.2.4.201"
    compressed(tmp_path / "a.dcm", uid, values, 12)
    get_decoder = pytest.importorskip("pydicom.pixels").get_decoder
    monkeypatch.setattr(get_decoder(uid), "_available", {})
    assert np.array_equal(codecs.stored_values(dcmread(tmp_path / "a.dcm"), 0), values)


def test_after_a_grey_file_one_in_colour_is_still_told_what_reads_it(tmp_path, monkeypatch):
    from pydicom.encaps import encapsulate

    ic, pydicom = pytest.importorskip("imagecodecs"), pytest.importorskip("pydicom")
    uid = "1.2.840.10008.1.2.4.80"
    decoder = pytest.importorskip("pydicom.pixels").get_decoder(uid)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")})
    compressed(tmp_path / "a.dcm", uid, np.zeros((8, 8), np.uint16), 12)
    read_image(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.PhotometricInterpretation = 3, 0, "RGB"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = encapsulate([ic.jpegls_encode(np.zeros((8, 8, 3), np.uint8))])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "b.dcm")
    with pytest.raises(UnreadableImage, match="not damaged: to read it, .* pylibjpeg pylibjpeg-libjpeg"):
        read_image(tmp_path / "b.dcm")


@pytest.mark.parametrize("uid", [uid for uid in ENCODED if uid.startswith("1.2.840.10008.1.2.4") and ENCODED[uid]])
def test_a_cut_frame_is_one_line(uid, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate, get_frame

    values = np.random.default_rng(0).integers(0, 4096, (60, 80)).astype(np.uint16)
    compressed(tmp_path / "a.dcm", uid, values, 12)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    whole = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([whole[:40]])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableImage) as refused:
        read_image(tmp_path / "a.dcm")
    assert "imagecodecs: " in str(refused.value) and "\n" not in str(refused.value)


def test_another_size_than_the_header_says_is_refused(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import get_decoder

    monkeypatch.setattr(get_decoder("1.2.840.10008.1.2.4.80"), "_available", {})
    values = np.random.default_rng(0).integers(0, 4096, (60, 80)).astype(np.uint16)
    compressed(tmp_path / "a.dcm", "1.2.840.10008.1.2.4.80", values, 12)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.Rows = 61
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UnreadableImage, match="4800 values of uint16, for 61 rows of 80"):
        read_image(tmp_path / "a.dcm")


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("above", [0, 1 << 14])  # a bit above those stored, which an overlay once used
def test_a_file_is_read_as_pydicom_reads_it(uid, signed, above, tmp_path):
    """With fewer copies of its pixels: the same values from files of two frames, the same data set from cut ones."""
    pydicom = pytest.importorskip("pydicom")

    values = np.random.default_rng(0).integers(0, 1 << 12, (2, 60, 80)).astype(np.int16)
    values = (values - 2048) ^ np.int16(above) if signed else values | np.int16(above)
    write_dicom(tmp_path / "a.dcm", values)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    if uid.endswith("5"):
        dataset.compress(uid)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(uid)
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, implicit_vr=uid.endswith(".2"), little_endian=True)
    data, whole = (tmp_path / "a.dcm").read_bytes(), pydicom.dcmread(tmp_path / "a.dcm")
    assert (
        whole.pixel_array.min() >= -2048 and whole.pixel_array.max() < 4096 and (whole.pixel_array.min() < 0) == signed
    )
    assert isinstance(dicom._read(data)["PixelData"].value, io.BytesIO if uid.endswith("5") else memoryview)
    for number, expected in enumerate(whole.pixel_array):
        assert np.array_equal(codecs.stored_values(dicom._read(data), number), expected)
    dataset.IconImageSequence = [pydicom.Dataset()]  # with pixels of its own, before those of the image
    dataset.IconImageSequence[0].BitsAllocated, dataset.IconImageSequence[0].PixelData = 8, b"\1\2"
    pydicom.dcmwrite(tmp_path / "a.dcm", dataset, implicit_vr=uid.endswith(".2"), little_endian=True)
    found = dicom._read((tmp_path / "a.dcm").read_bytes())
    assert np.array_equal(codecs.stored_values(found, 1), whole.pixel_array[1]) and len(found.IconImageSequence) == 1
    for cut in (1, 9, 2000):
        assert dicom._read(data[:-cut]) == pydicom.dcmread(io.BytesIO(data[:-cut]))
