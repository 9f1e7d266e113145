"""The index of large sources: what it spares, when it is made anew, who makes it."""

import json
import multiprocessing

import pytest
from source_tree import LARGE, all_captions, make_redcaps, save_jpeg

from datasets import READERS, create_reader
from inputs import index as inputs_index


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
