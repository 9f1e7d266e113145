"""Sets that a table describes (type csv): reading, refusals, and what each kind of evaluation says of them."""

import csv
import json
import re
from functools import partial
from html import unescape
from urllib.parse import unquote

import cbis_tree
import evaluation_helpers
import numpy as np
import pytest
from model_helpers import write_checkpoint
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from test_finetune import SMALL

import eval_zeroshot
import main_linear
import make_report
import predict
from beit_finetuning import run_class_finetuning
from evaluation import catalog as evaluation_catalog
from evaluation import downstream, features, heads, metrics, set_probes
from evaluation.heads import Samples
from evaluation.predictions import Predictions
from inputs.transforms import linear_eval_view
from preparation.cbis_tables import make_cbis

CLASSES = ("benign", "malignant", "normal")


def write_set(root, patients: int = 60, several: bool = False, seed: int = 0, **changes):
    """Two images a patient whose grey tells the class, a third of them for testing. Returns the catalog's path."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    rows = []
    for patient in range(patients):
        label = patient % 3
        for view in range(2):
            name = f"images/p{patient}_{view}.png"
            grey = rng.normal(60 + 55 * label, 22, (40, 40)).clip(0, 255).astype(np.uint8)
            Image.fromarray(grey).save(root / name)
            split = "test" if patient // 3 % 3 == 2 else "train"
            row = {"File Name": name, "diagnosis": CLASSES[label], "part": split, "patient": f"P{patient}"}
            rows.append(row | {"bright": str(int(label == 2)), "odd": rng.choice(["0", "1", "", "-1"])})
    write_rows(root / "table.csv", rows)
    entry = {
        "path": str(root), "type": "csv", "train": "train", "test": "test", "positive": "malignant",
        "columns": {"image": "File Name", "label": "diagnosis", "split": "part", "group": "patient"},
    } | changes  # fmt: skip
    if several:
        entry["columns"] = entry["columns"] | {"label": ["bright", "odd"]}
        del entry["positive"]
    (root / "catalog.json").write_text(json.dumps({"hospital": entry}))
    return root / "catalog.json"


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("hospital"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pt", "vit")


def probe(catalog, out, checkpoint, *flags):
    return main_linear.main([
        "--dataset", "hospital", "--catalog", str(catalog), "--pretrained", str(checkpoint), "-j", "0",
        "--output-dir", str(out), "--resamples", "100", *flags,
    ])  # fmt: skip


def test_rows_labels_and_groups_are_the_tables(hospital):
    catalog = evaluation_catalog.read_catalog(hospital)
    table = read_rows(hospital.parent / "table.csv")
    for train, split in ((True, "train"), (False, "test")):
        found = downstream.create_downstream("hospital", train, None, catalog)
        own = [row for row in table if row["part"] == split]
        assert found.classes == list(CLASSES)
        assert [found.classes[label] for label in found.labels] == [row["diagnosis"] for row in own]
        assert [row["group"] for row in found.rows] == [row["patient"] for row in own]
        assert np.array_equal(np.asarray(found.image(3))[..., 0], Image.open(hospital.parent / own[3]["File Name"]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[0].update(part="test"), "1 groups are in both train and test, first 'P0'"),
        (lambda rows: rows[4].update(diagnosis=""), "row 5 has no diagnosis"),
        (lambda rows: rows[4].update({"File Name": "../secret.png"}), "row 5: the path"),
        (lambda rows: rows[1].update({"File Name": "images/p0_0.png"}), "p0_0.png is there twice"),
        (lambda rows: [row.update(part="all") for row in rows], "no row of the split 'train'; its splits: all"),
        (lambda rows: [row.pop("diagnosis") for row in rows], "no column diagnosis"),
        (lambda rows: [row.pop("patient") for row in rows], "no column patient; found "),
        (lambda rows: [row.update(diagnosis="b") for row in rows if row["diagnosis"] == "malignant"], "is no class"),
    ],
)
def test_a_table_that_does_not_do_is_refused(tmp_path, change, message):
    catalog = write_set(tmp_path)
    rows = read_rows(tmp_path / "table.csv")
    change(rows)
    write_rows(tmp_path / "table.csv", rows)
    with pytest.raises(ValueError, match=message):
        downstream.create_downstream("hospital", True, None, evaluation_catalog.read_catalog(catalog))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"columns": {"picture": "x"}}, r"names the columns image, label, split, group; not \['picture'\]"),
        ({"blank": "perhaps"}, "counts blank as 'perhaps'; choose from negative, positive, skip"),
        ({"type": "imagefolder"}, "only the type csv has"),
    ],
)
def test_an_entry_that_does_not_do_is_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        evaluation_catalog.read_catalog(write_set(tmp_path, **entry))


def test_probe_and_neighbours_give_what_lesions_get(hospital, checkpoint, tmp_path):
    first = probe(hospital, tmp_path / "a", checkpoint, "--cache-features", "--knn", "5", "--fraction", "0.5")
    rows = read_rows(tmp_path / "a" / "predictions.csv")
    table = [row for row in read_rows(hospital.parent / "table.csv") if row["part"] == "test"]
    assert [(row["image"], row["group"], row["label"]) for row in rows] == [
        (row["File Name"], row["patient"], row["diagnosis"]) for row in table
    ]
    prob = np.array([[float(row[f"prob_{name}"]) for name in CLASSES] for row in rows])
    labels = [CLASSES.index(row["label"]) for row in rows]
    assert first["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, prob, multi_class="ovr"))
    assert first["metrics"]["recall_malignant"]["low"] <= first["metrics"]["recall_malignant"]["value"]
    assert first["test_patients"] == 18 and first["detection"]["auroc_malignant"]["value"] > 0.5
    assert first["knn"]["metrics"]["auroc"]["value"] <= 1 and (tmp_path / "a" / "predictions_knn.csv").is_file()
    baseline = str(tmp_path / "a" / "predictions.csv")
    second = probe(hospital, tmp_path / "b", checkpoint, "--cache-features", "--untrained", "--baseline", baseline)
    gain = second["difference"]["auroc"]["value"]
    assert gain == pytest.approx(second["metrics"]["auroc"]["value"] - first["metrics"]["auroc"]["value"])
    page = make_report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output-dir", str(tmp_path / "report")])
    (section,) = page["sections"]
    assert section["kind"] == "hospital" and [row["name"] for row in section["rows"]] == ["a", "a, 5-NN", "b"]
    assert section["rows"][0]["cells"][0] == metrics.Interval(**first["metrics"]["auroc"]).percent()


def test_the_held_out_tenth_keeps_groups_whole(hospital, checkpoint, tmp_path, monkeypatch):
    seen = []
    fit = set_probes.fit_logistic
    monkeypatch.setattr(set_probes, "fit_logistic", lambda train, val, *rest: seen.append((train, val)) or fit(
        train, val, *rest))  # fmt: skip
    probe(hospital, tmp_path, checkpoint, "--cache-features", "--fraction", "0.4")
    assert len(seen) == 4
    for train, val in seen:
        groups = [{row["group"] for row in part.rows} for part in (train, val)]
        assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_zero_shot_writes_predictions_with_intervals(hospital, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    evaluation_helpers.write_checkpoint(checkpoint)
    found = eval_zeroshot.main([
        "--resume", str(checkpoint), "--catalog", str(hospital), "--datasets", "hospital", "--output-dir",
        str(tmp_path), "-j", "0",
    ])["zero_shot"]["hospital"]  # fmt: skip
    rows = read_rows(tmp_path / "zeroshot_hospital.csv")
    assert found["samples"] == len(rows) == 36
    hits = np.mean([row["predicted"] == row["label"] for row in rows])
    assert found["top1"] == pytest.approx(hits)
    assert set(found["rows"]["metrics"]) == set(metrics.METRICS)
    page = make_report.main([str(tmp_path), "--output-dir", str(tmp_path / "report")])
    assert page["sections"][0]["rows"][0]["name"].startswith("zero-shot")
    assert page["zeroshot"][0]["rows"] == [("hospital", "top1", f"{100 * found['top1']:.2f}%")]


def test_sgd_writes_predictions_with_intervals(hospital, checkpoint, tmp_path):
    found = probe(hospital, tmp_path, checkpoint, "--epochs", "1", "--batch-size", "16")
    rows = read_rows(tmp_path / "predictions.csv")
    assert found["top1"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in rows]))
    assert found["metrics"]["recall_malignant"]["low"] <= found["metrics"]["recall_malignant"]["value"]
    assert len(rows) == 36


def test_zero_shot_on_lesions_has_the_probes_metrics(tmp_path):
    root = tmp_path / "cbis"
    cbis_tree.make_small_cbis(root)
    make_cbis(root)
    evaluation_helpers.write_checkpoint(tmp_path / "checkpoint.pt")
    entry = {"path": str(root), "type": "special", "train": "train", "test": "test"}
    (tmp_path / "catalog.json").write_text(json.dumps({"cbis_mass": entry}))
    found = eval_zeroshot.main([
        "--resume", str(tmp_path / "checkpoint.pt"), "--catalog", str(tmp_path / "catalog.json"), "-j", "0",
        "--output-dir", str(tmp_path / "out"),
    ])["zero_shot"]["cbis_mass"]  # fmt: skip
    predicted = Predictions.read(tmp_path / "out" / "zeroshot_cbis_mass.csv")
    auroc = roc_auc_score(predicted.labels, predicted.prob, multi_class="ovr")
    assert found["rows"]["metrics"]["auroc"]["value"] == pytest.approx(auroc)
    (reading,) = map(json.loads, (tmp_path / "out" / "test_readings.jsonl").read_text().splitlines())
    assert reading["zero_shot"] == "zeroshot_cbis_mass" and reading["time"]
    page = make_report.main([str(tmp_path / "out"), "--cbis", str(root), "--output-dir", str(tmp_path / "report")])
    assert page["sections"][0]["kind"] == "mass" and page["sections"][0]["flow"]


def test_fine_tuning_compares_with_a_probe(hospital, checkpoint, tmp_path):
    probe(hospital, tmp_path / "probe", checkpoint, "--cache-features")
    results = run_class_finetuning.main([
        "--data_set", "hospital", "--catalog", str(hospital), "--finetune", str(checkpoint), *SMALL, "--epochs", "1",
        "--output_dir", str(tmp_path / "tuned"), "--resamples", "50", "--layer_decay", "0.75",
        "--baseline", str(tmp_path / "probe" / "predictions.csv"),
    ])  # fmt: skip
    assert set(results["difference"]) == set(metrics.METRICS)
    assert len(read_rows(tmp_path / "tuned" / "predictions.csv")) == 36


@pytest.mark.parametrize("blank, uncertain", [("skip", "skip"), ("negative", "positive")])
def test_several_findings_each_by_itself(checkpoint, tmp_path, blank, uncertain):
    catalog = write_set(tmp_path / "set", several=True, blank=blank, uncertain=uncertain)
    found = downstream.create_downstream("hospital", False, None, evaluation_catalog.read_catalog(catalog))
    table = [row for row in read_rows(tmp_path / "set" / "table.csv") if row["part"] == "test"]
    counts = {"": {"skip": -1, "negative": 0}[blank], "-1": {"skip": -1, "positive": 1}[uncertain], "0": 0, "1": 1}
    assert found.findings.tolist() == [[counts[row["bright"]], counts[row["odd"]]] for row in table]
    results = probe(catalog, tmp_path / "out", checkpoint, "--cache-features")["findings"]
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    for name in ("bright", "odd"):
        known = [row for row in rows if row[name] != ""]
        truth, prob = ([float(row[key]) for row in known] for key in (name, f"prob_{name}"))
        assert results[name]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, prob))
        assert results[name]["average_precision"]["value"] == pytest.approx(average_precision_score(truth, prob))
    assert results["bright"]["auroc"]["value"] > 0.9 > results["odd"]["auroc"]["value"]
    mean = np.mean([results[name]["auroc"]["value"] for name in ("bright", "odd")])
    assert results["macro"]["auroc"]["value"] == pytest.approx(mean)


def change_rows(catalog, change):
    rows = read_rows(catalog.parent / "table.csv")
    for i, row in enumerate(rows):
        change(i, row)
    write_rows(catalog.parent / "table.csv", rows)


def test_a_finding_that_was_not_fitted_has_no_figure_and_no_part_in_the_mean(checkpoint, tmp_path, caplog):
    catalog = write_set(tmp_path / "set", several=True, blank="negative", uncertain="negative")
    change_rows(catalog, lambda i, row: row.update(odd=str(int(row["part"] == "test" and i % 5 == 0 or i == 0))))
    with caplog.at_level("INFO", logger="medslip"):
        found = probe(catalog, tmp_path / "out", checkpoint, "--cache-features")["findings"]
    why = "not fitted, of its training images 1 have it and 83 do not: two are needed"
    assert found["odd"]["auroc"] == {"value": None, "low": None, "high": None, "why": why}
    assert found["macro"]["auroc"] == found["bright"]["auroc"] and found["macro"]["mean_of"] == ["bright"]
    assert found["macro"]["left_out"] == {"odd": why} and f"| odd | no figure: {why}" in caplog.text
    assert {row["prob_odd"] + row["logit_odd"] for row in read_rows(tmp_path / "out" / "predictions.csv")} == {""}
    page = make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "report")])
    assert [line["dataset"] for line in page["other"]] == [
        "hospital: bright",
        "hospital: odd",
        "hospital: mean of bright",
    ]
    assert page["other"][1]["score"] == f"no figure: {why}"
    assert "mean of bright" in (tmp_path / "report" / "report.md").read_text()


def test_a_class_of_one_training_patient_is_divided_to_choose_the_penalty(checkpoint, tmp_path, caplog):
    """The others stay whole; a class of one image is an error that names it."""
    catalog = write_set(tmp_path / "set")
    change_rows(
        catalog,
        lambda i, row: row.update(
            diagnosis="malignant" if row["patient"] == "P1" or (row["part"] == "test" and i % 3) else "benign"
        ),
    )
    found = probe(catalog, tmp_path / "out", checkpoint, "--cache-features")
    assert "all 2 training images of class malignant are of one group (P1)" in caplog.text
    assert found["logistic"]["chosen"] and found["samples"] == {"train": 84, "test": 36}
    groups = np.repeat(np.arange(20), 3)
    labels = np.where(groups == 3, 1, 0)
    train = Samples(np.zeros((60, 2)), labels, [{"group": f"P{group}"} for group in groups])
    held_out = set_probes.choosing_part("a set", train, ("no", "yes"), seed=0)
    rest = np.setdiff1d(np.arange(60), held_out)
    assert set(labels[held_out]) == set(labels[rest]) == {0, 1} and set(groups[held_out]) & set(groups[rest]) == {3}
    with pytest.raises(ValueError, match="class no alone is left"):
        heads.folds_of(train, heads.Choice(lambda *_: 0.0, folds=3, group="group", classes=("no", "yes")))
    change_rows(catalog, lambda i, row: row.update(diagnosis="malignant" if i in (0, 13) else "benign"))
    with pytest.raises(ValueError, match="hospital: one training image of class malignant"):
        probe(catalog, tmp_path / "lone", checkpoint, "--cache-features")


@pytest.mark.parametrize("positive", ["=tumour | <b>", "normal"])
def test_the_class_that_is_looked_for_is_called_by_its_own_name(checkpoint, tmp_path, caplog, positive):
    catalog = write_set(tmp_path / "set", positive=positive)
    change_rows(catalog, lambda i, row: row.update(diagnosis=row["diagnosis"].replace("malignant", "=tumour | <b>")))
    with caplog.at_level("INFO", logger="medslip"):
        found = probe(catalog, tmp_path / "out", checkpoint, "--cache-features")
    assert found["positive"] == positive and f"  Recall ({positive})" in caplog.text
    assert f"{positive} against the rest" in caplog.text and "alignant" not in caplog.text
    page = make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "report")])
    assert f"Recall ({positive})" in page["sections"][0]["columns"]
    assert f"Brier score ({positive})" in page["sections"][0]["detection_columns"]
    for path in [path for path in (tmp_path / "report").rglob("*.*") if path.suffix != ".png"]:
        assert "alignant" not in path.read_text().replace("MALIGNANT", "Malignant"), path.name
    assert read_rows(tmp_path / "report" / "tables.csv")[0]["positive class"].lstrip("'") == positive


@pytest.mark.parametrize(
    "flags", [("--cache-features", "--knn", "3"), ("--epochs", "1", "--batch-size", "32"), "fine-tuning"]
)
def test_a_class_without_training_images_is_named_and_in_no_mean(checkpoint, tmp_path, caplog, flags):
    catalog = write_set(tmp_path / "set")
    change_rows(catalog, lambda i, row: row.update(part="other") if (row["diagnosis"], row["part"]) == (
        "malignant", "train") else None)  # fmt: skip
    if flags == "fine-tuning":
        found = run_class_finetuning.main([
            "--data_set", "hospital", "--catalog", str(catalog), "--finetune", str(checkpoint), *SMALL, "--epochs", "1",
            "--output_dir", str(tmp_path / "out"), "--resamples", "50", "--layer_decay", "0.75",
        ])  # fmt: skip
    else:
        found = probe(catalog, tmp_path / "out", checkpoint, *flags)
    assert (
        found["unlearnt"] == ["malignant"] and found["positive"] is None and "recall_malignant" not in found["metrics"]
    )
    assert "NO TRAINING IMAGE of class malignant" in caplog.text
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    recalls = [
        np.mean([row["predicted"] == name for row in rows if row["label"] == name]) for name in ("benign", "normal")
    ]
    assert found["metrics"]["recall"]["value"] == pytest.approx(np.mean(recalls)) and len(rows) == 36
    page = make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "report")])
    assert page["sections"][0]["rows"][0]["unlearnt"] == ["malignant"]
    assert "no training image of malignant, in no mean" in (tmp_path / "report" / "report.md").read_text()


def test_several_findings_are_not_taken_for_one_class(checkpoint, tmp_path):
    catalog = write_set(tmp_path / "set", several=True)
    for flags in ((), ("--knn", "3")):
        with pytest.raises(ValueError, match="several findings"):
            probe(catalog, tmp_path / "out", checkpoint, *flags)


def test_an_unclear_finding_is_named(tmp_path, checkpoint):
    catalog = write_set(tmp_path, several=True)
    rows = read_rows(tmp_path / "table.csv")
    rows[0]["odd"] = "maybe"
    write_rows(tmp_path / "table.csv", rows)
    with pytest.raises(ValueError, match=r"p0_0\.png, odd: 'maybe' is not 0, 1, -1 or empty"):
        downstream.create_downstream("hospital", True, None, evaluation_catalog.read_catalog(catalog))


def test_folds_and_class_weights_choose_over_whole_groups(hospital, checkpoint, tmp_path):
    found = probe(hospital, tmp_path / "a", checkpoint, "--cache-features", "--folds", "3")
    backbone = features.load_backbone(checkpoint)
    catalog = evaluation_catalog.read_catalog(hospital)
    view = partial(linear_eval_view, backbone.preprocess)
    train = downstream.create_downstream("hospital", True, view, catalog)
    rows, _ = features.extract(backbone, train, "", features.Loading(64))
    groups = [row["group"] for row in train.rows]
    scores = []  # scikit-learn's own regression at the chosen penalty, held-out rows of all folds together
    right = np.zeros(len(rows), bool)
    splitter = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    for fitted, held in splitter.split(train.labels, train.labels, groups):
        scaler = StandardScaler().fit(rows[fitted])
        penalty = found["logistic"]["chosen"]["lambda"]
        model = LogisticRegression(C=1 / (len(fitted) * penalty), tol=1e-8, max_iter=10000)
        model.fit(scaler.transform(rows[fitted]), train.labels[fitted])
        right[held] = model.predict(scaler.transform(rows[held])) == train.labels[held]
    scores = {entry["lambda"]: entry["score"] for entry in found["logistic"]["validation"]}
    assert scores[found["logistic"]["chosen"]["lambda"]] == pytest.approx(right.mean(), abs=0.015)
    weighted = probe(hospital, tmp_path / "b", checkpoint, "--cache-features", "--class-weights", "balanced")
    assert weighted["settings"]["class_weights"] == "balanced"
    written = [(tmp_path / run / "predictions.csv").read_text() for run in "ab"]
    assert written[0] != written[1]  # other probabilities, though this set is easy enough for both
    validated = probe(hospital, tmp_path / "c", checkpoint, "--cache-features", "--class-weights", "validated")
    assert "balanced" in validated["logistic"]["chosen"]
    with pytest.raises(ValueError, match="--folds keeps groups whole"):
        main_linear.main(["--dataset", "digits", "--cache-features", "--folds", "3", "-a", "test_vit", "--output-dir",
                          str(tmp_path / "d"), "-j", "0"])  # fmt: skip


def test_several_findings_have_no_fraction_and_no_zero_shot(checkpoint, tmp_path):
    catalog = write_set(tmp_path / "set", several=True)
    with pytest.raises(ValueError, match="several findings for each image: no --knn and no --fraction"):
        probe(catalog, tmp_path / "out", checkpoint, "--fraction", "0.5")
    evaluation_helpers.write_checkpoint(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="not several findings"):
        eval_zeroshot.main(["--resume", str(tmp_path / "clip.pt"), "--datasets", "hospital", "--catalog", str(catalog),
                            "--output-dir", str(tmp_path / "zero"), "-j", "0"])  # fmt: skip


def answers_of(run, catalog, findings=()):
    """predict.py's probabilities of the set's test images, and the run's own."""
    rows = [row for row in read_rows(catalog.parent / "table.csv") if row["part"] == "test"]
    (catalog.parent / "new.csv").write_text("image\n" + "".join(f"{row['File Name']}\n" for row in rows))
    found = predict.main(
        ["classify", str(run), str(catalog.parent / "new.csv"), "--gpu", "-1", "--batch-size", "256"]
    )  # fmt: skip
    names = [f"prob_{name}" for name in findings or CLASSES]
    own = read_rows(run / "predictions.csv")
    return found, [[[float(row[name]) for name in names] for row in table] for table in (found, own)]


def test_a_probe_answers_about_new_images(hospital, checkpoint, tmp_path):
    """To the bit what it has said of the test images; the decision is about the set's own positive class."""
    probe(hospital, tmp_path, checkpoint, "--cache-features", "--gpu", "-1")
    rows, (found, own) = answers_of(tmp_path, hospital)
    assert found == own
    point = json.loads((tmp_path / "results.json").read_text())["operating_point"]
    assert point["positive"] == "malignant"
    assert [row["called_malignant"] for row in rows] == [int(p[1] >= point["threshold"]) for p in own]
    assert {row["unlike_training"] for row in rows} <= {0, 1}


def test_a_layer_trained_by_sgd_answers_about_new_images(hospital, checkpoint, tmp_path):
    probe(hospital, tmp_path, checkpoint, "--epochs", "2", "--batch-size", "32", "--gpu", "-1")
    rows, (found, own) = answers_of(tmp_path, hospital)
    assert np.allclose(found, own, atol=1e-6) and "unlike_training" not in rows[0]


def test_findings_are_answered_each_by_its_own_head(checkpoint, tmp_path):
    catalog = write_set(tmp_path, several=True)
    probe(catalog, tmp_path / "out", checkpoint, "--cache-features", "--gpu", "-1")
    rows, (found, own) = answers_of(tmp_path / "out", catalog, ("bright", "odd"))
    assert found == own and "predicted" not in rows[0] and "unlike_training" in rows[0]


def test_no_cell_of_the_findings_is_a_formula(tmp_path):
    rows = [{"image": "=a.png", "group": "@1"}, {"image": "b.png", "group": "-2"}]
    known, prob = np.array([[1], [-1]]), np.array([[[0.75, 0.25]], [[0.5, 0.5]]])
    set_probes.write_findings(tmp_path / "predictions.csv", ["+odd"], rows, known, prob)
    first, second = read_rows(tmp_path / "predictions.csv")
    assert first == {
        "image": "'=a.png",
        "group": "'@1",
        "'+odd": "1",
        "prob_+odd": "0.25",
        "logit_+odd": str(np.log(0.25) - np.log(0.75)),
    }
    assert second == {"image": "b.png", "group": "-2", "'+odd": "", "prob_+odd": "0.5", "logit_+odd": "0.0"}


@pytest.mark.parametrize("names", [("../x", "a/b"), ("a/b", "a_b"), ("A/B", "a/b"), ("/tmp/x y", "C++ [1]")])
def test_a_sets_name_leaves_no_folder_and_is_no_other_sets(tmp_path, checkpoint, names):
    """From zero-shot and a probe to the page, its figures and its links."""
    entry = json.loads(write_set(tmp_path / "set", patients=24).read_text())["hospital"]
    (tmp_path / "catalog.json").write_text(json.dumps(dict.fromkeys(names, entry)))
    clip, out = tmp_path / "clip.pt", tmp_path / "deep" / "out"
    evaluation_helpers.write_checkpoint(clip)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    flags = ["--catalog", str(tmp_path / "catalog.json"), "-j", "0"]
    eval_zeroshot.main([*flags, "--resume", str(clip), "--datasets", *names, "--output-dir", str(out)])
    for i, name in enumerate(names):
        main_linear.main([*flags, "--dataset", name, "--pretrained", str(checkpoint), "--cache-features",
                          "--output-dir", str(out / f"probe{i}"), "--resamples", "20"])  # fmt: skip
    assert len(list(out.glob("zeroshot_*.csv"))) == 2
    page = make_report.main([str(out), "--output-dir", str(tmp_path / "deep" / "report")])
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"deep"}
    assert {path.relative_to(tmp_path).parts[1] for path in new} == {"out", "report"}

    report = tmp_path / "deep" / "report"
    html, markdown = ((report / f"report.{kind}").read_text() for kind in ("html", "md"))
    drawn = {path.name: path.read_text() for path in (report / "figures").glob("*.svg")}
    assert len(drawn) == len(page["figures"]) == html.count("<svg ") and len({f.svg for f in page["figures"].values()})
    linked = [unquote(link) for link in re.findall(r"\]\(figures/([^)\s]*)\)", markdown)]
    assert sorted(linked) == sorted(drawn)
    anchors = [unescape(link) for link in re.findall(r'<a href="#([^"]*)"', html)]
    ids = [unescape(name) for name in re.findall(r'<[^>]*\bid="([^"]*)"', html)]
    assert len(ids) == len(set(ids)) and set(anchors) <= set(ids) and len(set(anchors)) == len(anchors)
    assert {unescape(name) for name in re.findall(r'<h2 id="[^"]*">(.*?)</h2>', html)} >= set(names)
    for svg in drawn.values():
        own = set(re.findall(r'\bid="([^"]*)"', svg))
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= own
