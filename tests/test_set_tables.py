"""What the tables of labelled sets hold: splits, labels and patients as people and spreadsheets write them."""

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from beit_finetuning import sets
from evaluation import downstream, features
from evaluation.catalog import read_catalog
from evaluation.predictions import Predictions, score_predictions
from reporting.runs import ResultTable

SPLITS = [" Train", "train", "TRAIN ", "val", "test", "Test"]


def write_table(root, rows, header="image,label,split", **entry):
    """A set whose images are named by their row; returns the catalog."""
    root.mkdir(exist_ok=True)
    for i in range(len(rows)):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(root / f"{i}.png")
    lines = [header, *(f"{i}.png,{row}" for i, row in enumerate(rows))]
    (root / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    entry = {"path": str(root), "type": "csv", "train": "train", "test": "test"} | entry
    (root / "catalog.json").write_text(json.dumps({"hospital": entry}))
    return read_catalog(root / "catalog.json")


def names(part):
    return [row["image"] for row in part.rows]


def test_splits_are_read_in_any_case_and_others_are_named(tmp_path, caplog):
    catalog = write_table(tmp_path, [f"{'ab'[i % 2]},{split}" for i, split in enumerate(SPLITS)])
    train, test = downstream.open_splits("hospital", catalog)
    assert names(train) == ["0.png", "1.png", "2.png"] and names(test) == ["4.png", "5.png"]
    assert caplog.text.count("1 rows of other splits left out: 'val' 1; known are train, test") == 1
    for part in (True, False):  # whoever reads one split alone hears it too
        caplog.clear()
        downstream.create_downstream("hospital", part, None, catalog)
        assert "left out: 'val' 1" in caplog.text


def test_splits_that_the_entry_tells_apart_by_case_stay_apart(tmp_path):
    catalog = write_table(tmp_path, ["a,A", "b,A", "a,a", "b,a"], train="A", test="a")
    assert [names(part) for part in downstream.open_splits("hospital", catalog)] == [
        ["0.png", "1.png"],
        ["2.png", "3.png"],
    ]


@pytest.mark.parametrize(
    "column",
    [
        "patient_id",
        "PatientID",
        "Patient ID",
        "Patient.ID",
        "patient-id",
        "subject",
        "study",
        "case",
        "MRN",
        "participant_id",
        "PID",
        "record_id",
    ],
)
def test_a_column_of_patients_that_the_entry_does_not_name_is_said(tmp_path, caplog, column):
    rows = ["a,train,P1", "b,train,P2", "a,test,P1", "b,test,P3"]
    catalog = write_table(tmp_path, rows, f"image,label,split,{column}")
    _, test = downstream.open_splits("hospital", catalog)
    spelled = column.lower().replace(" ", "_")
    assert "1 of its values are in both train and test" in caplog.text
    assert f'add "columns": {{"group": "{spelled}"}}' in caplog.text and test.scheme.unit == "images"
    catalog["hospital"]["columns"] = {"group": spelled}
    with pytest.raises(ValueError, match="1 groups are in both train and test, first 'P1'"):
        downstream.open_splits("hospital", catalog)


def test_images_without_patients_are_called_images(tmp_path):
    rows = [f"{'ab'[i % 2]},{'train' if i < 2 else 'test'}" for i in range(12)]
    _, test = downstream.open_splits("hospital", write_table(tmp_path, rows))
    found = Predictions(test.rows, np.full((10, 2), 0.5), test.scheme)
    scores = score_predictions(found) | {"metrics": {}}
    assert scores["test_images"] == 10 and scores["interval"]["over"] == "images" and "test_patients" not in scores
    table = ResultTable("hospital")
    table.tested(scores, "results.json")
    assert table.size() == "10 test images"
    table.tested(scores | {"test_patients": 4, "interval": {"over": "patients"}}, "results.json")
    assert table.size() == "10 test images of 4 patients"


def test_a_patient_whose_number_became_a_float_is_one_patient(tmp_path, caplog):
    rows = ["a,train,12", "b,train,7", "a,test,12.0", "b,test,"]
    with pytest.raises(ValueError, match="1 groups are in both train and test, first '12'"):
        downstream.open_splits("hospital", write_table(tmp_path, rows, "image,label,split,group"))
    rows[2] = "a,test,nan"
    _, test = downstream.open_splits("hospital", write_table(tmp_path, rows, "image,label,split,group"))
    assert [row["group"] for row in test.rows] == ["2.png", "3.png"] and "2 images have no group" in caplog.text
    assert test.scheme.unit == "groups"


def test_one_image_under_two_patients_is_refused(tmp_path):
    catalog = write_table(tmp_path, ["a,train,P1", "b,test,P2"], "image,label,split,group")
    (tmp_path / "table.csv").write_text("image,label,split,group\nx.png,a,train,P1\nx.png,b,test,P2\n")
    with pytest.raises(ValueError, match="the image x.png is there twice"):
        downstream.open_splits("hospital", catalog)


def test_labels_that_are_one_number_are_one_class(tmp_path, caplog):
    labels = ["0", "1.0", "0.0", "1"]
    catalog = write_table(tmp_path, [f"{label},{'train' if i < 2 else 'test'}" for i, label in enumerate(labels)],
                          positive="1.0")  # fmt: skip
    train, test = downstream.open_splits("hospital", catalog)
    assert train.classes == ["0", "1"] and train.labels.tolist() == test.labels.tolist() == [0, 1]
    assert test.scheme.positive == "1" and "'0.0' as '0', '1.0' as '1'" in caplog.text
    alone = write_table(tmp_path, ["0.0,train", "1.0,train", "0.0,test"])  # nothing to be made one
    assert downstream.create_downstream("hospital", True, None, alone).classes == ["0.0", "1.0"]


@pytest.mark.parametrize("one, other", [("TRUE", "True"), ("Benign", "benign"), ("not  seen", "not seen"), ("01", "1"),
                                        ("Zähne", "Za\u0308hne")])  # fmt: skip
def test_labels_that_look_alike_are_refused_by_name(tmp_path, one, other):
    catalog = write_table(tmp_path, [f"{one},train", f"{other},train", "x,train", f"{one},test"])
    with pytest.raises(ValueError, match="differ in case, blanks, accents or zeros alone") as error:
        downstream.create_downstream("hospital", False, None, catalog)
    assert f"{one!r} (2 rows)" in str(error.value) and f"{other!r} (1 rows)" in str(error.value)


def test_rows_without_a_label_are_counted(tmp_path):
    catalog = write_table(tmp_path, ["a,train", "nan,train", "b,train", ",test", "a,test"])
    with pytest.raises(ValueError, match=r"table.csv: row 2 has no label, nor have 1 more"):
        downstream.create_downstream("hospital", True, None, catalog)


@pytest.mark.parametrize("kind", ["csv", "imagefolder", "findings"])
def test_a_class_of_one_split_is_named_before_anything_is_computed(tmp_path, caplog, kind):
    if kind == "imagefolder":
        for place in ("train/a", "train/b", "test/a", "test/rare"):
            (tmp_path / place).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / place / "0.png")
        entry = {"path": str(tmp_path), "type": "imagefolder", "train": "train", "test": "test"}
        catalog = {"hospital": entry}
    elif kind == "csv":
        catalog = write_table(tmp_path, ["a,train", "b,train", "a,test", "rare,test"])
    else:
        rows = ["1,0,1,train", "1,,1,train", "0,1,0,test", "1,-1,0,test"]
        catalog = write_table(tmp_path, rows, "image,a,rare,b,split", columns={"label": ["a", "rare", "b"]})
    downstream.open_splits("hospital", catalog)
    kinds = "findings" if kind == "findings" else "classes"
    assert f"hospital: {kinds} without training images: rare (1 test)" in caplog.text
    assert f"hospital: {kinds} without test images: b ({2 if kind == 'findings' else 1} training)" in caplog.text


def test_fine_tuning_names_them_too(tmp_path, caplog):
    for place in ("train/a", "train/b", "test/a", "test/b", "test/rare"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place / "0.png")
    args = Namespace(
        where="", data_set="image_folder", data_path=str(tmp_path / "train"), eval_data_path=str(tmp_path / "test")
    )
    sets.open_sets(args)
    assert "image_folder: classes without training images: rare (1 test)" in caplog.text


def test_a_set_shows_the_frame_and_the_window_that_its_entry_names(tmp_path):
    rows = [f"{'ab'[i % 2]},{'train' if i < 2 else 'test'}" for i in range(4)]
    write_table(tmp_path, rows)
    pages = [Image.fromarray(np.full((8, 8), value, np.uint16)) for value in (1000, 2000, 3000)]
    pages[0].save(tmp_path / "deep.tif", save_all=True, append_images=pages[1:])
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "deep.tif").read_bytes())
    shown = {}
    for more in ({}, {"frame": "middle", "window": [2000, 4000]}, {"frame": 3, "window": [2000, 4000]}):
        entry = {"path": str(tmp_path), "type": "csv", "train": "train", "test": "test"} | more
        (tmp_path / "catalog.json").write_text(json.dumps({"hospital": entry}))
        train, _ = downstream.open_splits("hospital", read_catalog(tmp_path / "catalog.json"))
        shown[len(shown)] = np.asarray(train.image(0))[0, 0, 0], train.fingerprint(), next(features.identify(train))
    assert [grey for grey, *_ in shown.values()] == [0, 128, 191]  # a page of one value; 2000 and 3000 of 0 to 4000
    assert len({fingerprint for _, fingerprint, _ in shown.values()}) == 3
    assert len({key for *_, key in shown.values()}) == 3
    for key, value in (("frame", 0), ("frame", "last"), ("window", [1]), ("window", [100, 0])):
        (tmp_path / "catalog.json").write_text(json.dumps({"hospital": entry | {key: value}}))
        with pytest.raises(ValueError, match=f"hospital.*{key}"):
            read_catalog(tmp_path / "catalog.json")


@pytest.mark.parametrize("one, other", [("007", "7"), ("P1", "p1"), ("P 1", "P  1"), ("Zähne", "Za\u0308hne")])
def test_patients_that_look_alike_are_not_divided(tmp_path, caplog, one, other):
    rows = [f"a,train,{one}", "b,train,x", f"a,test,{other}", "b,test,y"]
    header = "image,label,split,group"
    with pytest.raises(ValueError, match="table.csv: 1 groups are in both train and test, first"):
        downstream.open_splits("hospital", write_table(tmp_path, rows, header))
    downstream.open_splits("hospital", write_table(tmp_path, rows, header.replace("group", "patient")))
    assert "(1 of its values are in both train and test)" in caplog.text
    caplog.clear()
    rows[1], rows[2] = f"b,train,{other}", "a,test,z"
    train, _ = downstream.open_splits("hospital", write_table(tmp_path, rows, header))
    one_patient = len({row["group"] for row in train.rows}) == 1
    said = "1 times values of group differ in case or zeros alone" in caplog.text
    assert one_patient != said  # made one where it plainly is, else said


def test_images_that_are_one_file_are_there_twice(tmp_path):
    catalog = write_table(tmp_path, ["a,train", "b,train", "a,test", "b,test"])
    with open(tmp_path / "table.csv", "a") as file:
        file.write(".//0.png,a,test\n")
    with pytest.raises(ValueError, match="the image 0.png is there twice"):
        downstream.open_splits("hospital", catalog)


@pytest.mark.parametrize("cell", ["NA", "n/a", "None", "NaT", "#VALUE!", "-", "?", " null "])
def test_what_programs_write_for_nothing_is_no_patient(tmp_path, caplog, cell):
    rows = [f"a,train,{cell}", "b,train,P1", f"a,test,{cell}", "b,test,P2"]
    train, test = downstream.open_splits("hospital", write_table(tmp_path, rows, "image,label,split,group"))
    assert [row["group"] for row in [*train.rows, *test.rows]] == ["0.png", "P1", "2.png", "P2"]
    assert "2 images have no group, and count by themselves" in caplog.text and test.scheme.unit == "groups"
    rows = [f"{'ab'[i % 2]},{'train' if i < 2 else 'test'},{cell}" for i in range(4)]
    _, test = downstream.open_splits("hospital", write_table(tmp_path, rows, "image,label,split,group"))
    assert test.scheme.unit == "images"


@pytest.mark.parametrize("cell, refused", [("NA", True), ("#REF!", True), ("N/A", True), ("None", False), ("-", False)])
def test_what_programs_write_for_nothing_is_no_class_without_a_word(tmp_path, caplog, cell, refused):
    catalog = write_table(tmp_path, ["a,train", f"{cell},train", "a,test", f"{cell},test"])
    if refused:
        with pytest.raises(ValueError, match=rf"row 2 has no label, nor have 1 more \('{cell}' is none\)"):
            downstream.open_splits("hospital", catalog)
    else:
        train, _ = downstream.open_splits("hospital", catalog)
        assert set(train.classes) == {"a", cell} and f"a class is called '{cell}' (2 rows)" in caplog.text


def test_a_findings_cell_of_na_is_blank_and_a_dash_is_refused(tmp_path):
    rows = ["1,0,train", "NA,1,train", "0,1,test", "1,n/a,test"]
    catalog = write_table(tmp_path, rows, "image,a,b,split", columns={"label": ["a", "b"]}, blank="negative")
    train, test = downstream.open_splits("hospital", catalog)
    assert train.findings.tolist() == [[1, 0], [0, 1]] and test.findings.tolist() == [[0, 1], [1, 0]]
    catalog = write_table(tmp_path, [*rows[:3], "1,-,test"], "image,a,b,split", columns={"label": ["a", "b"]})
    with pytest.raises(ValueError, match="3.png, b: '-' is not 0, 1, -1 or empty"):
        downstream.open_splits("hospital", catalog)


@pytest.mark.parametrize("cells, positive, found", [("0.0 1.0", "1", "1.0"), ("0 1", 1, "1"), ("0 1", "1.0", "1")])
def test_the_positive_class_is_a_number_in_any_form(tmp_path, cells, positive, found):
    rows = [f"{cells.split()[i % 2]},{'train' if i < 2 else 'test'}" for i in range(4)]
    _, test = downstream.open_splits("hospital", write_table(tmp_path, rows, positive=positive))
    assert test.scheme.positive == found


def test_a_positive_class_in_another_case_is_named(tmp_path):
    catalog = write_table(tmp_path, ["benign,train", "malignant,train", "benign,test"], positive="Malignant")
    with pytest.raises(ValueError, match="positive 'Malignant' is no class .'malignant' differs in case.*choose from"):
        downstream.open_splits("hospital", catalog)


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    labels = ["1.5", "10.0", "2", "-1", "-20"]
    catalog = write_table(tmp_path, [f"{label},{split}" for label in labels for split in ("train", "test")])
    assert downstream.open_splits("hospital", catalog)[0].classes == ["-20", "-1", "1.5", "2", "10.0"]


@pytest.mark.parametrize("cells", [[" ", ""], ["NA"]])
def test_rows_without_an_image_are_refused_by_number(tmp_path, cells):
    catalog = write_table(tmp_path, ["a,train", "b,train", "a,test"])
    with open(tmp_path / "table.csv", "a") as file:
        file.writelines(f"{cell},b,test\n" for cell in cells)
    more = ", nor have 1 more" if len(cells) > 1 else r" \('NA' is none\)"
    with pytest.raises(ValueError, match=f"table.csv: row 4 has no image{more}$"):
        downstream.open_splits("hospital", catalog)


def test_units_that_would_be_called_the_same_are_refused(tmp_path):
    rows = ["a,train,P 1,L", "b,train,P2,L", "a,test,P,1 L", "b,test,P3,L"]
    catalog = write_table(tmp_path, rows, "image,label,split,study,side")
    catalog["hospital"]["unit"] = ["study", "side"]
    with pytest.raises(ValueError, match="two units would be called 'P 1 L'"):
        downstream.open_splits("hospital", catalog)
    catalog["hospital"]["unit"] = ["side"]
    with pytest.raises(ValueError, match="1 groups are in both train and test, first 'L'"):  # kept whole: no group else
        downstream.open_splits("hospital", catalog)
