import json
import multiprocessing
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LARGE,
    PREPROCESS,
    SslView,
    TrainView,
    all_captions,
    command,
    grey_of,
    jpeg,
    make_coco,
    make_redcaps,
    make_yfcc,
    save_jpeg,
    weights,
)
from PIL import Image
from torch.utils.data import DataLoader

import main
from datasets import READERS, Collate, ContrastiveDataset, EvalPairs, GlobalBatchSampler, create_reader
from inputs import index as inputs_index
from inputs import metadata
from inputs import reader as inputs_reader
from inputs.archives import ZipPool
from inputs.caption_filters import caption_pattern
from inputs.columns import TextColumn
from inputs.images import UnreadableImage, read_image
from inputs.metadata import RefusedPickle, iter_json, read_pickle
from inputs.transforms import Preprocess, eval_view
from tokenizer import SimpleTokenizer


# ---------------------------------------------------------------------------------------------------- columns
def test_a_text_column_is_a_list_of_texts():
    texts = ["", "mass", "µ-calcification ☢", "", "a\nb", "\U0001f600", ""]
    column = TextColumn.from_strings(iter(texts))
    assert len(column) == len(texts)
    assert [column[i] for i in range(len(texts))] == texts
    assert len(TextColumn.from_strings([])) == 0
    assert TextColumn.from_strings(["a\ud83db"])[0] == "a?b"  # half a surrogate pair cannot be UTF-8
    for i in (-1, len(texts)):
        with pytest.raises(IndexError):
            column[i]


def private_growth(texts, pipe) -> None:
    def private() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Dirty"))

    before = private()
    total = sum(len(texts[i]) for i in range(len(texts)))
    pipe.send((private() - before, total))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_worker_that_reads_every_text_copies_none():
    context = multiprocessing.get_context("fork")
    strings = [f"{i} " + "radiograph of the chest " * 3 for i in range(100_000)]
    growth = {}
    for kind, texts in (("column", TextColumn.from_strings(strings)), ("list", strings)):
        mine, theirs = context.Pipe()
        worker = context.Process(target=private_growth, args=(texts, theirs))
        worker.start()
        growth[kind], total = mine.recv()
        worker.join()
    text_kb = total / 1024
    assert growth["column"] < 0.2 * text_kb
    assert growth["list"] > 0.8 * text_kb  # what the column is for, and that the measure can tell


# -------------------------------------------------------------------------------------------- caption filters
MAMMO = [
    "Mammogram of the left breast",
    "MLO mammographic view",
    "Mammographie cliché de profil",
    "digital MAMMOGRAPHY",
    "Galactography shows a filling defect",
    "Breast tomosynthesis slice",
]
XRAY = [
    "Chest X-ray (PA)",
    "x ray of the hand",
    "AP Xray pelvis",
    "thorax x‐ray",
    "Postoperative radiograph",
    "Lateral radiographs",
    "A radio-graph after filling",
    "radiograma de tórax",
    "Chest roentgenogram",
    "Röntgen thorax",
    "Skiagram of the shoulder",
    "Bedside CXR",
    "Plain abdominal film",
    "Chest AP film on admission",
    "Orthopantomogram",
    "Preoperative OPG",
    "Lateral cephalogram",
]
OTHER = [
    "Axial CT of the chest",
    "internal mammary artery on CT",
    "reduction mammoplasty, MRI",
    "Mammotome probe on ultrasound",
    "Right breast ultrasound",
    "Autoradiography of the section",
    "microradiograph of enamel",
    "T1 postcontrast MRI film",
    "Carotid angiography, lateral view",
    "electroencephalogram",
    "Panoramic CBCT",
    "externodorsal rays of the bursa",
    "TEM image of a thin film",
]


@pytest.mark.parametrize("name, kept", [("all", MAMMO + XRAY + OTHER), ("mammo-xray", MAMMO + XRAY), ("mammo", MAMMO)])
def test_named_filters_keep_what_their_name_says(name, kept):
    pattern = caption_pattern(name)
    assert [text for text in MAMMO + XRAY + OTHER if pattern is None or pattern.search(text)] == kept


def test_a_filter_is_a_regular_expression_blind_to_case():
    assert caption_pattern(r"\bct\b").search("Axial CT") and not caption_pattern(r"\bct\b").search("act")
    with pytest.raises(ValueError, match=r"'\(ct'.*all, mammo-xray, mammo"):
        caption_pattern("(ct")


# ---------------------------------------------------------------------------------------------------- ROCO v1
CAPTIONS = {
    "ROCO_00001": "Mammogram of the left breast.",
    "ROCO_00002": "Chest  X-ray:\tno  effusion – normal.",
    "ROCO_00003": "Axial CT, µm\rscale.",
    "ROCO_00004": "Axial MRI.",
}


def make_roco(folder: Path, captions=None, name: str = "captions.txt", gap: str = "\t ") -> Path:
    """A folder of captions; image i has the grey value 50 * i."""
    captions = CAPTIONS if captions is None else captions
    for i, key in enumerate(captions, 1):
        save_jpeg(folder / "images" / f"{key}.jpg", 50 * i)
    (folder / name).write_bytes("".join(f"{key}{gap}{text}\n" for key, text in captions.items()).encode())
    return folder


@pytest.mark.parametrize("name, gap", [("captions.txt", "\t "), ("captions.txt", "\t   "), ("selected_pairs.txt", " ")])
def test_roco_reads_both_files_of_captions(tmp_path, name, gap):
    folder = make_roco(tmp_path / "train" / "radiology", name=name, gap=gap)
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
            make_roco(tmp_path / split / kind, {f"{split}-{kind}": f"{split} {kind}"})
    return tmp_path


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("deeper", ["", "train", "train/radiology", "test/radiology", "validation/non-radiology"])
def test_roco_finds_every_split_from_any_root(roco, split, deeper):
    assert all_captions(create_reader("roco", roco / deeper, split=split)) == [f"{split} radiology"]


def test_roco_understands_its_own_data_folder(tmp_path):
    make_roco(tmp_path / "data" / "test" / "radiology")
    assert len(create_reader("roco", tmp_path, split="test")) == 4


def test_roco_parts(roco):
    assert all_captions(create_reader("roco_nonradiology", roco)) == ["train non-radiology"]
    both = create_reader("roco_all", roco)
    assert all_captions(both) == ["train radiology", "train non-radiology"]
    assert both.image(1).size == (24, 20)


def test_a_lone_folder_of_captions_is_the_training_split_only(tmp_path):
    make_roco(tmp_path / "pairs")
    assert len(create_reader("roco", tmp_path / "pairs")) == 4
    with pytest.raises(FileNotFoundError, match="'validation'.*validation/radiology/captions.txt"):
        create_reader("roco", tmp_path / "pairs", split="validation")


def test_a_folder_named_after_its_split_is_that_split(tmp_path):
    make_roco(tmp_path / "test")
    assert len(create_reader("roco", tmp_path / "test", split="test")) == 4
    with pytest.raises(FileNotFoundError):
        create_reader("roco", tmp_path / "test", split="train")


def test_metadata_names_another_file_of_captions(tmp_path):
    folder = make_roco(tmp_path / "train" / "radiology")
    (folder / "selected_pairs.txt").write_text("ROCO_00004 only this\n")
    assert len(create_reader("roco", tmp_path)) == 4
    assert all_captions(create_reader("roco", tmp_path, "selected_pairs.txt")) == ["only this"]
    with pytest.raises(FileNotFoundError, match="mine.txt"):
        create_reader("roco", tmp_path, "mine.txt")
    with pytest.raises(ValueError, match="name of a file beside images/, no path.*radiology/captions.txt"):
        create_reader("roco", tmp_path, str(folder / "captions.txt"))  # it would serve for every split


def test_absent_images_and_rows_without_caption_are_counted_and_named(tmp_path):
    folder = make_roco(tmp_path / "train" / "radiology")
    with open(folder / "captions.txt", "a") as file:
        file.write("ROCO_00005\t gone\n\nROCO_00001\t  \nROCO_00002\nROCO_00006\t gone too\n")
    reader = create_reader("roco", tmp_path)
    assert len(reader) == 4 and reader.dropped == 2
    log = "\n".join(reader.log)
    assert "4 pictures" in log
    assert "2 rows dropped because their image is absent" in log and "ROCO_00005.jpg" in log
    assert "2 rows dropped because they have no caption" in log and "captions.txt line 7" in log


def test_a_folder_is_listed_once_and_no_image_is_asked_for(tmp_path, monkeypatch):
    make_roco(tmp_path / "train" / "radiology", {f"R_{i}": "text" for i in range(50)})
    listed, asked = [], []
    scandir, stat_of = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(str(path)) or stat_of(path, **more))
    assert len(create_reader("roco", tmp_path)) == 50
    assert listed == [str(tmp_path / "train" / "radiology" / "images")]
    assert not [path for path in asked if path.endswith(".jpg")]


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/../../b", "..", "a\\..\\b"])
def test_a_row_that_leaves_the_root_is_refused_by_name(tmp_path, name):
    folder = make_roco(tmp_path / "train" / "radiology")
    with open(folder / "captions.txt", "a") as file:
        file.write(f"{name}\t text\n")
    with pytest.raises(ValueError, match="captions.txt line 5.*may leave the data root"):
        create_reader("roco", tmp_path)


def test_clear_errors_for_roots_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_reader("roco", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no ROCO split 'train'.*train/radiology/captions.txt"):
        create_reader("roco", tmp_path)
    folder = make_roco(tmp_path / "train" / "radiology")
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
    folder = make_roco(tmp_path / "train" / "radiology")
    path = folder / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(create_reader("roco", tmp_path)) == 4


def test_the_caption_filter_chooses_rows_and_says_how_many(tmp_path):
    make_roco(tmp_path / "train" / "radiology")
    reader = create_reader("roco", tmp_path, caption_filter="mammo-xray")
    assert all_captions(reader) == list(CAPTIONS.values())[:2]
    assert grey_of(reader.image(1)) == 100
    assert "'mammo-xray' keeps 2 of 4 images" in reader.log[-1]
    axial = create_reader("roco", tmp_path, caption_filter="^axial")
    assert len(axial) == 2 and grey_of(axial.image(0)) == 150 and axial.name(1).endswith("ROCO_00004.jpg")
    with pytest.raises(ValueError, match="'mamo' keeps 0 of 4.*mammo-xray, mammo"):
        create_reader("roco", tmp_path, caption_filter="mamo")


# ----------------------------------------------------------------------------------------- ROCO v2 and tables
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


# ---------------------------------------------------------------------------------------------- large sources


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


def test_damaged_archives_and_members_are_named(tmp_path):
    make_yfcc(tmp_path)
    reader = create_reader("yfcc15m", tmp_path)
    path = tmp_path / "images" / "12" / "345.zip"
    path.write_bytes(path.read_bytes().replace(jpeg(678 % 200), jpeg(678 % 200)[::-1]))
    with pytest.raises(UnreadableImage, match="12/345.zip/678.jpg"):
        reader.image(0)  # the checksum fails
    path.write_bytes(b"no archive")
    reader.archives = ZipPool()
    with pytest.raises(UnreadableImage, match="12/345.zip"):
        reader.image(0)
    path.unlink()
    reader.archives = ZipPool()
    with pytest.raises(FileNotFoundError, match="12/345.zip"):
        reader.image(0)


def test_open_archives_are_bounded_and_reused(tmp_path):
    for i in range(6):
        with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as file:
            file.writestr("a", str(i))
    pool = ZipPool(size=3)
    assert [pool.read(tmp_path / f"{i}.zip", "a") for i in range(6)] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert [path.stem for path in pool.archives] == ["3", "4", "5"]
    handle = pool.archives[tmp_path / "3.zip"]
    pool.read(tmp_path / "3.zip", "a")
    pool.read(tmp_path / "0.zip", "a")
    assert pool.archives[tmp_path / "3.zip"] is handle  # the last used stays, 4 went
    assert [path.stem for path in pool.archives] == ["5", "3", "0"]


def read_many(pool, path, n, pipe) -> None:
    pipe.send(all(pool.read(path, str(k)) == bytes([k]) * 50_000 for _ in range(n) for k in range(8)))


def test_forked_workers_open_archives_of_their_own(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for k in range(8):
            file.writestr(str(k), bytes([k]) * 50_000)
    pool = ZipPool()
    pool.read(path, "0")
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for _ in range(3):
        mine, theirs = context.Pipe()
        workers.append(context.Process(target=read_many, args=(pool, path, 20, theirs)))
        workers[-1].start()
        pipes.append(mine)
    assert all(pipe.recv() for pipe in pipes)
    for worker in workers:
        worker.join()


# ------------------------------------------------------------------------------------------------------ index
@pytest.mark.parametrize("name", LARGE)
def test_the_second_start_reads_the_index_alone(tmp_path, monkeypatch, name):
    make, captions, greys, dropped = LARGE[name]
    first = create_reader(name, make(tmp_path), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(READERS[name], "rows", None)  # reading the metadata again would fail
    second = create_reader(name, tmp_path, cache_dir=tmp_path / "cache")
    assert [second.captions(i) for i in range(len(second))] == captions
    assert second.dropped == dropped and second.log[: len(first.log)] == first.log
    assert not second.texts.data.flags.writeable  # mapped from the file
    assert [path.name for path in tmp_path.glob("*.index")] == []


def test_the_index_follows_the_metadata_and_the_root(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        make_redcaps(folder, "images")
    listed = tmp_path / "list.json"
    listed.write_bytes((a / "redcaps_v1.json").read_bytes())
    assert len(create_reader("redcaps", a, str(listed))) == 1
    save_jpeg(b / "images" / "itap" / "gone.jpg")
    assert len(create_reader("redcaps", b, str(listed))) == 2  # another root, another index
    assert len(create_reader("redcaps", a, str(listed))) == 1
    listed.write_text(json.dumps([{"image_id": "abc1", "caption": "changed", "subreddit": "itap"}] * 3))
    assert all_captions(create_reader("redcaps", a, str(listed))) == ["changed"] * 3
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_a_damaged_index_is_made_again(tmp_path):
    make_redcaps(tmp_path, "images")
    create_reader("redcaps", tmp_path)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    for damaged in (b"", whole[:200], b"x" * len(whole), whole[: len(whole) - 64]):
        index.write_bytes(damaged)
        assert all_captions(create_reader("redcaps", tmp_path)) == ["itap"]


def test_without_a_writable_folder_the_reader_works_and_says_so(tmp_path, monkeypatch):
    make_redcaps(tmp_path, "images")

    def refuse(*_arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(inputs_index, "write_index", refuse)
    reader = create_reader("redcaps", tmp_path)
    assert all_captions(reader) == ["itap"]
    assert "no index kept" in reader.log[-1] and not list(tmp_path.glob("*.index"))


def build_once(root, barrier, pipe) -> None:
    calls = []
    rows = READERS["redcaps"].rows

    def counted(self):
        calls.append(1)
        return rows(self)

    READERS["redcaps"].rows = counted
    barrier.wait()
    pipe.send((len(calls), all_captions(create_reader("redcaps", root)), len(calls)))


def test_of_several_processes_one_makes_the_index(tmp_path):
    make_redcaps(tmp_path, "images")
    context = multiprocessing.get_context("fork")
    barrier, pipes, workers = context.Barrier(4), [], []
    for _ in range(4):
        mine, theirs = context.Pipe()
        workers.append(context.Process(target=build_once, args=(tmp_path, barrier, theirs)))
        workers[-1].start()
        pipes.append(mine)
    answers = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    assert [captions for _, captions, _ in answers] == [["itap"]] * 4
    assert sum(built for *_, built in answers) == 1


# --------------------------------------------------------------------------------------- metadata from others
class Run:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_in_every_protocol(tmp_path, protocol):
    rows = [(1, "a", "ü"), (2**40, "", "b"), {"x": [1.5, None, True]}]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(rows, protocol))
    assert read_pickle(tmp_path / "a.pkl") == rows


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_the_published_npy_files_are_read(tmp_path, module):
    """Object arrays of dicts with numpy numbers inside, as numpy 1 and numpy 2 pickle them."""
    rows = [
        {"image_id": "a.jpg", "captions": ["x"], "n": np.int64(-7)},
        {"image_id": 5, "captions": ["ü", "y"]},
    ]
    np.save(tmp_path / "a.npy", np.array(rows, dtype=object))
    data = (tmp_path / "a.npy").read_bytes()
    old, new = (struct.pack("<B", len(name)) + name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"))
    if module == "numpy.core" and old in data:
        data = data.replace(old, new)
    frame = data.find(b"\x95")  # the frame of protocol 4 states its length: written anew
    if frame > 0:
        data = data[: frame + 1] + struct.pack("<Q", len(data) - frame - 9) + data[frame + 9 :]
    (tmp_path / "a.npy").write_bytes(data.replace(b"numpy._core.multiarray", module.encode() + b".multiarray"))
    assert read_pickle(tmp_path / "a.npy") == rows


def test_arrays_of_numbers_and_strings_come_as_lists(tmp_path):
    for values in (np.arange(5), np.array([1.5, -2]), np.array(["a", "üb"]), np.array([True, False])):
        np.save(tmp_path / "a.npy", values)
        assert read_pickle(tmp_path / "a.npy") == values.tolist()
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": values, "n": values[0]}, protocol=4))
        assert read_pickle(tmp_path / "a.pkl") == {"x": values.tolist(), "n": values[0].item()}


@pytest.mark.parametrize(
    "hostile, named",
    [
        (Run(os.system, "touch ran"), r"(posix|nt)\.system"),
        (Run(eval, "__import__('os').system('touch ran')"), "builtins.eval"),
        (Run(print, "x"), "builtins.print"),
        (Path("x"), "pathlib"),
        (Run(np.load, "x"), "numpy"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_pickles_that_ask_for_more_are_refused_by_name(tmp_path, monkeypatch, hostile, named):
    data = pickle.dumps([hostile], protocol=3)
    (tmp_path / "bad.pkl").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedPickle, match=f"bad.pkl asks for {named}"):
        read_pickle(tmp_path / "bad.pkl")
    with open(tmp_path / "bad.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        file.write(data)
    with pytest.raises(RefusedPickle, match=f"bad.npy asks for {named}"):
        read_pickle(tmp_path / "bad.npy")
    assert not (tmp_path / "ran").exists()


def test_an_array_cannot_take_addresses_from_the_file(tmp_path):
    """ndarray((1,), 'O', buffer) takes pointers from the buffer: numpy's own class would follow them."""
    attack = b"\x80\x02]cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OU\x08AAAAAAAAtRa."
    (tmp_path / "a.pkl").write_bytes(attack)
    assert read_pickle(tmp_path / "a.pkl") == [[]]
    state = b"(K\x01K\x01\x85cnumpy\ndtype\n(X\x01\x00\x00\x00OtR\x89U\x08AAAAAAAAtb"
    rebuild = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    (tmp_path / "b.pkl").write_bytes(rebuild + state + b".")
    with pytest.raises(RefusedPickle, match="b.pkl.*'O'"):
        read_pickle(tmp_path / "b.pkl")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"no pickle", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x05\x00{}   "])
def test_damaged_pickles_are_named(tmp_path, data):
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="bad.pkl"):
        read_pickle(tmp_path / "bad.pkl")


VALUES = [{"a": [1, {"b": ']},[{\\"'}]}, -12.5e3, 123456789, "ü\ud83d", None, True, [], {}, "x" * 50]


@pytest.mark.parametrize("piece", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_are_read_piece_by_piece(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(metadata._JsonStream, "PIECE", piece)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUES, indent=indent) + "\n")
    assert list(iter_json(path)) == VALUES
    path.write_text(json.dumps({"info": {"annotations": 1}, "n": 12, "annotations": VALUES, "z": 3}, indent=indent))
    assert list(iter_json(path, "annotations")) == VALUES
    path.write_text("[]")
    assert list(iter_json(path)) == []


@pytest.mark.parametrize("text", ["", "[1, 2", "[1 2]", '{"a": [1]}', '{"annotations": 3}', "7", '[{"a": }]', "[1,]"])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json near character"):
        list(iter_json(tmp_path / "bad.json", "annotations"))


# --------------------------------------------------------------------------------------------------- training
@pytest.fixture
def reader(tmp_path):
    captions = {f"ROCO_{i:05d}": f"caption {i}" for i in range(12)}
    folder = make_roco(tmp_path / "train" / "radiology", captions)
    rng = np.random.default_rng(0)
    for key in captions:
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{key}.jpg")
    return create_reader("roco", tmp_path)


INPUTS = ("image", "text", "view1", "view2")


def test_a_sample_depends_on_seed_epoch_and_index_alone(reader):
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=3)
    first = samples[2, 5]
    assert first["index"] == 5 and first["text"] == "caption 5"
    assert torch.equal(first["view1"], ContrastiveDataset(reader, INPUTS, PREPROCESS, 3)[2, 5]["view1"])
    assert not torch.equal(first["view1"], first["view2"])
    for other in (samples[1, 5], ContrastiveDataset(reader, INPUTS, PREPROCESS, 4)[2, 5]):
        assert not torch.equal(first["image"], other["image"])
        assert not torch.equal(first["view2"], other["view2"])


def test_a_sample_holds_the_views_of_its_objective(reader):
    sample = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=3)[2, 5]
    rng, img = np.random.default_rng((3, 2, 5)), read_image(reader.name(5))
    rng.integers(1)  # the caption is drawn first
    for name, view in (
        ("image", TrainView(PREPROCESS)),
        ("view1", SslView(PREPROCESS)),
        ("view2", SslView(PREPROCESS)),
    ):
        assert torch.equal(PREPROCESS.normalise(sample[name]), view(img, rng))
    clip = ContrastiveDataset(reader, ("image", "text"), PREPROCESS, seed=3)[2, 5]
    assert set(clip) == {"image", "text", "index"}
    assert torch.equal(clip["image"], sample["image"])  # CLIP and SLIP see the same training view
    assert set(ContrastiveDataset(reader, ("view1", "view2"), PREPROCESS, seed=3)[0, 0]) == {
        "view1",
        "view2",
        "index",
    }
    with pytest.raises(ValueError, match="unknown inputs images; choose from text, image, view1, view2"):
        ContrastiveDataset(reader, ("images", "text"), PREPROCESS, seed=3)


@pytest.mark.parametrize("preprocess", [PREPROCESS, Preprocess(size=16, prepare="medclip")], ids=["colour", "grey"])
def test_colours_changed_on_the_device_are_those_that_a_worker_makes(reader, preprocess):
    keys, collate = [(0, i) for i in range(8)], Collate(SimpleTokenizer(context_length=9))
    early, late = (
        collate([ContrastiveDataset(reader, INPUTS, preprocess, seed=3, colour_later=later)[key] for key in keys])
        for later in (False, True)
    )
    assert not torch.equal(early["view1"], late["view1"])  # bare crops
    for name in ("image", "view1", "view2"):
        assert early[name].dtype == torch.uint8 and early[name].shape == (8, 3, 16, 16)
        finished = main.to_device(late, name, preprocess, torch.device("cpu"))
        assert torch.equal(finished, main.to_device(early, name, preprocess, torch.device("cpu")))
        assert torch.equal(finished, preprocess.normalise(early[name]))
    assert torch.equal(main.to_device(late, "text", preprocess, torch.device("cpu")), early["text"])


def test_one_of_several_captions_is_drawn(tmp_path):
    reader = create_reader("coco", make_coco(tmp_path))
    samples = ContrastiveDataset(reader, ("image", "text"), PREPROCESS, seed=0)
    drawn = [samples[epoch, 0]["text"] for epoch in range(300)]
    counts = [drawn.count(text) for text in reader.captions(0)]
    assert sum(counts) == 300 and min(counts) > 70  # 100 each, std 8


def batches(reader, workers: int, epoch: int, context: str | None = None) -> list[dict]:
    sampler = GlobalBatchSampler(len(reader), 4, seed=1)
    sampler.set_epoch(epoch)
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=1)
    return list(
        DataLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=Collate(SimpleTokenizer(context_length=9)),
            num_workers=workers,
            multiprocessing_context=context,
        )
    )


@pytest.mark.parametrize("workers, context", [(2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_the_number_and_kind_of_workers_changes_nothing(reader, workers, context):
    for one, other in zip(batches(reader, 0, 7), batches(reader, workers, 7, context), strict=True):
        assert set(one) == {*INPUTS, "index"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_hold_stacked_images_and_token_ids(reader):
    batch = batches(reader, 0, 0)[0]
    assert batch["image"].shape == batch["view1"].shape == (4, 3, 16, 16)
    assert batch["text"].shape == (4, 9) and batch["index"].shape == (4,)
    expected = SimpleTokenizer(context_length=9)([f"caption {i}" for i in batch["index"].tolist()])
    assert torch.equal(batch["text"], expected)
    assert set(Collate()([{"view1": torch.zeros(3, 2, 2), "index": 3}])) == {"view1", "index"}


def test_trimmed_captions_lose_padding_alone():
    tokenizer, texts = SimpleTokenizer(), ["a mass", "a " * 13 + "mass"]  # 4 and 16 tokens with start and end
    for chosen, length in ((texts[:1], 8), (texts, 16), (["a " * 200], 77), ([""], 8)):
        samples = [{"text": text, "index": 0} for text in chosen]
        whole, trimmed = Collate(tokenizer)(samples)["text"], Collate(tokenizer, trim=True)(samples)["text"]
        assert whole.shape[1] == 77 and trimmed.shape[1] == length and trimmed.is_contiguous()
        assert torch.equal(trimmed, whole[:, :length]) and not whole[:, length:].any()


def test_eval_pairs_take_the_evaluation_view(reader):
    pairs = pickle.loads(pickle.dumps(EvalPairs(reader, PREPROCESS)))
    tensor, index = pairs[4]
    assert len(pairs) == 12 and index == 4
    assert torch.equal(tensor, eval_view(PREPROCESS)(read_image(reader.name(4))))


# ---------------------------------------------------------------------------------------------------- sampler
@pytest.mark.parametrize("n, batch, world", [(20, 2, 3), (12, 4, 1), (7, 1, 7), (100, 8, 4)])
def test_ranks_share_the_batches_of_one_process(n, batch, world):
    whole = GlobalBatchSampler(n, batch * world, seed=5)
    ranks = [GlobalBatchSampler(n, batch, rank, world, seed=5) for rank in range(world)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(3)
        assert len(sampler) == n // (batch * world)
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == list(whole)
    drawn = [index for step in together for _, index in step]
    assert len(set(drawn)) == len(drawn) == n // (batch * world) * batch * world
    assert {epoch for step in together for epoch, _ in step} == {3}


def test_epochs_and_seeds_permute_differently():
    def order(seed, epoch):
        sampler = GlobalBatchSampler(50, 50, seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in next(iter(sampler))]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(50)) != order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_an_epoch_continues_at_any_step():
    sampler = GlobalBatchSampler(40, 4, rank=1, world_size=2, seed=2)
    sampler.set_epoch(6)
    whole = list(sampler)
    sampler.set_epoch(6, start_step=3)
    assert list(sampler) == whole[3:] and len(sampler) == 5
    sampler.set_epoch(7)
    assert len(list(sampler)) == 5


def test_too_few_pairs_name_both_numbers():
    with pytest.raises(ValueError, match="300 pairs do not fill one global batch of 512 .64 for each of 8"):
        GlobalBatchSampler(300, 64, world_size=8)


# -------------------------------------------------------------------------------------------- unreadable images
@pytest.fixture
def corrupt_reader(reader):
    for i in (2, 7):
        Path(reader.name(i)).write_bytes(b"no image")
    Path(reader.name(9)).unlink()
    return reader


def test_a_broken_image_is_an_error_that_names_it(corrupt_reader):
    samples = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, seed=0)
    with pytest.raises(UnreadableImage, match="ROCO_00002.jpg"):
        samples[0, 2]
    with pytest.raises(FileNotFoundError, match="ROCO_00009.jpg"):
        samples[0, 9]
    with pytest.raises(UnreadableImage, match="ROCO_00007.jpg"):
        EvalPairs(corrupt_reader, PREPROCESS)[7]


def test_broken_images_are_named_and_replaced_from_seed_epoch_and_index(corrupt_reader, tmp_path):
    def epoch_of(file, epoch=4):
        samples = ContrastiveDataset(
            corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=tmp_path / file, max_bad_fraction=0.5
        )
        return [samples[epoch, i] for i in range(12)]

    first, again = epoch_of("a.txt"), epoch_of("b.txt")
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        assert one["index"] == other["index"] and torch.equal(one["image"], other["image"])
        assert one["index"] not in (2, 7, 9) and (one["index"] == i or i in (2, 7, 9))
        assert one["text"] == f"caption {one['index']}"  # image and caption stay together
    assert {tuple(s["index"] for s in epoch_of("a.txt", epoch)) for epoch in range(5)} != {tuple(range(12))}
    lines = (tmp_path / "a.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(corrupt_reader.name(i) for i in (2, 7, 9))
    assert all(line.split("\t")[1] for line in lines)


def test_workers_name_a_broken_image_once(corrupt_reader, tmp_path):
    path = tmp_path / "bad.txt"
    samples = ContrastiveDataset(
        corrupt_reader, ("view1", "view2"), PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.5
    )
    sampler = GlobalBatchSampler(12, 2)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=Collate(), num_workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(loader)) == 6
    names = [line.split("\t")[0] for line in path.read_text().splitlines()]
    assert set(names) == {corrupt_reader.name(i) for i in (2, 7, 9)}


def test_too_many_broken_images_end_the_run(corrupt_reader, tmp_path):
    path = tmp_path / "bad.txt"
    samples = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.2)
    samples[0, 2]
    with pytest.raises(UnreadableImage, match="3 images cannot be read.*bad.txt"):
        for i in range(12):
            samples[0, i]
    later = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.1)
    with pytest.raises(UnreadableImage, match="images cannot be read"):  # a resumed run counts on
        later[0, 2]


def test_when_nothing_can_be_read_the_search_ends(reader, tmp_path):
    for i in range(12):
        Path(reader.name(i)).write_bytes(b"")
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, 0, bad_samples=tmp_path / "bad.txt", max_bad_fraction=1)
    with pytest.raises(UnreadableImage, match="10 images in a row cannot be read"):
        samples[0, 0]


# ------------------------------------------------------------------------------------------------ through main.py
@pytest.mark.parametrize("name", [*LARGE, "roco"])
def test_an_epoch_on_each_source_trains_both_towers(name, tmp_path):
    """A pair of images gives one step, whose gradient reaches both towers: nothing else moves them."""
    if name == "roco":
        make_roco(tmp_path / "train" / "radiology")
    else:
        LARGE[name][0](tmp_path)
    if name == "redcaps":  # its tree holds one image, and one pair alone has no gradient
        save_jpeg(tmp_path / "images" / "itap" / "abc2.jpg", 10)
        rows = json.loads((tmp_path / "redcaps_v1.json").read_text())
        rows.append({"image_id": "abc2", "caption": "another", "subreddit": "itap"})
        (tmp_path / "redcaps_v1.json").write_text(json.dumps(rows))
    states = []
    for lr in ("0", "1e-2"):
        settings = [
            "--batch-size",
            "2",
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--lr",
            lr,
            "--lr-end",
            lr,
            "--wd",
            "0",
        ]
        argv = command(tmp_path, tmp_path / lr, *settings)
        argv[argv.index("--dataset") + 1] = name
        argv[argv.index("--model") + 1] = "CLIP_VITT16"  # validates on nothing but ROCO
        main.main(argv)
        rows = [json.loads(line) for line in (tmp_path / lr / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "train"] == ([1, 2] if name == "roco" else [1])
        states.append(weights(tmp_path / lr))
    moved = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    for tower in ("visual.blocks", "transformer.resblocks", "token_embedding", "image_projection", "text_projection"):
        assert [key for key in moved if key.startswith(tower)], tower


# --- what others' tables, indices and archives are like ---------------------------------------------------------------


def test_an_index_of_an_unfinished_download_is_made_anew_and_says_so_once(tmp_path):
    rows = [{"image_id": f"ab{i}", "subreddit": "itap", "caption": f"thing {i}"} for i in range(6)]
    (tmp_path / "redcaps_v1.json").write_text(json.dumps(rows))
    for i in range(3):
        save_jpeg(tmp_path / "itap" / f"ab{i}.jpg")
    assert len(create_reader("redcaps", tmp_path)) == 3
    again = create_reader("redcaps", tmp_path)
    assert len(again) == 3 and "that is what the index" in again.log[-1]
    for i in range(3, 6):
        save_jpeg(tmp_path / "itap" / f"ab{i}.jpg")
    whole = create_reader("redcaps", tmp_path)
    assert len(whole) == 6 and sum("indexed anew" in line for line in whole.log) == 1
    log = "".join(create_reader("redcaps", tmp_path).log)  # nothing is left to be said
    assert "indexed anew" not in log and "that is what" not in log


def test_without_file_locks_the_index_is_kept_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make_redcaps(tmp_path, "images")
    assert len(create_reader("redcaps", tmp_path)) == 1 and list(tmp_path.glob("*.index"))


def test_zip_members_are_found_in_any_folder_and_case(tmp_path):
    members = {
        "000": [("000.jpg", 10), ("__MACOSX/._000.jpg", 0)],
        "001": [("001/000.jpg", 20)],
        "002": [("000.JPG", 30)],
        "003": [("a/000.jpg", 40), ("b/000.jpg", 50)],  # which of them is meant?
    }
    (tmp_path / "images" / "00").mkdir(parents=True)
    for archive, entries in members.items():
        with zipfile.ZipFile(tmp_path / "images" / "00" / f"{archive}.zip", "w") as file:
            for name, grey in entries:
                file.writestr(name, jpeg(grey))
    rows = [(1000 * i, "title", "text") for i in range(4)]
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    reader = create_reader("yfcc15m", tmp_path)
    assert [grey_of(reader.image(i)) for i in range(len(reader))] == [10, 20, 30]
    assert "00/003.zip/000.jpg" in "".join(reader.log)


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
