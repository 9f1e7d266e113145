"""Compiled towers against the same towers uncompiled: losses, gradients, names, whole runs."""

import json
import subprocess
import sys

import pytest
import torch
from distributed_helpers import free_port
from helpers import ROOT, assert_same_run, command, environment, stop_after, weights
from model_helpers import batches, gradients, split, tiny_medslip, tiny_model
from roco_tree import make_roco

import main
import models
import utils

# Of weights after the three steps of one epoch, an optimizer step being 1e-4 to 1e-3. Rounding grows from step to step
# (BatchNorm over 16 views): it was 1e-6 of the loss at the first and, with torch 2.11, 1e-2 at the sixth.
CLOSE = dict(rtol=1e-3, atol=2e-5)
DROPPING = dict(patch_size=8, embed_dim=64, depth=2, num_heads=4, drop_path_rate=0.5, proj_drop_rate=0.3)


def compiled_parts(model):
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


def float_batches(model, n, size):
    return [x.float() if x.is_floating_point() else x for x in batches(model, n, size=size)]


def compare(model, accumulate, groups, size=32, **options):
    """Relative difference of loss and of all gradients as one vector, between the model and itself compiled."""
    inputs = float_batches(model, 8, size)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for compiled in (False, True):
        model.load_state_dict(state)  # BatchNorm's statistics too
        model.zero_grad()
        if compiled:
            utils.compile_towers(model, **options)
        torch.manual_seed(5)
        metrics, grads = gradients(model, split(inputs, groups), accumulate)
        results.append((metrics[-1]["loss"].item(), torch.cat([g.flatten().clone() for g in grads.values()])))
    (loss, grad), (compiled_loss, compiled_grad) = results
    return abs(loss - compiled_loss) / loss, ((grad - compiled_grad).norm() / grad.norm()).item()


@pytest.mark.parametrize(
    "make, parts",
    [
        (
            lambda: tiny_model("SLIP"),
            {"visual.blocks.0", "visual.blocks.1", "transformer.resblocks.0", "transformer.resblocks.1"},
        ),
        (
            lambda: tiny_model("SLIP", vision_kwargs=DROPPING),  # each block drops another share of the paths
            {"visual", "transformer.resblocks.0", "transformer.resblocks.1"},
        ),
        (tiny_medslip, {"visual", *(f"bert.encoder.layer.{i}" for i in range(3))}),
    ],
)
def test_losses_gradients_and_names_equal_the_uncompiled(make, parts):
    """Traced and differentiated ahead of time, with the kernels left as they are: seconds on a CPU."""
    torch.manual_seed(0)
    model = make()
    names = list(model.state_dict())
    size = 64 if model.name == "MEDSLIP_VIT" else 32
    assert max(compare(model, main.accumulate_micro, 1, size, backend="aot_eager")) < 1e-5
    assert compiled_parts(model) == parts and list(model.state_dict()) == names


def test_where_it_is_on(monkeypatch):
    def answer(*extra):
        return main.compiles(main.get_args_parser().parse_args(extra), torch.device("cuda"))

    assert not utils.compilation_pays(torch.device("cpu"))
    monkeypatch.setattr(utils, "compilation_pays", lambda device: True)
    assert answer() and answer("--compile", "--shard") and not answer("--no-compile") and not answer("--shard")
    monkeypatch.setattr(utils, "compilation_pays", lambda device: False)
    assert answer("--compile") and not answer()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [main.accumulate_micro, main.accumulate_full])
def test_kernels_of_its_own_give_the_same_gradients(accumulate):
    """With dropout: numbers drawn as without compilation, and both passes of --accum-negatives full draw the same."""
    torch.manual_seed(0)
    model = tiny_model("SLIP", vision_kwargs=DROPPING)
    assert max(compare(model, accumulate, 2, options={"fallback_random": True})) < 1e-5


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


@pytest.mark.slow
def test_a_compiled_run_resumes_and_equals_the_uncompiled(roco, tmp_path, monkeypatch):
    plain, first, whole, broken = (tmp_path / name for name in ("plain", "first", "whole", "broken"))
    main.main(command(roco, plain, "--eps", "1e-2", "--epochs", "1"))
    main.main(command(roco, first, "--eps", "1e-2", "--epochs", "1", "--compile", "-j", "2"))
    a, b = weights(plain), weights(first)
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(b[key], a[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
    main.main(command(roco, whole, "--eps", "1e-2", "--compile", "-j", "2"))
    assert json.loads((whole / "settings.json").read_text())["derived"]["compiled"] is True
    assert models.load_pretrained(whole / "checkpoint.pt").model.name == "SLIP_VITT16"
    with monkeypatch.context() as m:
        m.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            main.main(command(roco, broken, "--eps", "1e-2", "--compile", "-j", "2"))
    main.main(command(roco, broken, "--eps", "1e-2", "--compile", "-j", "2"))
    assert_same_run(whole, broken)
    main.main(command(roco, broken, "--eps", "1e-2"))  # finished; without --compile it is no other run
    assert "this run is finished" in (broken / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_two_compiled_processes_equal_one_that_is_not(roco, tmp_path, extra):
    main.main(command(roco, tmp_path / "one", "--eps", "1e-2", "--epochs", "1"))
    # Started anew: a forked process cannot use the compiler's workers of its parent.
    argv = command(
        roco,
        tmp_path / "two",
        "--batch-size",
        "4",
        "--eps",
        "1e-2",
        "--epochs",
        "1",
        "--gpu",
        "-1",
        "--compile",
        *extra,
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master-port={free_port()}",
            ROOT / "main.py",
            *argv,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
