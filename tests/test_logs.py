"""Lines of a run whose streams are files, as nohup, Slurm and a redirection leave them."""

import io
import re
import subprocess
import sys
from contextlib import closing

import numpy as np
import torch
from distributed_helpers import run_ranks
from helpers import ROOT, environment

import distributed
from evaluation.features import Loading, each_once
from evaluation.resamples import Resamples
from inputs.metadata import read_table
from reporting import figures, plots, runs
from runtime import logs

# Each step takes a second.
LONG = """
import time
seconds = [0.0]
time.monotonic = time.time = lambda: seconds[0]
import logging, sys
from runtime.logs import progress, start_logging

with start_logging(sys.argv[1]):
    for step in progress(range(100), "encoding", total=100, unit=" batches"):
        seconds[0] += 1
        if step == 50:
            logging.getLogger("medslip").info("half of it")
    with progress(desc="reading", unit="B", total=2_000_000) as bar:
        for _ in range(12):
            seconds[0] += 1
            bar.update(100_000)
"""


def test_a_long_bar_is_a_line_each_ten_seconds(tmp_path):
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        command = [sys.executable, "-c", LONG, str(tmp_path)]
        subprocess.run(command, cwd=ROOT, env=environment(), stdout=out, stderr=err, check=True)
    lines = (tmp_path / "out").read_text().splitlines()
    assert (tmp_path / "err").read_text() == "" and (tmp_path / "log.txt").read_text().splitlines() == lines
    assert lines.pop(5) == "half of it"
    expected = [f"encoding: {n} of 100 batches, {logs.format_seconds(100 - n)} left" for n in range(10, 101, 10)]
    assert lines == [*expected, "reading: 1.00MB of 2.00MB, 0m10s left"]


def test_without_a_total_and_where_a_part_was_there(monkeypatch, caplog):
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(now))
    caplog.set_level("INFO", "medslip")
    bar = logs.ProgressLines(None, "shrinking", None, 0, " files")
    for _ in range(2):
        bar.update(600)
    bar = logs.ProgressLines(None, "writing", 1000, 400, " images")
    for _ in range(2):
        bar.update(100)
    # 200 of the 1,000 in 10 s: the 400 that were there took no time.
    assert caplog.messages == ["shrinking: 1,200 files", "writing: 600 of 1,000 images, 0m20s left"]


def bar_of_a_rank(rank, world, folder):
    """A pass over 30 samples that are each 20 s apart, as of a probe."""
    clock = iter(range(0, 10**6, 20))
    logs.time.monotonic = lambda: next(clock)
    sys.stdout = sys.stderr = open(folder / f"stream{rank}", "w")
    samples = [(torch.zeros(1), 0)] * 30
    loading = Loading(batch_size=1, processes=distributed.Processes(rank, world))
    with logs.start_logging(folder if rank == 0 else None, rank == 0):
        each_once(torch.nn.Identity(), samples, lambda numbers, *_: [numbers], loading, "encoding")
    sys.stdout.flush()


def test_only_the_main_rank_says_how_far_it_is(tmp_path):
    run_ranks(bar_of_a_rank, 2, tmp_path)
    lines = (tmp_path / "stream0").read_text().splitlines()
    assert len(lines) == 15 and all(re.fullmatch(r"encoding: \d+ of 15 batches, \S+ left", line) for line in lines)
    assert (tmp_path / "stream1").read_text() == ""


def test_long_work_on_tables_and_resamples_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logs, "QUIET_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level("INFO", "medslip")
    (tmp_path / "table.csv").write_text("image\na\nb\n")
    read_table(tmp_path / "table.csv", ["image"])
    Resamples([0, 1, 0, 1], ["a", "b", "c", "d"], ["x", "y"], None, 4).intervals(np.eye(2)[[0, 1, 0, 1]])
    assert "table.csv: 2 rows" in caplog.messages and "resampling: 1 of 1, 0m00s left" in caplog.messages


def test_a_terminal_gets_tqdms_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(logs.progress(range(3), "encoding", total=3)) == [0, 1, 2]
    assert terminal.getvalue() == ""  # too short to show anything
    bar = logs.progress(range(3), "encoding", total=3)
    bar.delay, bar.mininterval = -1, 0  # a second later
    assert list(bar) == [0, 1, 2]
    assert "encoding" in terminal.getvalue() and "\r" in terminal.getvalue()


def write_rows(folder, *rows):
    with closing(logs.MetricWriter(folder)) as writer:
        for kind, step, values in rows:
            writer.row(kind, step, values)


def test_after_a_kill_the_last_row_of_a_step_counts(tmp_path, caplog):
    """The epoch's row is written before its checkpoint: a kill between them repeats it."""
    write_rows(tmp_path, ("train", 4, {"loss": 3.0}), ("epoch", 4, {"epoch": 0, "loss": 3.5}))
    write_rows(tmp_path, ("train", 4, {"loss": 3.0}), ("epoch", 4, {"epoch": 0, "loss": 2.5}))
    write_rows(tmp_path, ("epoch", 8, {"epoch": 1, "loss": 2.0}))
    file = tmp_path / "log.jsonl"
    assert [(row["epoch"], row["loss"]) for row in logs.read_rows(file, "epoch")] == [(0, 2.5), (1, 2.0)]
    assert len(logs.read_rows(file, "train")) == 1 and not caplog.messages

    whole = file.read_text()
    file.write_text(whole[:-20])  # a line that a kill tore
    assert [row["epoch"] for row in logs.read_rows(file, "epoch")] == [0]
    assert caplog.messages == [f"{file}, line 5 is left out: no record of a run"]
    write_rows(tmp_path, ("epoch", 8, {"epoch": 1, "loss": 2.0}))  # nothing is joined to it
    assert [row["epoch"] for row in logs.read_rows(file, "epoch")] == [0, 1] and len(caplog.messages) == 1


def test_a_curve_stands_at_its_epochs(tmp_path, monkeypatch):
    """Of two seeds one was killed after its first epoch, the other in its third: the epochs that both have done."""
    rows = [("epoch", 4 * n, {"epoch": n - 1, "loss": 4.0 - n, "val_i2t_r1": 10.0 * n}) for n in (1, 2, 3)]
    write_rows(tmp_path / "a", rows[0], *rows)
    write_rows(tmp_path / "b", *rows[:2])
    drawn = {}

    def keep(curves, title):
        drawn[title] = curves
        return figures.Drawing("", b"")

    monkeypatch.setattr(plots.figures, "curves", lambda curves, title, *_, **__: keep(curves, title))
    plots.training_figures(runs.Runs(trainings={"row": [tmp_path / "a", tmp_path / "b"]}), plots.Gallery())
    loss, recall = drawn.values()
    for curve, values in ((loss, [3.0, 2.0]), (recall, [10.0, 20.0])):
        ((_, x, mean, low, high),) = curve
        assert x.tolist() == [1, 2] and mean.tolist() == low.tolist() == high.tolist() == values
