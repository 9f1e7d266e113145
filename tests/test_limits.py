"""What a file may ask for: its declared size is judged before anything of that size is made."""

import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, environment
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_dicom import write_dicom

from inputs import metadata
from inputs.archives import ZipPool
from inputs.images import UnreadableImage, decode_image, read_image
from preparation import audit, unpack
from runtime import checkpoints, limits
from towers import medclip


@pytest.fixture
def at_most(monkeypatch):
    def limit(limit: limits.Limit, number: int) -> None:
        monkeypatch.setenv(limit.variable, str(number))
        if limit is limits.PIXELS:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", number // 2)

    return limit


def test_an_image_of_more_pixels_is_refused_before_it_is_decoded(tmp_path, at_most, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "image.png")
    at_most(limits.PIXELS, 10_000)
    assert read_image(tmp_path / "image.png").size == (100, 100)
    at_most(limits.PIXELS, 9_998)
    monkeypatch.setattr(Image.Image, "load", lambda img: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="image.png: .*set MEDSLIP_MOST_PIXELS"):
        read_image(tmp_path / "image.png")
    assert "set MEDSLIP_MOST_PIXELS" in audit.small_image(8, tmp_path / "image.png")


def test_a_dicom_of_more_pixels_is_refused_before_they_are_decoded(tmp_path, at_most, monkeypatch):
    path = tmp_path / "image.dcm"
    write_dicom(path, np.zeros((100, 100), np.uint16))
    at_most(limits.PIXELS, 9_999)
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="image.dcm: it declares 10,000 pixels, above the limit of 9,999; .*set"):
        read_image(path)


def test_a_deflated_dicom_is_inflated_up_to_the_limit(tmp_path, at_most, monkeypatch):
    import pydicom

    path = tmp_path / "image.dcm"
    write_dicom(path, np.arange(10_000, dtype=np.uint16).reshape(100, 100) % 4096)
    expected = read_image(path)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    data = path.read_bytes()
    assert len(data) < 20_000 and decode_image(data, "x") == expected
    at_most(limits.BYTES, 19_999)
    monkeypatch.setattr("pydicom.dcmread", lambda *_, **__: pytest.fail("inflated"))
    with pytest.raises(UnreadableImage, match="set MEDSLIP_MOST_BYTES"):
        decode_image(data, "x")


@pytest.fixture
def packed(tmp_path):
    """An archive of some kilobytes whose members unpack to a megabyte each."""
    path = tmp_path / "test_images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("1.jpg", medclip.WEIGHTS_NAME):
            archive.writestr(name, bytes(1 << 20))
    assert path.stat().st_size < 5000
    return path


def test_a_member_of_a_zip_is_unpacked_up_to_the_limit(packed, at_most, monkeypatch):
    assert ZipPool().read(packed, "1.jpg") == bytes(1 << 20)
    at_most(limits.BYTES, (1 << 20) - 1)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(UnreadableImage, match=r"1.jpg declares 1,048,576 bytes, .*set MEDSLIP_MOST_BYTES"):
        ZipPool().read(packed, "1.jpg")
    (packed.parent / "test_captions.csv").write_text("ID,Caption\n1,text\n")
    (sample,) = unpack.zenodo_samples(packed.parent / "test_captions.csv")
    with pytest.raises(UnreadableImage, match=r"1.jpg declares 1,048,576 bytes"):
        sample.data()
    with pytest.raises(ValueError, match=r"pytorch_model.bin declares 1,048,576 bytes, .*set MEDSLIP_MOST_BYTES"):
        medclip.read_weights(packed)


def test_a_checkpoint_that_was_packed_is_unpacked_up_to_the_limit(tmp_path, at_most):
    torch.save({"weight": torch.zeros(100_000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    at_most(limits.BYTES, 300_000)
    assert len(checkpoints.load_checkpoint(tmp_path / "stored.pt")["weight"]) == 100_000
    with pytest.raises(ValueError, match=r"packed.pt, unpacked, declares [\d,]+ bytes, .*set MEDSLIP_MOST_BYTES"):
        checkpoints.load_checkpoint(tmp_path / "packed.pt")


def test_a_row_group_of_a_table_is_unpacked_up_to_the_limit(tmp_path, at_most):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"image": [{"bytes": bytes(50_000), "path": f"{i}.jpg"} for i in range(20)], "caption": ["text"] * 20}
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=10)
    assert len(list(unpack.parquet_samples(path, {}))) == 20 and path.stat().st_size < 400_000
    at_most(limits.BYTES, 40_000)
    with pytest.raises(ValueError, match="row group 0 declares .* bytes, above the limit of 40,000"):
        next(unpack.parquet_samples(path, {}))


READ = """
import sys
from inputs import metadata
from runtime import limits

limits._SPARE = 0
try:
    metadata.read_pickle(sys.argv[1])
except ValueError as error:
    print(error)
spent = bytearray(100 << 20)  # the limit went with the block
print(len(metadata.read_pickle(sys.argv[2])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit elsewhere")
def test_a_pickle_takes_memory_in_proportion_to_its_size(tmp_path, at_most):
    """In a process that has no memory of earlier work to give."""
    for n in (2_000_000, 20):
        (tmp_path / f"{n}.pkl").write_bytes(pickle.dumps([[] for _ in range(n)]))
    at_most(limits.MEMORY, 2)
    argv = [sys.executable, "-c", READ, str(tmp_path / "2000000.pkl"), str(tmp_path / "20.pkl")]
    done = subprocess.run(argv, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "2000000.pkl asks for more than 2 bytes of memory for each byte" in first and second == "20", done.stderr


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="captions.json near character 1: .*recursion"):
        list(metadata.iter_json(path))
    path.write_text(json.dumps({"a": 1, "annotations": [1, 2]}))
    assert list(metadata.iter_json(path, "annotations")) == [1, 2]


def test_a_limit_is_a_number(monkeypatch):
    monkeypatch.setenv("MEDSLIP_MOST_BYTES", "4G")
    with pytest.raises(ValueError, match="MEDSLIP_MOST_BYTES=4G: give a whole number of bytes"):
        _ = limits.BYTES.most
