#!/usr/bin/env bash
# LoRA by peft on the attention of timm's BEiT learns nothing where a BEiT has biases of queries and values: its block
# calls torch's linear function with `self.qkv.weight`, and peft's wrapped layer answers that with the weight of the
# frozen layer, so that the adapter is never run. No error, no warning; the adapter's gradient stays None. The same
# target in timm's plain ViT, which calls the layer, does learn.
#
# Seen with peft 0.21.2 and timm 1.0.31 on Python 3.11: the adapters of vit_tiny get gradients, those of BEiT none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 timm==1.0.31 torch==2.14.1 torchvision==0.29.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import timm
import torch

print("peft", peft.__version__, "timm", timm.__version__)
found = {}
for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
    model = timm.create_model(name, num_classes=0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv", "proj"]))
    model(torch.randn(1, 3, 224, 224)).sum().backward()
    adapters = [value for key, value in model.named_parameters() if "qkv.lora_B" in key]
    found[name] = sum(value.grad is not None for value in adapters), len(adapters)
    print(name, "adapters of qkv that got a gradient:", found[name][0], "of", found[name][1])
assert found["vit_tiny_patch16_224"] == (12, 12) and found["beit_base_patch16_224"] == (0, 12), "this has changed"
PYTHON
