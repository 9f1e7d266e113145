"""main_linear.py on the catalog's other sets: SGD as published, cached features, label fractions, k-NN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from distributed_helpers import run_ranks
from helpers import QUICK, image_side, write_checkpoint
from PIL import Image
from sklearn.linear_model import LogisticRegression

import main_linear
import models
import utils
from downstream import create_downstream
from transforms import Preprocess, eval_view


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt", "vit")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Path:
    """Three colours as class folders (24 images to train, 9 to test), entered as `pets` (mean per class)."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("test", 3)):
        for label, name in enumerate(("Abyssinian", "beagle", "boxer")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(90, 20, (40, 48, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    path = root / "catalog.json"
    pets = {"path": str(root), "type": "imagefolder", "train": "train", "test": "test"}
    digits = {"path": "", "type": "special", "train": "train", "test": "test"}
    path.write_text(json.dumps({"pets": pets, "digits": digits}))
    return path


def run(catalog: Path, checkpoint: Path, output_dir: Path, *flags: str) -> dict:
    argv = ["--dataset", "pets", "--catalog", str(catalog), "--pretrained", str(checkpoint)]
    argv += ["--output-dir", str(output_dir), *QUICK, "-b", "8", "--epochs", "6", "--eval-freq", "2", "--lr", "10"]
    return main_linear.main([*argv, *flags])


def test_published_defaults_stay():
    args = main_linear.get_args_parser().parse_args([])
    published = {
        "dataset": "imagenet", "output_dir": "./", "arch": "vit_base_patch16_224", "workers": 64, "epochs": 90,
        "start_epoch": 0, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "wd": 0.0, "print_freq": 10, "eval_freq": 10,
        "resume": "", "evaluate": False, "pretrained": "", "seed": None, "world_size": 1, "rank": 0, "local_rank": 0,
        "dist_url": "env://", "dist_backend": "nccl", "gpu": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    spelt = main_linear.get_args_parser().parse_args(
        "-a vit_small_patch16_224 -j 4 -b 2 --learning-rate 1 --weight-decay 2 -p 3 -e".split()
    )
    assert (spelt.lr, spelt.wd, spelt.workers, spelt.batch_size, spelt.evaluate) == (1.0, 2.0, 4, 2, True)


def test_learning_rate_scales_with_the_whole_batch():
    parse = main_linear.get_args_parser().parse_args
    assert main_linear.learning_rate(parse([]), world_size=8) == pytest.approx(0.1 * 8 * 128 / 256)
    # The published script divided one process's batch by their number.
    assert main_linear.learning_rate(parse(["--lr-scaling", "slip"]), 8) == pytest.approx(0.1 * 16 / 256)


def test_sgd_learns_and_leaves_the_tower_alone(catalog, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "batchnorm")
    load, seen = models.load_pretrained, []
    monkeypatch.setattr(models, "load_pretrained", lambda *a, **kw: seen.append(load(*a, **kw)) or seen[-1])
    results = run(catalog, checkpoint, tmp_path / "out", "--epochs", "20")
    assert results["metric"] == "mean_per_class" and results["score"] > 90 and results["samples"] == 9
    for name, value in image_side(checkpoint).items():
        assert torch.equal(value, seen[0].model.state_dict()[name]), name
    state = utils.load_checkpoint(tmp_path / "out" / "linear_checkpoint.pt")
    assert state["epoch"] == 20 and state["state_dict"]["weight"].shape[0] == 3
    assert (tmp_path / "out" / "linear_best.pt").is_file()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    base = 10 * 8 / 256
    assert rates == pytest.approx([base * (1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)])
    assert [row["step"] for row in rows if row["kind"] == "test"] == [3 * e for e in range(2, 21, 2)]


def head_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return utils.load_checkpoint(output_dir / "linear_checkpoint.pt")["state_dict"]


def test_an_interrupted_run_continues_as_if_it_never_stopped(catalog, checkpoint, tmp_path, monkeypatch):
    whole = run(catalog, checkpoint, tmp_path / "whole")
    epochs = []
    train_epoch = main_linear.train_epoch

    def stop_after_three(*args):
        if len(epochs) == 3:
            raise KeyboardInterrupt
        epochs.append(args[5])
        train_epoch(*args)

    monkeypatch.setattr(main_linear, "train_epoch", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(catalog, checkpoint, tmp_path / "parts")
    monkeypatch.setattr(main_linear, "train_epoch", lambda *args: epochs.append(args[5]) or train_epoch(*args))
    parts = run(catalog, checkpoint, tmp_path / "parts")
    assert epochs == [0, 1, 2, 3, 4, 5]
    for name, value in head_of(tmp_path / "whole").items():
        assert torch.equal(value, head_of(tmp_path / "parts")[name])
    assert whole == parts
    with pytest.raises(ValueError, match="learning_rate .* there"):
        run(catalog, checkpoint, tmp_path / "parts", "--lr", "1")
    assert run(catalog, checkpoint, tmp_path / "parts", "--lr", "1", "--evaluate")["score"] == whole["score"]


def one_of_two(rank: int, world: int, catalog: Path, checkpoint: Path, output_dir: Path) -> None:
    run(catalog, checkpoint, output_dir, "-b", "4")


def test_two_processes_train_what_one_trains(catalog, checkpoint, tmp_path):
    one = run(catalog, checkpoint, tmp_path / "one")
    run_ranks(one_of_two, 2, catalog, checkpoint, tmp_path / "two")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert one["settings"] == two["settings"] and one["score"] == two["score"]
    for name, value in head_of(tmp_path / "one").items():
        assert torch.allclose(value, head_of(tmp_path / "two")[name], rtol=1e-4, atol=1e-5)


def test_views_are_the_published_ones():
    """Resize(256), CenterCrop(224) to evaluate; to train, crops that depend on seed, epoch and index alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    img, preprocess = Image.fromarray(pixels), Preprocess()
    published = T.Compose(
        [T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(preprocess.mean, preprocess.std)]
    )
    assert torch.allclose(main_linear.linear_eval_view(preprocess, img), published(img), atol=1e-6)
    medclip = Preprocess(prepare="medclip")  # whole squares: there is nothing to cut off
    assert torch.equal(main_linear.linear_eval_view(medclip, img), eval_view(medclip)(img, None))

    class One:
        def __getitem__(self, i):
            return img, 7

        def __len__(self):
            return 2

    views = main_linear.TrainViews(One(), preprocess, seed=0)
    assert views[0, 1][1] == 7 and torch.equal(views[3, 1][0], views[3, 1][0])
    assert not torch.equal(views[3, 1][0], views[4, 1][0]) and not torch.equal(views[3, 0][0], views[3, 1][0])
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    slopes = [
        main_linear.linear_train_view(preprocess, ramp, np.random.default_rng(i))[0, 0].diff().sum() for i in range(60)
    ]
    assert 15 < sum(float(slope) < 0 for slope in slopes) < 45  # half of the crops are flipped
    spans = sorted(abs(float(slope)) * 0.229 for slope in slopes)
    assert spans[0] < 0.45 and spans[-1] > 0.85  # from small parts to nearly all of the width


def test_cached_features_fractions_and_neighbours(catalog, checkpoint, tmp_path, capsys):
    flags = ("--dataset", "digits", "-b", "256", "--cache-features", "--fraction", "0.05", "--knn", "20")
    results = run(catalog, checkpoint, tmp_path, *flags)
    assert results["samples"] == {"train": 1437, "test": 360}
    files = {path.name.split("_")[1]: np.load(path) for path in (tmp_path / "features").glob("*.npz")}
    labels, test_labels = (create_downstream("digits", train, None).labels for train in (True, False))
    x, x_test = (files[split]["features"].astype(np.float64) for split in ("train", "test"))
    mean, std = x.mean(0), x.std(0)
    penalty = results["logistic"]["chosen"]["lambda"]
    model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=5000).fit((x - mean) / std, labels)
    expected = 100 * model.score((x_test - mean) / std, test_labels)
    assert results["logistic"]["top1"] == pytest.approx(expected, abs=0.6)
    assert results["logistic"]["top1"] > 80 and results["knn"]["top1"] > 60
    (few,) = results["fractions"]
    assert few["samples"] < 80 and len(set(few["scores"])) > 1
    assert few["mean"] == pytest.approx(np.mean(few["scores"])) and few["mean"] < results["logistic"]["top1"]
    out = capsys.readouterr().out
    assert "digits, 20-NN: top1" in out and "5.00% of the labels" in out


def test_errors_name_the_thing(catalog, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'imagnet'; choose from .*digits"):
        run(catalog, checkpoint, tmp_path, "--dataset", "imagnet")
    with pytest.raises(ValueError, match="do not fill one global batch of 128"):
        run(catalog, checkpoint, tmp_path, "-b", "128")
    with pytest.raises(ValueError, match="--evaluate needs --resume"):
        run(catalog, checkpoint, tmp_path, "--evaluate")
    with pytest.raises(FileNotFoundError, match="no_such.pt"):
        run(catalog, checkpoint, tmp_path, "--resume", str(tmp_path / "no_such.pt"))
    with pytest.raises(ValueError, match="no settings"):
        run(catalog, checkpoint, tmp_path, "--resume", str(checkpoint))
    with pytest.raises(ValueError, match="--fraction 2.0"):
        run(catalog, checkpoint, tmp_path, "--fraction", "2")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        run(catalog, checkpoint, tmp_path, "--root", str(tmp_path / "elsewhere"))
