"""Pairs as JSON lines: the same pairs, flags and errors as of a CSV; broken lines by their number."""

import json
import re
from pathlib import Path

import pytest
from helpers import command, weights
from source_tree import all_captions, grey_of, save_jpeg

import eval_zeroshot
import main
import make_dataset
from datasets import create_reader
from inputs.columns import PairColumns
from inputs.metadata import JsonLines, Table
from inputs.reader import NoSplit


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pmc_oa(root: Path, n: int = 6) -> list[dict]:
    """As PMC-OA's own loader reads it: the keys image, caption, alignment_type, alignment_score."""
    rows = []
    for i in range(n):
        save_jpeg(root / "figures" / f"PMC{i}_Fig{i}_0.jpg", 30 * i)
        row = {"image": f"PMC{i}_Fig{i}_0.jpg", "caption": f"({i}) Axial CT, “arrow”\u2028of patient {i}."}
        rows.append(row | {"alignment_type": "subfigure_caption", "alignment_score": 0.5 + i / 100})
    write_lines(root / "pmc_oa.jsonl", rows)
    return rows


def test_pmc_oas_lines_are_its_pairs(tmp_path):
    rows = pmc_oa(tmp_path)
    metadata = str(tmp_path / "pmc_oa.jsonl")
    kept, held = (
        create_reader("csv", tmp_path / "figures", metadata, split, val_fraction=0.5)
        for split in ("train", "validation")
    )
    of = {Path(reader.name(i)).name: reader.captions(i) for reader in (kept, held) for i in range(len(reader))}
    assert of == {row["image"]: [row["caption"]] for row in rows} and min(len(kept), len(held)) > 0
    number = int(re.findall(r"\d+", Path(kept.name(0)).name)[0])
    assert grey_of(kept.image(0)) == pytest.approx(30 * number, abs=2)


def test_lines_and_a_csv_of_the_same_table_are_the_same_pairs(tmp_path):
    """With patients, splits, an image of two rows, cells that stand for nothing, and an absent image."""
    rows = []
    for i in range(12):
        save_jpeg(tmp_path / f"{i}.jpg", 20 * i)
        rows.append({"File Path": f"{i}.jpg", "Report": f"report, {i}", "patient": i // 3, "split": "train"})
    rows[4]["split"], rows[5]["split"] = "val", "TEST"
    rows += [rows[1] | {"Report": "another"}, rows[2] | {"Report": None}, rows[0] | {"File Path": "gone.jpg"}]
    write_lines(tmp_path / "pairs.jsonl", rows)
    lines = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text("\n" + lines)  # where the CSV has its header
    cells = [['"' + str("" if value is None else value) + '"' for value in row.values()] for row in rows]
    text = "\n".join(",".join(row) for row in [list(rows[0]), *cells]) + "\n"
    (tmp_path / "pairs.csv").write_text(text)
    for split in ("train", "validation", "test"):
        ours, theirs = (create_reader("csv", tmp_path, f"pairs.{kind}", split) for kind in ("jsonl", "csv"))
        assert ours.fingerprint() == theirs.fingerprint() and ours.groups == theirs.groups
        assert [line.replace("jsonl", "csv") for line in ours.log] == theirs.log
    write_lines(tmp_path / "all.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows])
    held = create_reader("csv", tmp_path, "all.jsonl", "validation", val_fraction=0.3)
    assert held.held_out_by == "patient" and len(held) % 3 == 0


@pytest.mark.parametrize("ending", [".ndjson", ".json", ".JSONL"])
def test_lines_under_another_name_are_lines(tmp_path, ending):
    write_lines(tmp_path / f"a{ending}", [{"image": "0.jpg", "caption": "a"}])
    save_jpeg(tmp_path / "0.jpg", 0)
    assert all_captions(create_reader("csv", tmp_path, f"a{ending}", val_fraction=0)) == ["a"]
    (tmp_path / f"b{ending}").write_text('[{"image": "0.jpg"}]')
    with pytest.raises(ValueError, match="is no JSON object, as each line has to be"):
        create_reader("csv", tmp_path, f"b{ending}")


def test_a_key_may_come_late_or_be_missing(tmp_path):
    """The columns are the keys of all lines: a split or a patient that the first line lacks is no silent loss."""
    for i in range(3):
        save_jpeg(tmp_path / f"{i}.jpg")
    rows = [{"image": "0.jpg", "caption": "a", "split": "train"}, {"caption": "b", "image": "1.jpg", "split": "val"}]
    (tmp_path / "pairs.jsonl").write_text("\ufeff" + json.dumps(rows[0]) + "\r\n\n  \n" + json.dumps(rows[1]), "utf-8")
    assert all_captions(create_reader("csv", tmp_path, "pairs.jsonl")) == ["a"]
    write_lines(tmp_path / "late.jsonl", [{"image": "2.jpg", "caption": "c"}, *rows])
    assert JsonLines(tmp_path / "late.jsonl").names == ["image", "caption", "split"]
    reader = create_reader("csv", tmp_path, "late.jsonl")
    assert all_captions(reader) == ["a"] and "1 rows of unknown splits left out: '' 1" in "".join(reader.log)


def test_lines_of_each_split_are_found_in_the_root(tmp_path):
    for name in ("train", "valid", "test"):
        save_jpeg(tmp_path / f"{name}.jpg")
        write_lines(tmp_path / f"{name}.jsonl", [{"image": f"{name}.jpg", "caption": name}])
    found = [all_captions(create_reader("csv", tmp_path, split=split)) for split in ("train", "validation", "test")]
    assert found == [["train"], ["valid"], ["test"]]
    (tmp_path / "test.csv").write_text("image,caption\ntest.jpg,the CSV comes first\n")
    assert all_captions(create_reader("csv", tmp_path, split="test")) == ["the CSV comes first"]
    write_lines(tmp_path / "one.jsonl", [{"image": "train.jpg", "caption": "x", "split": "train"}])
    with pytest.raises(NoSplit, match="one.jsonl has no rows of the split 'test'"):
        create_reader("csv", tmp_path, "one.jsonl", "test")


GOOD = b'{"image": "a.jpg", "caption": "x"}\n'


@pytest.mark.parametrize(
    "data, message",
    [
        (GOOD + b'{"image": "a.jpg", "capt\n', "line 2 is no JSON: Unterminated string starting at, character 20$"),
        (GOOD + GOOD + b'["a.jpg", "x"]\n', "line 3 is no JSON object"),
        (GOOD + b"7\n", "line 2 is no JSON object, as each line has to be: 7"),
        (GOOD + b'{"image": "\xe9.jpg", "caption": "x"}\n', "line 2 is not UTF-8"),
        (GOOD.decode().encode("utf-16"), "line 1 is not UTF-8"),
        (
            b'{"image": "a.jpg", "caption": "x", "caption": "y"}\n',
            "line 1 is no JSON: the key 'caption' more than once",
        ),
        (b'{"image": "a.jpg", "Caption": "x", "caption": "y"}\n', "the column 'caption' more than once"),
        (GOOD + b'{"image": "a.jpg", "caption": ["x", "y"]}\n', "line 2: 'caption' holds no text but a list"),
        (GOOD + b'{"image": {"path": "a.jpg"}, "caption": "x"}\n', "line 2: 'image' holds no text but a JSON object"),
        (GOOD + b'{"image": "../a.jpg", "caption": "x"}\n', r"line 2: the path '../a.jpg' may leave"),
        (GOOD + b"[" * 100_000 + b"\n", "line 2 is no JSON"),
        (b'{"picture_id": 1, "words": "x"}\n', "no column image or .*its columns: picture_id, words"),
        (b"", "no column image"),
        (b"\n \n", "no column image"),
    ],
)
def test_a_line_that_does_not_do_is_named(tmp_path, data, message):
    save_jpeg(tmp_path / "a.jpg")
    (tmp_path / "pairs.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=f"pairs.jsonl.*{message}"):
        create_reader("csv", tmp_path, "pairs.jsonl", val_fraction=0)


def test_any_keys_serve_where_they_are_named(tmp_path):
    for i in range(4):
        save_jpeg(tmp_path / f"{i}.jpg")
    rows = [{"Key": f"{i}.jpg", "Findings": f"Clear lungs {i}", "IMPRESSION": "nan" if i == 1 else f"Normal {i}."}
            for i in range(4)]  # fmt: skip
    write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="has no column image or"):
        create_reader("csv", tmp_path, "a.jsonl")
    named = PairColumns("key", ("findings", "impression"))
    reader = create_reader("csv", tmp_path, "a.jsonl", val_fraction=0, named=named)
    assert all_captions(reader) == [
        "Clear lungs 0. Normal 0.", "Clear lungs 1", "Clear lungs 2. Normal 2.", "Clear lungs 3. Normal 3.",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text(
        "Key;Findings;IMPRESSION\n" + "".join(";".join(row.values()) + "\n" for row in rows)
    )
    assert Table(tmp_path / "a.csv").delimiter == ";"
    assert create_reader("csv", tmp_path, "a.csv", val_fraction=0, named=named).fingerprint() == reader.fingerprint()
    with pytest.raises(ValueError, match="a.jsonl has no column conclusion; its columns: key, findings, impression"):
        create_reader("csv", tmp_path, "a.jsonl", named=PairColumns("key", ("conclusion",)))
    with pytest.raises(ValueError, match="--dataset csv; roco has its publisher's"):
        create_reader("roco", tmp_path, named=named)


def test_every_command_reads_them(tmp_path):
    """Training, retrieval, the check and shards, by the same flags."""
    for i in range(16):
        save_jpeg(tmp_path / f"{i}.jpg", 15 * i)
    rows = [{"file": f"{i}.jpg", "words": f"case {i}", "split": "val" if i % 4 == 3 else "train"} for i in range(16)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    columns = ["--image-column", "file", "--caption-columns", "words"]
    source = ["--dataset", "csv", "--root", str(tmp_path), "--metadata", str(tmp_path / "pairs.jsonl"), *columns]
    argv = command(tmp_path, tmp_path / "out", "--epochs", "1", model="CLIP_VITT16")
    row = main.main([*argv[4:], *source])
    assert row["val_candidates"] == 4 and weights(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["args"]
    assert settings["caption_columns"] == ["words"] and settings["image_column"] == "file"
    found = eval_zeroshot.main([
        "--resume", str(tmp_path / "out" / "checkpoint.pt"), "--retrieval", *source, "--split", "validation", "-j", "0",
        "--output-dir", str(tmp_path / "scores"),
    ])  # fmt: skip
    assert found["retrieval"]["csv"]["i2t_r1"] == pytest.approx(row["val_i2t_r1"] / 100)
    make_dataset.main(["check", *source, "-j", "1", "--output", str(tmp_path / "bad.txt")])
    make_dataset.main(["shards", *source, "-j", "1", "--output", str(tmp_path / "shards")])
    assert all_captions(create_reader("webdataset", tmp_path / "shards")) == [
        row["words"] for row in rows if row["split"] == "train"
    ]
