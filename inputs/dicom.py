"""A DICOM file to what its own elements say a screen shows (PS3.4, N.2): stored values, modality, window, presentation.

Decoding is pydicom's. The tables and windows are read here: hospitals' files empty elements, declare more bits than
their tables use, pack entries of 8 bits, and keep the window of a frame in functional groups.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inputs.codecs import CODECS, stored_values
from inputs.depth import levels_of, to_8bit, window_to_8bit
from inputs.display import BY_FILE, BY_HAND, DISPLAY, Display
from runtime.limits import BYTES, PIXELS
from utils import refuse_lfs_pointer

PIXEL_DATA, UNDEFINED = 0x7FE00010, 0xFFFFFFFF  # the element, and the length of one that ends by a mark, this one:
END_OF_SEQUENCE = b"\xfe\xff\xdd\xe0\0\0\0\0"


def is_dicom(data: bytes, name: str) -> bool:
    """By its mark; many exports have no extension, or another one."""
    return data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def displayed(data: bytes, display: Display = DISPLAY) -> tuple[Image.Image, str, int]:
    """A frame as its file, or a person, wants it displayed, with 8 bits.

    Returns:
        the image, RGB or grey (L), its pixels square; where its grey values come from, one of `display.SHOWN`; the
        number of frames.

    Raises:
        ImportError: without pydicom.
        Exception: of any kind, on a damaged file, or one without the frame.
    """
    from pydicom.pixels import apply_color_lut

    _refuse_inflated(data)
    dataset = _read(data)
    _drop_empty(dataset)
    sides = (int(dataset.get(name, 1)) for name in ("Rows", "Columns", "SamplesPerPixel"))
    PIXELS.refuse(math.prod(sides), "it")
    frames = int(dataset.get("NumberOfFrames") or 1)
    number = display.index(frames)
    _take_sign(dataset, number)
    _take_colours(dataset)
    above = _above_the_low_bits(dataset)
    frame = stored_values(dataset, number)  # (H, W), or (H, W, 3) in RGB
    frame = frame >> above if above else frame
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        _mend_palette(dataset)
        frame = apply_color_lut(frame, dataset)[..., :3]
        frame = frame if frame.dtype == np.uint8 else (frame >> 8).astype(np.uint8)  # entries fill all 16 bits
    take_functional_groups(dataset, number)
    if frame.ndim == 2:
        shown, how = _grey(frame, dataset, display.window)
    else:
        shown, how = to_8bit(frame)
    return _square(Image.fromarray(shown), dataset), how, frames


def _grey(frame: np.ndarray, dataset: Any, window: tuple[float, float] | None) -> tuple[np.ndarray, str]:
    """Stored values (H, W) to uint8, and where they come from."""
    if int(dataset.get("BitsStored", 16)) <= 8:
        window = None  # it is for what a device measured
    how = BY_HAND if window else BY_FILE
    levels, counts = levels_of(frame), None
    stored = levels.range if levels else frame
    values = _modality(stored, dataset)
    grey = window_to_8bit(values, *window) if window else _windowed(values, dataset)
    padding = _padding(stored, dataset)
    if grey is None:
        # No window: 8-bit values as they are, others between percentiles of what is not padding.
        if levels:  # which values occur, and how often, matters only now
            stored, counts = levels.counted()
            values, padding = _modality(stored, dataset), _padding(stored, dataset)
        grey = np.zeros(values.shape, np.uint8)
        grey[~padding], how = to_8bit(values[~padding], counts=None if counts is None else counts[~padding])
        # A mask of one bit, say. What a device measured of so few is not spread any more.
        if (bits := int(dataset.get("BitsStored", 8))) < 8 and np.array_equal(values, stored):
            grey = np.rint(grey * (255 / ((1 << bits) - 1))).clip(0, 255).astype(np.uint8)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    grey[padding] = 0  # it is no part of the image, so black
    return levels.spread(stored, grey) if levels else grey, how


def frames_of(path: str | Path) -> int:
    """How many frames a file holds, by its header; raises as `displayed` does."""
    import pydicom

    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
    return int(header.get("NumberOfFrames") or 1)


def header_text(path: str | Path, name: str) -> str:
    """A text of a file's header by its keyword, "" where it has none; ImportError, ValueError name the file."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise ImportError(f"{path} is a DICOM file: pip install pydicom") from error
    refuse_lfs_pointer(path)
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[name])
    except InvalidDicomError as error:
        raise ValueError(f"{path} is not a DICOM file: {error}") from error
    except Exception as error:  # of any kind, on a damaged file
        raise ValueError(f"the header of {path} cannot be read: {error}") from error
    return str(header.get(name, "")).strip()


def reason(error: Exception) -> str:
    """Why a file cannot be shown, in a user's words where pydicom has its own."""
    from pydicom.uid import UID

    first, *each = str(error).splitlines() or [""]
    text = str(error)
    if "missing dependencies" in text:  # its plugins, each with what it requires
        kind = re.search("'([^']+)'", text)
        packages = sorted(set(re.findall(r"\bpylibjpeg(?:-\w+)?", text)))
        named = f"it is {kind[1]}" if kind else "it is compressed"
        advice = f"pip install {' '.join(packages)}"
        if kind and kind[1] in {UID(syntax).name for syntax in CODECS}:
            advice = f"pip install imagecodecs (grey), or {advice} (colour too)"
        return f"{named} and not damaged: to read it, {advice}"
    if "Pillow does not support 'JPEG Extended'" in text:
        return "it is JPEG of 12 bits and not damaged: to read it, pip install pylibjpeg pylibjpeg-libjpeg"
    if type(error).__name__ == "InvalidDicomError":
        return "it does not begin as a DICOM file (128 bytes, then DICM): a DICOM tool such as dcmconv can rewrite it"
    # Of several decoders each says what it met, on a line of its own.
    return "; ".join(line.strip() for line in each) if first.endswith("by all available plugins:") else text


def _read(data: bytes) -> Any:
    """A file's data set, as pydicom reads it, where it can be with a copy of the pixels less."""
    import pydicom
    from pydicom.filereader import read_partial
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    pixels: list[tuple[str | None, int]] = []  # how and how long they are written

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag == PIXEL_DATA:
            pixels.append((vr, length))
        return tag == PIXEL_DATA

    file = io.BytesIO(data)
    try:
        dataset = read_partial(file, at_pixels)
        syntax = dataset.file_meta.TransferSyntaxUID
        (vr, length), start = pixels[0], file.tell()
    except Exception:  # of any kind, on a damaged file, or one without pixels: pydicom has the word
        return pydicom.dcmread(io.BytesIO(data))
    start += 12 if vr else 8  # after the tag, the kind and the length
    value: Any = None
    if vr in (None, "OB", "OW"):  # another kind may be written with a shorter length
        if length == UNDEFINED and syntax in CODECS and data.rfind(END_OF_SEQUENCE, start) > 0:
            value = file
            value.seek(start)  # where pydicom begins
        elif syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian) and start + length <= len(data):
            value = memoryview(data)[start : start + length]
    if value is None:
        return pydicom.dcmread(io.BytesIO(data))
    dataset[PIXEL_DATA] = pydicom.DataElement(PIXEL_DATA, vr or "OW", value, already_converted=True)
    dataset[PIXEL_DATA].is_undefined_length = length == UNDEFINED
    return dataset


def _refuse_inflated(data: bytes) -> None:
    """ValueError for a deflated data set (PS3.5, A.5) above the limit: pydicom inflates the whole at once."""
    deflated = b"1.2.840.10008.1.2.1.99" in data[132:4096]
    if not deflated or data[132:136] != b"\2\0\0\0":  # the length of the header, which comes first in it
        return
    rest, size = data[144 + int.from_bytes(data[140:144], "little") :], 0
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, 1 << 24))
        rest = inflate.unconsumed_tail
        BYTES.refuse(size, "it")


# ---------------------------------------------------------------------------------------------------------------------
# Elements
# ---------------------------------------------------------------------------------------------------------------------


def _drop_empty(dataset: Any) -> None:
    """Remove the elements of the image that are there and empty, as de-identification leaves them; they are absent."""
    for element in dataset.group_dataset(0x0028):
        if element.VR == "SQ":
            for item in element.value or ():
                _drop_empty(item)
            kept = [item for item in element.value or () if len(item)]
            if kept and len(kept) < len(element.value):
                dataset[element.tag].value = kept
            elif not kept:
                del dataset[element.tag]
        elif element.is_empty:
            del dataset[element.tag]


def _take_sign(dataset: Any, number: int) -> None:
    """Call the values signed where frame `number`'s JPEG 2000 codestream does and the header denies it.

    Decoders differ there: of pydicom 3.0.2's, Pillow moves such values up by half their range, pylibjpeg and GDCM
    wrap the negative ones to the top. Called signed, all three give the numbers that were encoded.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import get_j2k_parameters
    from pydicom.uid import JPEG2000TransferSyntaxes

    if dataset.file_meta.get("TransferSyntaxUID") in JPEG2000TransferSyntaxes and not dataset.get(
        "PixelRepresentation"
    ):
        code = get_frame(dataset.PixelData, number, number_of_frames=int(dataset.get("NumberOfFrames", 1)))
        dataset.PixelRepresentation = int(get_j2k_parameters(code).get("is_signed", False))


def _take_colours(dataset: Any) -> None:
    """Call the retired YBR_PARTIAL_422 of a JPEG what its decoders make of it, which pydicom leaves as Y, Cb and Cr."""
    from pydicom.uid import JPEGTransferSyntaxes

    if dataset.get("PhotometricInterpretation") == "YBR_PARTIAL_422" and (
        dataset.file_meta.get("TransferSyntaxUID") in JPEGTransferSyntaxes
    ):
        dataset.PhotometricInterpretation = "YBR_FULL_422"


def _above_the_low_bits(dataset: Any) -> int:
    """How far the stored values lie above the lowest bit (HighBit 15 of 12 bits: 4); pydicom then keeps all bits."""
    stored, high = dataset.get("BitsStored"), dataset.get("HighBit")
    if not isinstance(stored, int) or not isinstance(high, int) or not stored - 1 < high < dataset.BitsAllocated:
        return 0
    dataset.BitsStored = high + 1
    return high + 1 - stored


def _mend_palette(dataset: Any) -> None:
    """Palettes as pydicom reads them: little end first, without a byte behind the entries, 8 bits called 8 bits.

    Entries of 8 bits may be padded to 16, told by the length of the data (PS3.3, C.7.6.3.1.6).
    """
    colours = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if not all(f"{name}Data" in dataset and f"{name}Descriptor" in dataset for name in colours):
        return
    descriptors = [dataset[f"{name}Descriptor"] for name in colours]
    counts = [int(descriptor.value[0]) or 1 << 16 for descriptor in descriptors]
    tables = [_words(dataset[f"{name}Data"].value, dataset) for name in colours]
    wide = all(len(table) >= 2 * count for table, count in zip(tables, counts, strict=True))
    tables = [np.frombuffer(table[: (1 + wide) * count], "<u2" if wide else np.uint8)
              for table, count in zip(tables, counts, strict=True)]  # fmt: skip
    narrow = not wide or max(table.max() for table in tables) <= 255
    for name, descriptor, table in zip(colours, descriptors, tables, strict=True):
        dataset[f"{name}Data"].value = (table.astype(np.uint8) if narrow else table).tobytes()
        if narrow:
            descriptor.value = [*descriptor.value[:2], 8]


def _words(data: Any, dataset: Any) -> bytes:
    """Words of 16 bits, little end first, whatever the file's byte order and however pydicom read them."""
    if not isinstance(data, bytes):
        return np.atleast_1d(np.asarray(data)).astype("<u2").tobytes()
    little = dataset.original_encoding[1]
    return data if little in (True, None) else np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()


# What a group of a frame says at once, so that nothing of it is left of what counts less.
_VALUES = "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"
_SHOWN = "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"
MACROS = {
    "PixelValueTransformationSequence": _VALUES, "FrameVOILUTSequence": _SHOWN, "PixelMeasuresSequence": (),
}  # fmt: skip


def take_functional_groups(dataset: Any, number: int) -> None:
    """Put what the groups say of frame `number`'s values and pixels into the data set (PS3.3, C.7.6.16).

    The frame's own group counts before the shared one, and that before the data set.
    """
    for name, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", number)):
        groups = dataset.get(name) or []
        if place >= len(groups):
            continue
        for macro, replaced in MACROS.items():
            for item in (groups[place].get(macro) or [])[:1]:
                _drop_empty(item)
                for old in replaced if any(key in item for key in replaced) else ():
                    if old in dataset:
                        del dataset[old]
                for element in item:
                    dataset[element.tag] = element


def _padding(frame: np.ndarray, dataset: Any) -> np.ndarray:
    """Where stored values only fill the rectangle (PS3.3, C.7.5.1.1.2): (H, W) bool."""
    for kind in ("", "Float", "DoubleFloat"):
        first = dataset.get(f"{kind}PixelPaddingValue")
        if first is not None:
            break
    else:
        return np.zeros(frame.shape, bool)
    last = dataset.get(f"{kind}PixelPaddingRangeLimit", first)
    if kind:  # as the pixels hold it
        first, last = (float(frame.dtype.type(value)) for value in (first, last))
        return (frame >= min(first, last)) & (frame <= max(first, last))
    ends = [_as_stored(value, dataset) for value in (first, last)]
    return (frame >= min(ends)) & (frame <= max(ends))


def _as_stored(value: int, dataset: Any) -> int:
    """A value that was written unsigned, of an image of signed ones (63488 is -2048 there), or the other way round."""
    bits = int(dataset.BitsAllocated)
    if dataset.get("PixelRepresentation") == 1:
        return value - (1 << bits) if value >= 1 << (bits - 1) else value
    return value + (1 << bits) if value < 0 else value


def _square(img: Image.Image, dataset: Any) -> Image.Image:
    """The image as a screen with square pixels shows it: enlarged along the longer side of its own pixels.

    Their sides, of a row and of a column, are the distances of their centres in mm, or the ratio that a file without
    these states (PS3.3, C.7.6.3.1.7).
    """
    names = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
    pairs = [value for name in names if hasattr(value := dataset.get(name), "__len__") and len(value) == 2]
    sides = ([float(side) for side in pair] for pair in pairs)
    height, width = next((pair for pair in sides if min(pair) > 0), (1.0, 1.0))  # of a pixel
    if abs(height - width) <= 0.01 * width:  # spacings are rounded
        return img
    shorter = min(height, width)
    size = round(img.width * width / shorter), round(img.height * height / shorter)
    PIXELS.refuse(math.prod(size), "with square pixels it")
    return img.resize(size, Image.Resampling.BILINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and windows
# ---------------------------------------------------------------------------------------------------------------------


def _looked_up(values: np.ndarray, item: Any, signed: bool, dataset: Any) -> tuple[np.ndarray, int]:
    """Values through a table (PS3.3, C.11.1.1 and C.11.2.1.1), and the highest value that its entries can have.

    Args:
        item: with LUTDescriptor (number of entries, first value, bits of an entry) and LUTData.
        signed: the first value may be negative, whatever it was written as.
    """
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 1 << 16
    first = first - (1 << 16) if signed and first >= 1 << 15 else first
    data = _words(item.LUTData, dataset)
    if len(data) >= 2 * count:
        entries = np.frombuffer(data, "<u2", count)
    elif len(data) >= count:
        entries = np.frombuffer(data, np.uint8, count)  # of 8 bits, two to a word
    else:
        raise ValueError(f"a table of {count} entries holds {len(data)} bytes")
    # Sixteen bits are what an entry is stored in; some devices declare them where the table ends at 4095. Others
    # declare fewer than their entries have.
    highest = int(entries.max())
    bits = bits if 0 < bits < 16 and highest < 1 << bits else max(8, highest.bit_length())
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return entries[index], (1 << bits) - 1


def _has_table(item: Any) -> bool:
    return "LUTDescriptor" in item and "LUTData" in item


def _modality(frame: np.ndarray, dataset: Any) -> np.ndarray:
    """Stored values (H, W) to what the device measured: through its table, or slope and intercept."""
    signed = dataset.get("PixelRepresentation") == 1
    for item in (dataset.get("ModalityLUTSequence") or [])[:1]:
        if _has_table(item):
            return _looked_up(frame, item, signed, dataset)[0]
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None and intercept is None:
        return frame
    return frame.astype(np.float64) * float(1 if slope is None else slope) + float(intercept or 0)


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Through the first VOI table or window that the file states, to uint8; None where it states neither."""
    for item in (dataset.get("VOILUTSequence") or [])[:1]:
        if _has_table(item):
            # By what the values can be, and not by what those of this image are. A table's entries have no sign.
            signed = dataset.get("PixelRepresentation") == 1 or float(dataset.get("RescaleIntercept") or 0) < 0
            signed = signed and not any(map(_has_table, (dataset.get("ModalityLUTSequence") or [])[:1]))
            shown, high = _looked_up(values, item, signed or bool(values.min() < 0), dataset)
            return np.rint(255 * (shown / high)).astype(np.uint8)
    center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    # Some devices write a width below 1 to say that there is none; the other functions allow one.
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    return window_to_8bit(values, center, width, function=function)


def _first(value: Any) -> float | None:
    """Of an element with one value, several or none."""
    several = value if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    return None if not len(several) or several[0] in (None, "") else float(several[0])
