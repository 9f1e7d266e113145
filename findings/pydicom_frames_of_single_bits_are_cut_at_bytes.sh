#!/usr/bin/env bash
# pixel_array(..., index=k) of pydicom cannot read a later frame of single bits (BitsAllocated 1, as segmentations have
# them) unless a frame's rows times columns are a multiple of 8. Such frames follow one another without a gap (PS3.5, 8.1.1 and
# D), so one may begin inside a byte. pydicom takes the frame from the byte that it begins in, has too few or too many
# bits then, and raises; all frames together are read as they were written.
#
# Seen with pydicom 3.0.2 and numpy 2.4.6 on Python 3.11: three masks of 13 x 11 pixels are read at once; by index the
# first one is, and the second one ends in a ValueError that it cannot be reshaped. Of 8 x 11 each one is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid

print("pydicom", pydicom.__version__, "numpy", np.__version__)
found = {}
for rows in (13, 8):
    masks = np.random.default_rng(0).integers(0, 2, (3, rows, 11)).astype(np.uint8)
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID, image.SOPInstanceUID = SegmentationStorage, generate_uid()
    image.NumberOfFrames, image.Rows, image.Columns = masks.shape
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 1, 1, 0
    bits = np.packbits(masks.ravel(), bitorder="little").tobytes()
    image.PixelData = bits + b"\0" * (len(bits) % 2)
    assert np.array_equal(pixel_array(image), masks)
    for number, mask in enumerate(masks):
        try:
            found[rows, number] = "the same" if np.array_equal(pixel_array(image, index=number), mask) else "another"
        except ValueError as error:
            found[rows, number] = "ValueError"
            print(error)
        print(f"{rows} x 11 pixels, frame {number + 1} by its index: {found[rows, number]}")
assert [found[13, 0], found[13, 1]] == ["the same", "ValueError"], "this has changed"
assert [found[8, number] for number in range(3)] == ["the same"] * 3, "this has changed"
PYTHON
