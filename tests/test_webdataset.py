"""--dataset webdataset: tar shards as img2dataset writes them, read at the place of each sample."""

import codecs
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import TINY
from PIL import Image
from roco_tree import make_roco
from source_tree import PREPROCESS, all_captions, grey_of, jpeg
from test_dicom import LINE, write_dicom
from torch.utils.data import DataLoader

import main
import make_dataset
import predict
import utils
from datasets import Collate, ContrastiveDataset, GlobalBatchSampler, create_reader
from evaluation.catalog import read_catalog
from inputs import archives
from inputs.archives import TarPool
from inputs.images import UnreadableImage
from runtime import checkpoints
from tokenizer import SimpleTokenizer, read_vocab


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def write_shard(path: Path, keys, mode: str = "w", fmt: int = tarfile.USTAR_FORMAT) -> Path:
    """Samples key.jpg, key.json and key.txt as img2dataset orders them; image k has the grey value 10 k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=fmt) as archive:
        for key in keys:
            about = {"url": "u", "key": f"{key:09d}", "caption": f"caption {key}", "status": "success", "width": 24}
            add(archive, f"{key:09d}.jpg", jpeg(10 * key))
            add(archive, f"{key:09d}.json", json.dumps(about).encode())
            add(archive, f"{key:09d}.txt", f"caption {key}".encode())
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """24 samples in five shards of different sizes, with img2dataset's other files beside them."""
    root = tmp_path / "shards"
    for number, keys in enumerate((range(0, 7), range(7, 8), range(8, 14), range(14, 20), range(20, 24))):
        write_shard(root / f"{number:05d}.tar", keys)
        (root / f"{number:05d}_stats.json").write_text("{}")
        (root / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return root


def check(reader, keys) -> None:
    assert all_captions(reader) == [f"caption {key}" for key in keys]
    assert [grey_of(reader.image(i)) for i in range(len(reader))] == pytest.approx([10 * k for k in keys], abs=1)


def test_a_folder_of_shards(shards):
    reader = create_reader("webdataset", shards)
    check(reader, range(24))
    assert reader.name(7) == f"{shards}/00001.tar/000000007.jpg" and reader.data(7) == jpeg(70)
    assert "24 pictures with captions" in reader.log[0] and reader.dropped == 0
    check(pickle.loads(pickle.dumps(reader)), range(24))  # as a spawned worker gets it
    filtered = create_reader("webdataset", shards, caption_filter="1$")
    check(filtered, [1, 11, 21])


def test_names_with_dots_are_cut_at_the_last_where_that_makes_more_pairs(tmp_path):
    """As of files that DICOM's UIDs name; webdataset itself makes one sample of them all."""
    uid = "a.b/1.2.840.113619"
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for k in (3, 5):
            add(archive, f"{uid}.{k}.JPG", jpeg(10 * k))
            add(archive, f"{uid}.{k}.txt", f"caption {k}".encode())
        add(archive, "README")
    reader = create_reader("webdataset", tmp_path)
    check(reader, [3, 5])
    assert reader.name(1) == f"{tmp_path}/0.tar/{uid}.5.jpg" and reader.data(1) == jpeg(50)
    assert write_shard(tmp_path / "1.tar", [7]) and [len(create_reader("webdataset", tmp_path))] == [3]
    with tarfile.open(tmp_path / "mixed.tar", "w") as archive:  # the first dot counts, and who is lost is told why
        for name in ("7.jpg", "7.seg.png", "1.2.3.jpg", "1.2.4.jpg"):
            add(archive, name, jpeg(70))
        add(archive, "7.txt", b"caption 7")
    reader = create_reader("webdataset", tmp_path / "mixed.tar")
    check(reader, [7])
    assert reader.dropped == 2 and "'1': its name goes on with '2.3.jpg', and the format cuts" in " ".join(reader.log)


def test_a_plain_name_among_uids_loses_none_of_their_pairs(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for k, name in ((3, "1.2.840.3"), (7, "7"), (5, "1.2.840.5")):
            add(archive, f"{name}.jpg", jpeg(10 * k))
            add(archive, f"{name}.txt", f"caption {k}".encode())
    reader = create_reader("webdataset", tmp_path)
    check(reader, [3, 7, 5])
    assert reader.dropped == 0


def test_patterns_and_lists_of_shards(shards, monkeypatch):
    pytest.importorskip("webdataset")
    for root, keys in (
        (f"{shards}/{{00001..00003}}.tar", range(7, 20)),
        (f"{shards}/0000{{4,0}}.tar", [*range(20, 24), *range(7)]),
        (f"{shards}/00001.tar", [7]),
        (f"{shards}/00001.tar::{shards}/00004.tar", [7, *range(20, 24)]),
    ):
        reader = create_reader("webdataset", root)
        check(reader, keys)
        assert reader.root == shards
    check(create_reader("webdataset", shards, "{00002..00003}.tar"), range(8, 20))
    (shards / "few.txt").write_text(f"00003.tar\n\n{shards}/0000{{0..1}}.tar\n")
    check(create_reader("webdataset", shards, "few.txt"), [*range(14, 20), *range(8)])
    monkeypatch.chdir(shards.parent)
    check(create_reader("webdataset", "shards/{00003..00004}.tar"), range(14, 24))


def test_splits_are_folders(shards):
    with pytest.raises(FileNotFoundError, match="no shards .*validation"):
        create_reader("webdataset", shards, split="validation")
    with pytest.raises(FileNotFoundError, match="of the split 'train', not 'test'"):
        create_reader("webdataset", shards / "00000.tar", split="test")
    write_shard(shards / "validation" / "00000.tar", [3, 5])
    check(create_reader("webdataset", shards, split="validation"), [3, 5])
    check(create_reader("webdataset", shards), range(24))
    write_shard(shards / "train" / "00000.tar", [9])
    check(create_reader("webdataset", shards), [9])


def test_absent_shards_are_named(shards, tmp_path):
    pytest.importorskip("webdataset")
    for root, message in (
        (f"{shards}/{{00003..00006}}.tar", "2 of 4 shards are absent: .*00005.tar, .*00006.tar"),
        (tmp_path / "nowhere", "1 of 1 shards are absent: .*nowhere"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            create_reader("webdataset", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no shards \(\*.tar\) in"):
        create_reader("webdataset", tmp_path / "empty")


def test_a_pattern_without_the_library_says_what_to_install(shards, monkeypatch):
    for name in ("webdataset", "webdataset.shardlists"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="00001.*pip install webdataset"):
        create_reader("webdataset", f"{shards}/{{00000..00001}}.tar")
    check(create_reader("webdataset", shards), range(24))  # a folder needs none


# ------------------------------------------------------------------------------------------------- each sample once
def read_epoch(reader, epoch: int, workers: int, rank: int = 0, world: int = 1, start: int = 0) -> list[dict]:
    sampler = GlobalBatchSampler(len(reader), 6 // world, rank, world, seed=1)
    sampler.set_epoch(epoch, start)
    samples = ContrastiveDataset(reader, ("image", "text"), PREPROCESS, seed=1)
    return list(
        DataLoader(
            samples, batch_sampler=sampler, collate_fn=Collate(SimpleTokenizer(context_length=9)), num_workers=workers
        )
    )


def test_every_sample_is_seen_once_whatever_the_nodes_and_workers(shards):
    reader = create_reader("webdataset", shards)
    whole = read_epoch(reader, 2, workers=0)
    assert sorted(index for batch in whole for index in batch["index"].tolist()) == list(range(24))
    for world, workers in ((1, 2), (2, 2), (3, 1)):
        ranks = [read_epoch(reader, 2, workers, rank, world) for rank in range(world)]
        for expected, *parts in zip(whole, *ranks, strict=True):
            for name, values in expected.items():  # the same global batches, to the bit
                assert torch.equal(torch.cat([part[name] for part in parts]), values)


def test_an_epoch_continues_at_any_step(shards):
    reader = create_reader("webdataset", shards)
    whole = read_epoch(reader, 5, workers=0)
    for batch, expected in zip(read_epoch(reader, 5, workers=2, start=3), whole[3:], strict=True):
        assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["index"], expected["index"])


def test_few_files_are_open_at_a_time(shards):
    pool = TarPool(size=2)
    for number in (0, 1, 2, 0, 3):
        assert len(pool.read(shards / f"{number:05d}.tar", 512, 20)) == 20
        assert len(pool.archives) <= 2
    assert [path.stem for path in pool.archives] == ["00000", "00003"]


# ------------------------------------------------------------------------------------------------------- samples
def reader_of(tmp_path: Path, members: list[tuple], **keywords):
    with tarfile.open(tmp_path / "a.tar", "w", **keywords) as archive:
        for name, data, *fields in members:
            add(archive, name, data, **(fields[0] if fields else {}))
    return create_reader("webdataset", tmp_path)


def test_samples_without_image_or_caption_are_counted_and_named(tmp_path):
    reader = reader_of(
        tmp_path,
        [
            ("1.jpg", jpeg(50)),
            ("1.txt", b"one"),
            ("2.json", b'{"status": "failed_to_download", "caption": "two"}'),
            ("2.txt", b"two"),
            ("3.jpg", jpeg()),
            ("3.json", b'{"caption": null}'),
            ("4.jpg", jpeg()),
            ("4.txt", b" \n"),
            ("5.jpg", jpeg(150)),
            ("5.json", b'{"caption": "five"}'),
        ],
    )
    assert all_captions(reader) == ["one", "five"] and grey_of(reader.image(1)) == pytest.approx(150, abs=1)
    assert reader.dropped == 1
    assert "1 rows dropped because their image is absent; first: (" in reader.log[1] and "sample '2'" in reader.log[1]
    assert "2 rows dropped because they have no caption" in reader.log[2] and "sample '3'" in reader.log[2]


def test_several_captions_come_from_the_json(tmp_path):
    reader = reader_of(
        tmp_path,
        [
            ("1.jpg", jpeg()),
            ("1.txt", b"one"),
            ("1.json", b'{"captions": ["one", "uno", " "], "caption": "x"}'),
            ("2.jpg", jpeg()),
            ("2.txt", "zwei ü".encode()),
            ("2.json", b'{"captions": 3, "caption": "x"}'),
            ("3.jpg", jpeg()),
            ("3.txt", b"three"),
            ("3.json", b"[]"),
            ("4.jpg", jpeg()),
            ("4.txt", b"four"),
            ("4.json", b'{"captions": [], "caption": "x"}'),
            ("5.jpg", jpeg()),
            ("5.txt", b"\n"),
            ("5.json", b'{"captions": [null, ""], "caption": "five"}'),
            ("6.jpg", jpeg()),
            ("6.json", b'{"captions": [null, "six"]}'),
        ],
    )
    expected = [["one", "uno"], ["zwei ü"], ["three"], ["four"], ["five"], ["six"]]
    assert [reader.captions(i) for i in range(len(reader))] == expected


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    """Notepad puts one at the head of what it saves as UTF-8."""
    (tmp_path / "shards").mkdir()
    members = [("1.jpg", jpeg()), ("1.txt", codecs.BOM_UTF8 + b"one"), ("2.jpg", jpeg())]
    reader_of(tmp_path / "shards", [*members, ("2.json", codecs.BOM_UTF8 + b'{"caption": "two"}')])
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + b"shards/a.tar\r\n")
    reader = create_reader("webdataset", tmp_path, "list.txt")
    assert all_captions(reader) == ["one", "two"]
    (tmp_path / "captions.txt").write_bytes(codecs.BOM_UTF8 + b"chest film\r\n")
    assert predict.read_captions(tmp_path / "captions.txt") == ["chest film"]
    (tmp_path / "catalog.json").write_bytes(codecs.BOM_UTF8 + b"{}")
    assert read_catalog(tmp_path / "catalog.json") == utils.read_json(tmp_path / "catalog.json") == {}
    (tmp_path / "vocab.txt").write_bytes(codecs.BOM_UTF8 + b"[PAD]\n[UNK]\n")
    assert read_vocab(tmp_path / "vocab.txt") == ["[PAD]", "[UNK]"]


def test_names_extensions_and_order_as_tar_makes_them(tmp_path):
    """`tar cf` keeps ./ and folders; the members of a sample may lie apart; a key may hold blanks."""
    reader = reader_of(
        tmp_path,
        [
            ("./", b"", {"type": tarfile.DIRTYPE}),
            ("./a b/1.JPG", jpeg(40)),
            ("./2.x.png", jpeg(1)),
            ("./2.PNG", jpeg(80)),
            ("./a b/1.txt", b"one"),
            ("./2.txt", b"two"),
            ("./._2.txt", b"\xff"),
        ],
        format=tarfile.PAX_FORMAT,
    )
    assert all_captions(reader) == ["one", "two"]
    assert [grey_of(reader.image(i)) for i in range(2)] == pytest.approx([40, 80], abs=1)
    assert reader.name(0) == f"{tmp_path}/a.tar/a b/1.jpg"


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_tar_format(tmp_path, fmt):
    key = "f" * 60 + "/" + "k" * (39 if fmt == tarfile.USTAR_FORMAT else 200)
    reader = reader_of(
        tmp_path,
        [(f"{key}.jpg", jpeg(60)), (f"{key}.txt", b"long"), ("2.jpg", jpeg(90)), ("2.txt", b"short")],
        format=fmt,
    )
    assert all_captions(reader) == ["long", "short"]
    assert [grey_of(reader.image(i)) for i in range(2)] == pytest.approx([60, 90], abs=1)


# --------------------------------------------------------------------------------------------- hostile and damaged
@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("/etc/passwd.txt", {}, "may leave the data root"),
        ("../1.txt", {}, "may leave the data root"),
        ("a/../../1.txt", {}, "may leave the data root"),
        ("..\\1.txt", {}, "may leave the data root"),
        ("9.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no plain file"),
        ("9.txt", {"type": tarfile.LNKTYPE, "linkname": "1.jpg"}, "no plain file"),
        ("9.txt", {"type": tarfile.FIFOTYPE}, "no plain file"),
        ("9.txt", {"type": tarfile.CHRTYPE}, "no plain file"),
        ("1.jpg", {}, "is there twice"),
        ("1.JPG", {}, "is there twice"),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path, name, fields, message):
    with pytest.raises(ValueError, match=f"a.tar member .*{message}") as error:
        reader_of(tmp_path, [("1.jpg", jpeg()), ("1.txt", b"one"), (name, b"", fields)])
    assert repr(name) in str(error.value)
    assert not list(tmp_path.glob("*.index"))


def test_damaged_and_compressed_shards_are_named(shards):
    whole = (shards / "00002.tar").read_bytes()
    write_shard(shards / "gz", [1], "w:gz")
    damaged = [b"", whole[:700], b"no archive" * 200, (shards / "gz").read_bytes()]
    damaged += [whole[: 512 * blocks] for blocks in range(1, 12)]  # broken off within and between members
    header = whole.index(b"000000010.jpg")
    damaged.append(whole[:header] + b"X" + whole[header + 1 :])  # its checksum is wrong
    for data in damaged:
        (shards / "00002.tar").write_bytes(data)
        with pytest.raises(ValueError, match="00002.tar is no complete, uncompressed tar archive"):
            create_reader("webdataset", shards)


@pytest.mark.parametrize("name, data", [("1.txt", b"caf\xe9"), ("1.json", b'{"caption": "x'), ("1.json", b"\xff")])
def test_damaged_captions_are_named(tmp_path, name, data):
    with pytest.raises(ValueError, match="a.tar sample '1'"):
        reader_of(tmp_path, [("1.jpg", jpeg()), (name, data)])


def test_a_broken_image_is_named(shards):
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes().replace(jpeg(70), b"\0" * len(jpeg(70))))
    reader = create_reader("webdataset", shards)
    with pytest.raises(UnreadableImage, match="00001.tar/000000007.jpg"):
        reader.image(7)
    path.write_bytes(b"")
    reader.archives = TarPool()
    with pytest.raises(UnreadableImage, match="00001.tar ends before byte"):
        reader.image(7)
    path.unlink()
    reader.archives = TarPool()
    with pytest.raises(FileNotFoundError, match="00001.tar"):
        reader.image(7)


# --------------------------------------------------------------------------------------------------------- index
def test_the_index_follows_every_shard(shards, monkeypatch):
    first = create_reader("webdataset", shards)
    rows = archives.WebDataset.rows
    monkeypatch.setattr(archives.WebDataset, "rows", None)  # reading the shards again would fail
    check(create_reader("webdataset", shards), range(24))
    monkeypatch.setattr(archives.WebDataset, "rows", rows)
    write_shard(shards / "00003.tar", [1, 2])  # not the file beside which the index lies
    check(create_reader("webdataset", shards), [*range(14), 1, 2, *range(20, 24)])
    (shards / "00004.tar").unlink()
    check(create_reader("webdataset", shards), [*range(14), 1, 2])
    assert len(first) == 24


def test_an_interrupted_index_leaves_nothing_behind(shards, monkeypatch):
    def full(*_arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    said = create_reader("webdataset", shards).log[-1]
    assert "no index kept (could not write" in said and "disk full; what was there before is intact); with a" in said
    assert not list(shards.glob("*.index")) and not list(shards.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------ training
def test_training_on_shards_equals_training_on_their_source(tmp_path):
    pytest.importorskip("webdataset")
    root = make_roco(tmp_path / "roco", train=16, validation=6)
    for split in ("train", "validation"):
        make_dataset.main(
            [
                "shards",
                "--dataset",
                "roco",
                "--root",
                str(root),
                "--split",
                split,
                "-j",
                "1",
                "--output",
                str(tmp_path / "shards" / split),
                "--shard-size",
                "5",
            ]
        )
    scores, weights = {}, {}
    for name, folder in (("roco", root), ("webdataset", tmp_path / "shards")):
        output = tmp_path / f"run_{name}"
        scores[name] = main.main(
            [
                "--dataset",
                name,
                "--root",
                str(folder),
                "--model",
                "SLIP_VITT16",
                "--output-dir",
                str(output),
                "-j",
                "0",
                "--batch-size",
                "8",
                "--epochs",
                "1",
                "--lr",
                "1e-3",
                *TINY,
            ]
        )
        weights[name] = checkpoints.load_checkpoint(output / "checkpoint.pt")["state_dict"]
    assert scores["webdataset"] == scores["roco"] and scores["roco"]["val_candidates"] == 6
    assert all(torch.equal(value, weights["webdataset"][key]) for key, value in weights["roco"].items())


def test_archives_one_after_the_other_are_read_to_the_end(tmp_path):
    """`cat a.tar b.tar`: the second begins behind the first one's end mark."""
    parts = []
    for key in ("a", "b"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for kind, data in (("jpg", jpeg()), ("txt", f"caption {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        parts.append(buffer.getvalue())
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    reader = create_reader("webdataset", tmp_path)
    assert [reader.captions(i)[0] for i in range(len(reader))] == ["caption a", "caption b"]
    assert [reader.image(i).size for i in range(2)] == [(24, 20)] * 2
    (tmp_path / "0.tar").write_bytes(parts[0] + b"something else" * 100)
    with pytest.raises(ValueError, match="0.tar"):
        create_reader("webdataset", tmp_path)


def test_a_caption_that_stands_for_none_is_none(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for i, text in enumerate(("nan", "a mass", "None")):
            add(archive, f"{i}.jpg", jpeg(10 * i))
            add(archive, f"{i}.txt", text.encode())
    reader = create_reader("webdataset", tmp_path)
    assert all_captions(reader) == ["a mass"] and "2 rows dropped because they have no caption" in "\n".join(reader.log)


def test_members_of_every_kind_of_image_are_read(tmp_path):
    write_dicom(tmp_path / "a.dcm", LINE)
    members = {"2.dcm": (tmp_path / "a.dcm").read_bytes()}
    for name, form in (("0.jp2", "JPEG2000"), ("1.jfif", "JPEG")):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (90, 90, 90)).save(buffer, form)
        members[name] = buffer.getvalue()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in sorted({**members, **{f"{i}.txt": b"a" for i in range(3)}}.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = create_reader("webdataset", tmp_path)
    assert [found.image(i).size for i in range(len(found))] == [(16, 16), (16, 16), (64, 64)]
