"""make_dataset.py unpack: what is written is read by --dataset roco, against the images that went into the archives."""

import io
import re
import time
import zipfile
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

import datasets
import make_dataset
from preparation import unpack
from runtime import logs

CAPTIONS = [
    "Mammogram with a round\nmass",
    "Chest radiograph,\tposteroanterior",
    "Axial CT of the abdomen",
    "Sagittal MRI",
]


def jpeg(i: int, size=(40, 30), kind="JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def hub(folder, groups=2, names=("image", "caption", "image_id"), broken=()):
    """Parquet files as the Hub has ROCO-radiology: two of train, one each of validation and test."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True, exist_ok=True)
    number = 0
    for name, n in (("train-00000-of-00002", 5), ("train-00001-of-00002", 3), ("validation-00000-of-00001", 2),
                    ("test-00000-of-00001", 2)):  # fmt: skip
        rows = {name: [] for name in names}
        for _ in range(n):
            number += 1
            data = b"torn" if number in broken else jpeg(number, kind="PNG" if number == 2 else "JPEG")
            image = {"bytes": data, "path": f"ROCO_{number:05d}.jpg"}
            for key, value in zip(names, (image, CAPTIONS[number % 4], f"ROCO_{number:05d}"), strict=False):
                rows[key].append(value)
        pq.write_table(pa.table(rows), folder / "data" / f"{name}.parquet", row_group_size=groups)
    return folder


def run(source, output, *extra):
    make_dataset.main(["unpack", "--source", str(source), "--output", str(output), *extra])


def test_the_hubs_parquet_becomes_roco_with_its_subsets(tmp_path):
    run(hub(tmp_path / "hub"), tmp_path / "roco")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert len(reader) == 8 and [reader.data(i) for i in (0, 2)] == [jpeg(1), jpeg(3)]
    np.testing.assert_array_equal(reader.image(1), Image.open(io.BytesIO(jpeg(2, kind="PNG"))))
    assert reader.captions(0) == ["Chest radiograph, posteroanterior"] and reader.captions(3) == [
        "Mammogram with a round mass"
    ]
    for split in ("validation", "test"):
        assert len(datasets.create_reader("roco", str(tmp_path / "roco"), "", split, "all")) == 2
    kept = {
        f: len(datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", f)) for f in ("mammo", "mammo-xray")
    }
    assert kept == {"mammo": 2, "mammo-xray": 4}
    make_dataset.main(
        ["shrink", "--root", str(tmp_path / "roco"), "--output", str(tmp_path / "s"), "--short-side", "16"]
    )
    assert min(datasets.create_reader("roco", str(tmp_path / "s"), "", "train", "all").image(0).size) == 16


TYPES = [  # column, values of two rows, what the message says it holds; "" where it is taken
    ("image", ["{'bytes': b'x', 'path': None}"] * 2, "text"),
    ("image", [[1, 2], [3]], "list<.*>"),
    ("image", [{"path": "a.png"}, {"path": "b.png"}], "struct<path: string>"),
    ("image", [{"bytes": "text"}] * 2, "struct<bytes: string>"),
    ("image", [None, None], "null"),
    ("image", [jpeg(0), jpeg(1)], ""),
    ("caption", [b"a", b"b"], "bytes"),
    ("caption", [[b"a"], [b"b"]], "list<.*binary>"),
    ("caption", [1, 2], "int64"),
    ("caption", [["a", "more"], ["b"]], ""),
    ("image_id", [b"a", b"b"], "bytes"),
    ("image_id", [7, 8], ""),
]


@pytest.mark.parametrize(("column", "values", "held"), TYPES)
def test_a_column_of_another_type_is_refused_before_an_image_is_written(tmp_path, caplog, column, values, held):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(i), "path": None} for i in range(2)]
    table = {"image": images, "caption": ["a", "b"], "image_id": ["7", "8"], column: values}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    if held:
        with pytest.raises(ValueError, match=rf"train.parquet: the column '{column}' holds {held}, and .*-column"):
            run(tmp_path, tmp_path / "roco")
        assert not (tmp_path / "roco").exists()
        return
    with caplog.at_level("INFO"):
        run(tmp_path, tmp_path / "roco")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"))
    found = [(reader.name(i)[-5:], reader.data(i), reader.captions(i)) for i in range(len(reader))]
    assert found == [("7.jpg", jpeg(0), ["a"]), ("8.jpg", jpeg(1), ["b"])]
    assert ("1 further captions left out" in caplog.text) == (column == "caption")


def test_a_split_without_one_readable_image_is_an_error(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"torn"], "caption": ["a"], "id": ["7"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [jpeg(0)], "caption": ["a"], "id": ["8"]}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="gave no pair of train: no image of theirs can be read"):
        run(tmp_path, tmp_path / "roco")
    assert (tmp_path / "roco" / "bad_samples.txt").read_text().startswith(f"{tmp_path}/train.parquet row 0\t")
    assert (tmp_path / "roco" / "test" / "radiology" / "captions.txt").read_text() == "8\t a\n"


def test_images_that_uids_name_keep_all_of_their_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(i), "path": name} for i, name in enumerate(("a/1.2.840.1", "a/1.2.840.2.png", "x.dcm"))]
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS[:3]}), tmp_path / "train.parquet")
    run(tmp_path, tmp_path / "roco")
    written = {path.name for path in (tmp_path / "roco").rglob("*.jpg")}
    assert written == {"1.2.840.1.jpg", "1.2.840.2.jpg", "x.jpg"}


def test_an_interrupted_copy_goes_on_and_a_finished_one_is_verified(tmp_path, monkeypatch):
    source, output = hub(tmp_path / "hub"), tmp_path / "roco"
    write, seen = unpack.write_image, []

    def dies(folder, short_side, sample):
        if len(seen) == 6:
            raise KeyboardInterrupt
        seen.append(sample.id)
        return write(folder, short_side, sample)

    monkeypatch.setattr(unpack, "write_image", dies)
    with pytest.raises(KeyboardInterrupt):
        run(source, output)
    assert not list(output.rglob("captions.txt"))
    monkeypatch.setattr(unpack, "write_image", write)
    counts = unpack.unpack(source, output)
    assert counts["train"] == {"there already": 4, "written": 4} and counts["test"]["there already"] == 2
    images = sorted(output.rglob("*.jpg"))
    before = [image.stat().st_mtime_ns for image in images]
    assert unpack.unpack(source, output)["train"]["there already"] == 8
    assert [image.stat().st_mtime_ns for image in images] == before
    images[0].unlink()
    assert (
        unpack.unpack(source, output)["test"]["written"] + unpack.unpack(source, output)["test"]["there already"] >= 2
    )
    assert images[0].is_file()
    with pytest.raises(ValueError, match="short_side"):
        unpack.unpack(source, output, short_side=16)


@pytest.mark.parametrize("kind", ["parquet", "zip"])
def test_the_time_left_is_said(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(logs, "QUIET_SECONDS", 0)
    hub(tmp_path / "source") if kind == "parquet" else zenodo(tmp_path / "source")
    with caplog.at_level("INFO", "medslip"):
        run(tmp_path / "source", tmp_path / "out")
    said = [record.message for record in caplog.records if record.message.startswith("unpacking: ")]
    done, total = re.match(r"unpacking: (\d+) of (\d+) images, .* left", said[-1]).groups()
    assert done == total != "0"


def test_broken_images_are_counted_and_named(tmp_path):
    counts = unpack.unpack(hub(tmp_path / "hub", broken=(4, 11)), tmp_path / "roco", short_side=20)
    assert counts["train"] == {"written": 7, "unreadable": 1} and counts["test"] == {"written": 1, "unreadable": 1}
    named = (tmp_path / "roco" / "bad_samples.txt").read_text()
    assert "train-00000-of-00002.parquet row 3" in named and "test-00000-of-00001.parquet row 0" in named
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert len(reader) == 7 and min(reader.image(0).size) == 20


def test_columns_have_usual_names_or_are_named(tmp_path):
    source = hub(tmp_path / "hub", names=("picture", "text"))
    with pytest.raises(
        ValueError, match="no column image or img or jpg: name one of picture, text with --image-column"
    ):
        run(source, tmp_path / "roco")
    run(source, tmp_path / "roco", "--image-column", "picture")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert reader.name(0).endswith("ROCO_00001.jpg")  # of the struct's path, where there is no id


def test_a_null_id_is_no_name_and_a_null_caption_hides_none(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hub").mkdir()
    captions = [[["c0"], ["c1"], [None, "c2", "d2"]], [["c3"], [" ", "c4"], ["c5"]]]
    for part, ids in enumerate([[1, None, 3], [4, None, None]]):
        table = {
            "image": [{"bytes": jpeg(3 * part + i), "path": "a.jpg"} for i in range(3)],
            "caption": captions[part],
            "image_id": pa.array(ids, pa.int64()),
        }
        pq.write_table(pa.table(table), tmp_path / "hub" / f"train-{part}.parquet")
    run(tmp_path / "hub", tmp_path / "roco")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert {reader.captions(i)[0]: reader.data(i) for i in range(6)} == {f"c{i}": jpeg(i) for i in range(6)}
    names = ["1", "train-0_1", "3", "4", "train-1_1", "train-1_2"]
    assert [PurePath(reader.name(i)).stem for i in range(len(reader))] == names


def zenodo(folder, zipped=True, extra=()):
    folder.mkdir()
    for split, n in (("train", 3), ("valid", 2), ("test", 2)):
        rows = [f"ROCOv2_2023_{split}_{i:06d}" for i in range(n)]
        lines = "".join(f'{key},"{CAPTIONS[i]}"\n' for i, key in enumerate(rows))
        (folder / f"{split}_captions.csv").write_text("ID,Caption\n" + lines)
        if zipped:
            with zipfile.ZipFile(folder / f"{split}_images.zip", "w") as archive:
                for i, key in enumerate(rows):
                    archive.writestr(f"{split}/{key}.jpg", jpeg(i))
                for name in extra:
                    archive.writestr(name, b"evil")
        else:
            (folder / f"{split}_images" / split).mkdir(parents=True)
            for i, key in enumerate(rows):
                (folder / f"{split}_images" / split / f"{key}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.mark.parametrize("zipped", (True, False))
def test_zenodos_zips_are_read_packed_and_unpacked(zipped, tmp_path):
    run(zenodo(tmp_path / "z", zipped, extra=("../../evil.jpg", "/abs.jpg")), tmp_path / "roco", "--workers", "2")
    for split, n in (("train", 3), ("validation", 2), ("test", 2)):
        reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", split, "all")
        assert [reader.data(i) for i in range(len(reader))] == [jpeg(i) for i in range(n)]
    written = {
        path.relative_to(tmp_path / "roco").parts[0] for path in (tmp_path / "roco").rglob("*") if path.is_file()
    }
    assert written == {"train", "validation", "test", "parts", "unpack.json"}
    assert not list(tmp_path.rglob("evil.jpg"))


def test_bad_sources_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither parquet files nor"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "part-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="no split in its name or folder"):
        run(tmp_path / "a", tmp_path / "out")
    (tmp_path / "a" / "part-0.parquet").rename(tmp_path / "a" / "train-0.parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="train-0.parquet is not a readable parquet file"):
        run(tmp_path / "a", tmp_path / "out")
    source = zenodo(tmp_path / "z")
    (source / "test_captions.csv").write_text("ID,Caption\n../up,x\n")
    with pytest.raises(ValueError, match=r"\.\./up"):
        run(source, tmp_path / "out2")


def test_an_id_that_comes_twice_keeps_its_first_image_and_is_counted(tmp_path, caplog, monkeypatch):
    """Also where both are written at the same time in two threads, the second last."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "hub").mkdir()
    images = [{"bytes": jpeg(i), "path": ""} for i in range(3)]
    rows = {"image": images, "caption": list("abc"), "image_id": list("xyx")}
    pq.write_table(pa.table(rows), tmp_path / "hub" / "train.parquet")
    write, begun = unpack.atomic_write, []

    def slowly(path, content):
        begun.append(path)
        time.sleep(0.15 * len(begun))
        write(path, content)

    monkeypatch.setattr(unpack, "atomic_write", slowly)
    with caplog.at_level("WARNING", logger="medslip"):
        run(tmp_path / "hub", tmp_path / "roco", "-j", "3")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert [reader.captions(i) for i in range(len(reader))] == [["a"], ["b"]] and reader.data(0) == jpeg(0)
    assert "train: 1 rows have an id that was there already" in caplog.text


def test_a_damaged_member_of_a_zip_is_left_out_and_named(tmp_path):
    source = zenodo(tmp_path / "z", zipped=True)
    path, name = source / "train_images.zip", "train/ROCOv2_2023_train_000001.jpg"
    with zipfile.ZipFile(path) as archive:
        kept = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in kept.items():
            archive.writestr(member, content)
        place = archive.getinfo(name).header_offset + 30 + len(name)
    data = bytearray(path.read_bytes())
    data[place : place + 20] = b"\xff" * 20  # a kind of block that deflate does not have
    path.write_bytes(data)
    run(source, tmp_path / "roco")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert [reader.data(i) for i in range(len(reader))] == [jpeg(0), jpeg(2)]
    assert "ROCOv2_2023_train_000001" in (tmp_path / "roco" / "bad_samples.txt").read_text()


@pytest.mark.parametrize(
    "path", [lambda i: None, lambda i: f"{i % 6}.png", lambda i: f"{i}.png"], ids=["no", "same", "own"]
)
def test_images_without_names_of_their_own_are_called_by_file_and_row(tmp_path, path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "hub").mkdir()
    for part in range(2):
        rows = [{"bytes": jpeg(i), "path": path(i)} for i in range(6 * part, 6 * part + 6)]
        captions = [f"image {i}" for i in range(6 * part, 6 * part + 6)]
        table = pa.table({"image": pa.array(rows, kind), "caption": captions})
        pq.write_table(table, tmp_path / "hub" / f"train-{part:05d}-of-00002.parquet")
    run(tmp_path / "hub", tmp_path / "roco")
    reader = datasets.create_reader("roco", str(tmp_path / "roco"), "", "train", "all")
    assert {reader.captions(i)[0]: reader.data(i) for i in range(len(reader))} == {
        f"image {i}": jpeg(i) for i in range(12)
    }
    name = "11.jpg" if path(11) == "11.png" else "train-00001-of-00002_5.jpg"
    assert reader.name(11).endswith(f"/{name}")


def test_a_caption_that_stands_for_none_gives_way_to_the_next(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = {"image": [jpeg(i) for i in range(2)], "caption": [["nan", "a mass"], ["NA"]], "image_id": ["7", "8"]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    run(tmp_path, tmp_path / "roco")
    lines = (tmp_path / "roco" / "train" / "radiology" / "captions.txt").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [["7", " a mass"], ["8", " "]]
    assert datasets.create_reader("roco", str(tmp_path / "roco")).captions(0) == ["a mass"]
