#!/usr/bin/env bash
# Dataset.compress(RLELossless) of pydicom writes half of the pixels where an image of 8 bits or fewer is stored in 16
# (BitsAllocated 16, BitsStored 8), as DICOM allows and some devices do. It packs the values to one byte each and then
# cuts them into the two segments that 16 bits need. Nothing is said when it is written; pydicom's own decoder, and
# others, refuse the file when it is read. Images of 9 or more bits come back as they were.
#
# Seen with pydicom 3.0.2 and numpy 2.4.6 on Python 3.11: 7 and 8 bits in 16 cannot be read back, 9 and 12 can.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import logging

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

logging.disable(logging.CRITICAL)  # pydicom logs what its decoder raises
print("pydicom", pydicom.__version__, "numpy", np.__version__)
found = {}
for bits in (7, 8, 9, 12):
    values = np.random.default_rng(0).integers(0, 1 << bits, (4, 6)).astype("<u2")
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    image.Rows, image.Columns = values.shape
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, bits, bits - 1
    image.PixelData = values.tobytes()
    assert np.array_equal(image.pixel_array, values)
    image.compress(RLELossless, generate_instance_uid=False)
    try:
        found[bits] = "the same" if np.array_equal(image.pixel_array, values) else "other values"
    except RuntimeError as error:
        found[bits] = "refused"
        print(str(error).splitlines()[-1].strip())
    print(f"{bits} bits in 16, after RLE: {found[bits]}")
assert found == {7: "refused", 8: "refused", 9: "the same", 12: "the same"}, "this has changed"
PYTHON
