"""Cross-validation, selections, units and ordered classes on tables, against scikit-learn and plain formulas."""

import csv
import json
from dataclasses import replace

import cbis_tree
import numpy as np
import pytest
from model_helpers import write_checkpoint
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, confusion_matrix, recall_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from test_csv_sets import CLASSES, change_rows, probe, read_rows, write_rows, write_set
from test_finetune import SMALL

import main_linear
import make_report
from beit_finetuning import run_class_finetuning
from evaluation import catalog as evaluation_catalog
from evaluation import downstream, heads, metrics
from evaluation.cross_validation import cross_validate
from evaluation.heads import Choice, Samples
from evaluation.predictions import Predictions, set_scheme
from evaluation.resamples import Resamples
from evaluation.subgroups import by_unit
from preparation.cbis_tables import make_cbis
from runtime.command_line import UsageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pt", "vit")


def samples_of(n: int = 120, groups: int = 40, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    labels = (group + (rng.random(n) < 0.2)) % 3
    features = rng.normal(size=(n, 8)) + labels[:, None] * np.linspace(-1, 1, 8)
    return Samples(features, labels, [{"group": f"g{g}"} for g in group])


def test_every_sample_is_predicted_once_by_a_probe_that_saw_nobody_of_its_group(monkeypatch):
    """The same folds and penalties by scikit-learn give the same probabilities."""
    samples, seen = samples_of(), []
    choice = Choice(lambda labels, prob: float((prob.argmax(1) == labels).mean()), folds=4, group="group")

    def fit(train, val, classes, inner):
        seen.append((train, val, inner.folds))
        return heads.fit_logistic(train, val, classes, inner)

    found = cross_validate(samples, 3, 5, choice, fit)
    groups = np.array([row["group"] for row in samples.rows])
    assert sorted(set(found.fold)) == list(range(5)) and np.isfinite(found.prob).all()
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for k, (kept, held) in enumerate(splitter.split(samples.labels, samples.labels, groups)):
        assert np.array_equal(np.flatnonzero(found.fold == k), held) and not set(groups[held]) & set(groups[kept])
        train, val, folds = seen[k]
        assert np.array_equal(train.features, samples.features[kept]) and not len(val.labels) and folds == 4
        scaler = StandardScaler().fit(samples.features[kept])
        model = LogisticRegression(C=1 / (len(kept) * found.chosen[k]["lambda"]), tol=1e-10, max_iter=10000)
        model.fit(scaler.transform(samples.features[kept]), samples.labels[kept])
        expected = model.predict_proba(scaler.transform(samples.features[held]))
        np.testing.assert_allclose(found.prob[held], expected, atol=1e-4)
    for folds in (1, 41):
        with pytest.raises(ValueError, match=f"--cross-validate {folds}: choose 2 to"):
            cross_validate(samples, 3, folds, choice)


def test_a_table_without_splits_is_cross_validated_and_compared(checkpoint, tmp_path):
    catalog = write_set(tmp_path / "set")
    rows = [{k: v for k, v in row.items() if k != "part"} for row in read_rows(tmp_path / "set" / "table.csv")]
    write_rows(tmp_path / "set" / "table.csv", rows)
    with pytest.raises(ValueError, match="no column part; .* --cross-validate 5 needs none"):
        probe(catalog, tmp_path / "x", checkpoint, "--cache-features")
    first = probe(catalog, tmp_path / "a", checkpoint, "--cross-validate", "4")
    written = read_rows(tmp_path / "a" / "predictions.csv")
    assert [row["image"] for row in written] == [row["File Name"] for row in rows]
    folds_of = {}
    for row in written:
        folds_of.setdefault(row["group"], set()).add(row["fold"])
    assert {len(own) for own in folds_of.values()} == {1} and {row["fold"] for row in written} == set("0123")
    prob = [[float(row[f"prob_{name}"]) for name in CLASSES] for row in written]
    labels = [CLASSES.index(row["label"]) for row in written]
    assert first["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, prob, multi_class="ovr"))
    assert first["test_patients"] == 60 and first["settings"]["cross_validate"] == 4
    baseline = str(tmp_path / "a" / "predictions.csv")
    flags = ("--cross-validate", "4", "--untrained", "--baseline", baseline)
    second = probe(catalog, tmp_path / "b", checkpoint, *flags)
    gain = second["metrics"]["auroc"]["value"] - first["metrics"]["auroc"]["value"]
    assert second["difference"]["auroc"]["value"] == pytest.approx(gain)
    (section,) = make_report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output-dir", str(tmp_path / "page")])[
        "sections"
    ]
    assert section["title"] == "hospital, 4-fold cross-validation" and len(section["comparisons"]) == 1
    with pytest.raises(UsageError, match="no --knn with it"):
        probe(catalog, tmp_path / "c", checkpoint, "--cross-validate", "4", "--knn", "3")
    with pytest.raises(UsageError, match="sets of type csv, not digits"):
        main_linear.main(["--dataset", "digits", "--cross-validate", "3", "-a", "test_vit", "--output-dir",
                          str(tmp_path / "d"), "-j", "0"])  # fmt: skip


def test_lesions_of_all_splits_are_cross_validated_and_selected(checkpoint, tmp_path, caplog):
    cbis_tree.make_small_cbis(tmp_path / "cbis")
    make_cbis(tmp_path / "cbis")
    flags = ["--dataset", "cbis_calc", "--root", str(tmp_path / "cbis"), "--pretrained", str(checkpoint), "-j", "0",
             "--resamples", "30", "--where", "side == RIGHT"]  # fmt: skip
    found = main_linear.main([*flags, "--cross-validate", "3", "--output-dir", str(tmp_path / "a")])
    table = [row for row in read_rows(tmp_path / "cbis" / "calc.csv") if row["side"] == "RIGHT"]
    written = read_rows(tmp_path / "a" / "predictions.csv")
    assert {row["lesion"] for row in written} == {row["lesion"] for row in table} and len(written) == len(table)
    assert found["settings"]["where"] == "side == RIGHT" and set(found["units"]) == {"breast", "patient"}
    plain = main_linear.main([*flags, "--output-dir", str(tmp_path / "b")])
    assert plain["lesions"]["test"] == sum(row["split"] == "test" for row in table)
    assert {row["side"] for row in read_rows(tmp_path / "b" / "predictions.csv")} == {"RIGHT"}
    tuned = ["--data_set", "cbis_calc", "--data_path", str(tmp_path / "cbis"), "--finetune", str(checkpoint), *SMALL,
             "--epochs", "1", "--resamples", "30", "--layer_decay", "0.75"]  # fmt: skip
    results = run_class_finetuning.main(
        [*tuned, "--where", "side == RIGHT", "--output_dir", str(tmp_path / "c")]
    )  # fmt: skip
    assert results["lesions"]["test"] == plain["lesions"]["test"] and results["settings"]["where"] == "side == RIGHT"
    with pytest.raises(ValueError, match="where: 'side == RIGHT' there, '' now"):
        run_class_finetuning.main([*tuned, "--output_dir", str(tmp_path / "c")])
    with pytest.raises(ValueError, match="none of the .* rows of class BENIGN in the split 'train' is left"):
        main_linear.main([*flags[:-1], "pathology != BENIGN", "--output-dir", str(tmp_path / "d")])


def test_a_selection_of_a_table_takes_rows_and_classes_away(checkpoint, tmp_path):
    catalog = write_set(tmp_path / "set", classes=["normal", "benign", "malignant"])
    found = probe(catalog, tmp_path / "out", checkpoint, "--cache-features", "--where", "diagnosis != normal")
    table = [row for row in read_rows(tmp_path / "set" / "table.csv") if row["diagnosis"] != "normal"]
    assert found["classes"] == ["benign", "malignant"]
    assert found["samples"] == {s: sum(row["part"] == s for row in table) for s in ("train", "test")}
    with pytest.raises(UsageError, match="--where selects rows of a table"):
        main_linear.main(["--dataset", "digits", "--cache-features", "--where", "a == 1", "-a", "test_vit",
                          "--output-dir", str(tmp_path / "d"), "-j", "0"])  # fmt: skip


def test_units_subgroups_and_an_order_have_figures_on_the_page_too(checkpoint, tmp_path):
    order = ["normal", "benign", "malignant"]
    catalog = write_set(
        tmp_path / "set", ordered=True, classes=order, unit=["patient", "bright"], subgroups=["bright"], positive=None
    )  # fmt: skip
    entry = json.loads(catalog.read_text())["hospital"]
    catalog.write_text(json.dumps({"hospital": entry | {"positive": "malignant", "metric": "quadratic_kappa"}}))
    found = probe(catalog, tmp_path / "out", checkpoint, "--cache-features", "--fraction", "0.5")
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    truth, called = ([order.index(row[key]) for row in rows] for key in ("label", "predicted"))
    kappa = cohen_kappa_score(truth, called, weights="quadratic", labels=range(3))
    assert found["ordered"]["quadratic_kappa"]["value"] == pytest.approx(kappa)
    assert found["logistic"]["score"] == pytest.approx(kappa) and found["fractions"][0]["metric"] == "quadratic_kappa"
    near = np.mean(np.abs(np.subtract(truth, called)) <= 1)
    assert found["ordered"]["adjacent_accuracy"]["value"] == pytest.approx(near)
    (unit,) = found["units"].values()
    assert list(found["units"]) == ["patient and bright"] and unit["number"] == 18
    by_patient = {}
    for row in rows:
        by_patient.setdefault(row["group"], []).append([float(row[f"prob_{name}"]) for name in order])
    labels = {row["group"]: order.index(row["label"]) for row in rows}
    mean = np.array([np.mean(by_patient[group], axis=0) for group in labels])
    expected = roc_auc_score(list(labels.values()), mean, multi_class="ovr")
    assert unit["metrics"]["auroc"]["value"] == pytest.approx(expected) and unit["metrics_max"]
    assert {part["value"] for part in found["subgroups"]} == {"0", "1"}
    page = make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "page")])
    (section,) = page["sections"]
    assert [row["unit"] for row in section["units"]] == [
        f"patient and bright (18), {how}" for how in ("mean", "highest")
    ]
    assert section["ordered"][0][1:] == ["Quadratic weighted kappa", metrics.Interval.of(
        found["ordered"]["quadratic_kappa"]).shown(".3f", ".3f", 1)]  # fmt: skip
    assert {row["group"] for row in section["subgroups"]} == {"bright: 0", "bright: 1"}
    assert set(section["figures"]["curves"]) == {"hospital_roc", "hospital_precision", "hospital_calibration"}
    assert [row[1] for row in section["per_class"]] == order and "1 run (seed)" in section["seeds"]
    (line,) = page["fraction_lines"]
    assert line[:3] == ["out", "hospital", "50.00%"] and line[4] == "quadratic_kappa"


def test_the_highest_of_a_unit_is_the_image_with_most_of_the_positive_class():
    rows = [{"image": str(i), "group": "g", "label": label, "unit": unit} for i, (label, unit) in enumerate(
        [("a", "u"), ("b", "u"), ("a", "v")])]  # fmt: skip
    prob = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]])
    scheme = set_scheme(["a", "b"], "b", "groups", units=(("study", ("unit",)),))
    found = by_unit(Predictions(rows, prob, scheme), "study", "max")
    assert found.prob.tolist() == [[0.3, 0.7], [0.6, 0.4]] and [row["label"] for row in found.rows] == ["b", "a"]
    assert by_unit(Predictions(rows, prob, scheme), "study").prob[0].tolist() == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ordered": "yes"}, '"ordered" is true or false'),
        ({"metric": "quadratic_kappa"}, 'add "ordered": true'),
        ({"unit": []}, '"unit"'),
        ({"classes": ["a", "a"]}, "names 'a' twice"),
    ],
)
def test_an_entry_that_does_not_do_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluation_catalog.read_catalog(write_set(tmp_path, **change))


def test_a_unit_is_of_one_group_and_of_one_class_that_counts(tmp_path):
    catalog = write_set(tmp_path, unit="bright", positive=None)
    with pytest.raises(ValueError, match=r"the unit '0' is of \d+ groups; it is of one"):
        downstream.create_downstream("hospital", True, None, evaluation_catalog.read_catalog(catalog))
    entry = json.loads(catalog.read_text())["hospital"] | {"unit": "patient"}
    catalog.write_text(json.dumps({"hospital": entry}))
    change_rows(catalog, lambda i, row: row.update(diagnosis=CLASSES[i % 2]))
    with pytest.raises(ValueError, match="'P0' has images of benign and malignant: which of them"):
        downstream.create_downstream("hospital", True, None, evaluation_catalog.read_catalog(catalog))


def test_declared_classes_and_names_that_have_no_images_are_said(tmp_path, caplog):
    catalog = write_set(tmp_path, classes=[*CLASSES, "odd"], labels=["a", "b"])
    train, _ = downstream.open_splits("hospital", evaluation_catalog.read_catalog(catalog))
    assert train.classes == [*CLASSES, "odd"] and "no row of class odd, which the" in caplog.text
    assert f'its "labels" name 2 classes, and the set has 4: {", ".join([*CLASSES, "odd"])}' in caplog.text
    entry = json.loads(catalog.read_text())["hospital"] | {"classes": list(CLASSES[:2])}
    catalog.write_text(json.dumps({"hospital": entry}))
    with pytest.raises(ValueError, match="the label 'normal' is not among"):
        downstream.create_downstream("hospital", True, None, evaluation_catalog.read_catalog(catalog))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_ordered_metrics_are_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    for _ in range(20):
        truth, called = rng.integers(0, classes, (2, 30))
        found = metrics.ordered_metrics(confusion_matrix(truth, called, labels=range(classes)))
        kappa = cohen_kappa_score(truth, called, weights="quadratic", labels=range(classes))
        assert found["quadratic_kappa"] == pytest.approx(kappa)
        assert found["adjacent_accuracy"] == pytest.approx(np.mean(np.abs(truth - called) <= 1))
    same = metrics.ordered_metrics(confusion_matrix([1, 1], [1, 1], labels=range(classes)))
    assert same["quadratic_kappa"] == 0 and same["adjacent_accuracy"] == 1


def test_each_class_has_scikit_learns_figures_and_resampled_intervals():
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 3, 90), [f"p{i // 3}" for i in range(90)]
    prob = rng.dirichlet(np.ones(3), 90)
    prob[np.arange(90), labels] += 0.4
    prob /= prob.sum(1, keepdims=True)
    resamples = Resamples(labels, patients, CLASSES, "malignant", number=200)
    _, each = resamples.draw_with_classes(prob)
    recalls = recall_score(labels, prob.argmax(1), average=None)
    weights = np.concatenate(list(resamples.weights()))
    for c, name in enumerate(CLASSES):
        assert each[name]["auroc"].value == pytest.approx(roc_auc_score(labels == c, prob[:, c]))
        assert each[name]["sensitivity"].value == pytest.approx(recalls[c])
        for r in (0, 7):
            drawn = roc_auc_score(labels == c, prob[:, c], sample_weight=weights[r])
            assert each[name]["auroc"].draws[r] == pytest.approx(drawn)


def test_predictions_with_folds_are_read_with_and_without_them(tmp_path):
    rows = [{"image": str(i), "group": str(i), "label": "ab"[i % 2], "fold": "1"} for i in range(4)]
    scheme = set_scheme(["a", "b"])
    prob = np.array([[0.5, 0.5]] * 4)
    Predictions(rows, prob, replace(scheme, columns=(*scheme.columns, "fold"))).write(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        assert next(csv.reader(file)) == ["image", "group", "label", "fold", "predicted", "prob_a", "prob_b"]
    assert Predictions.read(tmp_path / "p.csv", scheme).prob.tolist() == prob.tolist()
