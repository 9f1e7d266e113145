"""make_tables.py on sets of a catalog: rows with seeds against scikit-learn and the formulas, and what is refused."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from model_helpers import write_checkpoint
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score
from test_csv_sets import CLASSES, read_rows, write_rows, write_set

import main_linear
import make_report
import make_tables
import utils
from beit_finetuning import run_class_finetuning
from evaluation.predictions import Predictions, set_scheme
from evaluation.resamples import Bootstrap
from reporting import plan as reporting_plan
from reporting import steps
from runtime.checkpoints import save_checkpoint
from runtime.command_line import UsageError

SCRIPTS = {"main_linear.py": main_linear.main, "run_class_finetuning.py": run_class_finetuning.main}


def command(folder, catalog, *flags, rows):
    (folder / "rows.json").write_text(json.dumps(rows))
    return [
        "--rows", str(folder / "rows.json"), "--catalog", str(catalog), "--output-dir", str(folder / "out"),
        "--workers", "0", "--resamples", "120", *flags,
    ]  # fmt: skip


def run_here(step, title, signals):
    """A step's own command in this process, which has the packages loaded."""
    step.folder.mkdir(parents=True, exist_ok=True)
    utils.write_json(step.folder / "step.json", step.record())
    SCRIPTS[Path(step.command[1]).name](step.command[2:])
    step.status = "done"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pt", "vit")


@pytest.fixture
def hospital(tmp_path):
    """A set whose classes overlap, so that probes err."""
    rng = np.random.default_rng(1)
    catalog = write_set(tmp_path / "set")
    for path in (tmp_path / "set" / "images").iterdir():
        grey = np.asarray(Image.open(path)).astype(float) + rng.normal(0, 60)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)
    return catalog


def rows_for(checkpoint, **changes):
    seeded = {"weights": str(checkpoint), "probe": "--untrained"}
    rows = [{"name": "Frozen", "weights": str(checkpoint)}, {"name": "Untrained", **seeded, "baseline": "Frozen"},
            {"name": "Untrained, 48 pixels", **seeded, "probe": "--untrained --image-size 48",
             "baseline": ["Frozen", "Untrained"]}]  # fmt: skip
    return {"tables": ["hospital"], "probe": "--resamples 60", "rows": rows} | changes


def expected_interval(found, resamples):
    """Mean over seeds and half-width: a bootstrap over patients and the seeds, each with its own t quantile."""

    def auroc(labels, prob, weight=None):
        return np.mean([roc_auc_score(labels == c, prob[:, c], sample_weight=weight) for c in range(len(CLASSES))])

    values = np.array([auroc(p.labels, p.prob) for p in found])
    weights = np.concatenate(list(resamples.weights()))
    draws = np.mean([[auroc(p.labels, p.prob, w) for w in weights] for p in found], axis=0)
    patients = min(len({row["group"] for row in found[0].rows if row["label"] == name}) for name in CLASSES)
    parts = [(draws.var(ddof=1) * patients / (patients - 1), patients - 1)]
    parts.append((values.var(ddof=1) / len(values), len(values) - 1))
    total = sum(variance for variance, _ in parts)
    quantile = sum(variance * stats.t.ppf(0.975, freedom) for variance, freedom in parts) / total
    return values, quantile * np.sqrt(total)


def test_a_sets_rows_have_seeds_intervals_and_corrected_comparisons(hospital, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "run_step", run_here)
    rows = rows_for(checkpoint, published={"hospital": {"Somebody": {"auroc": 70.5}}})
    result = make_tables.main(command(tmp_path, hospital, rows=rows))
    (table,) = result["tables"].values()
    assert (table["samples"], table["unit"], table["positive"]) == ("images", "patients", "malignant")
    test = [row for row in read_rows(hospital.parent / "table.csv") if row["part"] == "test"]
    assert (table["lesions"], table["patients"]) == (len(test), len({row["patient"] for row in test}))
    by_name = {row["name"]: row for row in table["rows"]}
    assert list(by_name)[:2] == ["Chance", "Always benign"] and not result["synthetic"]
    assert by_name["Chance"]["metrics"]["auroc"]["value"] == pytest.approx(0.5, abs=0.1)
    assert [by_name[row["name"]]["seeds"] for row in rows["rows"]] == [[0], [0, 1, 2], [0, 1, 2]]
    scheme = set_scheme(CLASSES, "malignant", "patients")
    for name in ("Untrained", "Untrained, 48 pixels"):
        row = by_name[name]
        found = [Predictions.read(tmp_path / "out" / path / "predictions.csv", scheme) for path in row["files"]]
        values, half = expected_interval(found, found[0].resamples(Bootstrap(120)))
        assert row["metrics"]["auroc"]["values"] == pytest.approx(values)
        assert row["metrics"]["auroc"]["value"] == pytest.approx(values.mean())
        assert row["metrics"]["auroc"]["low"] == pytest.approx(values.mean() - half)
        assert row["metrics"]["auroc"]["high"] == pytest.approx(min(1, values.mean() + half))
        assert row["detection"] and not row["leaves_out"] and "subgroups" not in row
    aurocs = {name: row["metrics"]["auroc"]["value"] for name, row in by_name.items()}
    for entry in table["comparisons"]:
        difference = aurocs[entry["row"]] - aurocs[entry["baseline"]]
        assert entry["difference"]["auroc"]["value"] == pytest.approx(difference) and entry["family"] == 3
    pairs = [(entry["row"], entry["baseline"]) for entry in table["comparisons"]]
    assert pairs[1:] == [("Untrained, 48 pixels", "Frozen"), ("Untrained, 48 pixels", "Untrained")]
    smaller = min(entry["difference"]["auroc"]["p_value"] for entry in table["comparisons"])
    assert min(entry["p_holm"] for entry in table["comparisons"]) == pytest.approx(min(1, 3 * smaller))
    text = (tmp_path / "out" / "tables.md").read_text()
    assert f"## hospital ({len(test)} test images of {table['patients']} patients)" in text
    assert "| Somebody (as published) | 70.5 | – |" in text and "Precision (malignant)" in text
    assert "BENIGN_WITHOUT_CALLBACK" not in text

    again = make_tables.main(command(tmp_path, hospital, "--primary", "hospital", "Untrained, 48 pixels", rows=rows))
    assert {step["status"] for step in again["steps"]} == {"done before"}
    found = again["tables"]["hospital"]["comparisons"]  # the primary one is with the row's first baseline
    assert [entry["primary"] for entry in found] == [False, True, False] and "p_holm" not in found[1]
    assert found[0]["family"] == found[2]["family"] == 2
    page = make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "report")])
    (section,) = page["sections"]
    assert section["size"].endswith(f"{table['patients']} patients") and section["against"] == "malignant"
    assert len(section["rows"]) == 6 and len(section["detection"]) == 3 and section["comparisons"]
    assert "benign" in page["figures"][section["figures"]["confusion"][0]].svg

    catalog = json.loads(hospital.read_text())
    hospital.write_text(json.dumps({"other": catalog["hospital"], **catalog}))  # another entry changes nothing
    plan = reporting_plan.read_plan(tmp_path / "rows.json", {}, None, hospital)
    args = argparse.Namespace(seeds=[0, 1, 2], workers=0, submit=None)
    assert all(step.done for step in steps.plan_steps(plan, args, tmp_path / "out"))
    del catalog["hospital"]["positive"]
    hospital.write_text(json.dumps(catalog))
    plan = reporting_plan.read_plan(tmp_path / "rows.json", {}, None, hospital)
    assert not any(step.done for step in steps.plan_steps(plan, args, tmp_path / "out"))


def test_a_set_without_patients_or_positive_class_is_fine_tuned_beside_its_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "run_step", run_here)
    catalog, tower = write_set(tmp_path / "set"), write_checkpoint(tmp_path / "tower.pt", "batchnorm")
    entry = json.loads(catalog.read_text())["hospital"]
    entry["columns"].pop("group")
    del entry["positive"]
    catalog.write_text(json.dumps({"training": entry}))  # as the folder of a row's training is called
    tuned = "--epochs 1 --warmup_epochs 0 --batch_size 16 --drop_path 0 --lr 1e-3 --resamples 60 -j 0 --gpu -1"
    rows = {"tables": ["training"], "probe": "--resamples 60", "finetune": tuned, "rows": [
        {"name": "Probe", "weights": str(tower)},
        {"name": "Tuned", "weights": str(tower), "finetune": "", "baseline": "Probe"},
    ]}  # fmt: skip
    result = make_tables.main(command(tmp_path, catalog, "--seeds", "0", "1", rows=rows))
    table = result["tables"]["training"]
    probe, tuned = (row for row in table["rows"] if row["kind"] == "measured")
    assert (table["unit"], table["positive"]) == ("images", None) and "detection" not in tuned
    assert tuned["files"] == ["runs/tuned/seed0/training~", "runs/tuned/seed1/training~"]
    assert set(tuned["metrics"]) == {"auroc", "f1", "precision", "recall"} and len(table["comparisons"]) == 1
    text = (tmp_path / "out" / "tables.md").read_text()
    assert f"({table['lesions']} test images)" in text and "over training and images" in text


def test_the_commands_name_the_set_and_its_catalog(hospital, checkpoint, tmp_path, capsys):
    rows = rows_for(checkpoint)
    rows["rows"] = [rows["rows"][0], {"name": "Tuned", "weights": str(checkpoint), "finetune": "--lr 1e-3"}]
    make_tables.main(command(tmp_path, hospital, "--seeds", "0", "--dry-run", rows=rows))
    printed = capsys.readouterr().out
    named = f"hospital --catalog {hospital}"
    assert f"main_linear.py --dataset {named} --cache-features --resamples 60" in printed
    assert f"run_class_finetuning.py --data_set {named} --lr 1e-3" in printed
    assert "hospital: 84 training images, 36 test images of 18 patients" in printed and "cbis" not in printed


def test_a_training_is_evaluated_at_its_best_epoch_or_its_last(hospital, tmp_path):
    for chosen, file in (("best", "checkpoint_best.pt"), ("last", "checkpoint.pt")):
        rows = {"tables": ["hospital"], "rows": [{"name": "A", "train": "--lr 1", "checkpoint": chosen}]}
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        plan = reporting_plan.read_plan(tmp_path / "rows.json", {}, None, hospital)
        args = argparse.Namespace(seeds=[0], workers=0, submit=None)
        train, probe = steps.plan_steps(plan, args, tmp_path)
        assert train.result.name == file and probe.command[-2:] == ["--pretrained", str(train.result)]


def test_a_training_that_was_cut_off_is_not_done(tmp_path, monkeypatch):
    """Its best checkpoint is there from its first epoch on."""
    ran = []
    monkeypatch.setattr(steps, "run_step", lambda step, title, signals: ran.append(step.name))
    step = steps.Step("train", tmp_path, ["python", "main.py"], tmp_path / "checkpoint_best.pt", training=True)
    utils.write_json(tmp_path / "step.json", step.record())
    save_checkpoint({"epoch": 1}, tmp_path / "checkpoint_best.pt")
    for epoch in (1, 3):
        newest = {"args": {"epochs": 3}, "epoch": epoch, "step_in_epoch": 0, "step": 5 * epoch}
        save_checkpoint(newest, tmp_path / "checkpoint.pt")
        steps.run_steps([step])
        assert ran == ["train"] and (step.status == "done before") == (epoch == 3)


def drop_test_class(root, rows):
    write_rows(root / "table.csv", [row for row in rows if row["part"] == "train" or row["diagnosis"] != "normal"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tables": ["hospitel"]}, r"unknown table 'hospitel'; choose from calc, mass, hospital .*catalog.json"),
        ({"tables": ["hospital", "hospital"]}, "'hospital' is there twice"),
        ({"rows": [{"name": "A"}, {"name": "B", "baseline": ["A", "C"]}]}, "row 'B': its baseline 'C' is no row"),
        ({"rows": [{"name": "A", "baseline": ["A"]}]}, "row 'A': it is its own baseline"),
        ({"tables": []}, "tables .*a list of calc, mass and names of sets"),
        ({"tables": "hospital"}, "tables 'hospital': a list of calc, mass"),
        ({"primary": ["calc", "Untrained"]}, "choose one of hospital and of"),
        ({"rows": [{"name": "A", "train": "--lr 1", "checkpoint": "newest"}]}, "checkpoint 'newest'; choose from best"),
        (lambda root, rows: (root / rows[3]["File Name"]).unlink(), "1 images are not there, first .*p1_1.png"),
        (drop_test_class, "hospital: no sample of class normal: its recall and AUROC are undefined"),
    ],
)
def test_what_can_be_no_table_is_refused_first(hospital, checkpoint, tmp_path, change, message):
    rows = rows_for(checkpoint)
    if callable(change):
        change(hospital.parent, read_rows(hospital.parent / "table.csv"))
    else:
        rows |= change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_tables.main(command(tmp_path, hospital, rows=rows))
    assert not (tmp_path / "out" / "runs").exists()


def test_findings_are_no_table_and_lesion_tables_alone_need_cbis(hospital, checkpoint, tmp_path):
    several = write_set(tmp_path / "several", several=True)
    with pytest.raises(ValueError, match="hospital has several findings for each image: tables are of sets with one"):
        make_tables.main(command(tmp_path, several, rows=rows_for(checkpoint)))
    for tables in ({"tables": ["hospital", "mass"]}, {}):
        rows = {"rows": rows_for(checkpoint)["rows"], **tables}
        with pytest.raises(UsageError, match=r"rows or tables of .*rows.json need --cbis$"):
            make_tables.main(command(tmp_path, hospital, rows=rows))
