#!/usr/bin/env bash
# `import torchvision` imports torch._dynamo and with it sympy, which `import torch` leaves until something is compiled:
# torchvision/ops/roi_align.py takes one function of torch._dynamo.utils as it is imported. So does every library that
# imports torchvision (timm), and every command and loader process that never compiles anything.
#
# Seen with torchvision 0.29.1 and torch 2.14.1 on Python 3.11: neither after torch, both after torchvision.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

WATCHED = ("torch._dynamo", "sympy")
before = [name in sys.modules for name in WATCHED]
import torchvision

after = [name in sys.modules for name in WATCHED]
print("torch", torch.__version__, "torchvision", torchvision.__version__)
for name, one, other in zip(WATCHED, before, after):
    print(f"{name}: imported with torch {one}, with torchvision {other}")
assert (before, after) == ([False, False], [True, True]), "this has changed"
PYTHON
