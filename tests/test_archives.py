"""Readers and pools of zip archives; tar shards are in test_webdataset.py."""

import multiprocessing
import pickle
import zipfile

import pytest
from source_tree import grey_of, jpeg, make_yfcc

from datasets import create_reader
from inputs.archives import ZipPool
from inputs.images import UnreadableImage


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


def test_a_name_that_several_members_have_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("a/1.jpg", "b/1.JPG", "c/2.jpg", "3.jpg", "d/3.jpg"):
            file.writestr(name, name)
    pool = ZipPool()
    assert pool.read(tmp_path / "a.zip", "2.JPG") == b"c/2.jpg"
    assert pool.read(tmp_path / "a.zip", "3.jpg") == b"3.jpg"  # the very name is there
    with pytest.raises(UnreadableImage, match="2 members are called 1.jpg: a/1.jpg, b/1.JPG"):
        pool.read(tmp_path / "a.zip", "1.jpg")
    with pytest.raises(UnreadableImage, match="0 members are called 4.jpg"):
        pool.read(tmp_path / "a.zip", "4.jpg")
