"""export.py of several checkpoints: the mean of their weights, or why there is none."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY
from test_export import built

import export
import models
from runtime import integrity
from runtime.checkpoints import load_checkpoint, save_checkpoint

HELD = ("--model", "SLIP_VITT16", "--vision-tower", "test_resnet", *TINY[:9], "text_width=32", "text_layers=1",
        "text_heads=2", "embed_dim=16")  # fmt: skip


def several(folder, *flags, n=3, **args):
    """Checkpoints of one model whose parameters, and the head's statistics, went their own ways; `args` of each."""
    paths = []
    first = built(folder / "first.pt", *(flags or ("--model", "SLIP_VITT16", *TINY)))
    buffers = {name for name, _ in models.load_pretrained(first).model.named_buffers()}
    for i in range(n):
        state, g = load_checkpoint(first), torch.Generator().manual_seed(i)
        for name, value in state["state_dict"].items():
            if value.is_floating_point() and (name not in buffers or name.startswith("image_mlp.")):
                value.add_(torch.rand(value.shape, generator=g))
        state["args"] = {"seed": 0, "init": "", "lr": 0.1 * (i + 1)} | {key: of[i] for key, of in args.items()}
        (folder / f"run{i}").mkdir()
        paths.append(folder / f"run{i}" / "checkpoint.pt")
        save_checkpoint(state, paths[-1])
    return paths


def averaged(paths, folder, form="safetensors"):
    return export.main([*map(str, paths), "--to", form, "--output", str(folder)])


@pytest.mark.parametrize("flags", [(), HELD], ids=["vit", "batchnorm held"])
def test_the_mean_is_the_one_computed_by_hand(flags, tmp_path):
    paths = several(tmp_path, *flags)
    found = models.load_pretrained(averaged(paths, tmp_path / "mean"))
    states = [load_checkpoint(path)["state_dict"] for path in paths]
    for name, value in found.model.state_dict().items():
        expected = np.mean([state[name].double().numpy() for state in states], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)
    card = (tmp_path / "mean" / "README.md").read_text()
    for i, path in enumerate(paths):
        assert f"`run{i}/checkpoint.pt` {integrity.sha256(path)}" in card
    assert "of the mean not measured" in card and str(tmp_path) not in card
    assert found.training == {"averaged": 3}


def test_what_has_no_mean_is_refused_by_name(tmp_path):
    def cannot(paths, why):
        with pytest.raises(ValueError, match=why):
            averaged(paths, tmp_path / "mean")
        assert not (tmp_path / "mean").exists()

    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    (a, b) = several(folder("a"), n=2)
    cannot([a, a], "hold the same bytes")
    cannot(several(folder("seeds"), n=2, seed=[0, 1]), r"run0.*run1.*same weights: --seed 0 and --seed 1")
    cannot(several(folder("starts"), n=2, init=["x.pt", "y.pt"]), "--init x.pt and --init y.pt")
    (other,) = several(folder("wide"), "--model", "SLIP_VITT16", *TINY[:-1], "embed_dim=24", n=1)
    cannot([a, other], "differ in settings: embed_dim 16 and 24")
    state = load_checkpoint(b)
    for key, value, why in (
        ("preprocess", {**state["preprocess"], "mean": [0.5, 0.5, 0.5]}, r"preparation of images: mean .* and \[0.5"),
        ("tokenizer", {**state["tokenizer"], "context_length": 20}, "tokenizer: context_length 24 and 20"),
    ):
        save_checkpoint({**state, key: value}, tmp_path / "changed.pt")
        cannot([a, tmp_path / "changed.pt"], why)
    first, second = several(folder("norms"), *HELD, n=2)
    state = load_checkpoint(second)
    name = next(key for key in state["state_dict"] if key.startswith("visual.") and key.endswith("running_mean"))
    state["state_dict"][name] += 1
    save_checkpoint(state, second)
    cannot([first, second], rf"{name} differs, and BatchNorm's statistics.*--hold-batchnorm")


def test_seeds_may_differ_where_all_weights_come_from_a_file_and_silence_is_said(tmp_path, caplog):
    (tmp_path / "s").mkdir()
    (tmp_path / "t").mkdir()
    averaged(several(tmp_path / "s", n=2, seed=[0, 1], init=["x.pt", "x.pt"]), tmp_path / "mean")
    assert "it is not recorded" not in caplog.text
    paths = [export.main([str(path), "--to", "safetensors", "--output", str(tmp_path / f"e{i}")])
             for i, path in enumerate(several(tmp_path / "t", n=2))]  # fmt: skip
    averaged(paths, tmp_path / "mean of exports")
    assert "it is not recorded what they started from" in caplog.text
    assert json.loads((tmp_path / "mean" / "config.json").read_text())["training"] == {"averaged": 2}


def test_image_towers_of_one_start_are_averaged_whatever_the_seed_of_the_rest(tmp_path):
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    paths = several(tmp_path / "same", *HELD, seed=[0, 1, 2], vision_weights=["a.pt"] * 3)
    with pytest.raises(ValueError, match="the same weights: --vision-weights a.pt, --seed 0 and"):
        averaged(paths, tmp_path / "whole")
    tower = models.load_pretrained(averaged(paths, tmp_path / "mean", "timm")).model.visual
    states = [load_checkpoint(path)["state_dict"] for path in paths]
    for name, value in tower.state_dict().items():
        expected = np.mean([state[f"visual.{name}"].double().numpy() for state in states], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)
    others = several(tmp_path / "other", *HELD, n=2, seed=[0, 0], vision_weights=["a.pt", "b.pt"])
    with pytest.raises(ValueError, match="--vision-weights a.pt and --vision-weights b.pt"):
        averaged(others, tmp_path / "none", "timm")
