"""main_linear.py end to end: CBIS-DDSM on a small tree in the published layout, then the catalog's other sets.

Those by SGD as published, on cached features, on label fractions and by k-NN.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import cbis_tree
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from distributed_helpers import run_ranks
from helpers import QUICK, signal_after
from model_helpers import image_side, write_checkpoint
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_score, recall_score, roc_auc_score

import main_linear
import models
from evaluation import cbis_probe, downstream, heads, linear_sgd
from evaluation import features as passes
from evaluation.downstream import create_downstream
from evaluation.heads import Samples
from evaluation.metrics import METRICS
from inputs.cbis import CBIS_CLASSES, CbisLesions
from inputs.transforms import Preprocess, eval_view, linear_eval_view, linear_train_view
from preparation.cbis_tables import make_cbis
from runtime import checkpoints


@pytest.fixture(scope="module")
def cbis(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cbis")
    cbis_tree.make_small_cbis(root)
    make_cbis(root)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt", "vit")


def probe(root: Path, output_dir: Path, *flags: str) -> dict:
    argv = ["--dataset", "cbis_calc", "--root", str(root), "--output-dir", str(output_dir), *QUICK]
    return main_linear.main([*argv, "--resamples", "200", *flags])


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(cbis, checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    output_dir = tmp_path_factory.mktemp("run")
    return output_dir, probe(cbis, output_dir, "--dataset", "cbis_mass", "--pretrained", str(checkpoint))


def test_results_follow_from_the_predictions(run, cbis):
    output_dir, results = run
    assert results == json.loads((output_dir / "results.json").read_text())
    rows = read_csv(output_dir / "predictions.csv")
    table = [row for row in read_csv(cbis / "mass.csv") if row["split"] == "test"]
    for name in ("lesion", "patient", "side", "view", "abnormality", "pathology"):
        assert [row[name] for row in rows] == [row[name] for row in table]
    prob = np.array([[float(row[f"prob_{name}"]) for name in CBIS_CLASSES] for row in rows])
    assert np.allclose(prob.sum(1), 1)
    truth = [CBIS_CLASSES.index(row["pathology"]) for row in rows]
    values = {name: entry["value"] for name, entry in results["metrics"].items()}
    assert values["auroc"] == pytest.approx(roc_auc_score(truth, prob, multi_class="ovr"))
    assert values["precision"] == pytest.approx(
        precision_score(truth, prob.argmax(1), average="macro", zero_division=0)
    )
    confusion = np.zeros((3, 3), int)
    for row in rows:
        confusion[CBIS_CLASSES.index(row["pathology"]), CBIS_CLASSES.index(row["predicted"])] += 1
    assert results["confusion"] == confusion.tolist()
    assert values["recall_malignant"] == pytest.approx(confusion[2, 2] / confusion[2].sum())
    for entry in results["metrics"].values():
        assert inside(entry) and (entry["low"] is None or 0 <= entry["low"] <= entry["high"] <= 1)
    assert results["lesions"]["test"] == len(rows) and results["test_patients"] == 20


def inside(entry) -> bool:
    """Between its bounds, or without them for a reason."""
    return bool(entry["why"]) if entry["low"] is None else entry["low"] <= entry["value"] <= entry["high"]


def test_brightness_that_tells_the_class_is_found(run):
    """The crops' brightness follows the pathology, so even a random tower's features separate the classes."""
    assert run[1]["metrics"]["auroc"]["value"] > 0.9


def test_printed_row_is_the_published_table(cbis, checkpoint, tmp_path, capsys):
    results = probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--picture", "full")
    out = capsys.readouterr().out
    header, row = (line for line in out.splitlines() if line.startswith("|") and "---" not in line)
    assert header == "| Model | AUROC | F1-Score | Precision | Recall | Precision (Malignant) | Recall (Malignant) |"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0].startswith("CLIP with test_vit from checkpoint ") and len(cells) == 1 + len(METRICS)
    for cell, entry in zip(cells[1:], results["metrics"].values(), strict=True):
        assert float(cell.split()[0]) == pytest.approx(100 * entry["value"], abs=0.006)
        assert float(cell.split("(")[1].split()[0]) == pytest.approx(100 * entry["low"], abs=0.06)
    assert "full images" in out and results["image_kind"] == "full"


def test_the_backbone_does_not_move(cbis, tmp_path, monkeypatch):
    """BatchNorm statistics would, in train mode; here the model even arrives in train mode."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "batchnorm")
    load, seen = models.load_pretrained, []

    def load_in_train_mode(*args, **kwargs):
        seen.append(load(*args, **kwargs))
        seen[-1].model.train()
        return seen[-1]

    monkeypatch.setattr(models, "load_pretrained", load_in_train_mode)
    probe(cbis, tmp_path / "out", "--pretrained", str(checkpoint))
    after = seen[0].model.state_dict()
    for name, value in image_side(checkpoint).items():
        assert torch.equal(value, after[name]), name
    expected = hashlib.sha256()
    for name, value in sorted(image_side(checkpoint).items()):
        expected.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["derived"]["weights_sha256"] == expected.hexdigest()


@pytest.mark.parametrize("features", ["backbone", "projection"])
def test_features_are_the_towers_own_in_eval_mode(cbis, tmp_path, features):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "batchnorm")
    probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--features", features, "--batch-size", "7")
    loaded = models.load_pretrained(checkpoint)
    (file,) = (tmp_path / "features").glob("*_test_*.npz")
    got = np.load(file)["features"]
    lesions = CbisLesions(cbis, "calc", "test", "crop", loaded.preprocess)
    with torch.inference_mode():
        expected = loaded.model.visual(torch.stack([lesions[i][0] for i in range(len(lesions))]))
        if features == "projection":
            expected = expected @ loaded.model.image_projection
    assert np.allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_test_table_is_read_once_and_last(cbis, checkpoint, tmp_path, monkeypatch):
    order = []
    lesions, logistic = CbisLesions, cbis_probe.PROTOCOLS["logistic"]

    def recorded_lesions(root, kind, split, *args, **kwargs):
        order.append(split)
        return lesions(root, kind, split, *args, **kwargs)

    def recorded_fit(*args):
        head = logistic(*args)
        order.append("chosen")
        return head

    monkeypatch.setattr(cbis_probe, "CbisLesions", recorded_lesions)
    monkeypatch.setitem(cbis_probe.PROTOCOLS, "logistic", recorded_fit)
    probe(cbis, tmp_path, "--pretrained", str(checkpoint))
    assert order == ["train", "val", "chosen", "chosen", "test"]  # three classes, then two of them


def test_kept_features_are_used_only_for_the_same_weights_and_images(cbis, checkpoint, tmp_path, monkeypatch):
    root = tmp_path / "cbis"
    shutil.copytree(cbis, root)
    extracted = []
    extract = passes.extract
    monkeypatch.setattr(passes, "extract", lambda *args: extracted.append(args[2]) or extract(*args))

    def splits_extracted(*flags: str, weights: Path = checkpoint) -> list[str]:
        extracted.clear()
        results.append(probe(root, tmp_path / "out", "--pretrained", str(weights), *flags)["metrics"])
        return [title.split("_")[-1] for title in extracted]

    results = []
    assert splits_extracted() == ["train", "val", "test"]
    assert splits_extracted() == [] and results[0] == results[1]
    assert splits_extracted("--picture", "mask") == ["train", "val", "test"]
    assert splits_extracted("--features", "projection") == ["train", "val", "test"]
    other = write_checkpoint(tmp_path / "other.pt", "vit", seed=1)
    assert splits_extracted(weights=other) == ["train", "val", "test"]
    crop = root / next(row["crop"] for row in read_csv(root / "calc.csv") if row["split"] == "val")
    os.utime(crop, ns=(1, 1))
    assert splits_extracted() == ["val"]


def test_medslip_protocol(cbis, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "MEDSLIP_EPOCHS", 5)
    monkeypatch.setattr(heads, "MEDSLIP_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(main_linear, "MEDSLIP_SIZE", 64)
    results = probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--protocol", "medslip")
    assert (results["features"], results["feature_dim"]) == ("projection", 32)
    assert [entry["lr"] for entry in results["validation"]] == [1e-3, 1e-2]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["derived"]["preprocess"]["size"] == 64
    assert results["metrics"]["auroc"]["value"] > 0.8


def test_untrained_tower_has_the_checkpoints_shape_and_other_weights(cbis, checkpoint, tmp_path):
    flags = ("--pretrained", str(checkpoint), "--untrained")
    names = {}
    for seed in ("1", "2", "1"):
        results = probe(cbis, tmp_path / seed, *flags, "--seed", seed)
        settings = json.loads((tmp_path / seed / "settings.json").read_text())["derived"]
        assert names.setdefault(seed, settings["weights_sha256"]) == settings["weights_sha256"]
        assert f"untrained (seed {seed})" in results["model"]
    assert names["1"] != names["2"]


def test_arch_without_weights(cbis, tmp_path):
    results = probe(cbis, tmp_path, "--arch", "test_vit")
    assert results["model"].startswith("test_vit, untrained") and results["feature_dim"] == 64


def test_baseline_gives_the_paired_difference(run, cbis, tmp_path, capsys):
    output_dir, results = run
    other = write_checkpoint(tmp_path / "other.pt", "vit", seed=3)
    flags = (
        "--dataset",
        "cbis_mass",
        "--pretrained",
        str(other),
        "--baseline",
        str(output_dir / "predictions.csv"),
    )
    got = probe(cbis, tmp_path / "out", *flags)
    for name, entry in got["difference"].items():
        assert entry["value"] == pytest.approx(got["metrics"][name]["value"] - results["metrics"][name]["value"])
        assert inside(entry)
    assert "paired over patients" in capsys.readouterr().out
    same = probe(cbis, tmp_path / "same", *flags[:2], "--baseline", str(tmp_path / "out" / "predictions.csv"),
                 "--pretrained", str(other))  # fmt: skip
    assert same["difference"]["auroc"] == {"value": 0, "low": 0, "high": 0, "p_value": 1}
    with pytest.raises(ValueError, match="a paired comparison needs the same ones"):
        probe(
            cbis,
            tmp_path / "calc",
            "--baseline",
            str(output_dir / "predictions.csv"),
            "--pretrained",
            str(other),
        )
    with pytest.raises(ValueError, match="is no predictions.csv"):
        probe(cbis, tmp_path / "x", *flags[:4], "--baseline", str(cbis / "mass.csv"))


def test_broken_and_missing_images(cbis, checkpoint, tmp_path, capsys):
    root = tmp_path / "cbis"
    shutil.copytree(cbis, root)
    test_rows = [row for row in read_csv(root / "calc.csv") if row["split"] == "test"]
    broken = root / test_rows[5]["crop"]
    broken.write_bytes(broken.read_bytes()[:200])
    flags = ("--pretrained", str(checkpoint))
    with pytest.raises(ValueError, match=broken.name):
        probe(root, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "results.json").exists()
    results = probe(root, tmp_path / "out", *flags, "--skip-broken")
    assert results["lesions_skipped"] == {"train": 0, "val": 0, "test": 1}
    assert results["lesions"]["test"] == len(test_rows) - 1
    assert "1 MORE SKIPPED" in capsys.readouterr().out
    lesions = [row["lesion"] for row in read_csv(tmp_path / "out" / "predictions.csv")]
    assert lesions == [row["lesion"] for row in test_rows if row is not test_rows[5]]


def test_errors_name_the_thing(cbis, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        probe(cbis, tmp_path, "--pretrained", str(tmp_path / "nowhere.pt"))
    with pytest.raises(FileNotFoundError, match="make_dataset.py cbis"):
        probe(tmp_path / "empty", tmp_path, "--pretrained", str(checkpoint))
    simclr = write_checkpoint(tmp_path / "simclr.pt", "vit", name="SIMCLR_VITT16", ssl_mlp_dim=16, ssl_emb_dim=8)
    with pytest.raises(ValueError, match="no projection: use --features backbone"):
        probe(cbis, tmp_path, "--pretrained", str(simclr), "--features", "projection")
    with pytest.raises(ValueError, match="unknown vision tower 'vit_gigantic'"):
        probe(cbis, tmp_path, "--arch", "vit_gigantic")
    with pytest.raises(ValueError, match="unknown dataset 'cbis_calcification'; choose from cbis_calc, cbis_mass"):
        main_linear.main(["--dataset", "cbis_calcification"])
    with pytest.raises(FileNotFoundError, match="no_such.csv"):
        probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--baseline", str(tmp_path / "no_such.csv"))


def one_of_two(rank: int, world: int, cbis: Path, checkpoint: Path, output_dir: Path) -> None:
    probe(cbis, output_dir, "--pretrained", str(checkpoint))


def test_two_processes_give_the_numbers_of_one(cbis, checkpoint, tmp_path):
    one = probe(cbis, tmp_path / "one", "--pretrained", str(checkpoint))
    run_ranks(one_of_two, 2, cbis, checkpoint, tmp_path / "two")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert one["chosen"] == two["chosen"] and one["lesions"] == two["lesions"]
    predictions = [read_csv(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    for a, b in zip(*predictions, strict=True):
        assert a["lesion"] == b["lesion"]
        assert float(a["prob_MALIGNANT"]) == pytest.approx(float(b["prob_MALIGNANT"]), abs=1e-4)


# -------------------------------------------------------------------------------- other sets of the catalog


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


def classify(catalog: Path, checkpoint: Path, output_dir: Path, *flags: str) -> dict:
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
    assert linear_sgd.learning_rate(parse([]), world_size=8) == pytest.approx(0.1 * 8 * 128 / 256)
    # The published script divided one process's batch by their number.
    assert linear_sgd.learning_rate(parse(["--lr-scaling", "slip"]), 8) == pytest.approx(0.1 * 16 / 256)


def test_sgd_learns_and_leaves_the_tower_alone(catalog, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "batchnorm")
    load, seen = models.load_pretrained, []
    monkeypatch.setattr(models, "load_pretrained", lambda *a, **kw: seen.append(load(*a, **kw)) or seen[-1])
    results = classify(catalog, checkpoint, tmp_path / "out", "--epochs", "20")
    assert results["metric"] == "mean_per_class" and results["score"] > 0.9 and results["samples"] == 9
    assert results["unit"] == "fraction"
    for name, value in image_side(checkpoint).items():
        assert torch.equal(value, seen[0].model.state_dict()[name]), name
    state = checkpoints.load_checkpoint(tmp_path / "out" / "linear_checkpoint.pt")
    assert state["epoch"] == 20 and state["state_dict"]["weight"].shape[0] == 3
    assert (tmp_path / "out" / "linear_best.pt").is_file()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    base = 10 * 8 / 256
    assert rates == pytest.approx([base * (1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)])
    assert [row["step"] for row in rows if row["kind"] == "test"] == [3 * e for e in range(2, 21, 2)]


def head_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(output_dir / "linear_checkpoint.pt")["state_dict"]


def test_an_interrupted_run_continues_as_if_it_never_stopped(catalog, checkpoint, tmp_path, monkeypatch):
    whole = classify(catalog, checkpoint, tmp_path / "whole")
    epochs = []
    train_epoch = linear_sgd.train_epoch

    def stop_after_three(run, stop):
        if len(epochs) == 3:
            raise KeyboardInterrupt
        epochs.append(run.epoch)
        return train_epoch(run, stop)

    monkeypatch.setattr(linear_sgd, "train_epoch", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        classify(catalog, checkpoint, tmp_path / "parts")
    monkeypatch.setattr(linear_sgd, "train_epoch", lambda run, stop: epochs.append(run.epoch) or train_epoch(run, stop))
    parts = classify(catalog, checkpoint, tmp_path / "parts")
    assert epochs == [0, 1, 2, 3, 4, 5]
    for name, value in head_of(tmp_path / "whole").items():
        assert torch.equal(value, head_of(tmp_path / "parts")[name])
    assert whole == parts
    with pytest.raises(ValueError, match="learning_rate: .* there"):
        classify(catalog, checkpoint, tmp_path / "parts", "--lr", "1")
    assert classify(catalog, checkpoint, tmp_path / "parts", "--lr", "1", "--evaluate")["score"] == whole["score"]


def test_a_signal_within_an_epoch_leaves_a_checkpoint_and_the_rest_is_the_unbroken_run(
    catalog, checkpoint, tmp_path, monkeypatch
):
    frequent = ("--print-freq", "1", "-b", "4")
    whole = classify(catalog, checkpoint, tmp_path / "whole", *frequent)
    cross_entropy = signal_after(linear_sgd.F.cross_entropy, 4, signal.SIGUSR1)
    monkeypatch.setattr(linear_sgd.F, "cross_entropy", cross_entropy)
    assert classify(catalog, checkpoint, tmp_path / "parts", *frequent) == {"stopped_by": "SIGUSR1"}
    assert not (tmp_path / "parts" / "results.json").exists()
    state = checkpoints.load_checkpoint(tmp_path / "parts" / "linear_checkpoint.pt")
    assert state["step_in_epoch"] > 0 and state["step"] == 4
    assert classify(catalog, checkpoint, tmp_path / "parts", *frequent) == whole
    for name, value in head_of(tmp_path / "whole").items():
        assert torch.equal(value, head_of(tmp_path / "parts")[name])


def test_the_test_split_goes_through_the_tower_once_for_all_results(catalog, checkpoint, tmp_path, monkeypatch):
    extract, passes = linear_sgd.extract, []
    monkeypatch.setattr(linear_sgd, "extract", lambda *args: passes.append(args[2]) or extract(*args))
    results = classify(catalog, checkpoint, tmp_path, "--eval-freq", "2")
    assert passes == ["pets test"] * 3  # epochs 2, 4 and 6; the scores, the rows and the file are the last one's
    rows = read_csv(tmp_path / "predictions.csv")
    found = [row["predicted"] == row["label"] for row in rows]
    assert results["top1"] == pytest.approx(np.mean(found))
    passes.clear()
    assert classify(catalog, checkpoint, tmp_path, "--eval-freq", "2") == results and len(passes) == 1


def test_a_torn_checkpoint_of_the_layer_is_named_and_the_one_before_it_used(catalog, checkpoint, tmp_path, caplog):
    whole = classify(catalog, checkpoint, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    newest = tmp_path / "torn" / "linear_step00000018.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    with caplog.at_level("INFO", logger="medslip"):
        again = classify(catalog, checkpoint, tmp_path / "torn")
    assert "linear_step00000018.pt is not a readable checkpoint" in caplog.text and again == whole
    assert sorted(path.name for path in (tmp_path / "torn").glob("*.pt")) == [
        "linear_best.pt", "linear_checkpoint.pt", "linear_step00000015.pt", "linear_step00000018.pt"
    ]  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_only_the_best_of_this_folder_has_to_be_beaten(catalog, checkpoint, tmp_path, beside):
    """With a score in the checkpoint that no epoch reaches."""
    classify(catalog, checkpoint, tmp_path / "whole")
    state = checkpoints.load_checkpoint(tmp_path / "whole" / "linear_step00000015.pt") | {"best_acc1": 101.0}
    checkpoints.save_checkpoint(state, tmp_path / "high.pt")
    folder = tmp_path / "run"
    folder.mkdir()
    if beside:
        checkpoints.save_checkpoint({"epoch": 1}, folder / "linear_best.pt")
    results = classify(catalog, checkpoint, folder, "--resume", str(tmp_path / "high.pt"))
    best = checkpoints.load_checkpoint(folder / "linear_best.pt")
    assert best == {"epoch": 1} if beside else best["epoch"] == 6 and best["best_acc1"] <= 100
    assert results["best_score_on_test"] == (1.01 if beside else results["score"])


def test_a_layer_is_not_continued_on_other_images(catalog, checkpoint, tmp_path):
    classify(catalog, checkpoint, tmp_path / "out")
    entry = json.loads(catalog.read_text())["pets"]
    folders = sorted((Path(entry["path"]) / "train").iterdir())
    image = next(folders[0].iterdir())
    moved = image.rename(image.with_name("another_name" + image.suffix))
    try:
        with pytest.raises(ValueError, match="images and labels: .* there"):
            classify(catalog, checkpoint, tmp_path / "out")
    finally:
        moved.rename(image)


def one_of_two_by_sgd(rank: int, world: int, catalog: Path, checkpoint: Path, output_dir: Path) -> None:
    classify(catalog, checkpoint, output_dir, "-b", "4")


def test_two_processes_train_what_one_trains(catalog, checkpoint, tmp_path):
    one = classify(catalog, checkpoint, tmp_path / "one")
    run_ranks(one_of_two_by_sgd, 2, catalog, checkpoint, tmp_path / "two")
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
    assert torch.allclose(linear_eval_view(preprocess, img), published(img), atol=1e-6)
    medclip = Preprocess(prepare="medclip")  # whole squares: there is nothing to cut off
    assert torch.equal(linear_eval_view(medclip, img), eval_view(medclip)(img, None))

    two = downstream.ImageArray(np.stack([pixels, pixels]), [str(i) for i in range(8)], [7, 7], None)
    views = downstream.Views(two, partial(linear_train_view, preprocess), seed=0)
    assert views[0, 1][1] == 7 and torch.equal(views[3, 1][0], views[3, 1][0])
    assert not torch.equal(views[3, 1][0], views[4, 1][0]) and not torch.equal(views[3, 0][0], views[3, 1][0])
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    slopes = [linear_train_view(preprocess, ramp, np.random.default_rng(i))[0, 0].diff().sum() for i in range(60)]
    assert 15 < sum(float(slope) < 0 for slope in slopes) < 45  # half of the crops are flipped
    spans = sorted(abs(float(slope)) * 0.229 for slope in slopes)
    assert spans[0] < 0.45 and spans[-1] > 0.85  # from small parts to nearly all of the width


def test_cached_features_fractions_and_neighbours(catalog, checkpoint, tmp_path, capsys):
    flags = ("--dataset", "digits", "-b", "256", "--cache-features", "--fraction", "0.05", "--knn", "20")
    results = classify(catalog, checkpoint, tmp_path, *flags)
    assert results["samples"] == {"train": 1437, "test": 360} and results["unit"] == "fraction"
    files = {path.name.split("_")[1]: np.load(path) for path in (tmp_path / "features").glob("*.npz")}
    labels, test_labels = (create_downstream("digits", train, None).labels for train in (True, False))
    x, x_test = (files[split]["features"].astype(np.float64) for split in ("train", "test"))
    mean, std = x.mean(0), x.std(0)
    penalty = results["logistic"]["chosen"]["lambda"]
    model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=5000).fit((x - mean) / std, labels)
    expected = model.score((x_test - mean) / std, test_labels)
    assert results["logistic"]["top1"] == pytest.approx(expected, abs=0.006)
    assert results["logistic"]["top1"] > 0.8 and results["knn"]["top1"] > 0.6
    (few,) = results["fractions"]
    assert few["samples"] < 80 and len(set(few["scores"])) > 1
    assert few["mean"] == pytest.approx(np.mean(few["scores"])) and few["mean"] < results["logistic"]["top1"]
    out = capsys.readouterr().out
    assert "digits, 20-NN: top1" in out and "5.00% of the labels" in out


def test_errors_about_a_set_name_the_thing(catalog, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'imagnet'; choose from .*digits"):
        classify(catalog, checkpoint, tmp_path, "--dataset", "imagnet")
    with pytest.raises(ValueError, match="do not fill one global batch of 128"):
        classify(catalog, checkpoint, tmp_path, "-b", "128")
    with pytest.raises(ValueError, match="--evaluate needs --resume"):
        classify(catalog, checkpoint, tmp_path, "--evaluate")
    with pytest.raises(FileNotFoundError, match="no_such.pt"):
        classify(catalog, checkpoint, tmp_path, "--resume", str(tmp_path / "no_such.pt"))
    with pytest.raises(ValueError, match="no settings"):
        classify(catalog, checkpoint, tmp_path, "--resume", str(checkpoint))
    with pytest.raises(ValueError, match="--fraction 2.0"):
        classify(catalog, checkpoint, tmp_path, "--fraction", "2")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        classify(catalog, checkpoint, tmp_path, "--root", str(tmp_path / "elsewhere"))


def test_a_set_of_ones_own_reports_the_metric_of_its_entry(catalog, checkpoint, tmp_path):
    """No code: the set's entry alone, with its classes in an order of its own."""
    entry = json.loads(catalog.read_text())["pets"] | {
        "metric": "mean_top1_top5",
        "folders": ["boxer", "beagle", "Abyssinian"],
    }
    own = tmp_path / "catalog.json"
    own.write_text(json.dumps({"scans": entry}))
    results = classify(own, checkpoint, tmp_path, "--dataset", "scans", "--cache-features", "--knn", "3")
    for method in ("logistic", "knn"):
        assert results[method]["metric"] == "mean_top1_top5"
        score = results[method]["score"]
        assert score > 0.9 and score == pytest.approx((results[method]["top1"] + 1) / 2)
    assert create_downstream("scans", True, None, {"scans": entry}).classes == ["boxer", "beagle", "Abyssinian"]
    with pytest.raises(ValueError, match="roco has captions, not classes"):
        main_linear.main(["--dataset", "roco", "--output-dir", str(tmp_path), "--gpu", "-1"])


def test_lesion_probe_says_what_it_read_and_sets_other_results_aside(cbis, checkpoint, tmp_path):
    flags = ("--pretrained", str(checkpoint))
    first = probe(cbis, tmp_path, *flags)
    assert first["weights"]["path"] == str(checkpoint) and not first["weights"]["untrained"]
    assert first["settings"]["weights_sha256"] and first["test_readings"] == 1
    before = (tmp_path / "predictions.csv").read_text()
    second = probe(cbis, tmp_path, *flags, "--class-weights", "balanced", "--folds", "3")
    assert second["test_readings"] == 2 and second["chosen"]["balanced"] is True
    assert (tmp_path / "earlier_1" / "predictions.csv").read_text() == before
    assert json.loads((tmp_path / "earlier_1" / "results.json").read_text()) == first
    readings = [json.loads(line) for line in (tmp_path / "test_readings.jsonl").read_text().splitlines()]
    assert [reading["folds"] for reading in readings] == [0, 3] and all(reading["time"] for reading in readings)


def test_class_weights_are_chosen_on_validation(cbis, checkpoint, tmp_path):
    results = probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--class-weights", "validated")
    best = {entry["balanced"]: entry for entry in results["validation"] if "decision" in entry}
    assert set(best) == {False, True}
    better = max(best.values(), key=lambda entry: entry["decision"])
    assert best[results["chosen"]["balanced"]]["decision"] == better["decision"]


def test_several_baselines_and_what_else_they_did_otherwise(cbis, checkpoint, tmp_path):
    flags = ("--pretrained", str(checkpoint))
    probe(cbis, tmp_path / "full", *flags, "--picture", "full")
    probe(cbis, tmp_path / "same", *flags)
    paths = [str(tmp_path / name / "predictions.csv") for name in ("full", "same")]
    results = probe(cbis, tmp_path / "run", *flags, "--baseline", *paths)
    assert [entry["baseline"] for entry in results["differences"]] == paths
    assert results["difference"] == results["differences"][0]["difference"]
    assert results["differences"][0]["settings_differ"]["image_kind"] == ["full", "crop"]
    assert results["differences"][1]["settings_differ"] == {}
    assert results["differences"][1]["difference"]["auroc"]["value"] == 0
    mass = tmp_path / "mass"
    probe(cbis, mass, *flags, "--dataset", "cbis_mass")
    with pytest.raises(ValueError, match="are not the"):
        probe(cbis, tmp_path / "late", *flags, "--baseline", paths[0], str(mass / "predictions.csv"))
    assert not (tmp_path / "late").exists()  # before the features


def test_label_fractions_on_lesions_are_fractions_of_the_patients(cbis, checkpoint, tmp_path):
    flags = ("--pretrained", str(checkpoint), "--fraction", "0.3", "1.0", "--fraction-seeds", "2")
    small, whole = probe(cbis, tmp_path, *flags)["fractions"]
    patients = {row["patient"] for row in read_csv(cbis / "calc.csv") if row["split"] != "test"}
    assert whole["patients"] == [len(patients)] and len(small["patients"]) == 2
    assert small["patients"][0] == pytest.approx(0.3 * len(patients), abs=2)
    assert len(small["values"]["auroc"]) == 2 and inside(small["metrics"]["auroc"])
    with pytest.raises(ValueError, match="at most 1"):
        probe(cbis, tmp_path / "bad", *flags[:2], "--fraction", "1.5")


def test_a_pathology_that_one_of_two_splits_lacks_is_named_with_its_patients():
    def samples(*lesions):
        labels = np.array([label for _, label in lesions])
        return Samples(np.zeros((len(lesions), 2)), labels, [{"patient": patient} for patient, _ in lesions])

    train, val = samples(("A", 0), ("A", 2), ("A", 2), ("B", 1)), samples(("C", 0), ("C", 1))
    with pytest.raises(
        ValueError, match="cbis_calc: the validation split has no lesion of MALIGNANT, of which 1 patient"
    ):
        cbis_probe.refuse_lacking("cbis_calc", train, val)
    with pytest.raises(ValueError, match="the training split has no lesion of MALIGNANT"):
        cbis_probe.refuse_lacking("cbis_calc", val, train)
    cbis_probe.refuse_lacking("cbis_calc", val, val)


def test_two_classes_without_the_dismissed_lesions(run, cbis):
    two = run[1]["two_class"]
    table = [row for row in read_csv(cbis / "mass.csv") if row["split"] == "test"]
    assert two["lesions"] == sum(row["pathology"] != "BENIGN_WITHOUT_CALLBACK" for row in table)
    assert two["classes"] == ["BENIGN", "MALIGNANT"] and two["metrics"]["auroc"]["value"] > 0.9


@pytest.mark.parametrize("protocol", ["logistic", "medslip"])
def test_the_kept_head_gives_the_runs_predictions(cbis, checkpoint, tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(heads, "MEDSLIP_EPOCHS", 2)
    monkeypatch.setattr(main_linear, "MEDSLIP_SIZE", 64)
    results = probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--protocol", protocol)
    (head,), about = heads.load_heads(tmp_path / "head.safetensors")
    (file,) = (tmp_path / "features").glob("*_test_*.npz")
    prob = head(np.load(file)["features"])
    written = [[float(row[f"prob_{name}"]) for name in CBIS_CLASSES] for row in read_csv(tmp_path / "predictions.csv")]
    assert np.array_equal(prob, np.array(written, dtype=prob.dtype))
    assert about["weights_sha256"] == results["settings"]["weights_sha256"] and about["classes"] == list(CBIS_CLASSES)
    (tmp_path / "head.safetensors").write_bytes(b"no head")
    with pytest.raises(ValueError, match="no fitted head"):
        heads.load_heads(tmp_path / "head.safetensors")


@pytest.mark.slow
def test_digits_get_what_lesions_get_and_a_paired_baseline(tmp_path):
    """Any labelled set of moderate size: predictions, intervals that hold scikit-learn's value, a comparison."""
    argv = ["--dataset", "digits", "--cache-features", "-a", "test_vit", "-j", "0", "--gpu", "-1", "--resamples", "100"]
    first = main_linear.main([*argv, "--output-dir", str(tmp_path / "a")])
    second = main_linear.main([*argv, "--seed", "1", "--output-dir", str(tmp_path / "b"),
                               "--baseline", str(tmp_path / "a" / "predictions.csv")])  # fmt: skip
    assert first["unit"] == "fraction"
    with open(tmp_path / "a" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert len(rows) == 360 and right == pytest.approx(first["logistic"]["top1"])
    value = first["metrics"]["recall"]
    labels, predicted = ([row[key] for row in rows] for key in ("label", "predicted"))
    assert value["value"] == pytest.approx(recall_score(labels, predicted, average="macro"))
    assert value["low"] <= value["value"] <= value["high"]
    gain = second["difference"]["recall"]
    assert gain["value"] == pytest.approx(second["metrics"]["recall"]["value"] - value["value"])
