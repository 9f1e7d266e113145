"""What is said of a test table beside its six columns, against scikit-learn and by hand."""

import csv
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    roc_auc_score,
)

from evaluation import metrics, predictions, references, run_folder
from evaluation.predictions import Predictions, Scheme
from evaluation.resamples import Bootstrap
from evaluation.weighted import weighted_detection
from inputs import cbis

CLASSES = cbis.CBIS_CLASSES


def table(n: int = 240, seed: int = 0, signal: float = 1.5) -> Predictions:
    """Lesions of patients with two breasts and two views, and overconfident probabilities that know something."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = int(rng.choice(3, p=(0.5, 0.2, 0.3)))
        rows.append({
            "lesion": f"L{i}", "patient": f"P{i // 3}", "side": ("LEFT", "RIGHT")[i % 3 == 2],
            "view": ("CC", "MLO")[i % 2], "abnormality": "1", "pathology": CLASSES[label], "split": "test",
            "density": str(1 + i % 4), "assessment": "", "subtlety": "3", "crop_width": str(50 + i),
            "crop_height": "10",
        })  # fmt: skip
    labels = np.array([CLASSES.index(row["pathology"]) for row in rows])
    logits = rng.normal(0, 2, (n, 3)) + signal * 2 * np.eye(3)[labels]
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(rows, prob)


def test_detection_equals_scikit_learns():
    val, test = table(seed=1), table()
    point = metrics.operating_point(val.labels, val.prob, 2)
    found = test.resamples(Bootstrap(200)).detection(test.prob, point)
    positive, score = test.labels == 2, test.prob[:, 2]
    value = {name: interval.value for name, interval in found.items()}
    assert value["auroc_malignant"] == pytest.approx(roc_auc_score(positive, score))
    assert value["average_precision_malignant"] == pytest.approx(average_precision_score(positive, score))
    assert value["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(test.labels, test.prob.argmax(1)))
    called = score >= point.threshold
    assert value["sensitivity"] == pytest.approx(called[positive].mean())
    assert value["specificity"] == pytest.approx((~called)[~positive].mean())
    calibrated = point.calibrated(test.prob)[:, 2]
    assert value["brier"] == pytest.approx(np.mean((calibrated - positive) ** 2))
    logit = np.log(calibrated / (1 - calibrated))[:, None]
    second = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(logit, positive)
    assert value["calibration_slope"] == pytest.approx(second.coef_.item(), rel=1e-3)
    for interval in found.values():
        assert interval.low <= interval.value <= interval.high


def test_the_intercept_makes_the_mean_probability_the_prevalence():
    test = table()
    point = metrics.OperatingPoint(1.0, 0.5)
    found = test.resamples(Bootstrap(50)).detection(test.prob, point)
    p = test.prob[:, 2].clip(1e-12, 1 - 1e-12)
    shifted = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + found["calibration_intercept"].value)))
    assert shifted.mean() == pytest.approx((test.labels == 2).mean(), abs=1e-6)


def test_the_threshold_keeps_the_specificity_on_validation_and_no_lower_one_does():
    val = table(seed=1)
    point = metrics.operating_point(val.labels, val.prob, 2, specificity=0.9)
    others = val.prob[val.labels != 2, 2]
    assert (others < point.threshold).mean() >= 0.9
    lower = others[others < point.threshold].max()
    assert (others < lower).mean() < 0.9


def test_the_temperature_minimises_validations_cross_entropy():
    val = table(seed=1)
    point = metrics.operating_point(val.labels, val.prob, 2)
    losses = [
        log_loss(val.labels, metrics.OperatingPoint(t, 0).calibrated(val.prob))
        for t in (point.temperature, 0.98 * point.temperature, 1.02 * point.temperature, 1.0)
    ]
    assert losses[0] == min(losses) and point.temperature > 1  # the probabilities are overconfident


def test_resampled_scores_are_those_of_the_resampled_lesions():
    """Weights of whole numbers against the same lesions repeated as often."""
    test, point = table(60), metrics.OperatingPoint(1.3, 0.4)
    counts = np.random.default_rng(0).integers(0, 4, len(test.rows))
    again = test[np.repeat(np.arange(len(test.rows)), counts)]
    one = weighted_detection(test.labels, test.prob, 2, point, range(3))(counts[None])
    other = weighted_detection(again.labels, again.prob, 2, point, range(3))(np.ones((1, len(again.rows))))
    for name in metrics.DETECTION:
        assert one[name][0] == pytest.approx(other[name][0], abs=1e-9), name


def test_a_constant_score_has_no_slope():
    test = table(60)
    prob = np.tile([0.5, 0.2, 0.3], (60, 1))
    point = metrics.OperatingPoint(1.0, 0.5)
    found = test.resamples(Bootstrap(50)).detection(prob, point)
    assert found["calibration_slope"].plain()["value"] is None
    assert found["auroc_malignant"].value == 0.5
    assert predictions.describe_interval("calibration_slope", found["calibration_slope"].plain()) == ("not defined")


def test_a_class_that_is_never_predicted_is_named():
    test = table(60)
    test.prob[:, 1] = 0
    test.prob /= test.prob.sum(1, keepdims=True)
    assert predictions.score_predictions(test, test.resamples(Bootstrap(20)))["never_predicted"] == [
        "BENIGN_WITHOUT_CALLBACK"
    ]


def test_a_baseline_is_checked_by_lesion_and_by_truth(tmp_path):
    test = table(60)
    test.write(tmp_path / "predictions.csv")
    shuffled = [test.rows[i] for i in np.random.default_rng(0).permutation(60)]
    again = predictions.check_baseline(tmp_path / "predictions.csv", shuffled)
    assert [row["lesion"] for row in again.rows] == [row["lesion"] for row in shuffled]
    with pytest.raises(ValueError, match="60 lesions that are not the 59"):
        predictions.check_baseline(tmp_path / "predictions.csv", test.rows[1:])
    other = [dict(row) for row in test.rows]
    other[7]["pathology"] = "BENIGN" if other[7]["pathology"] != "BENIGN" else "MALIGNANT"
    with pytest.raises(ValueError, match="L7 the pathology"):
        predictions.check_baseline(tmp_path / "predictions.csv", other)


def test_a_baseline_gives_back_every_text_and_number_and_no_cell_is_a_formula(tmp_path):
    classes = ("=x", "-x", "'=x", "Cat", "cat")
    scheme = Scheme(classes, "image", "label", "group", ("image", "group", "label"))
    images = ["=1+1.png", "@a.png", "-3", "'-3", "+a/b.png", "''=x", "'quoted'", "a\rb", "a\nb", '=HYPERLINK("x";"y")']
    rows = [{"image": name, "group": f"-{name}", "label": classes[i % 5]} for i, name in enumerate(images)]
    prob = np.random.default_rng(0).dirichlet(np.ones(5), len(rows)) - 1e-20
    path = tmp_path / "predictions.csv"
    Predictions(rows, prob, scheme).write(path)
    found = predictions.check_baseline(path, rows, scheme)
    assert np.array_equal(found.prob, prob)
    assert [{name: row[name] for name in scheme.columns} for row in found.rows] == rows
    with open(path, newline="") as file:
        cells = [cell for row in csv.reader(file, strict=True) for cell in row]
    assert [cell for cell in cells if cell.startswith(tuple("=+-@\t\r\n"))] == ["-3"]  # a number


def test_results_of_other_settings_are_set_aside_and_a_baseline_is_not_overwritten(tmp_path):
    test = table(60)
    test.write(tmp_path / "predictions.csv")
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"protocol": "logistic", "folds": 0}}))
    run_folder.set_aside_other_results(tmp_path, {"protocol": "logistic", "folds": 0})
    assert (tmp_path / "results.json").exists()
    with pytest.raises(ValueError, match="overwrite"):
        run_folder.set_aside_other_results(tmp_path, {}, [str(tmp_path / "predictions.csv")])
    run_folder.set_aside_other_results(tmp_path, {"protocol": "medslip", "folds": 0})
    assert not (tmp_path / "results.json").exists()
    assert sorted(path.name for path in (tmp_path / "earlier_1").iterdir()) == ["predictions.csv", "results.json"]


def lesion_table(n: int, seed: int = 0) -> list[dict[str, str]]:
    """A table whose assessment tells the pathology most of the time."""
    rng = np.random.default_rng(seed)
    rows = [dict(row) for row in table(n, seed).rows]
    for i, row in enumerate(rows):
        row["split"] = ("train", "train", "val", "test")[(i // 3) % 4]
        telling = {"BENIGN": "3", "BENIGN_WITHOUT_CALLBACK": "2", "MALIGNANT": "5"}[row["pathology"]]
        row["assessment"] = telling if rng.random() < 0.8 else str(rng.integers(2, 6))
        row |= {"subtlety": str(rng.integers(1, 6)), "calc_type": rng.choice(["AMORPHOUS", "ROUND-PUNCTATE", "N/A"])}
        row |= {"calc_distribution": "CLUSTERED", "mass_shape": "", "mass_margins": ""}
    return rows


def test_reference_rows_know_what_they_are_given_and_no_more():
    found = references.reference_rows(lesion_table(600))
    auroc = {}
    for name, rows in found.items():
        assert not isinstance(rows, str), rows
        auroc[name] = np.mean([predictions.macro_auroc(row.labels, row.prob) for row in rows])
    assert auroc["Radiologist: BI-RADS assessment"] > 0.8
    assert auroc["Radiologist: assessment, descriptors, density, subtlety"] > 0.8
    assert abs(auroc["Radiologist: descriptors"] - 0.5) < 0.15
    assert abs(auroc["Chance"] - 0.5) < 0.03 and auroc["Always BENIGN"] == 0.5
    assert abs(auroc[references.CROP_AREA] - 0.5) < 0.15


def test_a_reference_without_its_columns_says_so():
    rows = lesion_table(200)
    for row in rows:
        row["assessment"] = row["crop_width"] = ""
    found = references.reference_rows(rows)
    assert "assessment" in found["Radiologist: BI-RADS assessment"]
    assert "crop_width" in found[references.CROP_AREA]
    assert isinstance(found["Radiologist: descriptors"], list)


def test_words_of_a_descriptor_count_one_by_one():
    rows = [{"mass_shape": "ROUND-OVAL"}, {"mass_shape": "OVAL"}]
    encode = references.Descriptors(rows, ["mass_shape"])
    assert encode.words == [("mass_shape", "OVAL"), ("mass_shape", "ROUND")]
    assert encode([*rows, {"mass_shape": "IRREGULAR-ROUND"}]).tolist() == [[1, 1], [1, 0], [0, 1]]


def test_a_bad_row_is_named_by_its_number(tmp_path):
    test, path = table(6), tmp_path / "predictions.csv"
    test.write(path)
    lines = path.read_text().splitlines()
    again = Predictions.read(path)
    assert np.array_equal(again.prob, test.prob) and again.labels.tolist() == test.labels.tolist()
    assert [row["predicted"] for row in again.rows] == [CLASSES[i] for i in test.prob.argmax(1)]

    def read(row, old, new):
        changed = [*lines]
        changed[row] = changed[row].replace(old, new)
        path.write_text("\n".join(changed) + "\n")
        return Predictions.read(path)

    with pytest.raises(ValueError, match="predictions.csv, row 3: could not convert string to float: 'high'"):
        read(3, lines[3].rsplit(",", 1)[1], "high")
    with pytest.raises(ValueError, match="predictions.csv, row 1: pathology 'benign' is no class of this set"):
        read(1, f",{test.rows[0]['pathology']},", ",benign,")
    with pytest.raises(ValueError, match="the lesion L1 is there twice"):
        read(3, "L2", "L1")
    with pytest.raises(ValueError, match="no predictions.csv of this set: .*prob_malignant"):
        read(0, "prob_MALIGNANT", "prob_other")
    path.write_text(lines[0] + "\n")
    assert Predictions.read(path).prob.shape == (0, 3)


def test_a_score_that_is_no_number_is_named_with_its_sample(tmp_path):
    test = table(9)
    test.write(tmp_path / "predictions.csv")
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    lines[4] = lines[4].rsplit(",", 1)[0] + ",nan"
    (tmp_path / "predictions.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="predictions.csv: the lesion L3 has a score of no number"):
        Predictions.read(tmp_path / "predictions.csv")


def test_a_class_that_is_not_learnt_is_not_looked_for(caplog):
    assert predictions.unlearnt_classes(CLASSES, np.array([0, 2, 0]), "a set") == [1]
    assert f"a set: NO TRAINING IMAGE of class {CLASSES[1]}" in caplog.text
    scheme = predictions.CBIS.without([1, 2])
    assert (scheme.positive, scheme.unlearnt) == (None, CLASSES[1:]) and predictions.CBIS.without(
        []
    ) == predictions.CBIS
    test = table()
    assert predictions.macro_auroc(test.labels, test.prob, scheme) == roc_auc_score(test.labels == 0, test.prob[:, 0])
    two = test[np.flatnonzero(test.labels != 1)]  # validation samples, which have it neither
    assert predictions.macro_f1(two.labels, two.prob, predictions.CBIS.without([1])) > 0
    with pytest.raises(ValueError, match="no sample of class BENIGN_WITHOUT_CALLBACK"):
        predictions.macro_f1(two.labels, two.prob)


def test_numbers_for_people():
    fraction = {"value": 0.12345, "low": 0.1, "high": 0.98765}
    assert predictions.describe_interval("auroc_malignant", fraction) == "12.35 (10.0 to 98.8)"
    for name in ("brier", "calibration_slope", "calibration_intercept"):
        assert predictions.describe_interval(name, fraction) == "0.123 (0.100 to 0.988)"
    assert predictions.describe_interval("brier", fraction | {"high": None}) == "not defined"
    why = fraction | {"low": None, "high": None, "why": "one positive patient"}
    assert predictions.describe_interval("brier", why) == "0.123 (no interval: one positive patient)"
    assert predictions.describe_interval("sensitivity", why) == "12.35 (no interval: one positive patient)"
    assert metrics.headings(metrics.METRICS, metrics.MALIGNANT)["recall_malignant"] == "Recall (Malignant)"
    assert metrics.headings(metrics.DETECTION, "pneumonia")["brier"] == "Brier score (pneumonia)"
    assert list(metrics.headings(metrics.METRICS, None)) == ["auroc", "f1", "precision", "recall"]


def test_a_class_without_test_samples_is_an_error_only_where_a_comparison_was_asked_for(tmp_path, caplog):
    test = table(3)  # of one patient
    test.write(tmp_path / "predictions.csv")
    found = predictions.report_rows(test, None, [], {})
    assert found == {"no_metrics": "no sample of class MALIGNANT: its recall and AUROC are undefined"}
    assert "no metrics of the test rows: no sample of class MALIGNANT" in caplog.text
    assert "no metrics, no sample" in predictions.describe_results(
        found | {"dataset": "cbis_calc", "lesions_skipped": {"test": 0}}, "k-NN"
    )
    with pytest.raises(ValueError):
        predictions.report_rows(test, None, [str(tmp_path / "predictions.csv")], {})


def test_the_first_baseline_stands_by_itself_as_well(tmp_path):
    test, paths = table(90), []
    for i in range(2):
        other = Predictions(test.rows, np.roll(test.prob, i, axis=1))
        other.write(tmp_path / f"{i}.csv")
        paths.append(str(tmp_path / f"{i}.csv"))
    found = predictions.report_rows(test, (test.labels, test.prob), paths, {}, Bootstrap(50))
    assert [entry["baseline"] for entry in found["differences"]] == paths and found["baseline"] == paths[0]
    assert found["difference"] == found["differences"][0]["difference"]
    assert found["difference"]["auroc"]["value"] == 0 < found["differences"][1]["difference"]["auroc"]["value"]
    assert found["confusion"] == confusion_matrix(test.labels, test.prob.argmax(1)).tolist()
    assert found["unit"] == "fraction" and found["test_patients"] == 30 and "detection" in found
    assert found["interval"] == {"level": 0.95, "resamples": 50, "over": "patients"}


def test_the_table_for_people_says_what_was_left_out_and_lines_its_columns_up(tmp_path):
    test = table(90)
    never = Predictions(test.rows, test.prob * [1, 0, 1] / (test.prob * [1, 0, 1]).sum(1, keepdims=True))
    never.write(tmp_path / "a.csv")
    found = predictions.report_rows(never, (test.labels, test.prob), [str(tmp_path / "a.csv")], {}, Bootstrap(40))
    found |= {"dataset": "cbis_calc", "model": "a tower", "image_kind": "crop", "lesions": {"test": 90}}
    text = predictions.describe_results(found | {"lesions_skipped": {"test": 0}}, "logistic regression")
    lines = text.splitlines()
    assert lines[0] == "cbis_calc: 90 test lesions of 30 patients, crop images, logistic regression"
    assert "from 40 resamples" in lines[1] and lines[4] == "| --- |" + " --- |" * 6
    assert lines[5].startswith("| a tower | ") and lines[5].count("|") == 8
    header, *rows = lines[8:12]
    counts = confusion_matrix(test.labels, never.prob.argmax(1), labels=range(3))
    ends = [header.index(f"  {name}  ") + 2 + len(name) if i < 2 else len(header) for i, name in enumerate(CLASSES)]
    for name, row, own in zip(CLASSES, rows, counts, strict=True):
        assert row.split() == [name, *map(str, own)] and row[: len(CLASSES[1])].strip() == name
        assert [row[:end].split()[-1] for end in ends] == [str(n) for n in own]
    assert lines[12] == "NEVER PREDICTED: BENIGN_WITHOUT_CALLBACK"
    at = lines.index("Each class against the rest:")
    assert at == 14 and [line.split()[:2] for line in lines[at + 2 : at + 5]] == [
        [name, str((test.labels == c).sum())] for c, name in enumerate(CLASSES)
    ]
    assert lines[at + 6].startswith("Malignant against the rest") and text.count("p = 1.0000") == 6
    assert f"Difference to {tmp_path / 'a.csv'}, percentage points" in text and "NOT THE WEIGHTS" not in text
    skipped = found | {"lesions_skipped": {"test": 3}, "test_readings": 2}
    skipped["differences"] = [skipped["differences"][0] | {"settings_differ": {"folds": [0, 5]}}]
    again = predictions.describe_results(skipped, "logistic regression")
    assert "of 30 patients (3 MORE SKIPPED, image missing or corrupt), crop" in again
    assert again.splitlines()[0].endswith("; reading 2 of the test table here")
    assert "  NOT THE WEIGHTS ALONE: folds is 0 there and 5 here" in again
    plain = {name: value for name, value in found.items() if not name.startswith("diff")}
    alone = predictions.describe_results(plain | {"lesions_skipped": {"test": 0}}, "k-NN")
    assert "Difference" not in alone and "Malignant against" in alone
    del plain["detection"]
    assert "Malignant against" not in predictions.describe_results(plain | {"lesions_skipped": {"test": 0}}, "k-NN")


def test_other_weights_are_not_called_another_setting(tmp_path):
    """They are what two checkpoints differ in; all else that differs is said."""
    found = table(90)
    found.write(tmp_path / "predictions.csv")
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"weights_sha256": "a" * 64, "folds": 0}}))
    there = json.loads((tmp_path / "results.json").read_text())
    there["settings"] |= {"knn": 0, "fraction": [], "cache_features": True}  # what adds other results changes none
    (tmp_path / "results.json").write_text(json.dumps(there))
    ours = {"weights_sha256": "b" * 64, "folds": 5, "knn": 20, "fraction": [0.1], "cache_features": False}
    baseline = [str(tmp_path / "predictions.csv")]
    results = predictions.report_rows(found, (found.labels, found.prob), baseline, ours, Bootstrap(40))
    assert results["differences"][0]["settings_differ"] == {"folds": [0, 5]}


def test_a_folder_is_no_table_of_predictions(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the predictions.csv in it$"):
        predictions.Predictions.read(tmp_path)


def test_values_of_the_positive_class_stand_in_one_column():
    found = table(90)
    results = predictions.report_rows(found, (found.labels, found.prob), [], {}, Bootstrap(40))
    lines = predictions.describe_detection(results)[2:]
    values = [predictions.describe_interval(*entry) for entry in results["detection"].items()]
    assert len({line.rindex(value) for line, value in zip(lines, values, strict=True)}) == 1
