"""Which files of a folder are images."""

import os
from pathlib import Path

import pytest
from PIL import Image
from test_dicom import LINE, write_dicom

import predict
from inputs.files import images_below
from preparation import audit


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
    assert [str(path.relative_to(folder)) for path in predict.find_images([folder])] == EXPECTED
    assert [str(path.relative_to(folder)) for path in audit.list_images(folder)] == EXPECTED
