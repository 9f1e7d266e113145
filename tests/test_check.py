"""make_dataset.py check on small trees with an image that is torn."""

import subprocess
import sys

import pytest
from helpers import ROOT
from roco_tree import make_roco
from test_csv_sets import write_set

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


def test_a_set_of_the_catalog_has_its_classes_and_groups_counted(tmp_path, caplog):
    catalog = write_set(tmp_path / "set")
    argv = ["check", "--set", "hospital", "--catalog", str(catalog), "-j", "1", "--output", str(tmp_path / "bad.txt")]
    with caplog.at_level("INFO", logger="medslip"):
        make_dataset.main(argv)
    assert "train: " in caplog.text and "3 classes of" in caplog.text and "groups" in caplog.text
    next((tmp_path / "set" / "images").glob("*.png")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="1 images cannot be decoded"):
        make_dataset.main(argv)
    with pytest.raises(ValueError, match="one of the two"):
        make_dataset.main(["check"])
    with pytest.raises(FileNotFoundError, match="no split of roco"):
        make_dataset.main(["check", "--dataset", "roco", "--root", str(tmp_path)])
