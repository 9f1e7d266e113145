"""On a GPU, which they are skipped without: the same results as on the CPU, and no wait for the device inside a step.

`python benchmarks/on_gpu.py` runs them first.
"""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, command
from model_helpers import batches, tiny_medslip, tiny_model
from roco_tree import make_roco

import distributed
import losses
import main
import models
from evaluation import features
from inputs import colour
from runtime import checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("data") / "roco")


@pytest.mark.parametrize("objective", ("CLIP", "SIMCLR", "SLIP"))
def test_loss_and_gradients_are_those_of_the_cpu(objective):
    torch.manual_seed(0)
    model = tiny_model(objective).double()
    inputs = batches(model, 8)
    loss = model.objective.loss(losses.LossSettings())
    found = {}
    for device in (torch.device("cpu"), CUDA):
        model.to(device).zero_grad()
        metrics = loss(model(*(x.to(device) for x in inputs)))
        metrics["loss"].backward()
        found[device.type] = [metrics["loss"].detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters())]
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_colours_are_to_the_bit_those_of_the_host():
    rng = np.random.default_rng(0)
    drawn = [colour.draw_colour(rng) for _ in range(64)]
    pixels = rng.integers(0, 256, (64, 3, 40, 48), dtype=np.uint8)
    found = colour.apply_colour_batch(torch.from_numpy(pixels).to(CUDA), colour.Colours.of(drawn)).cpu().numpy()
    for x, c, ours in zip(pixels, drawn, found, strict=True):
        np.testing.assert_array_equal(ours, np.broadcast_to(colour.apply_colour(x, c), x.shape))


@pytest.mark.parametrize("accumulation", ("micro", "full"))
@pytest.mark.parametrize("name", ("SLIP_VITT16", "MEDSLIP_VIT"))
def test_a_step_does_not_wait_for_the_device(name, accumulation):
    small = ["--model", name, *TINY] if name == "SLIP_VITT16" else ["--model", name, "--ssl-mlp-dim", "32"]
    args = main.get_args_parser().parse_args([*small, "--no-compile", "--accum-negatives", accumulation])
    processes = distributed.Processes(device=CUDA, precision="bf16")
    model, tokenizer = (tiny_medslip(), None) if name == "MEDSLIP_VIT" else main.build_model(args)
    step = main.prepare_learner(args, processes, model)
    run = main.Run(
        **vars(step), tokenizer=tokenizer, loader=None, sampler=None, steps_per_epoch=9, writer=None, settings={}
    )
    run.wrapped.train()
    rng, side = np.random.default_rng(0), model.preprocess.size
    totals = main.Totals.zero(len(model.objective.metrics), CUDA)
    micro = []
    for _ in range(2):
        batch = {"text": torch.randint(1, 30, (8, 12))}
        for key in ("image", "view1", "view2"):
            batch[key] = torch.from_numpy(rng.integers(0, 256, (8, 3, side, side), dtype=np.uint8))
            if key != "image":
                batch[f"{key}_colour"] = colour.Colours.of([colour.draw_colour(rng) for _ in range(8)])
        micro.append({k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    main.update(run, micro, totals)  # tables and kernels come to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if accumulation == "micro":  # the other reads and restores the device's random state, which waits
            main.update(run, micro, totals)
        else:
            torch.cuda.set_sync_debug_mode("default")
            main.update(run, micro, totals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals.count.item() in (2.0, 4.0) and totals.skipped.item() == 0


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_run_on_the_gpu_learns_and_goes_on_where_it_stopped(roco, tmp_path, precision):
    main.main(command(roco, tmp_path / "run", "--epochs", "2", "--precision", precision, "--no-compile"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses_of = [row["loss"] for row in rows if row["kind"] == "epoch"]
    assert len(losses_of) == 2 and losses_of[1] < losses_of[0]
    derived = json.loads((tmp_path / "run" / "settings.json").read_text())["derived"]
    assert derived["precision"] == precision and derived["device"].startswith("cuda")
    state = checkpoints.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(v.dtype == torch.float32 for v in state["state_dict"].values() if v.is_floating_point())
    assert bool(state["scaler"]) == (precision == "fp16")


def test_a_compiled_step_is_the_eager_one(roco, tmp_path):
    found = {}  # weights would not do: AdamW makes whole steps of a gradient that is rounding, before a BatchNorm
    for name, flag in (("eager", "--no-compile"), ("compiled", "--compile")):
        found[name] = main.main(command(roco, tmp_path / name, "--epochs", "1", "--precision", "fp32", flag))
    for key in ("loss", "clip_loss", "ssl_loss"):
        assert found["compiled"][key] == pytest.approx(found["eager"][key], rel=1e-4), key


@pytest.mark.parametrize("name", ("SLIP_VITT16", "MEDSLIP_VIT", "MEDSLIP_RESNET"))
def test_features_are_those_of_the_cpu(name):
    torch.manual_seed(0)
    small = {"text_layers": 2} if name == "MEDSLIP_RESNET" else {}
    model = tiny_medslip() if name == "MEDSLIP_VIT" else models.create_model(name, image_size=64, **small)
    model.eval()
    x = torch.randn(8, 3, 64, 64)
    with torch.inference_mode():
        expected = model.visual(x)
        model.to(CUDA)
        for precision, least in (("fp32", 0.99999), ("bf16", 0.99)):
            loading = features.Loading(processes=distributed.Processes(device=CUDA, precision=precision))
            found = loading.encode(model.visual, x.to(CUDA)).cpu()
            assert torch.cosine_similarity(found, expected).min() > least, precision
