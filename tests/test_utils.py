"""Schedule, files written whole, the commit of a run, names as file names, cells that no spreadsheet runs."""

import csv
import errno
import fcntl
import io
import json
import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDENS, command
from roco_tree import make_roco
from torch import nn

import main
import utils
from runtime import checkpoints, versions


@pytest.mark.parametrize("case", json.loads((GOLDENS / "cosine_scheduler.json").read_text()))
def test_schedule_equals_the_published_one(case):
    schedule = utils.cosine_scheduler(**case["args"])
    assert len(schedule) == case["length"]
    np.testing.assert_allclose(schedule[case["at"]], case["values"], rtol=1e-12)


def test_schedule_is_defined_beyond_its_ends():
    assert utils.cosine_lr(-1, 10, 1.0, 0.1, 2) == 0
    assert utils.cosine_lr(10_000, 10, 1.0, 0.1, 2) == pytest.approx(0.1)
    assert utils.cosine_lr(0, 0, 1.0, 0.1) == 1.0


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint({"x": torch.ones(3)}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="checkpoint.pt: no space is left on its disk; what was there before is intact"):
        checkpoints.save_checkpoint({"x": torch.zeros(3)}, path)
    assert torch.equal(checkpoints.load_checkpoint(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]  # no temporary file stays behind


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    """The order in which a power cut leaves the old file or the new one."""
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(number):
        name = os.readlink(f"/proc/self/fd/{number}")
        written = (tmp_path / name).is_dir() or (tmp_path / name).read_bytes() == b"new"
        calls.append(("fsync", os.path.basename(name), written))
        fsync(number)

    def recorded_replace(source, target):
        calls.append(("replace", os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    utils.atomic_write(tmp_path / "a", lambda file: file.write(b"new"))
    temporary = calls[0][1]
    assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.tmp", temporary)
    assert calls == [("fsync", temporary, True), ("replace", temporary, "a"), ("fsync", tmp_path.name, True)]


def test_a_full_disk_is_named_in_its_own_words_where_torch_uses_others(tmp_path, monkeypatch):
    """torch's writer turns what the system says into an internal error of its own."""

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.io, "FileIO", Full)
    with pytest.raises(OSError) as failed:
        utils.atomic_write(tmp_path / "weights.pt", lambda file: torch.save({"x": torch.zeros(100_000)}, file))
    assert str(failed.value) == (
        f"could not write {tmp_path / 'weights.pt'}: no space is left on its disk; what was there before is intact"
    )
    assert os.listdir(tmp_path) == []


def test_a_temporary_file_follows_no_link_and_the_mode_of_the_old_file_stays(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".a.00.tmp").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(utils.secrets, "token_hex", lambda n: "00")
    with pytest.raises(OSError, match="could not write .*File exists"):
        utils.atomic_write(tmp_path / "a", lambda file: file.write(b"new"))
    monkeypatch.undo()
    assert (tmp_path / ".a.00.tmp").is_symlink() and (tmp_path / "elsewhere").read_text() == "kept"
    utils.atomic_write(tmp_path / "a", lambda file: file.write(b"new"))
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode  # as the umask has it
    (tmp_path / "a").chmod(0o640)
    utils.atomic_write(tmp_path / "a", lambda file: file.write(b"newer"))
    assert (tmp_path / "a").read_bytes() == b"newer" and (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_a_dead_process_has_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    living, dead, young = (tmp_path / f".a.{digit * 16}.tmp" for digit in "123")
    for path in (living, dead, young):
        path.write_text("half")
        os.utime(path, (0, 0))
    os.utime(young)
    (tmp_path / ".notes.tmp").write_text("a person's")
    with open(living, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        utils.atomic_write(tmp_path / "a", lambda file: file.write(b"new"))
    assert sorted(os.listdir(tmp_path)) == sorted(["a", living.name, young.name, ".notes.tmp"])


def test_what_will_not_fit_is_told_before_it_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000_000))
    assert utils.refuse_full(tmp_path / "absent" / "yet", 3_000_000_000, "the vectors") == 3_000_000_000
    with pytest.raises(OSError, match="yet has 3.0 GB free; the vectors take 5.0 GB"):
        utils.refuse_full(tmp_path / "absent" / "yet", 5_000_000_000, "the vectors")
    weights = [torch.empty(100_000_000, device="meta", requires_grad=True)]  # 1.2 GB a checkpoint with its averages
    checkpoints.refuse_full_disk(tmp_path, weights, kept=0)
    assert not caplog.messages
    checkpoints.refuse_full_disk(tmp_path, weights, kept=1)
    assert "3.0 GB free; up to 3 checkpoints will be there, which take 3.6 GB more" in caplog.text
    with pytest.raises(OSError, match="3.0 GB free; a checkpoint's weights and averages take 3.6 GB"):
        checkpoints.refuse_full_disk(tmp_path, weights * 3, kept=1)
    caplog.clear()
    with open(tmp_path / "checkpoint.pt", "wb") as file:
        file.truncate(1_200_000_000)
    os.link(tmp_path / "checkpoint.pt", tmp_path / "checkpoint_step00000003.pt")
    checkpoints.refuse_full_disk(tmp_path, weights, kept=1)  # one of the three is there
    assert not caplog.messages


def test_fused_adamw_leaves_everything_alone_where_the_gradient_is_not_finite():
    """What main.update relies on for skipping an update on the device."""
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.ones(4)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.full((4,), torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())


def test_the_commit_is_asked_once_and_is_that_of_the_start(tmp_path, monkeypatch):
    """A run of several checkpoints, in the middle of which a file is edited."""
    asked = []

    def git(command, **_):
        asked.append(command[0])
        return SimpleNamespace(stdout=f"abc{'-dirty' * (len(asked) > 1)}\n")

    monkeypatch.setattr(versions.subprocess, "run", git)
    versions.commit.cache_clear()
    try:
        main.main(command(make_roco(tmp_path / "roco"), tmp_path / "run"))
        files = [*(tmp_path / "run").glob("checkpoint_step*.pt")]
        assert [checkpoints.load_checkpoint(file)["versions"]["commit"] for file in files] == ["abc", "abc"]
    finally:
        versions.commit.cache_clear()
    assert asked == ["git"]


NAMES = [
    "", ".", "..", "../x", "/etc/x", "a/b", "a_b", "A/B", "a\\b", "a\0b", "a\nb", ".hidden", "a~b", "x" * 300, "é" * 90,
    "日本", "a b", " a", "a.", "a:b", "a|b", "a%2Fb", "\udcff", "CBIS (mass), +1", "cbis_calc", "-a", "%s",
]  # fmt: skip


def test_a_name_becomes_one_part_of_a_path_and_no_other_does(tmp_path):
    names = [*NAMES, *(utils.file_name(name) for name in NAMES if utils.file_name(name) != name)]
    found = [utils.file_name(name) for name in names]
    assert len(set(found)) == len(names) and len({name.lower() for name in map(utils.file_name, NAMES)}) == len(NAMES)
    for name in found:
        for kind in (PurePosixPath, PureWindowsPath):
            assert kind(name).parts == (name,) and name not in (".", "..") and not name.startswith(".")
        (tmp_path / f"zeroshot_{name}_0123456789abcdef0123456789abcdef.npz").write_text(name)
    assert len(list(tmp_path.iterdir())) == len(names)


@pytest.mark.parametrize(
    "name", ["cbis_calc", "hospital", "mammo+x-ray", "CBIS (mass)", "ViT-B.16", "日本", "a, b", "7"]
)
def test_an_ordinary_name_is_its_own_file_name(name):
    assert utils.file_name(name) == name


CELLS = [
    "=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx", "a\rb", "\n=x", "'", "'x", "'=x", "''=x", "'-1", "''-1", "a,b", 'a"b',
    "", "−1", "-", "- 1", "-1", "+1.5e3", ".5", "-.5", "-1-1", "1=1", "-inf", "＝1", "BENIGN", "P_00001",
]  # fmt: skip


def test_no_cell_is_a_formula_and_each_comes_back():
    """Read by Python's own reader; what a spreadsheet runs is OWASP's list."""
    text = utils.csv_text([CELLS, [-1, -0.5, 1e-20, None, True], *([cell, "end"] for cell in CELLS)])
    first, numbers, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert [utils.csv_value(cell) for cell in first] == CELLS
    assert [[utils.csv_value(cell) for cell in row] for row in rows] == [[cell, "end"] for cell in CELLS]
    assert numbers == ["-1", "-0.5", "1e-20", "", "True"] and [float(x) for x in numbers[:3]] == [-1, -0.5, 1e-20]
    for cell in first:
        if cell.startswith(tuple("=+-@\t\r\n")):
            float(cell)  # a number
            assert cell in ("-1", "+1.5e3", "-.5")


def test_ordinary_cells_are_written_as_the_csv_module_writes_them():
    lines = [["a", "a,b", 'say "x"', "two\nlines", "it's", "'quoted'", 0.1, -1, 1e-7, None, "-1"], ["", "x"], [""]]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    assert utils.csv_text(lines) == text.getvalue()


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ("3", "holds a int"),
    ],
)
def test_a_file_without_a_json_object_is_named(tmp_path, text, why):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=f"results.json {why}"):
        utils.read_json(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"a": 1}')
    assert utils.read_json(tmp_path / "results.json") == {"a": 1}
