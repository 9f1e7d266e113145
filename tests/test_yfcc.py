"""make_dataset.py yfcc15m: the lists against a slow reference, the arrays beside them, errors that name a file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from source_tree import image_bytes, reference, write_sources

import make_dataset
from datasets import create_reader
from inputs import index, sources
from inputs.metadata import read_pickle
from preparation import yfcc


def test_without_arguments_in_the_folder_of_the_sources(tmp_path, monkeypatch, capsys):
    captioned, listed = reference(tmp_path, write_sources(tmp_path))
    assert len(captioned) > 1000  # more than a batch of opcodes
    monkeypatch.chdir(tmp_path)
    make_dataset.main([])
    for name, expected in (("yfcc15m.pkl", captioned), ("yfcc100m.pkl", listed)):
        with open(name, "rb") as file:
            assert pickle.load(file) == expected
        assert [tuple(row) if isinstance(row, list) else row for row in read_pickle(name)] == expected
    assert f"{len(captioned):,} captioned" in capsys.readouterr().out


def test_known_captions():
    cases = {
        "a+b%2Bc": "a b c",
        quote('<a href="x">link</a> <b>x</b> http://y.z/1 end'): "link x  end",
        quote("<i>www.foo.com</i>"): "",  # what follows an address without a space goes with it
        "100%25": "100%",
    }
    for field, text in cases.items():
        assert yfcc.clean_caption(field.encode()) == text


@pytest.mark.parametrize("items", [0, 1, 999, 1000, 1001, 2000])
def test_streamed_pickle_of_any_length(tmp_path, items):
    with open(tmp_path / "list.pkl", "wb") as file, yfcc.PickledList(file) as target:
        for i in range(items):
            target.append(yfcc.pickled_int(i))
    assert pickle.loads((tmp_path / "list.pkl").read_bytes()) == list(range(items)) and target.count == items


def test_index_is_built_where_the_archives_are(tmp_path, capsys):
    captioned, _ = reference(tmp_path, write_sources(tmp_path, 200))
    for number, _, _ in captioned[:5]:
        folder, archive, member = f"{number:08d}"[:2], f"{number:08d}"[2:5], f"{number:08d}"[5:]
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(tmp_path / "images" / folder / f"{archive}.zip", "a") as file:
            file.writestr(f"{member}.jpg", b"")
    names = ("flickr_unique_ids.npy", "yfcc100m_subset_data.tsv", "yfcc100m_dataset.txt")
    flags = [f"--{flag}={tmp_path / name}" for flag, name in zip(("ids", "subset", "dataset"), names, strict=True)]
    make_dataset.main(["yfcc15m", *flags, "--output-dir", str(tmp_path / "out"), "--root", str(tmp_path)])
    assert list((tmp_path / "out").glob("*.index"))
    assert "5 pictures with captions" in capsys.readouterr().out


def test_errors_name_the_file_and_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="flickr_unique_ids.npy is missing"):
        make_dataset.main([])
    write_sources(tmp_path, 20)
    table = tmp_path / "yfcc100m_dataset.txt"
    lines = table.read_text().splitlines(keepends=True)
    for bad, message in (("x\ty\n", "line 3: b'x' is not an image number"), ("123456789\t\n", "line 3: b'123456789'")):
        table.write_text("".join([*lines[:2], bad, *lines[2:]]))
        with pytest.raises(ValueError, match=message):
            make_dataset.main([])
    number = np.load("flickr_unique_ids.npy")[0]
    table.write_text(f"{number}\tonly\tthree\n")
    with pytest.raises(ValueError, match="line 1: 3 columns"):
        make_dataset.main([])
    np.save("flickr_unique_ids.npy", np.array([1, -5]))
    with pytest.raises(ValueError, match="found -5..1"):
        make_dataset.main([])
    np.save("flickr_unique_ids.npy", np.array([1, None]), allow_pickle=True)
    with pytest.raises(ValueError, match="flickr_unique_ids.npy is no array of image numbers"):
        make_dataset.main([])
    assert not list(tmp_path.glob("*.pkl*"))


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
