"""--precision: what it is on each device, what is refused, and that it reaches training, features and zero-shot."""

import argparse
import json

import pytest
import torch
from helpers import command
from roco_tree import make_roco

import distributed
import main
import main_linear
import models
from evaluation import features
from runtime import checkpoints

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "flags, units, device, expected",
    [
        ("auto", False, CPU, "fp32"), ("auto", True, CPU, "fp32"), ("fp32", True, CPU, "fp32"),
        ("fp32-onednn", True, CUDA, "fp32"),
        ("bf16", True, CPU, "bf16"), ("auto", True, CUDA, "bf16"), ("auto", False, CUDA, "fp16"),
        ("fp16", True, CUDA, "fp16"), ("fp32", True, CUDA, "fp32"),
    ],
)  # fmt: skip
def test_what_a_device_computes_in(flags, units, device, expected, monkeypatch):
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: units)
    monkeypatch.setattr(distributed, "onednn_pays", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: units)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    assert distributed.resolve_precision(flags, device) == expected


def test_what_a_device_has_no_units_for_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    for wanted, device, why in (
        ("bf16", CPU, "no bf16 units"),
        ("fp16", CPU, "for GPUs"),
        ("bf16", CUDA, "an old GPU"),
    ):
        with pytest.raises(ValueError, match=why):
            distributed.resolve_precision(wanted, device)
    both = argparse.Namespace(precision="bf16", disable_amp=True)
    with pytest.raises(ValueError, match="--disable-amp means --precision fp32"):
        distributed.wanted_precision(both)
    assert distributed.wanted_precision(argparse.Namespace(precision="auto", disable_amp=True)) == "fp32"
    assert distributed.wanted_precision(argparse.Namespace(precision="auto", disable_amp=False)) == "auto"


@pytest.mark.parametrize("line, expected", [
    ("flags\t\t: fpu vme avx512f avx512_bf16 amx_tile", True), ("flags : fpu avx512f avx512_bf16x", False),
    ("Features : fp asimd bf16 i8mm", True), ("model name : bf16 machine", False),
])  # fmt: skip
def test_the_processors_units_are_read_from_its_flags(line, expected, monkeypatch):
    monkeypatch.setattr(distributed.Path, "read_text", lambda path: f"processor : 0\n{line}\n")
    assert distributed.cpu_has_bf16() == expected


def test_bf16_trains_probes_and_is_named_in_what_is_written(tmp_path, monkeypatch):
    """On a CPU without units for it the same numbers, only slower: the refusal alone is taken away here."""
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)
    root = make_roco(tmp_path / "roco")
    dtypes = set()
    towers = models.SLIP.towers

    def watched(model, *inputs):
        found = towers(model, *inputs)
        dtypes.update(x.dtype for x in found)
        return found

    monkeypatch.setattr(models.SLIP, "towers", watched)
    main.main(command(root, tmp_path / "run", "--epochs", "1", "--precision", "bf16"))
    assert torch.bfloat16 in dtypes  # of captions; an image tower ends with a norm, which stays in float32
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["derived"]["precision"] == "bf16"
    state = checkpoints.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(v.dtype == torch.float32 for v in state["state_dict"].values() if v.is_floating_point())
    with pytest.raises(ValueError, match="precision: 'bf16' there, 'auto' now"):
        main.main(command(root, tmp_path / "run", "--epochs", "1"))
    argv = [
        "--dataset",
        "digits",
        "--cache-features",
        "--pretrained",
        str(tmp_path / "run" / "checkpoint.pt"),
        "-j",
        "0",
    ]
    argv += ["--gpu", "-1", "--resamples", "20", "--output-dir", str(tmp_path / "probe")]
    plain = main_linear.main(argv)
    half = main_linear.main([*argv, "--precision", "bf16"])
    of_cpu = distributed.resolve_precision("auto", CPU)
    assert (plain["settings"]["precision"], half["settings"]["precision"]) == (of_cpu, "bf16")
    assert len(list((tmp_path / "probe" / "features").glob("digits_test_*.npz"))) == 2  # neither takes the other's
    assert (tmp_path / "probe" / "earlier_1").is_dir()


def test_features_in_bf16_come_back_in_float32_and_lie_near():
    torch.manual_seed(0)
    model = models.create_model("CLIP_VITT16", image_size=32, vision_kwargs={"patch_size": 8, "depth": 2}).eval()
    x = torch.randn(4, 3, 32, 32)
    found = {}
    for precision in ("fp32", "bf16"):
        loading = features.Loading(processes=distributed.Processes(precision=precision))
        with torch.inference_mode():
            found[precision] = loading.encode(model.visual, x)
    assert found["bf16"].dtype == torch.float32 and not torch.equal(found["bf16"], found["fp32"])
    assert torch.cosine_similarity(found["bf16"], found["fp32"]).min() > 0.99
