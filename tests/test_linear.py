"""main_linear.py on CBIS-DDSM, end to end on a small tree in the published layout."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import cbis_tree
import numpy as np
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import QUICK, image_side, write_checkpoint
from sklearn.metrics import precision_score, roc_auc_score

import main_linear
import make_dataset
import models
import probes
from datasets import CBIS_CLASSES
from metrics import METRICS


@pytest.fixture(scope="module")
def cbis(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cbis")
    cbis_tree.make_small_cbis(root)
    make_dataset.make_cbis(root)
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
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    assert results["lesions"]["test"] == len(rows) and results["test_patients"] == 20


def test_brightness_that_tells_the_class_is_found(run):
    """The crops' brightness follows the pathology, so even a random tower's features separate the classes."""
    assert run[1]["metrics"]["auroc"]["value"] > 0.9


def test_printed_row_is_the_published_table(cbis, checkpoint, tmp_path, capsys):
    results = probe(cbis, tmp_path, "--pretrained", str(checkpoint), "--picture", "full")
    out = capsys.readouterr().out
    header, row = (line for line in out.splitlines() if line.startswith("|") and "---" not in line)
    assert header == "| Model | AUROC | F1-Score | Precision | Recall | Precision (Malignant) | Recall (Malignant) |"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert "CLIP_VITT16" in cells[0] and len(cells) == 1 + len(METRICS)
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
    lesions = main_linear.CbisLesions(cbis, "calc", "test", "crop", loaded.preprocess)
    with torch.inference_mode():
        expected = loaded.model.visual(torch.stack([lesions[i][0] for i in range(len(lesions))]))
        if features == "projection":
            expected = expected @ loaded.model.image_projection
    assert np.allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_test_table_is_read_once_and_last(cbis, checkpoint, tmp_path, monkeypatch):
    order = []
    lesions, logistic = main_linear.CbisLesions, main_linear.PROTOCOLS["logistic"]

    def recorded_lesions(root, kind, split, *args, **kwargs):
        order.append(split)
        return lesions(root, kind, split, *args, **kwargs)

    def recorded_fit(*args):
        head = logistic(*args)
        order.append("chosen")
        return head

    monkeypatch.setattr(main_linear, "CbisLesions", recorded_lesions)
    monkeypatch.setitem(main_linear.PROTOCOLS, "logistic", recorded_fit)
    probe(cbis, tmp_path, "--pretrained", str(checkpoint))
    assert order == ["train", "val", "chosen", "test"]


def test_kept_features_are_used_only_for_the_same_weights_and_images(cbis, checkpoint, tmp_path, monkeypatch):
    root = tmp_path / "cbis"
    shutil.copytree(cbis, root)
    extracted = []
    extract = probes.extract
    monkeypatch.setattr(probes, "extract", lambda *args: extracted.append(args[2]) or extract(*args))

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
    monkeypatch.setattr(probes, "MEDSLIP_EPOCHS", 5)
    monkeypatch.setattr(probes, "MEDSLIP_RATES", (1e-3, 1e-2))
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
        assert entry["low"] <= entry["value"] <= entry["high"]
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
