"""One epoch of pre-training on each publisher's layout, through main.py."""

import math

import pytest
import test_datasets as trees
from test_main import command, weights

import main

LAYOUTS = {
    "yfcc15m": (trees.make_yfcc, "yfcc15m.pkl"),
    "coco": (trees.make_coco, "annotations/captions_train2017.json"),
    "cc3m": (lambda root: trees.make_cc(root, "cc3m", "image_id"), "cc3m.npy"),
    "cc12m": (lambda root: trees.make_cc(root, "cc12m", "image_name"), "cc12m.npy"),
    "redcaps": (lambda root: trees.make_redcaps(root, "images"), "redcaps_v1.json"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_epoch_on_each_source(name, tmp_path):
    make, metadata = LAYOUTS[name]
    root = tmp_path / name
    root.mkdir()
    make(root)
    argv = command(
        root,
        tmp_path / "run",
        "--metadata",
        str(root / metadata),
        "--batch-size",
        "1",
        "--epochs",
        "1",
        model="CLIP_VITT16",
    )  # without BatchNorm, which needs two rows: some trees hold one image
    argv[argv.index("--dataset") + 1] = name
    row = main.main(argv)
    assert math.isfinite(row["loss"]) and weights(tmp_path / "run")
