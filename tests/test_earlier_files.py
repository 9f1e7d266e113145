"""What commit 5f1b3f6 wrote is read as before: a checkpoint, features, an index, heads, an export, a bank of vectors.

The images of the small set are drawn again here; the answers beside the files are those of the commit that wrote them.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import GOLDENS, command
from PIL import Image
from roco_tree import make_roco
from source_tree import save_jpeg

import main
import main_linear
import models
import predict
from datasets import create_reader
from evaluation import downstream, features
from inputs import sources
from inputs.transforms import eval_view

EARLIER = GOLDENS / "run_of_5f1b3f6"
CATALOG = {"greys": {"path": "set", "type": "csv", "train": "train", "test": "test", "positive": "dense",
                     "columns": {"group": "group"}}}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A working folder with the small set, its catalog, and a copy of the files."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    (tmp_path / "set").mkdir()
    lines = ["image,label,split,group"]
    for i in range(24):
        Image.fromarray(np.full((40, 40), 60 + 100 * (i % 2) + 4 * (i // 2), np.uint8)).save(
            tmp_path / "set" / f"{i:02d}.png"
        )
        label, split = ("dense" if i % 2 else "fatty"), ("train" if i < 16 else "test")
        lines.append(f"{i:02d}.png,{label},{split},p{i // 2 if i < 16 else i}")
    (tmp_path / "set" / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "catalog.json").write_text(json.dumps(CATALOG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answered(rows: list[dict], file: str) -> None:
    expected = json.loads((EARLIER / file).read_text())
    assert [row["image"] for row in rows] == [row["image"] for row in expected] and rows[0].keys() == expected[0].keys()
    for row, then in zip(rows, expected, strict=True):
        for key, value in then.items():
            assert row[key] == (pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value), key


def test_a_probe_answers_as_it_did(world):
    answered(predict.main(["classify", "earlier/probe", "set", "--weights", "earlier/checkpoint.pt"]), "answers.json")


def test_a_fine_tuned_tower_answers_as_it_did(world):
    rows = predict.main(["classify", "earlier/tuned", "set", "--weights", "earlier/checkpoint.pt"])
    answered(rows, "tuned_answers.json")


def test_a_checkpoint_an_export_and_a_bank_hold_the_same_model(world):
    bank = np.load("earlier/bank.npz", allow_pickle=False)
    images = [f"set/{i:02d}.png" for i in range(24)]
    for source in ("checkpoint.pt", "export"):
        loaded = models.load_pretrained(f"earlier/{source}")
        assert loaded.training["finished"] and loaded.training["step"] == 6
        np.testing.assert_allclose(loaded.embed_images(images), bank["vectors"], atol=1e-5)
    found = predict.main(["search", "earlier/bank.npz", images[7], "--weights", "earlier/checkpoint.pt", "-k", "1"])
    assert found[0]["found"] == images[7]


def test_features_are_found_under_the_same_key(world, monkeypatch):
    """The key holds timm's release; the features are those of the release with which they were computed."""
    monkeypatch.setattr(timm, "__version__", "1.0.31")
    backbone = features.load_backbone("earlier/checkpoint.pt")
    pixels = (np.arange(6 * 16 * 16 * 3) % 251).astype(np.uint8).reshape(6, 16, 16, 3)
    images = downstream.ImageArray(pixels, ["a", "b"], np.array([0, 1] * 3), eval_view(backbone.preprocess))
    loading = features.Loading(batch_size=6)
    computed, _ = features.extract(backbone, images, "set", loading)
    monkeypatch.setattr(features, "extract", None)  # a miss would call it
    kept, numbers = features.extract_or_reuse(backbone, images, "set", loading, world / "earlier" / "features")
    np.testing.assert_allclose(kept, computed, atol=1e-5)
    assert numbers.tolist() == list(range(6))


def test_an_index_is_read_in_place_of_its_metadata(tmp_path, monkeypatch):
    """Its key names root, file and time: those of the copy are written into it, and nothing else is changed but the
    version, since the reader takes other rows from files with a list of images, which this one has not."""
    captions = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    captions.parent.mkdir(parents=True)
    shutil.copy(EARLIER / "coco_captions.json", captions)
    for i in (1, 2, 3):
        (tmp_path / "coco" / "train2017").mkdir(exist_ok=True)
        save_jpeg(tmp_path / "coco" / "train2017" / f"{i:012d}.jpg")
    create_reader("coco", tmp_path / "coco", cache_dir=tmp_path / "now")  # for the name, which is a hash of the place
    written = next((tmp_path / "now").glob("*.index"))
    with open(EARLIER / "coco.index", "rb") as file:
        head = json.loads(np.lib.format.read_array(file, allow_pickle=False).tobytes())
        file.seek(-file.tell() % 64, os.SEEK_CUR)
        arrays = file.read()
    stat = captions.stat()
    assert head["key"][5][0] == stat.st_size
    head["key"][0] = sources.Coco.index_version
    head["key"][3:] = [str(tmp_path / "coco"), str(captions), [stat.st_size, stat.st_mtime_ns]]
    with open(written, "wb") as file:
        np.save(file, np.frombuffer(json.dumps(head).encode(), np.uint8))
        file.write(b"\0" * (-file.tell() % 64) + arrays)
    monkeypatch.setattr(sources.Coco, "rows", None)
    reader = create_reader("coco", tmp_path / "coco", cache_dir=tmp_path / "now")
    assert [reader.captions(i) for i in range(3)] == [["a mass", "the same mass"], ["ein Rückenschmerz"], ["clear"]]
    assert reader.dropped == 1 and reader.name(1).endswith("000000000002.jpg")


def test_a_finished_run_and_a_linear_run_are_known_again(world):
    roco = make_roco(world / "roco")
    (world / "run").mkdir()
    shutil.copy("earlier/checkpoint.pt", "run/checkpoint.pt")
    sizes = ("vision.embed_dim=16", "vision.depth=1")
    argv = command(roco, "run", *sizes, model="SIMCLR_VITT16")
    for size in ("vision.embed_dim=32", "vision.depth=2"):
        argv.remove(size)
    main.main(argv)  # there is nothing left to do, which a run of other settings would be refused
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and not list(Path("run").glob("checkpoint_step*"))

    sgd = ["--dataset", "greys", "--catalog", "catalog.json", "--pretrained", "earlier/checkpoint.pt", "-j", "0",
           "-b", "8", "--epochs", "1", "--output-dir", "linear"]  # fmt: skip
    results = main_linear.main([*sgd, "--resume", "earlier/sgd/linear_checkpoint.pt"])
    assert results["score"] == 0.5
    with open("linear/predictions.csv") as file:
        assert len(list(csv.DictReader(file))) == 8
