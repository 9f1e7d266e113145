#!/usr/bin/env bash
# apply_color_lut of pydicom takes palettes of 16 bits for little-endian ones in every file. In a file of Explicit VR Big
# Endian (retired, still in archives of ultrasound and nuclear medicine) an entry has the file's byte order, as all words
# have (PS3.5, 7.3), so the bytes of each entry change places and the colours are others; nothing is said. The pixels of
# the same file are read in its own order.
#
# Seen with pydicom 3.0.2 and numpy 2.4.6 on Python 3.11: the colours of the little-endian file are those of the
# palette; the big-endian one, with equal pixels, has each entry's bytes swapped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

print("pydicom", pydicom.__version__, "numpy", np.__version__)
index = np.arange(64, dtype=np.uint8).reshape(8, 8)
palette = np.random.default_rng(0).integers(0, 1 << 16, (3, 64))  # red, green, blue
found = {}
for syntax, order in ((ExplicitVRLittleEndian, "<u2"), (ExplicitVRBigEndian, ">u2")):
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    image.SOPClassUID, image.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.Rows, image.Columns = index.shape
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "PALETTE COLOR", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    for number, entries in enumerate(palette, 1):
        image.add_new(0x00281100 + number, "US", [64, 0, 16])
        image.add_new(0x00281200 + number, "OW", entries.astype(order).tobytes())
    image.PixelData = index.tobytes()
    image["PixelData"].VR = "OB"
    pydicom.dcmwrite(f"{sys.argv[1]}/a.dcm", image, implicit_vr=False, little_endian=order == "<u2", enforce_file_format=True)
    image = pydicom.dcmread(f"{sys.argv[1]}/a.dcm")
    assert np.array_equal(image.pixel_array, index)
    shown = np.moveaxis(apply_color_lut(image.pixel_array, image), -1, 0)
    if np.array_equal(shown, palette[:, index]):
        found[syntax.name] = "as in the palette"
    elif np.array_equal(shown.astype(np.uint16).byteswap(), palette[:, index]):
        found[syntax.name] = "bytes swapped"
    else:
        found[syntax.name] = "something else"
    print(f"{syntax.name}: {found[syntax.name]}")
assert list(found.values()) == ["as in the palette", "bytes swapped"], "this has changed"
PYTHON
