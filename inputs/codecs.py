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
    if values.size != runner.rows * runner.columns or values.dtype.kind != "u":
        raise ValueError(f"{values.size} values of {values.dtype}, for {runner.rows} rows of {runner.columns}")
    return np.ascontiguousarray(values, f"<u{values.dtype.itemsize}").data


def stored_values(dataset: Any, number: int) -> np.ndarray:
    """Frame `number` as pydicom decodes it, (H, W) or (H, W, 3), by imagecodecs where that is there and can."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    uid = dataset.file_meta.get("TransferSyntaxUID")
    if dataset.get("SamplesPerPixel") == 1 and is_available(str(uid)):
        decoder = get_decoder(uid)
        if LABEL not in decoder.available_plugins:
            decoder.add_plugin(LABEL, (__name__, decode_frame.__name__))
        try:
            return pixel_array(dataset, index=number, decoding_plugin=LABEL)
        except Exception:  # of any kind, on a damaged file: what another decoder reads or says of it counts
            if decoder.available_plugins == (LABEL,):
                raise
    if dataset.get("SamplesPerPixel") == 1 and uid in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        # pydicom copies the frame, shifts it to the left and back. Without a bit above those stored nothing is lost.
        frame = pixel_array(dataset, index=number, view_only=True, correct_unused_bits=False)
        bits = dataset.get("BitsStored") or 0
        least, beyond = (-(1 << bits - 1), 1 << bits - 1) if frame.dtype.kind == "i" else (0, 1 << bits)
        if frame.dtype.kind in "iu" and bits and least <= frame.min() and frame.max() < beyond:
            return frame
    return pixel_array(dataset, index=number)
