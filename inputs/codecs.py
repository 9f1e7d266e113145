"""imagecodecs' decoders as a plugin of pydicom, where it is installed: two to nine times as fast as pydicom's others.

Only where a frame is grey and compressed without loss (JPEG Lossless, JPEG-LS, HTJ2K, RLE), so that there is one right
answer; near-lossless JPEG-LS is decoded by the same library as in pydicom's own plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

LABEL = "imagecodecs"
# Of its two decoders of HTJ2K the faster one (htj2k_decode of 2026.3.6) prints what is wrong with a damaged frame and
# returns; OpenJPEG's raises.
_JPEG_LOSSLESS, _JPEG_LS, _HTJ2K, _RLE = "jpeg_decode", "jpegls_decode", "jpeg2k_decode", "dicomrle_decode"
CODECS = {  # transfer syntax -> function of imagecodecs
    "1.2.840.10008.1.2.4.57": _JPEG_LOSSLESS,
    "1.2.840.10008.1.2.4.70": _JPEG_LOSSLESS,
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.201": _HTJ2K,
    "1.2.840.10008.1.2.4.202": _HTJ2K,
    "1.2.840.10008.1.2.5": _RLE,
}
DECODER_DEPENDENCIES = {uid: (LABEL,) for uid in CODECS}  # pydicom asks for this, and for the two functions below


def is_available(uid: str) -> bool:
    """Whether imagecodecs is installed."""
    return uid in CODECS and find_spec(LABEL) is not None


def decode_frame(source: bytes, runner: Any) -> memoryview:
    """An encoded frame to its stored values, little end first; ValueError where they are not what the header says."""
    import imagecodecs

    name = CODECS[str(runner.transfer_syntax)]
    decode: Callable[..., Any] = getattr(imagecodecs, name)
    if name == _RLE:
        values = np.frombuffer(decode(source, f"<u{runner.bits_allocated // 8}"), f"<u{runner.bits_allocated // 8}")
    else:
        values = np.asarray(decode(source))
        runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    kinds = "ui" if runner.pixel_representation else "u"
    if values.size != runner.rows * runner.columns or values.dtype.kind not in kinds:
        raise ValueError(f"{values.size} values of {values.dtype}, for {runner.rows} rows of {runner.columns}")
    return np.ascontiguousarray(values, f"<{values.dtype.kind}{values.dtype.itemsize}").data


def stored_values(dataset: Any, number: int) -> np.ndarray:
    """Frame `number` as pydicom decodes it, (H, W) or (H, W, 3), by imagecodecs where that is there and can."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    uid = dataset.file_meta.get("TransferSyntaxUID")
    # pydicom 3.0.2 looks for a frame of single bits from a whole byte on, where none need end (findings/).
    if dataset.get("BitsAllocated") == 1 and number:
        return pixel_array(dataset)[number]
    plain = uid in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    if dataset.get("SamplesPerPixel") == 1 and (plain or is_available(str(uid))):
        decoder = get_decoder(uid)
        how: dict[str, Any] = {"view_only": True} if plain else {"decoding_plugin": LABEL}
        if not plain and LABEL not in decoder.available_plugins:
            decoder.add_plugin(LABEL, (__name__, decode_frame.__name__))
        try:
            # pydicom clears the bits above those stored by shifting all values there and back, which is asked for only
            # where there are such bits.
            frame = pixel_array(dataset, index=number, correct_unused_bits=False, **how)
            if not _has_bits_above(frame, dataset.get("BitsStored")):
                return frame
        except Exception:  # of any kind, on a damaged file: what another decoder reads or says of it counts
            if plain or decoder.available_plugins == (LABEL,):
                raise
    elif uid in CODECS and (decoder := get_decoder(uid)).available_plugins == (LABEL,):  # of a grey image before
        missing = "; ".join(decoder.missing_dependencies)
        raise RuntimeError(f"'{decoder.UID.name}' in colour: plugins are missing dependencies: {missing}")
    return pixel_array(dataset, index=number)


def _has_bits_above(frame: np.ndarray, stored: int | None) -> bool:
    """Whether whole numbers need more bits than those that the header says are stored; so if it does not say."""
    if frame.dtype.kind not in "iu":
        return False
    if not stored:
        return True
    if frame.dtype.kind == "u":
        return int(frame.max()) >= 1 << stored
    return int(frame.min()) < -(1 << stored - 1) or int(frame.max()) >= 1 << stored - 1
