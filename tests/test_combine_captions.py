"""redcaps/combine_captions.py on small annotation files."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from helpers import load_script
from source_tree import image_bytes

from datasets import create_reader


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
