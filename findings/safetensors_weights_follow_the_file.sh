#!/usr/bin/env bash
# The tensors of safetensors.torch.load_file are the file, mapped into memory, until somebody copies them: what is written
# to the file in place later (an export that is written again, a copy by rsync --inplace) changes the weights of a model
# that load_state_dict(..., assign=True) has given them to. torch.load gives tensors of their own, unless mmap=True is asked.
#
# Seen with safetensors 0.8.0 and torch 2.14.1 on Python 3.11: 1.0 becomes 2.0 with safetensors, stays 1.0 with torch.load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 safetensors==0.8.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import struct

import safetensors
import safetensors.torch
import torch

print("safetensors", safetensors.__version__, "torch", torch.__version__)
weights = {"weight": torch.ones(4)}
safetensors.torch.save_file(weights, "w.safetensors")
torch.save(weights, "w.pt")
found = {}
for name, load in (("w.safetensors", safetensors.torch.load_file), ("w.pt", torch.load)):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(4))
    layer.load_state_dict(load(name), assign=True)
    with open(name, "r+b") as file:  # the same four numbers, 2.0 each, where they stand
        data = file.read()
        file.seek(data.index(struct.pack("<4f", 1, 1, 1, 1)))
        file.write(struct.pack("<4f", 2, 2, 2, 2))
    found[name] = layer.weight.tolist()[0]
    print(f"{name}: a weight of 1.0 is {found[name]} after the file was written to")
assert found == {"w.safetensors": 2.0, "w.pt": 1.0}, "this has changed"
PYTHON
