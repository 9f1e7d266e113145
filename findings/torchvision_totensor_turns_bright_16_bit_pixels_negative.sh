#!/usr/bin/env bash
# torchvision's ToTensor reads a grey image of 16 bits as signed numbers: what is 32,768 and brighter comes out
# negative, so the brightest tissue of a film stored in all 16 bits (as CBIS-DDSM's are) is darker than its background.
# Nothing is said, and nothing is scaled to 1 as 8 bits are; with the 10 to 14 bits that a detector gives nothing shows.
# PILToTensor, and v2's ToImage with ToDtype(scale=True), read the same file right.
#
# Seen with torchvision 0.29.1 and Pillow 13.0.0 on Python 3.11: 65,520 is -16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

print("torchvision", torchvision.__version__, "Pillow", PIL.__version__)
values = [0, 4095, 32752, 32768, 65520]
Image.fromarray(np.array([values], np.uint16)).save("film.png")
film = Image.open("film.png")
print("stored:", film.mode, values)
signed = transforms.ToTensor()(film)
print("ToTensor:", signed.dtype, signed.flatten().tolist())
whole = transforms.PILToTensor()(film)
print("PILToTensor:", whole.dtype, whole.flatten().tolist())
scaled = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(film)
print("v2, scaled:", scaled.dtype, [round(value, 4) for value in scaled.flatten().tolist()])
assert signed.flatten().tolist() == [0, 4095, 32752, -32768, -16], "this has changed"
assert whole.flatten().tolist() == values, "this has changed"
assert np.allclose(scaled.flatten(), np.array(values) / 65535), "this has changed"
PYTHON
