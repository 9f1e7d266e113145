"""Texts in shared arrays, against lists of strings; what forked workers copy of them."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from inputs.columns import TextColumn


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
