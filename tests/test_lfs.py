"""What a clone without Git LFS leaves in place of large files: every reader says so, and what brings them."""

import zipfile
from pathlib import Path

import pytest

import models
import utils
from datasets import create_reader
from evaluation.heads import load_heads
from evaluation.predictions import Predictions
from inputs import archives, images, metadata
from preparation import cbis_tables, unpack, yfcc
from runtime import checkpoints, integrity
from towers import medclip, pretrained
from towers.files import read_pretrained

# As git-lfs.com has it in its specification.
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def roco(path: Path) -> object:
    (path.parent / "train" / "radiology").mkdir(parents=True)
    path.rename(path.parent / "train" / "radiology" / "captions.txt")
    return create_reader("roco", str(path.parent))


def exported(path: Path) -> object:
    (path.parent / "config.json").write_text("{}")
    return read_pretrained(path.parent)


def zenodo(path: Path) -> object:
    captions = path.with_name("train_captions.csv")
    captions.write_text("ID,Caption\n1,a\n")
    return list(unpack.zenodo_samples(captions))


READERS = {
    "checkpoint.pt": checkpoints.load_checkpoint,
    "checkpoint_best.pt": lambda path: checkpoints.load_checkpoint(path, mmap=True),
    "slip.pt": models.load_pretrained,
    "model.safetensors": exported,
    "tower.safetensors": pretrained.read_state,
    "tower.bin": pretrained.read_state,
    "medclip-vit.zip": models.load_pretrained,
    "pytorch_model.bin": medclip.read_weights,
    "vocab.txt": lambda path: pretrained._bert_vocabulary(path.parent),
    "head.safetensors": load_heads,
    "bank.npz": integrity.read_arrays,
    "config.json": utils.read_json,
    "train-0.parquet": lambda path: unpack.open_parquet(path, {}),
    "train_images.zip": zenodo,
    "345.zip": lambda path: archives.ZipPool().read(path, "678.jpg"),
    "0.tar": lambda path: create_reader("webdataset", str(path)),
    "pairs.csv": lambda path: create_reader("csv", str(path.parent), str(path)),
    "predictions.csv": Predictions.read,
    "captions.txt": roco,
    "cc3m.npy": metadata.read_pickle,
    "captions.json": lambda path: list(metadata.iter_json(path)),
    "ids.npy": yfcc.read_ids,
    "subset.tsv": yfcc.read_subset,
    "image.png": images.read_image,
    "image.jpg": lambda path: images.decode_pixels(path.read_bytes(), str(path)),
    "image.dcm": images.read_image,
    "1-1.dcm": cbis_tables.dicom_description,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_called_one_and_git_lfs_pull_named(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name}.*Git LFS pointer.*`git lfs pull`") as refused:
        READERS[name](tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_torn_archive_is_still_called_so(tmp_path):
    (tmp_path / "345.zip").write_bytes(b"PK\3\4 torn")
    with pytest.raises(ValueError, match="345.zip is torn or no zip file"):
        archives.open_zip(tmp_path / "345.zip")
    with zipfile.ZipFile(tmp_path / "345.zip", "w") as archive:
        archive.writestr("678.jpg", b"bytes")
    assert archives.ZipPool().read(tmp_path / "345.zip", "678.jpg") == b"bytes"
