#!/usr/bin/env bash
# open_clip's evaluation transform takes the interpolation that a model's configuration names for square images alone.
# For an image size of two different sides it resizes bicubically whatever is named, and says nothing: a model whose
# open_clip_config.json says "bilinear" and 40 x 24 pixels is not evaluated as it was trained.
#
# Seen with open_clip_torch 3.3.0 on Python 3.11: bilinear for 24 x 24, bicubic for 40 x 24.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import open_clip
from open_clip.transform import image_transform

print("open_clip", open_clip.__version__)
found = {}
for size in ((24, 24), (40, 24)):
    resize = image_transform(size, is_train=False, interpolation="bilinear").transforms[0]
    found[size] = resize.interpolation.value
    print(size, "asked for bilinear, resizes", found[size])
assert found == {(24, 24): "bilinear", (40, 24): "bicubic"}, "this has changed"
PYTHON
