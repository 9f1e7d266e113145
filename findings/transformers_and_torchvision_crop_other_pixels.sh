#!/usr/bin/env bash
# Two libraries that prepare the same image for the same model cut out other pixels. Of an odd margin torchvision's
# CenterCrop rounds half to even, and the image processors of transformers round down: after a resize to 37 x 47 pixels
# the central 32 begin at (2, 8) there and at (2, 7) here. A tower that was trained with one preparation and is used with
# the other sees every such image moved by a pixel.
#
# Seen with transformers 5.24.0 and torchvision 0.29.1 on Python 3.11: 8 and 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
import torchvision
import transformers
from PIL import Image
from transformers import BitImageProcessor

print("transformers", transformers.__version__, "torchvision", torchvision.__version__)
columns = np.tile(np.arange(47, dtype=np.uint8), (37, 1))  # each pixel says where it stands
image = Image.fromarray(np.stack([columns] * 3, -1))
processor = BitImageProcessor(
    do_resize=False, do_rescale=False, do_normalize=False, crop_size={"height": 32, "width": 32}
)
theirs = processor(image, return_tensors="pt")["pixel_values"][0, 0, 0, 0].item()
other = torchvision.transforms.CenterCrop(32)(torch.from_numpy(columns))[0, 0].item()
print("first column of the central 32 of 47: torchvision", int(other), "transformers", int(theirs))
assert (int(other), int(theirs)) == (8, 7), "this has changed"
PYTHON
