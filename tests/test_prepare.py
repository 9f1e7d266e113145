"""make_dataset.py and redcaps/combine_captions.py: YFCC's and RedCaps' lists, tar shards, shrunk trees."""

import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import LARGE, ROOT, grey_of, make_coco, reference, write_sources
from PIL import Image

import make_dataset
from datasets import create_reader
from inputs import archives, index, sources
from inputs.images import decode_image, read_image, to_rgb8
from preparation import shards, shrink

needs_webdataset = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="pip install webdataset")


def image_bytes(size, file_format="JPEG", mode="RGB", seed=0, **options) -> bytes:
    """Smooth noise, so that JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "I;16": 1}[mode]
    coarse = rng.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(channels)]
    img = bands[0] if channels == 1 else Image.merge(mode, bands)
    if mode == "I;16":
        img = Image.fromarray(np.asarray(img).astype(np.uint16) * 200)
    buffer = io.BytesIO()
    img.save(buffer, file_format, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- YFCC15M
def yfcc_tree(folder: Path, present: int = 40) -> list[tuple[int, str, str]]:
    """The three sources and the archives of the first captioned images; returns those images' rows."""
    captioned, _ = reference(folder, write_sources(folder, 400))
    for number, _, _ in captioned[:present]:
        path = folder / "images" / f"{number // 10**6:02d}" / f"{number // 1000 % 1000:03d}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(f"{number % 1000:03d}.jpg", image_bytes((30, 20)))
    return captioned[:present]


def test_the_yfcc_reader_starts_from_the_arrays_without_unpickling(tmp_path, monkeypatch):
    rows = yfcc_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_dataset.main([])
    by_pickle = sources.read_list(tmp_path / "yfcc15m.pkl")
    columns = index.load_index(*index.rows_index(tmp_path / "yfcc15m.pkl"))
    texts = [columns.texts[i] for i in range(len(columns.texts))]
    from_arrays = zip(columns.images.tolist(), texts[::2], texts[1::2], strict=True)
    assert list(from_arrays) == [tuple(row) for row in by_pickle] and len(by_pickle) > len(rows)

    monkeypatch.setattr(sources, "read_pickle", None)  # unpickling would fail
    reader = create_reader("yfcc15m", tmp_path)
    kept = [(n, [t.strip() for t in (title, text) if t.strip()]) for n, title, text in rows]
    kept = [(n, captions) for n, captions in kept if captions]
    assert [(int(reader.images[i]), reader.captions(i)) for i in range(len(reader))] == kept
    assert reader.image(0).size == (30, 20)


def test_arrays_of_another_list_are_not_used(tmp_path, monkeypatch):
    yfcc_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_dataset.main([])
    number = create_reader("yfcc15m", tmp_path).images[0]
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps([(int(number), "another", "list")]))
    assert create_reader("yfcc15m", tmp_path).captions(0) == ["another", "list"]


def test_every_missing_yfcc_source_is_named_with_its_origin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path, 10)
    (tmp_path / "flickr_unique_ids.npy").unlink()
    (tmp_path / "yfcc100m_dataset.txt").unlink()
    message = "ids.npy is missing.*deepcluster.*dataset.txt is missing.*multimedia"
    with pytest.raises(FileNotFoundError, match=message) as error:
        make_dataset.main([])
    assert "subset_data" not in str(error.value)


def test_sources_that_do_not_belong_together_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path, 50)
    (tmp_path / "yfcc100m_subset_data.tsv").write_text("99999999\tx\ty\n")
    with pytest.raises(ValueError, match="holds no image that is in both"):
        make_dataset.main(["yfcc15m", "--output-dir", "out"])
    assert not list((tmp_path / "out").iterdir())


# --------------------------------------------------------------------------------------------------- RedCaps
def load_script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def combine_captions():
    return load_script("redcaps/combine_captions.py")


def annotation(subreddit: str, key: str, caption: str = "a cat") -> dict:
    return {
        "image_id": key,
        "author": "x",
        "url": "u",
        "raw_caption": caption.upper(),
        "caption": caption,
        "subreddit": subreddit,
        "score": 3,
        "created_utc": 1,
        "crosspost_parents": None,
    }


@pytest.fixture
def redcaps(tmp_path) -> tuple[Path, list[dict]]:
    folder = tmp_path / "annotations"
    folder.mkdir()
    birds = [annotation("birding", "b1", "ein Vögelchen \U0001f426"), annotation("birding", "b2")]
    files = {
        "birding_2017.json": birds,
        "itap_2016.json": [annotation("itap", "i1", 'a "quoted" \\ one')],
        "empty_2020.json": [],
    }
    for name, rows in files.items():
        (folder / name).write_text(json.dumps({"info": {"start_date": "x"}, "annotations": rows}))
    return folder, birds + files["itap_2016.json"]


def test_redcaps_annotations_are_merged_unchanged_into_one_list(redcaps, tmp_path, capsys):
    folder, rows = redcaps
    output = folder / "redcaps_v1.json"  # beside its sources, and made twice: it is not read as one of them
    for _ in range(2):
        combine_captions().main(["--input", str(folder), "--output", str(output)])
        assert json.loads(output.read_text()) == rows
    assert "3 of 3 annotations, 2 of 2 subreddits, 3 files" in capsys.readouterr().out
    for row in rows:
        path = tmp_path / "images" / row["subreddit"] / f"{row['image_id']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes((20, 20)))
    reader = create_reader("redcaps", tmp_path, str(output))
    assert [reader.captions(i)[0] for i in range(3)] == [row["caption"] for row in rows]


def test_redcaps_subreddits_are_selected(redcaps, tmp_path, capsys):
    folder, rows = redcaps
    output = tmp_path / "some.json"
    combine_captions().main(["--input", str(folder), "--output", str(output), "--subreddits", "ITAP"])
    assert json.loads(output.read_text()) == rows[2:]
    assert "itap: 1\n" in capsys.readouterr().out
    output.unlink()
    with pytest.raises(ValueError, match="no annotations of cats; there are birding, itap"):
        combine_captions().main(["--input", str(folder), "--output", str(output), "--subreddits", "itap", "cats"])
    assert not output.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"annotations": [{"image_id": "a"', "character"),
        ('{"annotations": [{"image_id": "a", "caption": "x"}]}', "annotation 0 has no proper field 'subreddit'"),
        ('{"info": 1}', "no list 'annotations'"),
        ("", "character"),
    ],
)
def test_a_malformed_redcaps_file_is_named_and_nothing_written(redcaps, tmp_path, text, message):
    folder, _ = redcaps
    (folder / "cats_2018.json").write_text(text)
    with pytest.raises(ValueError, match=f"cats_2018.json.*{message}"):
        combine_captions().main(["--input", str(folder), "--output", str(tmp_path / "out" / "all.json")])
    assert not list((tmp_path / "out").iterdir())


def test_redcaps_without_files(tmp_path):
    for folder, message in ((tmp_path, "no annotation files"), (tmp_path / "no", "not a folder")):
        with pytest.raises(FileNotFoundError, match=message):
            combine_captions().main(["--input", str(folder), "--output", str(tmp_path / "x.json")])


def combine_in(folder: Path, output: Path, pipe) -> None:
    import tracemalloc

    module = combine_captions()
    tracemalloc.start()
    module.combine(module.annotation_files(folder, output), output, [])
    pipe.send(tracemalloc.get_traced_memory()[1])


def test_the_memory_of_combining_does_not_grow_with_the_files(tmp_path):
    context = multiprocessing.get_context("fork")
    peaks = []
    for rows in (4_000, 20_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        many = [annotation("itap", f"{i:06d}", "words " * 30) for i in range(rows)]
        (folder / "itap_2017.json").write_text(json.dumps({"annotations": many}))
        mine, theirs = context.Pipe()
        worker = context.Process(target=combine_in, args=(folder, tmp_path / "out.json", theirs))
        worker.start()
        peaks.append(mine.recv())
        worker.join()
    assert os.path.getsize(tmp_path / "20000" / "itap_2017.json") > 8e6
    assert peaks[1] < peaks[0] + 3e6


# ---------------------------------------------------------------------------------------------------- shards
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


FILES = {  # name, what is in it
    "small.jpg": image_bytes((70, 50)),
    "large.jpg": image_bytes((301, 200), seed=1),
    "grey.jpg": image_bytes((90, 160), mode="L", seed=2),
    "alpha.png": image_bytes((120, 100), "PNG", "RGBA", seed=3),
    "deep.png": image_bytes((160, 110), "PNG", "I;16", seed=4),
    "really_a_png.jpg": image_bytes((120, 80), "PNG", seed=5),
    "web.webp": image_bytes((100, 90), "WEBP", seed=6, lossless=True),
    "scan.tif": image_bytes((40, 30), "TIFF", seed=7),
}


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

    def fails(reader, i, short_side):
        calls.append(i)
        if i == 5:
            raise OSError("disk on fire")
        return pack(reader, i, short_side)

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


# ---------------------------------------------------------------------------------------------------- shrink
@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "in"
    for name, data in FILES.items():
        path = root / "train" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "train" / "captions.txt").write_text("R_1\t text\n")
    (root / "train" / "BIG.JPEG").write_bytes(image_bytes((200, 100), seed=9))
    (root / "broken.png").write_bytes(FILES["alpha.png"][:200])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.jpg").write_bytes(FILES["large.jpg"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    return root


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tree_is_copied_with_its_images_shrunk(tree, tmp_path, capsys):
    output = tmp_path / "out"
    make_dataset.main(["shrink", "--root", str(tree), "--output", str(output), "--short-side", "60", "-j", "1"])
    copy = tree_bytes(output)
    shrunk = {
        "train/images/large.jpg",
        "train/images/grey.jpg",
        "train/images/alpha.png",
        "train/images/deep.png",
        "train/images/really_a_png.jpg",
        "train/BIG.JPEG",
        "linked/linked.jpg",
    }
    kept = {
        "train/images/small.jpg",
        "train/images/web.webp",
        "train/images/scan.tif",
        "train/captions.txt",
        "broken.png",
    }
    assert set(copy) == shrunk | kept | {"shrink.json", "bad_samples.txt"}
    for name in kept:
        assert copy[name] == (tree / name).read_bytes()
    for name in shrunk:
        before, after = Image.open(tree / name), Image.open(io.BytesIO(copy[name]))
        assert min(after.size) == 60 and after.format == before.format
    deep = read_image(tree / "train/images/deep.png").resize((87, 60), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(read_image(output / "train/images/deep.png")), np.asarray(deep))
    assert str(tree / "broken.png") in copy["bad_samples.txt"].decode()
    assert "7 shrunk, 4 copied, 1 unreadable" in capsys.readouterr().out


def test_a_shrunk_tree_is_continued_and_the_same_with_many_processes(tree, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    shrink.shrink_tree(tree, many, 60, workers=3)
    shrink.shrink_tree(tree, one, 60)
    drop = {"shrink.json": b"", "bad_samples.txt": b""}
    assert {**tree_bytes(one), **drop} == {**tree_bytes(many), **drop}
    (one / "train" / "images" / "large.jpg").unlink()
    (tree / "train" / "captions.txt").write_text("R_1\t other\n")
    assert shrink.shrink_tree(tree, one, 60) == {"shrunk": 1, "copied": 1, "there already": 10}
    assert (one / "train" / "captions.txt").read_text() == "R_1\t other\n"
    large = "train/images/large.jpg"
    assert (one / large).read_bytes() == (many / large).read_bytes()
    assert shrink.shrink_tree(one, tmp_path / "again", 30)["copied"] >= 1  # a copy of a copy has notes of its own
    assert json.loads((tmp_path / "again" / "shrink.json").read_text())["short_side"] == 30


def test_a_shrunk_copy_lies_elsewhere_and_has_one_size(tree, tmp_path):
    for output in (tree, tree / "small", tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            shrink.shrink_tree(tree, output, 60)
    shrink.shrink_tree(tree, tmp_path / "out", 60)
    with pytest.raises(ValueError, match="begun with short_side 60, not 80"):
        shrink.shrink_tree(tree, tmp_path / "out", 80)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        shrink.shrink_tree(tmp_path / "nowhere", tmp_path / "out2", 60)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not begun by this command"):
        shrink.shrink_tree(tree, tmp_path / "used", 60)


# ------------------------------------------------------------------------------------------------- benchmarks
def test_the_memory_benchmark_reads_what_it_says():
    bench = load_script("benchmarks/bench_memory.py")
    lengths = bench.caption_lengths(200_000, seed=3)
    assert lengths.min() >= 3 and lengths.max() <= 2045
    assert lengths.mean() == pytest.approx(137, abs=4) and np.median(lengths) == pytest.approx(114, abs=2)
    assert np.mean(lengths > 370) == pytest.approx(0.03, abs=0.003)
    if sys.platform == "linux":
        result = bench.main(["--rows", "5000", "--workers", "2"])
        assert result["text_bytes"] == 5000 * 30 + bench.caption_lengths(5000, 0).sum()
        assert result["rows"] == 5000 and len(result["pss_workers"]) == 2
        assert result["pss_bytes"] == result["pss_parent"] + sum(result["pss_workers"]) > result["text_bytes"]


@pytest.mark.slow
def test_the_yfcc_benchmark_makes_the_lists_it_reports(tmp_path):
    result = load_script("benchmarks/bench_yfcc.py").main(["--folder", str(tmp_path), "--gigabytes", "0.001"])
    assert result["rows"] > 1000 and result["table_gb"] == pytest.approx(0.001, rel=0.01)
    rows = sources.read_list(tmp_path / "yfcc15m.pkl")
    assert 0.1 * result["rows"] < len(rows) < 0.2 * result["rows"]
    assert rows[0][1:] == (
        "Sunset over the bay, evening",
        "We walked along the shore for two hours and saw nothing but \u00e9normous gulls. More at ",
    )


def test_shrinking_and_sharding_keep_the_contrast_of_twelve_bits(tmp_path):
    """A radiograph of 12 bits in a 16-bit colour file: its copies look as the file itself does in training."""
    pytest.importorskip("webdataset")
    from test_images import png_of_16_bits

    ramp = np.tile(np.linspace(0, 4095, 120).astype(np.uint16), (80, 1))[..., None].repeat(3, -1)
    root = tmp_path / "in"
    root.mkdir()
    (root / "deep.png").write_bytes(png_of_16_bits(ramp))
    (root / "train.csv").write_text("image,caption\ndeep.png,a ramp\n")
    make_dataset.main(
        ["shrink", "--root", str(root), "--output", str(tmp_path / "small"), "--short-side", "40", "-j", "1"]
    )
    reader = create_reader("csv", root)
    assert shards.make_shards(reader, tmp_path / "shards", shard_size=3, short_side=40) == 0
    expected = np.asarray(read_image(root / "deep.png").resize((60, 40), Image.Resampling.LANCZOS), dtype=int)
    for copy in (create_reader("csv", tmp_path / "small"), create_reader("webdataset", tmp_path / "shards")):
        got = np.asarray(copy.image(0), dtype=int)
        assert got.shape == (40, 60, 3) and got.max() > 250 and abs(got - expected).max() <= 2
