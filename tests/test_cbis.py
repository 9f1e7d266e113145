"""The reader of the lesion tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cbis_tree import make_small_cbis
from PIL import Image

from inputs.cbis import CBIS_CLASSES, CbisLesions
from inputs.transforms import Preprocess
from preparation.cbis_tables import make_cbis


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cbis")
    make_small_cbis(root)
    make_cbis(root)
    return root


def test_reader_gives_image_label_and_row(small):
    root = small
    preprocess = Preprocess(size=16)
    for image in ("crop", "full", "mask"):
        lesions = CbisLesions(root, "calc", "val", image, preprocess)
        pixels, label, row = lesions[3]
        grey = np.asarray(Image.open(root / row[image]).convert("L").resize((16, 16), Image.Resampling.BILINEAR))
        expected = (grey / 255 - 0.485) / 0.229
        assert np.abs(pixels[0].numpy() - expected).max() < 0.02
        assert label == CBIS_CLASSES.index(row["pathology"]) == lesions.labels[3]
        assert lesions.patients[3] == row["patient"]


@pytest.mark.parametrize("wrong", [{"kind": "masses"}, {"split": "validation"}, {"image": "lesion"}])
def test_reader_lists_the_choices(small, wrong):
    with pytest.raises(ValueError, match=f"unknown {next(iter(wrong))} .* choose from"):
        CbisLesions(**{"root": small, "kind": "calc", "split": "test", **wrong})


def test_reader_refuses_foreign_tables(tmp_path, small):
    with pytest.raises(FileNotFoundError, match="make_dataset.py cbis"):
        CbisLesions(tmp_path, "calc", "test")
    text = (small / "calc.csv").read_text()
    (tmp_path / "calc.csv").write_text(text.replace("patient", "person", 1))
    with pytest.raises(ValueError, match="no column patient"):
        CbisLesions(tmp_path, "calc", "test")
    (tmp_path / "calc.csv").write_text(text.replace("jpeg/", "../jpeg/", 1))
    with pytest.raises(ValueError, match=r"row 1.*\.\./jpeg"):
        CbisLesions(tmp_path, "calc", "test")
    (tmp_path / "calc.csv").write_text(text.replace("MALIGNANT", "MALIGNANTISH", 1))
    with pytest.raises(ValueError, match="MALIGNANTISH"):
        CbisLesions(tmp_path, "calc", "test")
