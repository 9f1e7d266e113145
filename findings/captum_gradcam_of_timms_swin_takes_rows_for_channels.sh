#!/usr/bin/env bash
# Grad-CAM by captum on a stage of timm's Swin is a map of channels, not of places. Swin's stages give (n, rows,
# columns, channels); LayerGradCam takes the second axis for channels and averages the gradient over the last two, so it
# weighs the rows and leaves (n, 1, columns, channels): 7 x 768 in place of 7 x 7. No error or warning, and
# LayerAttribution.interpolate makes a picture of the image's size of it, whose one direction runs through the 768
# channels. On a layer that hands the same output on as (n, channels, rows, columns), the map is 7 x 7.
#
# Seen with captum 0.9.0 and timm 1.0.31 on Python 3.11, Swin-Tiny with random weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q captum==0.9.0 timm==1.0.31 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import captum
import timm
import torch
from captum.attr import LayerAttribution, LayerGradCam


class Turn(torch.nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(*self.axes)


print("captum", captum.__version__, "timm", timm.__version__)
torch.manual_seed(0)
model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
image, stage = torch.randn(1, 3, 224, 224), model.layers[-1]
shown = LayerGradCam(model, stage).attribute(image, target=1)

# What each axis was taken for: the gradient is averaged over columns and channels, a weight for each row.
with torch.no_grad():
    output = model.layers(model.patch_embed(image))
output.requires_grad_()
model.forward_head(model.norm(output))[0, 1].backward()
weighed = (output.grad.mean((2, 3), keepdim=True) * output.detach()).sum(1, keepdim=True)
print("captum's map:", tuple(shown.shape), "the rows' weighted sum:", torch.allclose(shown, weighed, atol=1e-6))
picture = LayerAttribution.interpolate(shown, (224, 224))
print("enlarged, nothing is said:", tuple(picture.shape))

# The same model with its last stage's output turned to channels first and back.
turned = torch.nn.Sequential(stage, Turn(0, 3, 1, 2))
model.layers[-1] = torch.nn.Sequential(turned, Turn(0, 2, 3, 1))
places = LayerGradCam(model, turned).attribute(image, target=1)
print("after a layer of channels first:", tuple(places.shape))
assert shown.shape == (1, 1, 7, 768) and torch.allclose(shown, weighed, atol=1e-6), "this has changed"
assert picture.shape == (1, 1, 224, 224) and places.shape == (1, 1, 7, 7), "this has changed"
PYTHON
