#!/usr/bin/env bash
# A model that flattens with x.reshape(len(x), -1) has its number of rows fixed while it is exported: `len` gives a number
# where x.shape[0] gives a symbol. Told that rows are a dimension of its own, torch.export.export refuses such a model
# (Constraints violated, with batch = 2 as the suggested fix); torch.onnx.export, told the same, follows that suggestion
# and writes a graph that takes the example's number of rows alone, which shows when somebody runs another number. With
# x.shape[0] both export a graph for any number.
#
# Seen with torch 2.14.1, onnxscript 0.7.2, onnx 1.23.2 and onnxruntime 1.32.0 on Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import onnxruntime
import torch

warnings.simplefilter("ignore")
ROWS = {"len(x)": lambda x: x.reshape(len(x), -1), "x.shape[0]": lambda x: x.reshape(x.shape[0], -1)}


class Flatten(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by(x)


def attempt(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
found = {}
for name, by in ROWS.items():
    example, shapes = (torch.rand(2, 3, 4),), ({0: torch.export.Dim("batch", min=1)},)
    exported = attempt(lambda: torch.export.export(Flatten(by), example, dynamic_shapes=shapes))
    program = torch.onnx.export(Flatten(by), example, dynamo=True, verbose=False, dynamic_shapes=shapes)
    file = f"{sys.argv[1]}/graph.onnx"
    program.save(file)
    session = onnxruntime.InferenceSession(file)
    given = {session.get_inputs()[0].name: torch.rand(5, 3, 4).numpy()}
    answer = attempt(lambda: session.run(None, given)[0].shape)
    print(f"{name}: torch.export {exported if isinstance(exported, str) else 'exports'};")
    print(f"    torch.onnx's graph takes {session.get_inputs()[0].shape}; five rows: {answer}")
    found[name] = isinstance(exported, str), session.get_inputs()[0].shape[0], answer
assert found["len(x)"][:2] == (True, 2) and "InvalidArgument" in found["len(x)"][2], "this has changed"
assert found["x.shape[0]"] == (False, "batch", (5, 12)), "this has changed"
PYTHON
