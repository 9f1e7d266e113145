"""The GPU's path without a GPU: tensors that have a shape and the device `cuda`, and no numbers (FakeTensorMode).

Of a training step it covers what comes before the backward pass, which even so takes a real GPU. What it can show: that
nothing stays on the CPU, and that the host never asks for a value, which on a GPU would wait for it.
"""

import numpy as np
import pytest
import torch
from helpers import TINY
from model_helpers import tiny_medslip
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import losses
import main
import models
from distributed import Processes
from evaluation import features
from inputs import colour, transforms

CUDA = torch.device("cuda")
B = 4
MODELS = ("SLIP_VITT16", "SIMCLR_VITT16", "CLIP_VITT16", "MEDSLIP_VIT", "MEDSLIP_RESNET")


def build(name: str) -> models.ImageModel:
    if name.startswith("MEDSLIP"):
        return tiny_medslip() if name == "MEDSLIP_VIT" else models.create_model(name, text_layers=2, text_width=48)
    args = main.get_args_parser().parse_args(["--model", name, *TINY])
    return main.build_model(args)[0]


def move(model: nn.Module) -> nn.Module:
    """Inside the mode: parameters and buffers without numbers on the fake device."""
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(torch.empty_like(p, device=CUDA), p.requires_grad)
        for key, b in module._buffers.items():
            if b is not None:
                module._buffers[key] = torch.empty_like(b, device=CUDA)
    return model


@pytest.fixture
def fake(monkeypatch):
    """The mode, for `with`; real tensors of the host may enter it, and come to the device without their numbers."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # that takes a real GPU
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    colour._hue_tables_on.cache_clear()  # no fake table must outlive the test
    transforms._normalisation.cache_clear()


def batch_of(model: models.ImageModel) -> dict:
    """A batch on the host, as its loader delivers it for a GPU: 8 bits, the colours still to be changed."""
    side, rng = model.preprocess.size, np.random.default_rng(0)
    batch: dict = {"text": torch.randint(1, 30, (B, 12))}
    for key in ("image", "view1", "view2"):
        batch[key] = torch.randint(256, (B, 3, side, side), dtype=torch.uint8)
        if key != "image":
            batch[f"{key}_colour"] = colour.Colours.of([colour.draw_colour(rng) for _ in range(B)])
    return batch


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
@pytest.mark.parametrize("name", MODELS)
def test_forward_pass_and_loss_stay_on_the_device_and_wait_for_nothing(name, precision, fake, monkeypatch):
    model = build(name).train()
    batch = batch_of(model)
    plans = {id(c): colour.plan_batch(c) for key, c in batch.items() if key.endswith("_colour")}
    monkeypatch.setattr(main, "apply_colour_batch", lambda x, c: colour.run_plan(x, plans[id(c)]))
    with fake:
        move(model)
        inputs = [main.to_device(batch, key, model.preprocess, CUDA) for key in model.objective.inputs]
        assert {x.device.type for x in inputs} == {"cuda"}
        with Processes(device=CUDA, precision=precision).autocast():
            outputs = model(*inputs)
        metrics = model.objective.loss(losses.LossSettings())(outputs)
    kept = {k: v for k, v in outputs.items() if k.endswith("_embed")}
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kept and all(v.device.type == "cuda" and v.dtype == half for v in kept.values())
    assert {metrics[key].device.type for key in model.objective.metrics} == {"cuda"}


@pytest.mark.parametrize("name", MODELS)
def test_features_and_captions_are_computed_on_the_device(name, fake):
    model = build(name).eval()
    side = model.preprocess.size
    loading = features.Loading(processes=Processes(device=CUDA, precision="bf16"))
    with fake, torch.inference_mode():
        move(model)
        image = model.preprocess.normalise(torch.empty(B, 3, side, side, dtype=torch.uint8, device=CUDA))
        found = [loading.encode(model.visual, image)]
        if model.objective.text:
            found.append(loading.encode(model.encode_image, image))
            found.append(loading.encode(model.encode_text, torch.ones(B, 9, dtype=torch.long, device=CUDA)))
    assert all(x.device.type == "cuda" and x.dtype == torch.float32 and len(x) == B for x in found)


def test_such_a_pass_would_notice_a_wait_and_a_tensor_of_the_host(fake):
    with fake:
        x = torch.ones(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)
