"""Thousands of damaged files, seeded: each is read, or refused by name; nothing is left half-written."""

import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from PIL import Image
from source_tree import jpeg, make_redcaps, make_yfcc, save_jpeg

import models
from datasets import create_reader
from evaluation import catalog, downstream
from inputs import cbis
from inputs.display import Display
from inputs.images import UnreadableImage, decode_image, decode_pixels
from inputs.metadata import read_table
from preparation import cbis_tables
from runtime import checkpoints

ROUNDS = 1500  # of each kind


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four of: a byte changed, a piece cut out, doubled, put elsewhere, or replaced; the end cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        a = rng.randrange(len(out))
        b = min(len(out), a + rng.choice((1, 1, 2, 8, 64, 700)))
        piece = bytes(out[a:b])
        kind = rng.randrange(6)
        if kind == 0:
            out[a] = rng.randrange(256)
        elif kind == 1:
            del out[a:b]
        elif kind == 2:
            out[a:a] = piece
        elif kind == 3:
            at = rng.randrange(len(out))
            out[at : at + len(piece)] = piece
        elif kind == 4:
            out[a:b] = rng.choice((b"", b"\0", b'"', b"\n", b",", b"\xff\xfe", b"../", b"-1", b"9" * 12, b"{}"))
        else:
            del out[a:]
    return bytes(out)


def check(read, name: str, errors=(ValueError, FileNotFoundError)) -> bool:
    """Whether a file was read; an error names it."""
    try:
        read()
    except errors as error:
        assert name in str(error), f"{type(error).__name__} does not name {name}: {error}"
        return False
    return True


def each_round(kind: str):
    for i in range(ROUNDS):
        yield i, random.Random(f"{kind} {i}")


def all_of(reader) -> list:
    found = []
    for i in range(len(reader)):
        found += reader.captions(i)
        try:
            reader.image(i)
        except (UnreadableImage, FileNotFoundError) as error:
            assert str(error)
    return found


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_tables(tmp_path):
    for i in range(4):
        save_jpeg(tmp_path / f"{i}.jpg", i)
    rows = "".join(f'{i}.jpg,"a caption, {i}",{"val" if i == 3 else "train"}\n' for i in range(4))
    whole = f"image,caption,split\n{rows}".encode()
    read = 0
    for _, rng in each_round("table"):
        (tmp_path / "pairs.csv").write_bytes(mutated(whole, rng))
        read += check(lambda: all_of(create_reader("csv", tmp_path, "pairs.csv")), "pairs.csv")
    assert 0 < read < ROUNDS
    lines = [{"image": f"{i}.jpg", "caption": f"a caption, {i}", "split": "train"} for i in range(4)]
    whole, read = "".join(json.dumps(line) + "\n" for line in lines).encode(), 0
    for _, rng in each_round("lines"):
        (tmp_path / "pairs.jsonl").write_bytes(mutated(whole, rng))
        read += check(lambda: all_of(create_reader("csv", tmp_path, "pairs.jsonl")), "pairs.jsonl")
    assert 0 < read < ROUNDS
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]},{'train' if i < 2 else 'test'},P{i}\n" for i in range(4))
    whole, entry = f"image,label,split,patient\n{rows}".encode(), {"path": str(tmp_path), "type": "csv"}
    labelled = {"mine": entry | {"train": "train", "test": "test", "columns": {"group": "patient"}}}
    for _, rng in each_round("labelled"):
        (tmp_path / "table.csv").write_bytes(mutated(whole, rng))
        check(lambda: downstream.open_splits("mine", catalog.Catalog(labelled, "catalog.json")), "table.csv")
    lesions = [dict.fromkeys(cbis.CBIS_COLUMNS, "x") | {"split": "test", "pathology": "MALIGNANT", "crop": "a.png"}] * 3
    cbis_tables.write_table(tmp_path / "mass.csv", lesions)
    whole = (tmp_path / "mass.csv").read_bytes()
    for _, rng in each_round("lesions"):
        (tmp_path / "mass.csv").write_bytes(mutated(whole, rng))
        check(lambda: cbis.CbisLesions(tmp_path, "mass", "test", skip_missing=True), "mass.csv")
        check(lambda: read_table(tmp_path / "mass.csv", ("lesion",)), "mass.csv")


def test_json(tmp_path):
    make_redcaps(tmp_path, "images")
    whole = (tmp_path / "redcaps_v1.json").read_bytes()
    for i, rng in each_round("json"):
        (tmp_path / "redcaps_v1.json").write_bytes(mutated(whole, rng))
        cache = tmp_path / f"cache{i}"
        check(lambda cache=cache: all_of(create_reader("redcaps", tmp_path, cache_dir=cache)), "redcaps_v1.json")
        assert not list(cache.glob("*.tmp"))
    entry = {"mine": {"path": "/x", "type": "imagefolder", "train": "a", "test": "b", "labels": ["u", "v"]}}
    for _, rng in each_round("catalog"):
        (tmp_path / "catalog.json").write_bytes(mutated(json.dumps(entry).encode(), rng))
        check(lambda: catalog.read_catalog(tmp_path / "catalog.json"), "catalog.json")


def test_pickles_and_arrays(tmp_path):
    rows = [(i, f"title {i}", "text") for i in range(6)]
    entries = [{"image_name": "a.jpg", "captions": ["one", "two"]}] * 4
    save_jpeg(tmp_path / "a.jpg")
    buffer = io.BytesIO()
    np.save(buffer, np.array(entries, dtype=object))
    for name, reader, data in (
        ("yfcc15m.pkl", "yfcc15m", pickle.dumps(rows)),
        ("cc12m.npy", "cc12m", buffer.getvalue()),
    ):
        for i, rng in each_round(name):
            (tmp_path / name).write_bytes(mutated(data, rng))
            check(lambda r=reader, i=i: all_of(create_reader(r, tmp_path, cache_dir=tmp_path / f"c{i}")), name)


def test_zips(tmp_path):
    make_yfcc(tmp_path)
    path = tmp_path / "images" / "12" / "345.zip"
    whole = path.read_bytes()
    assert zipfile.is_zipfile(path)
    for i, rng in each_round("zip"):
        path.write_bytes(mutated(whole, rng))
        check(lambda i=i: all_of(create_reader("yfcc15m", tmp_path, cache_dir=tmp_path / f"c{i}")), "345.zip")


def test_tars(tmp_path):
    pytest.importorskip("webdataset")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key in ("a", "b"):
            for kind, data in (("jpg", jpeg()), ("txt", b"a caption"), ("json", b'{"captions": ["x", "y"]}')):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for i, rng in each_round("tar"):
        (tmp_path / "0.tar").write_bytes(mutated(buffer.getvalue(), rng))
        check(lambda i=i: all_of(create_reader("webdataset", tmp_path, cache_dir=tmp_path / f"c{i}")), "0.tar")


KINDS = ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "16 bits", "film", "DICOM", "DICOM with tables"]


@pytest.mark.parametrize("kind", KINDS)
def test_images(kind, tmp_path):
    if kind.startswith("DICOM"):
        pytest.importorskip("pydicom")
        from test_dicom import sequence, table, write_dicom

        values = {"WindowCenter": 1000, "WindowWidth": 500, "PixelPaddingValue": 3}
        if kind == "DICOM with tables":
            window = sequence({"WindowCenter": 1000, "WindowWidth": 200})
            values = {
                "SharedFunctionalGroupsSequence": sequence({"FrameVOILUTSequence": window}),
                "ModalityLUTSequence": sequence({**table(np.arange(64) * 60, 12), "ModalityLUTType": "US"}),
                "VOILUTSequence": sequence(table(np.arange(64) * 60, 16)),
            }
        write_dicom(tmp_path / "a.dcm", np.arange(1200).reshape(30, 40), **values)
        whole = (tmp_path / "a.dcm").read_bytes()
    elif kind == "16 bits":
        from test_images import png_of_16_bits

        whole = png_of_16_bits(np.random.default_rng(0).integers(0, 4096, (30, 40, 3)).astype(np.uint16))
    elif kind == "film":  # a digitiser's TIFF: deep, white is zero, several pages
        buffer, deep = io.BytesIO(), np.arange(1200, dtype=np.uint16).reshape(30, 40)
        pages = [Image.fromarray(deep + i) for i in range(3)]
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], tiffinfo={262: 0})
        whole = buffer.getvalue()
    else:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, kind)
        whole = buffer.getvalue()
    for _, rng in each_round(kind):
        data = mutated(whole, rng)
        if check(lambda d=data: decode_image(d, "the name"), "the name", UnreadableImage):
            img = decode_image(data, "the name")
            assert img.mode == "RGB" and img.width * img.height < 10**8
        check(lambda d=data: decode_pixels(d, "the name"), "the name", UnreadableImage)
        asked = Display(rng.choice(["middle", 1, 3]), (1000, 400))
        check(lambda d=data, asked=asked: decode_image(d, "the name", asked), "the name", UnreadableImage)


def test_checkpoints(tmp_path):
    model = models.create_model("SIMCLR_VITT16", vision_tower="test_vit", image_size=32, ssl_mlp_dim=4, ssl_emb_dim=2)
    state = {
        "state_dict": model.state_dict(),
        "epoch": 1,
        "args": {"epochs": 2, "model": "SIMCLR_VITT16"},
        "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(),
        "tokenizer": None,
    }
    path = tmp_path / "checkpoint.pt"
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for _, rng in each_round(f"checkpoint {legacy}"):
            path.write_bytes(mutated(whole, rng))
            check(lambda: checkpoints.load_checkpoint(path), "checkpoint.pt")
            check(lambda: models.load_pretrained(path), "checkpoint.pt")
    assert [p.name for p in Path(tmp_path).iterdir()] == ["checkpoint.pt"]


def test_configurations_of_other_libraries(tmp_path):
    """Of transformers: a folder is read, or refused in words that name it."""
    folder = twins.vision("vit", tmp_path / "vit")
    for file in ("config.json", "preprocessor_config.json"):
        whole = (folder / file).read_bytes()
        for i, rng in each_round(file):
            if i == 150:  # each builds a model
                break
            (folder / file).write_bytes(mutated(whole, rng))
            check(lambda: models.load_pretrained(folder), "vit")
        (folder / file).write_bytes(whole)
