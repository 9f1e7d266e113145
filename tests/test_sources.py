"""Readers of image files in their publishers' layouts, on small trees in those layouts."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
from source_tree import (
    CAPTIONS,
    LARGE,
    all_captions,
    grey_of,
    make_coco,
    make_redcaps,
    make_yfcc,
    roco_folder,
    save_jpeg,
)

from datasets import READERS, create_reader
from inputs import reader as inputs_reader
from inputs.columns import Row


@pytest.mark.parametrize("name, gap", [("captions.txt", "\t "), ("captions.txt", "\t   "), ("selected_pairs.txt", " ")])
def test_roco_reads_both_files_of_captions(tmp_path, name, gap):
    folder = roco_folder(tmp_path / "train" / "radiology", name=name, gap=gap)
    reader = create_reader("roco", tmp_path)
    assert all_captions(reader) == list(CAPTIONS.values())
    assert [grey_of(reader.image(i)) for i in range(4)] == [50, 100, 150, 200]
    assert reader.name(2) == str(folder / "images" / "ROCO_00003.jpg")
    assert reader.dropped == 0
    for i in (-1, 4):
        with pytest.raises(IndexError):
            reader.captions(i)


@pytest.fixture
def roco(tmp_path) -> Path:
    for split in ("train", "validation", "test"):
        for kind in ("radiology", "non-radiology"):
            roco_folder(tmp_path / split / kind, {f"{split}-{kind}": f"{split} {kind}"})
    return tmp_path


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("deeper", ["", "train", "train/radiology", "test/radiology", "validation/non-radiology"])
def test_roco_finds_every_split_from_any_root(roco, split, deeper):
    assert all_captions(create_reader("roco", roco / deeper, split=split)) == [f"{split} radiology"]


def test_roco_understands_its_own_data_folder(tmp_path):
    roco_folder(tmp_path / "data" / "test" / "radiology")
    assert len(create_reader("roco", tmp_path, split="test")) == 4


def test_roco_parts(roco):
    assert all_captions(create_reader("roco_nonradiology", roco)) == ["train non-radiology"]
    both = create_reader("roco_all", roco)
    assert all_captions(both) == ["train radiology", "train non-radiology"]
    assert both.image(1).size == (24, 20)


def test_a_lone_folder_of_captions_is_the_training_split_only(tmp_path):
    roco_folder(tmp_path / "pairs")
    assert len(create_reader("roco", tmp_path / "pairs")) == 4
    with pytest.raises(FileNotFoundError, match="'validation'.*validation/radiology/captions.txt"):
        create_reader("roco", tmp_path / "pairs", split="validation")


def test_a_folder_named_after_its_split_is_that_split(tmp_path):
    roco_folder(tmp_path / "test")
    assert len(create_reader("roco", tmp_path / "test", split="test")) == 4
    with pytest.raises(FileNotFoundError):
        create_reader("roco", tmp_path / "test", split="train")


def test_metadata_names_another_file_of_captions(tmp_path):
    folder = roco_folder(tmp_path / "train" / "radiology")
    (folder / "selected_pairs.txt").write_text("ROCO_00004 only this\n")
    assert len(create_reader("roco", tmp_path)) == 4
    assert all_captions(create_reader("roco", tmp_path, "selected_pairs.txt")) == ["only this"]
    with pytest.raises(FileNotFoundError, match="mine.txt"):
        create_reader("roco", tmp_path, "mine.txt")
    with pytest.raises(ValueError, match="name of a file beside images/, no path.*radiology/captions.txt"):
        create_reader("roco", tmp_path, str(folder / "captions.txt"))  # it would serve for every split


def test_absent_images_and_rows_without_caption_are_counted_and_named(tmp_path):
    folder = roco_folder(tmp_path / "train" / "radiology")
    with open(folder / "captions.txt", "a") as file:
        file.write("ROCO_00005\t gone\n\nROCO_00001\t  \nROCO_00002\nROCO_00006\t gone too\n")
    reader = create_reader("roco", tmp_path)
    assert len(reader) == 4 and reader.dropped == 2
    log = "\n".join(reader.log)
    assert "4 pictures" in log
    assert "2 rows dropped because their image is absent" in log and "ROCO_00005.jpg" in log
    assert "2 rows dropped because they have no caption" in log and "captions.txt line 7" in log


def test_a_link_to_nothing_is_no_image(tmp_path):
    roco_folder(tmp_path / "train" / "radiology", {f"R_{i}": "text" for i in range(3)})
    image = tmp_path / "train" / "radiology" / "images" / "R_1.jpg"
    image.rename(tmp_path / "stored.jpg")
    image.symlink_to(tmp_path / "stored.jpg")
    assert len(create_reader("roco", tmp_path)) == 3
    (tmp_path / "stored.jpg").unlink()
    reader = create_reader("roco", tmp_path)
    assert len(reader) == 2 and reader.dropped == 1 and "R_1.jpg" in reader.log[1]


def test_a_folder_is_listed_once_and_no_image_is_asked_for(tmp_path, monkeypatch):
    roco_folder(tmp_path / "train" / "radiology", {f"R_{i}": "text" for i in range(50)})
    listed, asked = [], []
    scandir, stat_of = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(str(path)) or stat_of(path, **more))
    assert len(create_reader("roco", tmp_path)) == 50
    assert listed == [str(tmp_path / "train" / "radiology" / "images")]
    assert not [path for path in asked if path.endswith(".jpg")]


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/../../b", "..", "a\\..\\b"])
def test_a_row_that_leaves_the_root_is_refused_by_name(tmp_path, name):
    folder = roco_folder(tmp_path / "train" / "radiology")
    with open(folder / "captions.txt", "a") as file:
        file.write(f"{name}\t text\n")
    with pytest.raises(ValueError, match="captions.txt line 5.*may leave the data root"):
        create_reader("roco", tmp_path)


def test_clear_errors_for_roots_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_reader("roco", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no ROCO split 'train'.*train/radiology/captions.txt"):
        create_reader("roco", tmp_path)
    folder = roco_folder(tmp_path / "train" / "radiology")
    with pytest.raises(ValueError, match="'val'.*train, validation, test"):
        create_reader("roco", tmp_path, split="val")
    with pytest.raises(ValueError, match="unknown dataset 'rocco'.*roco, .*csv"):
        create_reader("rocco", tmp_path)
    (folder / "captions.txt").write_bytes(b"ROCO_00001\t caf\xe9\n")
    with pytest.raises(ValueError, match="captions.txt line 1 is not UTF-8"):
        create_reader("roco", tmp_path)
    (folder / "captions.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="captions.txt: 0 pictures with captions"):
        create_reader("roco", tmp_path)
    (folder / "captions.txt").write_text("gone\t text\n")
    with pytest.raises(FileNotFoundError, match="1 rows dropped because their image is absent.*gone.jpg"):
        create_reader("roco", tmp_path)


def test_a_byte_order_mark_is_not_part_of_the_first_id(tmp_path):
    folder = roco_folder(tmp_path / "train" / "radiology")
    path = folder / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(create_reader("roco", tmp_path)) == 4


def test_the_caption_filter_chooses_rows_and_says_how_many(tmp_path):
    roco_folder(tmp_path / "train" / "radiology")
    reader = create_reader("roco", tmp_path, caption_filter="mammo-xray")
    assert all_captions(reader) == list(CAPTIONS.values())[:2]
    assert grey_of(reader.image(1)) == 100
    assert "'mammo-xray' keeps 2 of 4 images" in reader.log[-1]
    axial = create_reader("roco", tmp_path, caption_filter="^axial")
    assert len(axial) == 2 and grey_of(axial.image(0)) == 150 and axial.name(1).endswith("ROCO_00004.jpg")
    with pytest.raises(ValueError, match="'mamo' keeps 0 of 4.*mammo-xray, mammo"):
        create_reader("roco", tmp_path, caption_filter="mamo")


@pytest.mark.parametrize("layout", ["{0}_images/{0}", "{0}_images", "{0}"])
@pytest.mark.parametrize("split, short", [("train", "train"), ("validation", "valid"), ("test", "test")])
def test_rocov2_layouts(tmp_path, layout, split, short):
    name = f"ROCOv2_2023_{short}_000001"
    save_jpeg(tmp_path / layout.format(short) / f"{name}.jpg", 77)
    (tmp_path / f"{short}_captions.csv").write_text(f'ID,Caption\n{name},"CT, ""axial"",\nsecond line"\ngone,text\n')
    reader = create_reader("rocov2", tmp_path, split=split)
    assert all_captions(reader) == ['CT, "axial",\nsecond line']
    assert grey_of(reader.image(0)) == 77 and reader.dropped == 1


def test_rocov2_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_captions.csv"):
        create_reader("rocov2", tmp_path)
    (tmp_path / "train_captions.csv").write_text("ID,Caption\n")
    with pytest.raises(FileNotFoundError, match="train_images/train"):
        create_reader("rocov2", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "filepath\ttitle\na/1.jpg\tone, two\nb/2.jpg\tthree\n",
        '\ufeffid,Image,CAPTION\r\n1,a/1.jpg,"one, two"\r\n2,b/2.jpg,three\r\n',
        "caption;path\none, two;a/1.jpg\nthree; b/2.jpg\n",
    ],
)
def test_csv_finds_delimiter_and_columns(tmp_path, text):
    for i, name in enumerate(("a/1.jpg", "b/2.jpg"), 1):
        save_jpeg(tmp_path / name, 60 * i)
    (tmp_path / "pairs.txt").write_text(text, encoding="utf-8")
    reader = create_reader("csv", tmp_path, "pairs.txt")
    assert all_captions(reader) == ["one, two", "three"]
    assert [grey_of(reader.image(i)) for i in range(2)] == [60, 120]


def test_csv_splits_by_column_or_by_file(tmp_path):
    for name in "abc":
        save_jpeg(tmp_path / f"{name}.jpg")
    (tmp_path / "all.csv").write_text("image,caption,split\na.jpg,a,train\nb.jpg,b,val\nc.jpg,c,TEST\n")
    for split, captions in (("train", ["a"]), ("validation", ["b"]), ("test", ["c"])):
        assert all_captions(create_reader("csv", tmp_path, str(tmp_path / "all.csv"), split)) == captions
    (tmp_path / "validation.tsv").write_text("image\tcaption\nc.jpg\tc\n")
    assert all_captions(create_reader("csv", tmp_path, split="validation")) == ["c"]
    with pytest.raises(FileNotFoundError, match="'train'.*train.csv or .*train.tsv"):
        create_reader("csv", tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,words\na.jpg,x\n", "no column caption or title.*image, words"),
        ("image_id,caption\na.jpg,x\n", "no column image or"),
        ("image,caption\na.jpg,x\nb.jpg\n", "line 3 has 1 fields, the header 2"),
        ("image,caption\na.jpg,x\n../b.jpg,y\n", r"line 3: the path '\.\./b\.jpg'"),
        ("image,caption\n/etc/b.jpg,y\n", "line 2: the path '/etc/b.jpg'"),
        ("image,caption\n", "no rows of the split"),
        ("", "no column"),
        ("image,caption\na.jpg,caf\xe9\n", "encoding UTF-8"),
        ("image,caption\na.jpg,a comma, unquoted\n", "line 2 has 3 fields, the header 2"),
        ('image,caption\na.jpg,"never closed\nb.jpg,y\n', "never closed"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path, text, message):
    save_jpeg(tmp_path / "a.jpg")
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"pairs.csv.*{message}"):
        create_reader("csv", tmp_path, "pairs.csv")


@pytest.mark.parametrize("name", LARGE)
def test_large_sources_in_their_published_layout(tmp_path, name):
    make, captions, greys, dropped = LARGE[name]
    reader = create_reader(name, make(tmp_path))
    assert [reader.captions(i) for i in range(len(reader))] == captions
    assert [grey_of(reader.image(i)) for i in range(len(reader))] == pytest.approx(greys, abs=1)
    assert reader.dropped == dropped
    assert f"{dropped} rows dropped because their image is absent" in "\n".join(reader.log)
    filtered = create_reader(name, tmp_path, caption_filter=captions[-1][-1])
    assert filtered.captions(len(filtered) - 1) == captions[-1]
    again = pickle.loads(pickle.dumps(reader))  # as a spawned worker gets it
    assert again.captions(0) == captions[0] and grey_of(again.image(0)) == pytest.approx(greys[0], abs=1)


def test_every_reader_is_tested_here():
    assert set(READERS) == {*LARGE, "roco", "roco_nonradiology", "roco_all", "rocov2", "csv", "webdataset"}


def test_yfcc_numbers_become_folder_archive_and_member(tmp_path):
    reader = create_reader("yfcc15m", make_yfcc(tmp_path))
    assert reader.name(0) == str(tmp_path / "images" / "12" / "345.zip" / "678.jpg")
    assert reader.name(1) == str(tmp_path / "images" / "00" / "000.zip" / "005.jpg")
    assert reader.images.tolist() == [12345678, 5]


def test_coco_validation_lies_beside_the_training_file(tmp_path):
    make_coco(tmp_path)
    given = str(tmp_path / "annotations" / "captions_train2017.json")
    assert create_reader("coco", tmp_path, given, "validation").captions(0) == ["7 0", "7 1", "x"]
    with pytest.raises(ValueError, match="'test'.*train, validation"):
        create_reader("coco", tmp_path, split="test")


def test_cocos_own_list_says_which_file_an_id_is(tmp_path, monkeypatch):
    """Others' files in its format count ids from 1 and files from 0; an index from before the list was read is old."""
    make_coco(tmp_path)
    captions = tmp_path / "annotations" / "captions_train2017.json"
    value = json.loads(captions.read_text())
    del value["images"]
    captions.write_text(json.dumps(value))
    assert Path(create_reader("coco", tmp_path).name(0)).name == "000000000009.jpg"  # without a list by the id
    names = ["000000000000.jpg", "train2017/000000000001.jpg", "b/2.png"]
    for i in range(4):
        save_jpeg(tmp_path / "train2017" / f"{i:012d}.jpg", 50 * i)
    save_jpeg(tmp_path / "train2017" / "b" / "2.png", 100)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    value = {"annotations": [{"image_id": i, "caption": f"of {i}"} for i in (1, 2, 3, 4)]}
    captions.write_text(json.dumps(value | {"images": images}))
    with monkeypatch.context() as earlier:
        earlier.setattr(READERS["coco"], "_file_names", lambda self: {})
        earlier.setattr(READERS["coco"], "index_version", 1)
        assert all_captions(create_reader("coco", tmp_path)) == ["of 1", "of 2", "of 3"]
        assert grey_of(create_reader("coco", tmp_path).image(0)) == pytest.approx(50, abs=1)
    reader = create_reader("coco", tmp_path)
    assert all_captions(reader) == ["of 1", "of 2", "of 3"] and reader.dropped == 1
    assert [grey_of(reader.image(i)) for i in range(3)] == pytest.approx([0, 50, 100], abs=1)
    assert "image 4, which is not in its list of images" in reader.log[1]
    for bad, message in (
        ({"id": 4, "file_name": "../x.jpg"}, "images 3: the path '../x.jpg' may leave"),
        ({"id": 3, "file_name": "3.jpg"}, "images 3: the id 3 is that of 'b/2.png' already, now of '3.jpg'"),
        ({"id": 4}, "images 3 has no proper field 'file_name'"),
    ):
        captions.write_text(json.dumps(value | {"images": [*images, bad]}))
        with pytest.raises(ValueError, match=message):
            create_reader("coco", tmp_path)


def test_redcaps_in_slips_layout(tmp_path):
    assert grey_of(create_reader("redcaps", make_redcaps(tmp_path, "")).image(0)) == 90


def test_redcaps_with_a_subreddit_in_each_layout(tmp_path):
    make_redcaps(tmp_path, "images")
    save_jpeg(tmp_path / "birding" / "b1.jpg", 60)
    rows = [
        {"image_id": image, "caption": image, "subreddit": subreddit}
        for image, subreddit in (("abc1", "itap"), ("b1", "birding"))
    ]
    (tmp_path / "redcaps_v1.json").write_text(json.dumps(rows))
    reader = create_reader("redcaps", tmp_path)
    assert [grey_of(reader.image(i)) for i in range(len(reader))] == [90, 60] and reader.dropped == 0


@pytest.mark.parametrize("name", ["yfcc15m", "cc3m", "cc12m", "redcaps"])
def test_sources_without_validation_say_so(tmp_path, name):
    LARGE[name][0](tmp_path)
    with pytest.raises(ValueError, match="'validation'; choose from train"):
        create_reader(name, tmp_path, split="validation")


def test_every_source_checks_its_own_metadata(tmp_path):
    bad = [
        ("yfcc15m", "a.pkl", pickle.dumps([(1, "a", "b"), (2, "only one")]), "row 1 is not"),
        ("yfcc15m", "b.pkl", pickle.dumps([(10**8, "a", "b")]), "row 0.*100000000"),
        ("yfcc15m", "c.pkl", pickle.dumps({"a": 1}), "holds dict, not a list"),
        (
            "coco",
            "d.json",
            b'{"annotations": [{"image_id": "x", "caption": "c"}]}',
            "annotation 0.*'image_id'",
        ),
        ("coco", "e.json", b'{"images": []}', "no list 'annotations'"),
        (
            "redcaps",
            "f.json",
            b'[{"image_id": "../../x", "subreddit": "a", "caption": "c"}]',
            "annotation 0.*root",
        ),
        ("redcaps", "g.json", b'[{"image_id": "a", "caption": "c"}]', "annotation 0.*'subreddit'"),
        ("cc3m", "h.pkl", pickle.dumps([{"image_id": "../x.jpg", "captions": ["a"]}]), "row 0.*root"),
        ("cc3m", "i.pkl", pickle.dumps([{"image_id": "x.jpg", "captions": [3]}]), "row 0.*captions"),
        ("cc12m", "j.pkl", pickle.dumps(["x.jpg"]), "row 0.*'image_name'"),
    ]
    for name, file, data, message in bad:
        (tmp_path / file).write_bytes(data)
        with pytest.raises(ValueError, match=f"{file}.*{message}"):
            create_reader(name, tmp_path, file)
        assert not list(tmp_path.glob("*.index")) and not list(tmp_path.glob("*.tmp"))


def test_split_names_of_all_publishers_are_known_and_others_named(tmp_path):
    names = ["train", "restval", "Training", "val", "validate", "dev", "test", "holdout"]
    for i in range(len(names)):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    rows = "".join(f"{i}.jpg,text {i},{name}\n" for i, name in enumerate(names))
    (tmp_path / "pairs.csv").write_text(f"image,caption,split\n{rows}")
    readers = {split: create_reader("csv", tmp_path, "pairs.csv", split) for split in ("train", "validation", "test")}
    assert [len(reader) for reader in readers.values()] == [3, 3, 1]
    assert "1 rows of unknown splits left out: 'holdout' 1" in "".join(readers["train"].log)
    (tmp_path / "only.csv").write_text("image,caption,split\n0.jpg,text,train\n")
    with pytest.raises(inputs_reader.NoSplit, match="no rows of the split 'validation'"):
        create_reader("csv", tmp_path, "only.csv", "validation")


def test_a_table_for_each_split_and_whole_paths_below_the_root(tmp_path):
    for i in range(3):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    for split, part in (("train", (0, 1)), ("val", (2,))):
        rows = "".join(f"{tmp_path}/{i}.jpg,text {i}\n" for i in part)
        (tmp_path / f"pairs_{split}.csv").write_text(f"image,caption\n{rows}")
    assert all_captions(create_reader("csv", tmp_path, "pairs_{split}.csv")) == ["text 0", "text 1"]
    assert all_captions(create_reader("csv", tmp_path, "pairs_{split}.csv", "validation")) == ["text 2"]


def test_rows_of_one_image_are_one_pair_in_every_table(tmp_path):
    for i in range(2):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    rows = "".join(f"{i}.jpg,image {i} wording {k}\n" for k in range(5) for i in range(2))
    (tmp_path / "train.csv").write_text(f"image,caption\n{rows}")
    reader = create_reader("csv", tmp_path)
    assert len(reader) == 2 and reader.captions(1) == [f"image 1 wording {k}" for k in range(5)]
    assert "10 rows share their image" in "".join(reader.log)


class Compared(str):
    """Counts how often a caption is compared with another."""

    count = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Compared.count += 1
        return str.__eq__(self, other)


def test_captions_of_one_image_are_not_compared_with_each_other_in_pairs():
    counts = []
    for n in (500, 1000):
        texts = [Compared(f"caption {i % (n // 2)}") for i in range(n)]  # each twice
        Compared.count = 0
        (row,) = inputs_reader.grouped(Row(f"line {i}", "a.jpg", [text]) for i, text in enumerate(texts))
        assert row.captions == texts[: n // 2] and row.rows == n
        counts.append(Compared.count)
    assert counts[1] < 2.5 * counts[0] < 2.5 * 3 * 500 + 500


def parts_of(root, table, **arguments):
    """The names of the images of training and validation, and what the first says."""
    readers = [create_reader("csv", root, table, split, **arguments) for split in ("train", "validation")]
    return [{Path(reader.name(i)).name for i in range(len(reader))} for reader in readers], " ".join(readers[0].log)


@pytest.mark.parametrize("column", ["patient", "Patient ID", "Patient.ID", "study", "group", "MRN"])
def test_the_held_out_tenth_keeps_patients_whole(tmp_path, column):
    for i in range(60):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    rows = [(f"{i}.jpg", f"P{i // 3}" if i < 57 else "") for i in range(60)]
    rows[1] = ("1.jpg", "P0")
    lines = [f"{image},text {k},{group}" for k in (0, 1) for image, group in rows]
    (tmp_path / "pairs.csv").write_text("\n".join([f"image,caption,{column}", *lines]) + "\n")
    (train, held), said = parts_of(tmp_path, "pairs.csv", val_fraction=0.2)
    assert len(train) + len(held) == 60 and not train & held and held
    patients = [{group for image, group in rows if image in part and group} for part in (train, held)]
    assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 19
    # The rule by itself: a blake2b of the patient, or of the image that has none.
    wanted = {image for image, group in rows if hash63(group or image) < 0.2 * 2**63}
    assert held == wanted and f"20% of the values of {column.lower()}, with all their images" in said
    (apart, single), said = parts_of(tmp_path, "pairs.csv", val_fraction=0.2, by_image=True)
    assert single == {image for image, _ in rows if hash63(image) < 0.2 * 2**63} != held and "began so" in said


def hash63(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def test_one_of_few_patients_is_held_out_and_a_table_without_them_says_so(tmp_path):
    for i in range(9):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    (tmp_path / "a.csv").write_text("image,caption,case\n" + "".join(f"{i}.jpg,x,{i // 3}\n" for i in range(9)))
    (train, held), _ = parts_of(tmp_path, "a.csv", val_fraction=1e-9)
    assert (len(train), len(held)) == (6, 3) and len({int(name[0]) // 3 for name in held}) == 1
    (tmp_path / "b.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,x\n" for i in range(9)))
    _, said = parts_of(tmp_path, "b.csv", val_fraction=0.5)
    assert "no column (patient, study, ...) tells what belongs together" in said
    (tmp_path / "c.csv").write_text("image,caption,split,patient\n0.jpg,x,train,7\n1.jpg,x,val,7.0\n2.jpg,x,val,8\n")
    _, said = parts_of(tmp_path, "c.csv")
    assert "1 values of patient are in several splits, first '7'" in said
    rows = "0.jpg,x,train\n0.jpg,y,train\n1.jpg,x,train\n1.jpg,x,test\n./2.jpg,x,val\n2.jpg,x,test\n"
    (tmp_path / "d.csv").write_text(f"image,caption,split\n{rows}")
    _, said = parts_of(tmp_path, "d.csv")
    assert "2 images are in several splits, first 1.jpg" in said


def test_pairs_of_patients_that_look_alike_stay_together(tmp_path):
    for i in range(40):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    names = [f"P{i // 2}" if i % 2 else f"p{i // 2}" for i in range(20)] + [
        f"{i // 2:0{i % 2 * 3 + 1}d}" for i in range(20)
    ]
    lines = [f"{'./' * (i % 3)}{i}.jpg,x,{name}" for i, name in enumerate(names)]
    (tmp_path / "a.csv").write_text("image,caption,patient\n" + "\n".join(lines) + "\n")
    (train, held), said = parts_of(tmp_path, "a.csv", val_fraction=0.4)
    pairs = [{f"{i}.jpg", f"{i + 1}.jpg"} for i in range(0, 40, 2)]
    assert held and train and all(pair <= held or pair <= train for pair in pairs)
    (tmp_path / "b.csv").write_text(
        "image,caption,split,patient\n0.jpg,x,train,P1\n./0.jpg,y,train,P1\n1.jpg,x,val,p1\n"
    )
    reader = create_reader("csv", tmp_path, "b.csv")
    assert len(reader) == 1 and reader.captions(0) == ["x", "y"]
    assert "1 values of patient are in several splits, first 'P1' and 'p1'" in " ".join(reader.log)


def test_captions_that_stand_for_none_are_counted_in_every_layout(tmp_path):
    captions = ["NA", "None", " nan", "#N/A", "?", "a nan is no number", "none seen"]
    for i in range(len(captions)):
        for folder in ("pairs", "v2/train_images", "roco/train/radiology/images"):
            save_jpeg(tmp_path / folder / f"{i}.jpg", i)
    rows = "".join(f"{i}.jpg,{text}\n" for i, text in enumerate(captions))
    (tmp_path / "pairs" / "train.csv").write_text(f"image,caption\n{rows}5.jpg,NULL\n")
    (tmp_path / "v2" / "train_captions.csv").write_text(f"ID,Caption\n{rows.replace('.jpg', '')}")
    lines = rows.replace(".jpg,", "\t")
    (tmp_path / "roco" / "train" / "radiology" / "captions.txt").write_text(lines)
    for name, folder, silent in (("csv", "pairs", 6), ("rocov2", "v2", 5), ("roco", "roco", 5)):
        reader = create_reader(name, tmp_path / folder)
        assert all_captions(reader) == captions[5:]
        assert f"{silent} rows dropped because they have no caption" in "\n".join(reader.log)
