"""The mammography sets of the catalog, from the layouts that their publishers ship to results."""

import csv
import re
import shutil

import numpy as np
import pytest
from mammography_tree import MAKERS, catalog_at, make_cmmd, make_embed, make_inbreast, make_vindr
from model_helpers import write_checkpoint
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from test_csv_sets import read_rows
from test_table_sets import command, run_here

import main_linear
import make_dataset
import make_report
import make_tables
from evaluation import downstream
from evaluation.catalog import read_catalog
from evaluation.set_probes import find_set
from evaluation.set_rows import PathTemplate
from evaluation.set_tables import UNIT_COLUMN
from preparation import shrink
from reporting import steps

pytest.importorskip("pydicom")
CROSS_VALIDATED = sorted(set(MAKERS) - {"vindr_birads"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pt", "vit")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """{set: (its root, what is known of each image)}"""
    found = {}
    for name, make in MAKERS.items():
        root = tmp_path_factory.mktemp(name)
        found[name] = root, make(root)
    return found


def every_row(name, root):
    return downstream.open_every_row(name, find_set(name, str(root), "dataset_catalog.json"), None)


@pytest.mark.parametrize("name", MAKERS)
def test_each_image_has_the_label_the_patient_and_the_breast_that_it_was_made_with(name, trees):
    root, truth = trees[name]
    found = every_row(name, root)
    units = f"{UNIT_COLUMN}breast"
    assert {row["image"]: (row["label"], row["group"], row[units]) for row in found.rows} == truth
    assert len(found) == len(truth)
    assert found.classes == read_catalog()[name]["classes"]
    for i in (0, len(found) - 1):  # brighter with the grade, as the window shows it
        assert found.image(i).size == (20, 24)


def test_vindr_has_its_own_splits_and_its_densities(trees):
    root, truth = trees["vindr_birads"]
    train, test = downstream.open_splits("vindr_density", find_set("vindr_density", str(root), "dataset_catalog.json"))
    with open(root / "breast-level_annotations.csv", newline="") as file:
        table = {row["image_id"]: row for row in csv.DictReader(file)}
    for part, split in ((train, "training"), (test, "test")):
        own = [row for row in table.values() if row["split"] == split]
        images = [row["image"].rsplit("/", 1)[1].removesuffix(".dicom") for row in part.rows]
        assert images == [row["image_id"] for row in own]
        assert [part.classes[label] for label in part.labels] == [row["breast_density"] for row in own]


def test_embed_has_densities_too(trees):
    root, _ = trees["embed_birads"]
    found = every_row("embed_density", root)
    assert found.classes == ["1.0", "2.0", "3.0", "4.0"] and found.scheme.ordered  # as the table writes them
    assert all(1 + (int(row["group"]) - 10000258) % 4 == float(row["label"]) for row in found.rows)
    assert len(found) == 4 * 24 - 2 * 3  # the right breasts of three exams have no row


def probe(name, root, checkpoint, out, *flags):
    return main_linear.main([
        "--dataset", name, "--root", str(root), "--pretrained", str(checkpoint), "-j", "0", "--output-dir", str(out),
        "--resamples", "30", *flags,
    ])  # fmt: skip


@pytest.mark.parametrize("name", CROSS_VALIDATED)
def test_a_set_without_splits_is_cross_validated_by_patient(name, trees, checkpoint, tmp_path):
    root, truth = trees[name]
    found = probe(name, root, checkpoint, tmp_path, "--cross-validate", "2", "--folds", "2")
    rows = read_rows(tmp_path / "predictions.csv")
    assert {row["image"]: (row["label"], row["group"]) for row in rows} == {k: v[:2] for k, v in truth.items()}
    folds = {}
    for row in rows:
        folds.setdefault(row["group"], set()).add(row["fold"])
    assert all(len(own) == 1 for own in folds.values())
    assert found["interval"]["over"] == "patients"
    assert found["units"]["breast"]["number"] == len({breast for _, _, breast in truth.values()})
    assert found["units"]["patient"]["number"] == len({patient for _, patient, _ in truth.values()})
    if name == "inbreast_birads":
        order = read_catalog()[name]["classes"]
        truth_of, called = ([order.index(row[key]) for row in rows] for key in ("label", "predicted"))
        kappa = cohen_kappa_score(truth_of, called, weights="quadratic", labels=range(8))
        assert found["ordered"]["quadratic_kappa"]["value"] == pytest.approx(kappa)
    with pytest.raises(ValueError, match="no column split; .*--cross-validate 5 needs none"):
        probe(name, root, checkpoint, tmp_path / "other", "--cache-features")


def test_vindr_is_probed_on_its_test_split_and_is_a_row_of_tables(trees, checkpoint, tmp_path, monkeypatch):
    root, truth = trees["vindr_birads"]
    found = probe("vindr_birads", root, checkpoint, tmp_path / "run", "--cache-features")
    assert found["logistic"]["metric"] == "quadratic_kappa" and found["samples"] == {"train": 56, "test": 24}
    assert found["units"]["breast"]["number"] == 12 and found["units"]["exam"]["number"] == 6
    monkeypatch.setattr(steps, "run_step", run_here)
    catalog = catalog_at(root, "vindr_birads", tmp_path / "catalog.json")
    rows = {
        "tables": ["vindr_birads"],
        "probe": "--resamples 20",
        "rows": [{"name": "Frozen", "weights": str(checkpoint)}],
    }
    (table,) = make_tables.main(command(tmp_path, catalog, rows=rows))["tables"].values()
    assert (table["lesions"], table["patients"]) == (24, 6)
    (row,) = [row for row in table["rows"] if row["name"] == "Frozen"]
    assert row["metrics"]["auroc"]["value"] == pytest.approx(found["metrics"]["auroc"]["value"])
    rows["rows"].append({"name": "Part", "weights": str(checkpoint), "probe": "--cross-validate 3"})
    with pytest.raises(ValueError, match="row 'Part': --cross-validate does not go in a table"):
        make_tables.main(command(tmp_path, catalog, rows=rows))
    rows["rows"][-1] = {"name": "Few", "weights": str(checkpoint), "probe": "--fraction 0.5 --knn 3"}
    make_tables.main(command(tmp_path, catalog, rows=rows))  # beside the probe of all


@pytest.mark.parametrize("name", CROSS_VALIDATED)
def test_a_set_without_splits_is_a_row_of_tables_in_folds(name, trees, checkpoint, tmp_path, monkeypatch, caplog):
    root, truth = trees[name]
    monkeypatch.setattr(steps, "run_step", run_here)
    catalog = catalog_at(root, name, tmp_path / "catalog.json")
    rows = {"tables": [name], "probe": "--resamples 20", "rows": [{"name": "Frozen", "weights": str(checkpoint)}]}
    with caplog.at_level("INFO", logger="medslip"):
        (table,) = make_tables.main(command(tmp_path, catalog, rows=rows))["tables"].values()
    patients = len({patient for _, patient, _ in truth.values()})
    assert (table["lesions"], table["patients"], table["folds"]) == (len(truth), patients, 5)
    size = f"{len(truth)} images of {patients} patients"
    assert f"{size}, without splits: cross-validated in 5 folds" in caplog.text
    assert f"({size}, 5-fold cross-validation)" in (tmp_path / "out" / "tables.md").read_text()
    (row,) = [row for row in table["rows"] if row["name"] == "Frozen"]
    found = probe(name, root, checkpoint, tmp_path / "run", "--cross-validate", "5")
    assert row["metrics"]["auroc"]["value"] == pytest.approx(found["metrics"]["auroc"]["value"])
    breasts = len({breast for _, _, breast in truth.values()})
    assert (row["units"]["breast"]["number"], row["units"]["patient"]["number"]) == (breasts, patients)
    ours, theirs = row["units"]["breast"]["metrics"], found["units"]["breast"]["metrics"]
    assert ours["auroc"]["value"] == pytest.approx(theirs["auroc"]["value"])
    assert bool(row.get("subgroups")) == bool(read_catalog()[name].get("subgroups"))
    make_report.main([str(tmp_path / "out"), "--output-dir", str(tmp_path / "report"), "--no-images"])
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"{size}, 5-fold cross-validation" in page and f"breast ({breasts})" in page
    rows["rows"].append({"name": "Few", "weights": str(checkpoint), "probe": "--fraction 0.5"})
    with pytest.raises(ValueError, match="row 'Few': --fraction does not go in a table"):
        make_tables.main(command(tmp_path, catalog, rows=rows))
    rows["rows"][-1] = {"name": "Tuned", "weights": str(checkpoint), "finetune": "--epochs 1"}
    with pytest.raises(ValueError, match=f"row 'Tuned': fine-tuning needs a test split, which {name} does not have"):
        make_tables.main(command(tmp_path, catalog, rows=rows))


def check(name, root, tmp_path):
    make_dataset.main(["check", "--set", name, "--root", str(root), "-j", "1", "--output", str(tmp_path / "bad.txt")])


def test_check_says_what_is_missing_by_table_and_by_image(tmp_path, caplog):
    root = tmp_path / "embed"
    truth = make_embed(root)
    with caplog.at_level("INFO", logger="medslip"):
        check("embed_birads", root, tmp_path)
    said = caplog.text
    assert "1 of 43 rows go with no row of" in said and "rows go with several of" in said
    assert re.search(r"9 of 144 rows are left out, no row of .*clinical_reduced.csv goes with them", said)
    assert f"all: {len(truth)} images, 0 of them cannot be decoded" in said
    first, second = sorted(truth)[:2]
    (root / first).unlink()
    (root / second).write_bytes((root / second).read_bytes()[:300])
    with pytest.raises(ValueError, match="2 images cannot be decoded"):
        check("embed_birads", root, tmp_path)
    named = (tmp_path / "bad.txt").read_text()
    assert first in named and second in named
    (root / "tables" / "EMBED_OpenData_clinical_reduced.csv").unlink()
    with pytest.raises(FileNotFoundError, match="clinical_reduced.csv does not exist"):
        check("embed_birads", root, tmp_path)


def test_a_row_whose_file_is_not_there_is_said_and_refused_where_it_is_read(tmp_path, caplog):
    truth = make_inbreast(tmp_path / "set")
    gone = sorted(truth)[3]
    (tmp_path / "set" / gone).unlink()
    with pytest.raises(ValueError, match="1 images cannot be decoded"):
        check("inbreast_birads", tmp_path / "set", tmp_path)
    number = gone.split("/")[1].split("_")[0]
    assert f"1 rows have no file below {tmp_path / 'set'} that fits, first AllDICOMs/{number}_*_MG_*.dcm" in caplog.text
    found = every_row("inbreast_birads", tmp_path / "set")
    assert len(found) == len(truth)


def test_the_films_of_a_side_that_the_table_does_not_name_have_no_label(trees, caplog):
    root, truth = trees["cmmd"]
    every_row("cmmd", root)
    films = len(list((root / "CMMD").rglob("*.dcm")))
    assert films > len(truth)
    assert f"{films - len(truth)} files are of no row, by ImageLaterality in their headers" in caplog.text


def test_cmmds_workbook_is_its_table(tmp_path):
    """As TCIA publishes it, where nobody has saved it as CSV."""
    openpyxl = pytest.importorskip("openpyxl")
    truth = make_cmmd(tmp_path, patients=8)
    table = tmp_path / "CMMD_clinicaldata_revision.csv"
    as_csv = every_row("cmmd", tmp_path)
    book = openpyxl.Workbook()
    with open(table, newline="") as file:
        for row in csv.reader(file):
            book.active.append([int(cell) if cell.isdecimal() else cell or None for cell in row])
    book.create_sheet("notes").append(["not", "this"])
    book.save(table.with_suffix(".xlsx"))
    table.unlink()
    as_book = every_row("cmmd", tmp_path)
    assert as_book.rows == as_csv.rows and len(as_book) == len(truth)
    assert np.array_equal(as_book.labels, as_csv.labels)
    table.with_suffix(".xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="revision.xlsx is no Excel workbook that can be read"):
        every_row("cmmd", tmp_path)


def test_a_patient_whose_films_are_not_there_is_missing_and_not_twice_there(tmp_path, caplog):
    """Of both breasts, which one folder holds; and sides in lower case are sides."""
    truth = make_cmmd(tmp_path)
    table = tmp_path / "CMMD_clinicaldata_revision.csv"
    patients = [row["ID1"] for row in read_rows(table)]
    both = next(name for name in patients if patients.count(name) == 2)
    table.write_text(table.read_text().replace(",L,", ",l,"))
    assert len(every_row("cmmd", tmp_path)) == len(truth)
    shutil.rmtree(tmp_path / "CMMD" / both)
    with pytest.raises(ValueError, match="2 images cannot be decoded"), caplog.at_level("INFO", logger="medslip"):
        check("cmmd", tmp_path, tmp_path)
    said = rf"2 rows have no file below .* that fits, first CMMD/{both}/\*/\*/\*.dcm \(ImageLaterality [lR]\)"
    assert re.search(said, caplog.text)


def test_check_names_files_without_a_row_and_sets_that_cannot_be_evaluated(tmp_path, caplog):
    root = tmp_path / "vindr"
    make_vindr(root, studies=6)
    table = root / "breast-level_annotations.csv"
    lines = table.read_text().splitlines()
    with caplog.at_level("INFO", logger="medslip"):
        check("vindr_birads", root, tmp_path)
        assert "are of no row" not in caplog.text
        table.write_text("\n".join(lines[:-2]))
        check("vindr_birads", root, tmp_path)
        assert f"{root / 'images'}: 2 images are of no row of the table, first images/" in caplog.text
        table.write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
        check("vindr_birads", root, tmp_path)
    assert "no column that tells a training and a test split: main_linear.py --cross-validate 5" in caplog.text
    (root / lines_of_images(lines)[0]).unlink()
    with pytest.raises(ValueError, match=f"first {lines_of_images(lines)[0]}: see"):
        check("vindr_birads", root, tmp_path)
    table.write_text(lines[0].removesuffix(",split") + "\n")
    with pytest.raises(ValueError, match="vindr_birads: no image of all"):
        check("vindr_birads", root, tmp_path)


def lines_of_images(lines):
    return [f"images/{line.split(',')[0]}/{line.split(',')[2]}.dicom" for line in lines[1:]]


def test_all_faults_of_a_table_are_named_at_once(tmp_path):
    make_vindr(tmp_path)
    table = tmp_path / "breast-level_annotations.csv"
    lines = table.read_text().splitlines()
    lines[3] = re.sub("BI-RADS .", "BI-RADS 0", lines[3])
    lines[5] = lines[5].replace("training", "test")
    lines[9] = re.sub("BI-RADS .", "", lines[9])
    table.write_text("\n".join([*lines, lines[7]]))
    with pytest.raises(ValueError) as refused:
        downstream.open_splits("vindr_birads", find_set("vindr_birads", str(tmp_path), "dataset_catalog.json"))
    for fault in (
        "1 groups are in both",
        "is there twice",
        "row 9 has no breast_birads",
        "the label 'BI-RADS 0' is not",
    ):
        assert fault in str(refused.value)


def test_embeds_tables_that_do_not_meet_are_refused_and_odd_labels_named(tmp_path, caplog):
    root = tmp_path / "embed"
    make_embed(root)
    clinical = root / "tables" / "EMBED_OpenData_clinical_reduced.csv"
    text = clinical.read_text()
    clinical.write_text(text.replace(",K,", ",X,", 1))
    with pytest.raises(ValueError, match="gravest_first"):  # an odd label among several rows of a breast
        clinical.write_text(text.replace(",M,", ",X,", 1))
        check("embed_birads", root, tmp_path)
    clinical.write_text(text.replace(",K,", ",X,", 1))
    check("embed_birads", root, tmp_path)
    assert re.search(r"without a row of asses .*'X' \(\d+ rows\)", caplog.text) and "'A' (" in caplog.text
    clinical.write_text(re.sub(r"(?m)^(\d+,\d+),80\d+", r"\1,8.10E+15", text))
    with pytest.raises(ValueError, match="no row of .* goes with one of .* by empi_anon, acc_anon, .*side, first "):
        check("embed_birads", root, tmp_path)


def test_a_unit_that_cannot_be_measured_says_why(trees, checkpoint, tmp_path, caplog):
    """One exam's images are of one class alone."""
    root, _ = trees["vindr_birads"]
    with caplog.at_level("INFO", logger="medslip"):
        found = probe("vindr_birads", root, checkpoint, tmp_path, "--cache-features")
    silent = {unit for unit, entry in found["units"].items() if entry["metrics"] is None}
    assert {unit for unit, entry in found["units"].items() if entry.get("why")} == silent
    for unit in silent:
        assert f"By {unit} ({found['units'][unit]['number']}): no figure, {found['units'][unit]['why']}" in caplog.text
    assert silent


def test_films_whose_headers_do_not_say_the_side_are_refused(tmp_path):
    truth = make_cmmd(tmp_path, patients=4)
    torn, text = sorted(truth)[:2]
    (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:200])
    (tmp_path / text).write_text("no film")
    with pytest.raises(ValueError, match="2 files do not say which row they are of: .*1-1.dcm"):
        every_row("cmmd", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"columns": {"image": "images/{study_id}/{image}.dicom"}}, "no column image"),
        ({"columns": {"image": "images/{study_id/{image_id}"}}, "has a brace that is no"),
        ({"columns": {"image": "../{image_id}.dicom"}}, "may leave the data root"),
        ({"header": {"ImageLaterality": "laterality"}}, "its image is no such path"),
        ({"rows": "laterality = L"}, "is no expression"),
        ({"join": {"table": "x.csv"}}, '"join" has table and on'),
        (
            {"join": {"table": "x.csv", "on": ["study_id"], "any": {"side": ["B"]}}},
            "cells of the other table's columns",
        ),
        ({"join": {"table": "x.csv", "on": ["a"], "any": {"a": "B"}}}, "cells of the other table's columns a"),
        ({"rows": 5}, '"rows" is an expression'),
        ({"columns": {"image": "images/{study_id}/{*view_position}*.dicom"}}, "has a column view_position"),
        ({"join": {"table": "x.csv", "on": ["study_id"]}}, "x.csv does not exist"),
        ({"rows": "laterality == X"}, "\"rows\" 'laterality == X': no row of"),
        ({"unit": {"breast": ["laterality"]}}, "is of 20 groups; it is of one"),
    ],
)
def test_an_entry_that_does_not_do_is_refused(trees, tmp_path, change, message):
    root, _ = trees["vindr_birads"]
    columns = read_catalog()["vindr_birads"]["columns"] | change.get("columns", {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        catalog = catalog_at(root, "vindr_birads", tmp_path / "c.json", **change | {"columns": columns})
        downstream.open_every_row("vindr_birads", read_catalog(catalog), None)


def test_several_rows_of_other_labels_need_to_be_told_which_counts(trees, tmp_path):
    root, _ = trees["embed_birads"]
    join = dict(read_catalog()["embed_birads"]["join"])
    for gravest, message in ((None, "has rows of several labels for it"), (["N", "M"], "A among them|P among them")):
        join["gravest_first"] = gravest
        if gravest is None:
            del join["gravest_first"]
        catalog = catalog_at(root, "embed_birads", tmp_path / "c.json", join=join)
        with pytest.raises(ValueError, match=message):
            downstream.open_every_row("embed_birads", read_catalog(catalog), None)


def test_a_cell_does_not_leave_the_root_and_is_no_pattern(tmp_path):
    make_vindr(tmp_path, studies=3)
    table = tmp_path / "breast-level_annotations.csv"
    text = table.read_text()
    for cell, message in (("../../etc", "may leave the data root"), ("", "row 1 has no image")):
        table.write_text(text.replace(f"{0:032x}", cell, 1))
        with pytest.raises(ValueError, match=message):
            every_row("vindr_birads", tmp_path)
    template = PathTemplate("a/{x}_{*who}_*.dcm")
    assert (template.columns, template.captured, template.searched) == (["x"], ["who"], True)
    assert template.fill({"x": "20586908.0"})[0] == "a/20586908_*_*.dcm" and template.fill({"x": "NaN"}) is None
    shown, pattern, expression = template.fill({"x": "1*[2]"})
    assert shown == "a/1*[2]_*_*.dcm" and pattern == "a/1[*][[]2]_*_*.dcm"
    assert re.fullmatch(expression, "a/1*[2]_me_MG_R.dcm")[1] == "me"
    assert not re.fullmatch(expression, "a/11[2]_me_x.dcm")


def test_zero_shot_asks_every_row_of_a_set_without_splits(trees):
    root, truth = trees["rsna_cancer"]
    found = downstream.load_zeroshot_set("rsna_cancer", lambda image, rng=None: np.asarray(image), find_set(
        "rsna_cancer", str(root), "dataset_catalog.json"))  # fmt: skip
    assert len(found.dataset) == len(truth) and list(found.classnames) == ["without cancer", "with cancer"]


@pytest.mark.parametrize("name", ["vindr_birads", "cmmd", "inbreast_birads"])
def test_a_shrunk_copy_is_the_same_set_seen_smaller(name, trees, tmp_path):
    """Full decoding, then the same resize: no pixel differs; labels, patients and sides are found as before."""
    root, truth = trees[name]
    counts = shrink.shrink_tree(root, tmp_path / "small", 10)
    assert (
        counts["shrunk"] == sum(file.suffix in (".dcm", ".dicom") for file in root.rglob("*"))
        and not counts["unreadable"]
    )
    whole, small = every_row(name, root), every_row(name, tmp_path / "small")
    assert small.rows == whole.rows and np.array_equal(small.labels, whole.labels) and len(small) == len(truth)
    for i in range(0, len(whole), 7):
        expected = whole.image(i).resize((10, 12), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(small.image(i)), np.asarray(expected))


def test_the_catalogs_entries_are_written_as_their_order_says():
    catalog = read_catalog()
    for name in ("vindr_birads", "vindr_density", "embed_birads", "embed_density", "inbreast_birads"):
        assert catalog[name]["ordered"] and len(catalog[name]["labels"]) == len(catalog[name]["classes"])
