"""make_dataset.py shards: what is written reads as its source does, here and in the webdataset library."""

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_tree import FILES, LARGE, grey_of, make_coco
from test_dicom import write_dicom

import make_dataset
import utils
from datasets import create_reader
from inputs import archives
from inputs.images import decode_image, to_rgb8
from preparation import shards, shrink

needs_webdataset = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="pip install webdataset")


def shard_bytes(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members |= {f"{path.stem}/{member.name}": archive.extractfile(member).read() for member in archive}
    return members


@needs_webdataset
@pytest.mark.parametrize("name", LARGE)
def test_any_reader_becomes_shards_that_read_the_same(tmp_path, name):
    make, captions, greys, _ = LARGE[name]
    make(tmp_path / "in")
    argv = [
        "shards",
        "--dataset",
        name,
        "--root",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
        "--shard-size",
        "1",
        "-j",
        "1",
    ]
    make_dataset.main(argv)
    source, reader = create_reader(name, tmp_path / "in"), create_reader("webdataset", tmp_path / "out")
    assert len(reader) == len(source) == len(captions) == len(list((tmp_path / "out").glob("*.tar")))
    assert [reader.captions(i) for i in range(len(reader))] == captions
    assert [reader.data(i) for i in range(len(reader))] == [source.data(i) for i in range(len(source))]
    assert [grey_of(reader.image(i)) for i in range(len(reader))] == pytest.approx(greys, abs=1)


@needs_webdataset
def test_shards_have_img2datasets_form_for_the_webdataset_library(tmp_path):
    import webdataset

    make_coco(tmp_path / "in")
    make_dataset.main(
        [
            "shards",
            "--dataset",
            "coco",
            "--root",
            str(tmp_path / "in"),
            "--output",
            str(tmp_path / "out"),
            "--shard-size",
            "10",
            "-j",
            "1",
        ]
    )
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    reader = create_reader("coco", tmp_path / "in")
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001"]
    for i, sample in enumerate(samples):
        assert sample["jpg"] == reader.data(i) and sample["txt"].decode() == reader.captions(i)[0]
        about = json.loads(sample["json"])
        assert about["captions"] == reader.captions(i) and str(tmp_path / "in" / about["name"]) == reader.name(i)


@pytest.fixture
def table(tmp_path) -> Path:
    """Pairs of the csv reader; the caption is the file's name."""
    root = tmp_path / "in"
    root.mkdir()
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    (root / "train.csv").write_text(
        "".join(f"{name},{name}\n" for name in ("image", *FILES)).replace("image,image", "image,caption")
    )
    return root


@needs_webdataset
def test_images_are_shrunk_to_the_short_side_or_copied_byte_for_byte(table, tmp_path):
    shards.make_shards(create_reader("csv", table), tmp_path / "out", short_side=60)
    reader = create_reader("webdataset", tmp_path / "out")
    for i, (name, data) in enumerate(FILES.items()):
        assert reader.captions(i) == [name]
        before, after = decode_image(data, name), Image.open(io.BytesIO(reader.data(i)))
        if min(before.size) <= 60:
            assert reader.data(i) == data
            continue
        short, long = sorted(before.size)
        assert sorted(after.size) == [60, round(long * 60 / short)]
        assert (after.width > after.height) == (before.width > before.height)
        assert after.format == ("PNG" if name in ("alpha.png", "deep.png", "really_a_png.jpg") else "JPEG")
        assert reader.name(i).endswith({"PNG": ".png", "JPEG": ".jpg"}[after.format])
        assert after.mode == ("L" if name in ("grey.jpg", "deep.png") else "RGB")
        reference = np.asarray(before.resize(after.size, Image.Resampling.BOX), dtype=float)  # a second antialiasing
        assert np.abs(np.asarray(to_rgb8(after), dtype=float) - reference).mean() < 4


def test_shrinking_is_antialiased(tmp_path):
    """Stripes of one pixel average to grey; taking every n-th pixel would give black or white."""
    stripes = np.zeros((200, 200), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(shrink.shrink(Image.fromarray(stripes).convert("RGB"), 50))
    assert small.shape == (50, 50, 3) and np.abs(small[5:-5, 5:-5].astype(float) - 127.5).max() < 12


@needs_webdataset
def test_what_needs_another_decoder_becomes_a_png(table, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    scan = FileDataset(str(table / "scan.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.PhotometricInterpretation = 20, 30, 1, "MONOCHROME2"
    scan.BitsAllocated = scan.BitsStored = 16
    scan.HighBit, scan.PixelRepresentation = 15, 0
    scan.PixelData = np.arange(600, dtype=np.uint16).tobytes()
    pydicom.dcmwrite(table / "scan.dcm", scan, enforce_file_format=True)
    (table / "train.csv").write_text("image,caption\nscan.dcm,a scan\n")
    source = create_reader("csv", table)
    shards.make_shards(source, tmp_path / "out")
    reader = create_reader("webdataset", tmp_path / "out")
    assert reader.name(0).endswith(".png")
    assert np.array_equal(np.asarray(reader.image(0)), np.asarray(source.image(0)))


def test_every_extension_that_is_written_is_read():
    assert set(shards.EXTENSIONS.values()) <= set(archives.SHARD_IMAGES)


@needs_webdataset
def test_broken_images_are_left_out_and_named(table, tmp_path, caplog):
    caplog.set_level("INFO")
    (table / "grey.jpg").write_bytes(FILES["grey.jpg"][:300])
    assert shards.make_shards(create_reader("csv", table), tmp_path / "out", shard_size=3) == 1
    reader = create_reader("webdataset", tmp_path / "out")
    assert [reader.captions(i)[0] for i in range(len(reader))] == [name for name in FILES if name != "grey.jpg"]
    assert str(table / "grey.jpg") in (tmp_path / "out" / "bad_samples.txt").read_text()
    assert "1 images cannot be decoded" in caplog.text


@needs_webdataset
def test_interrupted_shards_are_continued_and_equal_those_of_many_processes(table, tmp_path, monkeypatch):
    one, many = tmp_path / "one", tmp_path / "many"
    reader = create_reader("csv", table)
    shards.make_shards(reader, many, 2, 60, workers=3)
    pack, calls = shards.pack, []

    def fails(reader, i, *how):
        calls.append(i)
        if i == 5:
            raise OSError("disk on fire")
        return pack(reader, i, *how)

    monkeypatch.setattr(shards, "pack", fails)
    with pytest.raises(OSError, match="could not write .*00002.tar: disk on fire"):
        shards.make_shards(reader, one, 2, 60)
    assert sorted(path.name for path in one.glob("*")) == ["00000.tar", "00001.tar", "shards.json"]
    monkeypatch.setattr(shards, "pack", lambda *arguments: calls.append(arguments[1]) or pack(*arguments))
    calls.clear()
    shards.make_shards(reader, one, 2, 60)
    assert calls == [4, 5, 6, 7]
    for number in range(4):
        assert (one / f"{number:05d}.tar").read_bytes() == (many / f"{number:05d}.tar").read_bytes()
    assert len(shard_bytes(one)) == 3 * len(FILES)


@needs_webdataset
def test_a_folder_holds_one_set_of_shards(table, tmp_path):
    reader = create_reader("csv", table)
    shards.make_shards(reader, tmp_path / "out")
    with pytest.raises(ValueError, match="begun with short_side None, not 60"):
        shards.make_shards(reader, tmp_path / "out", short_side=60)
    (tmp_path / "out" / "shards.json").unlink()
    with pytest.raises(ValueError, match="not begun by this command"):
        shards.make_shards(reader, tmp_path / "out")
    for arguments, message in (({"shard_size": 0}, "shard-size 0"), ({"short_side": 0}, "short-side 0")):
        with pytest.raises(ValueError, match=message):
            shards.make_shards(reader, tmp_path / "new", **arguments)


def test_without_the_library_shards_say_what_to_install(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(ImportError, match="pip install webdataset"):
        shards.make_shards(create_reader("csv", table), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_frame_that_is_asked_for_goes_into_the_shard(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "pairs.csv").write_text("image,caption\na.tif,a\n")
    reader = create_reader("csv", tmp_path, "pairs.csv")
    for frame, value in (("first", 10), ("middle", 20), (3, 30)):
        shards.make_shards(reader, tmp_path / str(frame), frame=frame)
        found = create_reader("webdataset", tmp_path / str(frame))
        assert (np.asarray(found.image(0)) == value).all()


def test_a_dicom_file_of_any_name_goes_into_a_shard(tmp_path):
    array = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    write_dicom(tmp_path / "IM000001", array)
    (tmp_path / "pairs.csv").write_text("image,caption\nIM000001,a\n")
    reader = create_reader("csv", tmp_path, "pairs.csv")
    for short_side in (None, 32):
        shards.make_shards(reader, tmp_path / str(short_side), short_side=short_side)
        found = create_reader("webdataset", tmp_path / str(short_side)).image(0)
        expected = reader.image(0) if short_side is None else reader.image(0).resize((32, 32), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 2


def test_what_is_to_be_written_is_said_and_refused_where_it_does_not_fit(tmp_path, monkeypatch, caplog):
    (tmp_path / "pairs").mkdir()
    for i in range(3):
        Image.new("L", (64, 64), i).save(tmp_path / "pairs" / f"{i}.bmp")
    (tmp_path / "pairs" / "pairs.csv").write_text("image,caption\n" + "".join(f"{i}.bmp,a\n" for i in range(3)))
    reader = create_reader("csv", tmp_path / "pairs", "pairs.csv")
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9**9, 9**9, 100))
    with pytest.raises(OSError, match="GB free; the images take"):
        shards.make_shards(reader, tmp_path / "whole")
    caplog.set_level("INFO")
    shards.make_shards(reader, tmp_path / "smaller", short_side=8)  # of which nobody knows before how much it is
    shrink.shrink_tree(tmp_path / "pairs", tmp_path / "copy", 8)
    assert caplog.text.count("at most 0.0 GB to write, 0.0 GB free") == 2
