"""Smaller copies of DICOM files: what they show beside full decoding, what their headers keep, and the breast's box."""

import numpy as np
import pytest
from PIL import Image
from test_dicom import write_dicom

from inputs.dicom import header_text
from inputs.display import Display
from inputs.images import decode_shown, read_image
from preparation import shrink
from preparation.breast import breast_box
from preparation.small_dicom import frames_in

pydicom = pytest.importorskip("pydicom")


def values_of(seed: int = 0, shape=(90, 60)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    noise = np.random.default_rng(seed).normal(0, 200, shape)
    return (1500 + 20 * rows - 10 * columns + noise).clip(0, 4095).astype(np.uint16)


def lut(count: int = 4096):
    item = pydicom.Dataset()
    item.LUTDescriptor = [count, 0, 16]
    item.LUTData = (np.linspace(0, 1, count) ** 2 * 65535).astype("<u2").tobytes()
    return item


KINDS = {
    "window": {"WindowCenter": 2000, "WindowWidth": 1500},
    "two windows": {"WindowCenter": [2000, 5], "WindowWidth": [1500, 5], "VOILUTFunction": "SIGMOID"},
    "percentiles": {},
    "inverted": {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2000, "WindowWidth": 3000},
    "inverse look": {"PresentationLUTShape": "INVERSE"},
    "rescaled": {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 2000, "WindowWidth": 3000},
    "padded": {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 3500},
    "table": {"VOILUTSequence": [lut()]},
    "no squares": {"PixelSpacing": [0.1, 0.15]},
    "an aspect": {"PixelAspectRatio": [3, 2]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shows_what_full_decoding_and_the_same_resize_show(tmp_path, kind):
    (tmp_path / "in").mkdir()
    source, copy = tmp_path / "in" / "a.dicom", tmp_path / "out" / "a.dicom"
    write_dicom(source, values_of(), ImageLaterality="L", PatientID="P7", BreastImplantPresent="NO", **KINDS[kind])
    assert shrink.shrink_tree(tmp_path / "in", tmp_path / "out", 30) == {"shrunk": 1}
    whole, how = decode_shown(source.read_bytes(), "a", grey=True)
    expected = shrink.shrink(whole, 30)
    shown, now = decode_shown(copy.read_bytes(), "a", grey=True)
    assert np.array_equal(np.asarray(shown), np.asarray(expected)) and min(shown.size) == 30
    assert now == (how if "window" in how else "8 bits as stored")  # what a probe says of its training images
    assert copy.stat().st_size < source.stat().st_size
    header = pydicom.dcmread(copy)
    assert (header.ImageLaterality, header.PatientID, header.BreastImplantPresent) == ("L", "P7", "NO")
    assert header.SOPInstanceUID == pydicom.dcmread(source).SOPInstanceUID and header.ImageType[0] == "DERIVED"
    assert (header.Rows, header.Columns, header.BitsStored) == (*expected.size[::-1], 8)
    if kind == "no squares":  # 60 pixels of 0.15 are 90 of 0.1, and those 30
        assert [float(side) for side in header.PixelSpacing] == pytest.approx([0.3, 0.3])
    by_hand = decode_shown(copy.read_bytes(), "a", Display(window=(100, 20)), grey=True)[0]
    assert np.array_equal(np.asarray(by_hand), np.asarray(expected))  # the values that a window is for are gone


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "RLELossless", "colour"])
def test_files_of_other_encodings_are_shrunk_too(tmp_path, syntax):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "IM000001"  # as archives export them
    values = values_of(shape=(90, 61))
    write_dicom(source, values, WindowCenter=2000, WindowWidth=1500)
    dataset = pydicom.dcmread(source)
    if syntax == "RLELossless":
        dataset.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom")
        dataset.save_as(source)
    elif syntax == "colour":
        rgb = np.stack([values >> 4, values >> 5, 255 - (values >> 4)], -1).astype(np.uint8)
        dataset.PixelData, dataset.SamplesPerPixel, dataset.PlanarConfiguration = rgb.tobytes(), 3, 0
        dataset.PhotometricInterpretation = "RGB"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.save_as(source)
    else:
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        big = "Big" in syntax
        dataset.PixelData = values.astype(">u2" if big else "<u2").tobytes()
        flags = {"implicit_vr": "Implicit" in syntax, "little_endian": not big}
        pydicom.dcmwrite(source, dataset, force_encoding=True, **flags)
    assert shrink.shrink_tree(tmp_path / "in", tmp_path / "out", 30) == {"shrunk": 1}
    expected = shrink.shrink(read_image(source), 30)
    assert np.array_equal(np.asarray(read_image(tmp_path / "out" / "IM000001")), np.asarray(expected))
    assert (np.asarray(expected).std(-1) > 0).any() == (syntax == "colour")


def test_small_files_several_frames_and_broken_ones_are_copied_as_they_are(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    write_dicom(root / "small.dcm", values_of(shape=(20, 20)))
    write_dicom(root / "several.dcm", np.stack([values_of(0), values_of(1)]))
    (root / "broken.dcm").write_bytes((root / "several.dcm").read_bytes()[:400])
    Image.new("L", (80, 60), 9).save(root / "really.png")
    (root / "really.png").rename(root / "really_a_png.dcm")
    counts = shrink.shrink_tree(root, tmp_path / "out", 30)
    assert counts == {"copied": 2, "unreadable": 1, "shrunk": 1}
    for name in ("small", "several", "broken"):
        assert (tmp_path / "out" / f"{name}.dcm").read_bytes() == (root / f"{name}.dcm").read_bytes()
    assert frames_in((root / "several.dcm").read_bytes()) == 2 and frames_in(b"") == 1
    assert read_image(tmp_path / "out" / "really_a_png.dcm").size == (40, 30)
    assert "broken.dcm" in (tmp_path / "out" / "bad_samples.txt").read_text()


def mammogram(left: bool = True, background: int = 0) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A breast, half an ellipse at the edge, with a label beside it, and the box of the breast alone."""
    rows, columns = np.mgrid[:800, :600]
    breast = ((rows - 420) / 260) ** 2 + (columns / 330) ** 2 <= 1
    grey = np.where(breast, 600 + 3000 * (1 - columns / 330).clip(0), 40 * background)
    grey[40:80, 480:580] = 4000  # the label
    box = (0, 160, 330, 681)
    if not left:
        grey, box = grey[:, ::-1], (600 - box[2], box[1], 600, box[3])
    return grey.astype(np.uint16), box


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("background", [0, 2])
def test_a_mammogram_is_cut_to_its_breast_before_it_is_shrunk(tmp_path, left, background):
    (tmp_path / "in").mkdir()
    values, box = mammogram(left, background)
    write_dicom(tmp_path / "in" / "a.dcm", values, WindowCenter=2048, WindowWidth=4096, ImageLaterality="LR"[not left])
    whole = read_image(tmp_path / "in" / "a.dcm")
    found = breast_box(whole)
    assert all(abs(a - b) <= 9 for a, b in zip(found, box, strict=True)), found  # two squares of four pixels
    assert found[0] <= box[0] and found[1] <= box[1] and found[2] >= box[2] and found[3] >= box[3]
    shrink.shrink_tree(tmp_path / "in", tmp_path / "out", 100, crop=True)
    copy = read_image(tmp_path / "out" / "a.dcm")
    assert np.array_equal(np.asarray(copy), np.asarray(shrink.shrink(whole.crop(found), 100)))
    assert header_text(tmp_path / "out" / "a.dcm", "ImageLaterality") == "LR"[not left]
    with pytest.raises(ValueError, match="begun with crop_breast True, not None"):
        shrink.shrink_tree(tmp_path / "in", tmp_path / "out", 100)


def test_an_image_without_a_dark_background_stays_whole():
    noise = np.random.default_rng(0).normal(150, 20, (300, 200)).clip(90, 255).astype(np.uint8)
    assert breast_box(Image.fromarray(noise)) is None
    assert breast_box(Image.new("L", (300, 200))) is None
    speck = np.zeros((300, 200), np.uint8)
    speck[10:20, 10:20] = 255
    assert breast_box(Image.fromarray(speck)) is None


def test_spacings_of_functional_groups_go_with_a_copy(tmp_path):
    (tmp_path / "in").mkdir()
    measures, group = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = [0.1, 0.1]
    group.PixelMeasuresSequence = [measures]
    write_dicom(tmp_path / "in" / "a.dcm", values_of(), SharedFunctionalGroupsSequence=[group])
    assert shrink.shrink_tree(tmp_path / "in", tmp_path / "out", 30) == {"shrunk": 1}
    assert pydicom.dcmread(tmp_path / "out" / "a.dcm").PixelSpacing == pytest.approx([0.2, 0.2])
