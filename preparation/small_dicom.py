"""A DICOM file with fewer pixels: its own header around what a screen shows of it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from inputs.dicom import take_functional_groups
from inputs.display import BY_FILE
from inputs.images import UnreadableImage, decode_shown

# Of group 0028, which describes the pixels, what holds for the smaller ones too (PS3.6): BurnedInAnnotation,
# BreastImplantPresent, PartialView, QualityControlImage, LossyImageCompression with its ratio and method.
STAYS = (0x00280301, 0x00281300, 0x00281350, 0x00281351, 0x00281352, 0x00280300, 0x00282110, 0x00282112, 0x00282114)
OVERLAYS = range(0x6000, 0x6100)  # groups, which lie on the pixels one to one
GONE = (
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "FloatPixelData", "DoubleFloatPixelData", "PresentationLUTShape",
    "PresentationLUTSequence", "IconImageSequence",
)  # fmt: skip
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


def frames_in(data: bytes) -> int:
    """How many frames a DICOM file holds, by its header; 1 where it cannot be read, which decoding it says."""
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1)
    except Exception:  # of any kind, on a damaged file
        return 1


def with_pixels(data: bytes, small: Image.Image, how: str, scale: float, name: str) -> bytes:
    """The file in `data` with `small` in place of its pixels, 8 bits as they are shown, deflated (PS3.5, A.5).

    What it is called, of whom and of which side it is, stays; the values, windows and tables that made the greys go.
    A file whose greys came from its window keeps one that changes nothing, so that they count as that still.

    Args:
        small: RGB or L.
        how: where its greys come from, one of display.SHOWN.
        scale: pixels of `small` for one of the file's, along its shorter side.

    Raises:
        UnreadableImage: with `name`, where the new file would not show `small` to the bit.
    """
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        take_functional_groups(dataset, 0)  # of one frame, where spacings may lie
        spacing = {key: _finest(dataset.get(key)) for key in SPACINGS}
        for tag in [element.tag for element in dataset if _goes(element.tag)]:
            del dataset[tag]
        for key in GONE:
            if key in dataset:
                del dataset[key]
        for key, side in spacing.items():
            if side:
                setattr(dataset, key, [side / scale] * 2)
        _describe(dataset, small, how == BY_FILE)
        dataset.PixelData = small.tobytes() + b"\0" * (len(small.tobytes()) % 2)
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    except Exception as error:  # of any kind, on a header that cannot be written
        raise UnreadableImage(f"cannot write the header of {name} again: {error}") from error
    shown, now = decode_shown(buffer.getvalue(), name, grey=True)
    if not np.array_equal(np.asarray(shown), np.asarray(small)) or (now == BY_FILE) != (how == BY_FILE):
        raise UnreadableImage(f"cannot make a smaller copy of {name}: it would be shown otherwise")
    return buffer.getvalue()


def _goes(tag: Any) -> bool:
    """Whether an element is of the old pixels."""
    return (tag.group == 0x0028 and int(tag) not in STAYS) or tag.group in OVERLAYS or tag.group == 0x7FE0


def _finest(spacing: Any) -> float:
    """The smaller of two distances, to which an image is made square; 0 for none."""
    return min(map(float, spacing)) if hasattr(spacing, "__len__") and len(spacing) == 2 else 0.0


def _describe(dataset: Any, small: Image.Image, windowed: bool) -> None:
    """The elements of the new pixels."""
    colour = small.mode == "RGB"
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = small.height, small.width
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    if windowed and not colour:
        dataset.WindowCenter, dataset.WindowWidth = 128, 256  # 0 to 255 as they are
    dataset.ImageType = ["DERIVED", *list(dataset.get("ImageType") or ["", "PRIMARY"])[1:]]
    dataset.DerivationDescription = "made smaller, 8 bits as displayed"
