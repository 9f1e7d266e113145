"""Which files of a folder are images, and names in another form than the disk's."""

import os
import shutil
import unicodedata
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from test_dicom import LINE, write_dicom

import predict
from datasets import create_reader
from evaluation import downstream, features
from inputs import files
from inputs import images as images_module
from inputs.files import images_below, on_disk
from preparation import audit, unpack


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images, among them DICOM without an ending, in a linked folder and in other letters; and what is none."""
    root = tmp_path / "set"
    for place in ("a", "a/@eaDir/0.png", "b", ".hidden"):
        (root / place).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("a/0.png", "a/1.TIFF", "a/@eaDir/0.png/THUMB.jpg", ".hidden/2.png", "../elsewhere/3.gif"):
        Image.new("L", (8, 8)).save(root / place)
    for place in ("b/IM000001", "b/two.IMA", "b/three.dicom"):
        write_dicom(root / place, LINE)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    for place in ("a/notes.txt", "a/more.txt", "b/README", "a/._0.png"):
        (root / place).write_bytes(b"\0\5\x16\7" * 100)
    os.mkfifo(root / "b" / "pipe")
    return root


EXPECTED = ["a/0.png", "a/1.TIFF", "b/IM000001", "b/three.dicom", "b/two.IMA", "c/3.gif"]


def test_images_are_found_by_ending_or_content_and_what_is_passed_over_is_counted(folder, caplog):
    with caplog.at_level("INFO", "medslip"):
        found = [os.path.relpath(path, folder) for path in images_below(folder)]
    assert found == EXPECTED
    assert "4 files are no images and were passed over (by their endings: 2 .txt, 2 without one)" in caplog.text


def test_every_command_takes_the_same_files_of_a_folder(folder):
    assert [str(path.relative_to(folder)) for path in predict.find_files([folder])] == EXPECTED
    assert [str(path.relative_to(folder)) for path in audit.list_images(folder)] == EXPECTED


FORMS = [("NFD", "NFC"), ("NFC", "NFD")]  # of the names on disk, and of those in a table
NAME = "Müller {}_röntgen"


def form(kind: str, i: int) -> str:
    return unicodedata.normalize(kind, NAME.format(i))


def pictures(folder: Path, kind: str, suffix: str = ".png") -> None:
    """Six images whose grey tells their number."""
    folder.mkdir(parents=True)
    for i in range(6):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{form(kind, i)}{suffix}")


@pytest.mark.parametrize("there, listed", FORMS)
def test_a_name_is_found_in_the_other_form_of_its_letters(tmp_path, there, listed):
    folder = tmp_path / unicodedata.normalize(there, "Bänder")
    pictures(folder, there)
    wanted = tmp_path / unicodedata.normalize(listed, "Bänder") / f"{form(listed, 3)}.png"
    assert not wanted.exists() and on_disk(wanted) == folder / f"{form(there, 3)}.png"
    assert on_disk(tmp_path / "ärger.png") == tmp_path / "ärger.png"  # nowhere
    (folder / "\u1ea5.png").touch()
    assert on_disk(folder / "a\u0302\u0301.png").name == "\u1ea5.png"
    (folder / "\u00e2\u0301.png").touch()  # may be either of the two
    files._accented.cache_clear()  # two changes may fall into one tick of the disk's clock
    assert on_disk(folder / "a\u0302\u0301.png").name == "a\u0302\u0301.png"
    (folder / "a\u0302\u0301.png").touch()
    assert on_disk(folder / "a\u0302\u0301.png").name == "a\u0302\u0301.png"  # the plain name first


@pytest.mark.parametrize("there, listed", FORMS)
def test_readers_of_pairs_and_labelled_sets_find_the_other_form(tmp_path, there, listed):
    pictures(tmp_path / "csv", there)
    lines = [f"{form(listed, i)}.png,text {i},{'ab'[i % 2]},{'train' if i < 4 else 'test'}" for i in range(6)]
    (tmp_path / "csv" / "table.csv").write_text("\n".join(["image,caption,label,split", *lines]) + "\n", "utf-8")
    reader = create_reader("csv", tmp_path / "csv", "table.csv")
    assert [reader.image(i).getpixel((0, 0))[0] for i in range(4)] == [0, 20, 40, 60] and reader.dropped == 0
    pictures(tmp_path / "roco" / "train" / "radiology" / "images", there, ".jpg")
    text = "".join(f"{form(listed, i).replace(' ', '_')}\ttext\n" for i in range(6))
    for path in (tmp_path / "roco" / "train" / "radiology" / "images").iterdir():
        path.rename(path.with_name(path.name.replace(" ", "_")))
    (tmp_path / "roco" / "train" / "radiology" / "captions.txt").write_text(text, "utf-8")
    assert len(create_reader("roco", tmp_path / "roco")) == 6
    entry = {"path": str(tmp_path / "csv"), "type": "csv", "train": "train", "test": "test"}
    found = downstream.create_downstream("set", True, None, {"set": entry})
    assert [found.image(i).getpixel((0, 0))[0] for i in range(4)] == [0, 20, 40, 60]
    before = list(features.identify(found))
    os.utime(tmp_path / "csv" / f"{form(there, 2)}.png", (1, 1))
    assert [i for i, part in enumerate(features.identify(found)) if part != before[i]] == [2]  # a changed file is seen
    images = predict.find_files([tmp_path / "csv" / "table.csv"])
    assert images_module.read_image(images[5]).getpixel((0, 0))[0] == 100 and images_module.image_size(images[5]) == (
        8,
        8,
    )


@pytest.mark.parametrize("there, listed", FORMS)
def test_classes_of_two_splits_are_one_in_either_form(tmp_path, there, listed):
    for split, kind in (("train", there), ("test", listed)):
        for name in ("Zähne", "a"):
            folder = tmp_path / split / unicodedata.normalize(kind, name)
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    entry = {"path": str(tmp_path), "type": "imagefolder", "train": "train", "test": "test"}
    train, test = downstream.open_splits(
        "set", {"set": entry | {"folders": ["a", unicodedata.normalize("NFD", "Zähne")]}}
    )
    assert train.classes == test.classes == ["a", "Zähne"] and train.labels.tolist() == test.labels.tolist() == [0, 1]
    assert [test.image(i).size for i in range(2)] == [(8, 8)] * 2


@pytest.mark.parametrize("there, listed", FORMS)
@pytest.mark.parametrize("zipped", [False, True])
def test_unpacking_finds_the_other_form(tmp_path, there, listed, zipped):
    source = tmp_path / "source"
    pictures(source / "train_images", there, ".jpg")
    lines = [f"{form(listed, i).replace(' ', '_')},text {i}" for i in range(6)]
    (source / "train_captions.csv").write_text("\n".join(["ID,Caption", *lines]) + "\n", "utf-8")
    for path in list((source / "train_images").iterdir()):
        path = path.rename(path.with_name(path.name.replace(" ", "_")))
        if zipped:
            with zipfile.ZipFile(source / "train_images.zip", "a") as archive:
                archive.write(path, path.name)
    if zipped:
        shutil.rmtree(source / "train_images")
    assert unpack.unpack(source, tmp_path / "out")["train"] == {"written": 6}
    assert len(create_reader("roco", tmp_path / "out")) == 6
