"""make_dataset.py check on small trees with an image that is torn."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from helpers import ROOT
from PIL import Image
from roco_tree import make_roco
from test_csv_sets import read_rows, write_set

import make_dataset


def test_pairs_are_counted_by_split_and_torn_images_named(tmp_path, caplog):
    root = make_roco(tmp_path / "roco")
    argv = ["check", "--dataset", "roco", "--root", str(root), "--output", str(tmp_path / "bad.txt"), "-j"]
    with caplog.at_level("INFO", logger="medslip"):
        make_dataset.main([*argv, "1"])
    for split, n in (("train", 24), ("validation", 8), ("test", 4)):
        assert f"{split}: {n} images with captions, 0 of them cannot be decoded" in caplog.text
    assert not (tmp_path / "bad.txt").exists()
    torn = root / "validation" / "radiology" / "images" / "ROCO_00026.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    for workers in "12":
        with pytest.raises(ValueError, match="1 images cannot be decoded, first .*ROCO_00026.jpg"):
            make_dataset.main([*argv, workers])
    done = subprocess.run([sys.executable, ROOT / "make_dataset.py", *argv, "2"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: 1 images cannot be decoded, first" in done.stderr
    assert (tmp_path / "bad.txt").read_text().count("\n") == 1


def test_a_set_of_the_catalog_has_its_classes_and_patients_counted(tmp_path, caplog):
    catalog = write_set(tmp_path / "set")
    argv = ["check", "--set", "hospital", "--catalog", str(catalog), "-j", "1", "--output", str(tmp_path / "bad.txt")]
    with caplog.at_level("INFO", logger="medslip"):
        make_dataset.main(argv)
    head, train, test = table_of(caplog)
    assert head == ["images", "patients", "benign", "malignant", "normal", "not", "found"]
    rows = read_rows(tmp_path / "set" / "table.csv")
    for split, *cells in (train, test):
        own = [row for row in rows if row["part"] == split]
        of_class = Counter(row["diagnosis"] for row in own)
        patients = len({row["patient"] for row in own})
        assert list(map(int, cells)) == [len(own), patients, *(of_class[name] for name in head[2:5]), 0]
    next((tmp_path / "set" / "images").glob("*.png")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="1 images cannot be decoded"):
        make_dataset.main(argv)
    with pytest.raises(ValueError, match="one of the two"):
        make_dataset.main(["check"])
    with pytest.raises(FileNotFoundError, match="no split of roco"):
        make_dataset.main(["check", "--dataset", "roco", "--root", str(tmp_path)])


def table_of(caplog) -> list[list[str]]:
    """The cells of the table that was printed first."""
    record = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("\n"))
    return [line.split() for line in record.strip().split("\n")]


def test_all_that_is_odd_about_a_set_is_on_one_screen(tmp_path, caplog):
    folder, name = tmp_path / "set", unicodedata.normalize("NFD", "röntgen.png")
    folder.mkdir()
    for file in (name, "1.png", "2.png", "3.png"):
        Image.new("L", (8, 8)).save(folder / file)
    (folder / "4.png").symlink_to(folder / "not fetched.png")  # as good as absent
    rows = ["röntgen.png,a,Train,7", "1.png,b,train,8", "4.png,a,train,9", "2.png,a,test,7.0", "3.png,rare,test,6",
            "0.png,a,val,1"]  # fmt: skip
    (folder / "table.csv").write_text("\n".join(["image,label,split,patient_id", *rows]) + "\n", encoding="utf-8")
    entry = {"path": str(folder), "type": "csv", "train": "train", "test": "test"}
    (tmp_path / "catalog.json").write_text(json.dumps({"hospital": entry}))
    argv = ["check", "--set", "hospital", "--catalog", str(tmp_path / "catalog.json"), "--output",
            str(tmp_path / "bad.txt"), "-j", "0"]  # fmt: skip
    with caplog.at_level("INFO", logger="medslip"), pytest.raises(ValueError, match="1 images cannot be decoded"):
        make_dataset.main(argv)
    assert table_of(caplog)[1:] == [["train", "3", "2", "1", "0", "1", "1"], ["test", "2", "1", "0", "1", "0"]]
    for said in ("1 rows of other splits left out: 'val' 1", "'patient_id' that the catalog entry does not name (1 of "
                 "its values", "classes without training images: rare (1 test)", "classes without test images: b (1",
                 "train: 1 names differ from the disk's in the form of accented letters"):  # fmt: skip
        assert caplog.text.count(said) == 1, said
    assert len(caplog.messages) <= 12
    entry["columns"] = {"group": "patient_id"}
    (tmp_path / "catalog.json").write_text(json.dumps({"hospital": entry}))
    rows += ["1.png,,test,5", "2.png,A,train,4"]
    (folder / "table.csv").write_text("\n".join(["image,label,split,patient_id", *rows]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        make_dataset.main(argv)
    for said in ("1 groups are in both train and test, first '7'", "the image 1.png is there twice, and so are 1 more",
                 "row 7 has no label", "'A' (1 rows), 'a' (3 rows)"):  # fmt: skip
        assert said in str(error.value)


def test_pairs_have_their_patients_counted(tmp_path, caplog):
    for i in range(4):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    for split, patients in (("train", ("P1", "P1", "P2")), ("validation", ("P2",))):
        lines = [f"{i + 3 * (split != 'train')}.png,text,{patient}" for i, patient in enumerate(patients)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,caption,patient", *lines, "9.png,text,P9"]) + "\n")
    with caplog.at_level("INFO", logger="medslip"):
        make_dataset.main(["check", "--dataset", "csv", "--root", str(tmp_path), "-j", "0"])
    assert table_of(caplog) == [["images", "groups", "not", "found"], ["train", "3", "3", "1"],
                                ["validation", "1", "2", "1"]]  # fmt: skip
    assert "2 groups are in both train and validation, first 'P2'" in caplog.text
