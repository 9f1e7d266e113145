"""demo.py end to end on a small world: what it writes and prints, that it reruns and needs no network."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import partial

import pytest

import demo
from evaluation.metrics import METRICS, Interval
from synthetic import world

SMALL = {"calc": {"train": 80, "test": 60}, "mass": {"train": 160, "test": 120}}
ARGS = ("--pairs", "300", "--epochs", "1")


@pytest.fixture
def small_and_offline(monkeypatch):
    connect = socket.socket.connect

    def only_local(self, address):  # loader processes talk through Unix sockets
        if self.family != socket.AF_UNIX:
            raise OSError(f"the demo asked the network for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)
    monkeypatch.setattr(world, "make_demo", partial(world.make_demo, lesions=SMALL, workers=1))


@pytest.mark.slow
@pytest.mark.usefixtures("small_and_offline")
def test_the_demo_trains_probes_and_reruns(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "medslip")
    argv = [*ARGS, "--output-dir", str(tmp_path / "out")]
    results = demo.main(argv)
    printed = capsys.readouterr().out
    run = tmp_path / "out" / "slip_seed0"

    assert set(results) == {"calc", "mass"}
    for kind, pair in results.items():
        assert set(pair) == {"untrained", "trained"}
        for result in pair.values():
            assert result["lesions"]["test"] >= SMALL[kind]["test"] and set(result["metrics"]) == set(METRICS)
        gain = pair["trained"]["difference"]["auroc"]
        points = {name: result["metrics"]["auroc"]["value"] for name, result in pair.items()}
        assert gain["value"] == pytest.approx(points["trained"] - points["untrained"])
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert points["trained"] != points["untrained"]
    written = json.loads((run / "results.json").read_text("utf-8"))
    assert written["synthetic"] is True and written["calc"] == json.loads(json.dumps(results["calc"]))

    table = (run / "results.md").read_text("utf-8")
    assert table.strip() in printed and "SYNTHETIC" in table
    assert table.count("| untrained |") == table.count("| trained (SLIP) |") == 2
    assert table.count("trained minus untrained") == 2
    for place in (tmp_path / "out" / "phantoms_seed0", run / "training", run / "probe"):
        assert place.is_dir() and str(place) in printed

    page = (run / "report" / "report.html").read_text("utf-8")
    assert "SYNTHETIC data" in page and str(run / "report" / "report.html") in printed
    for pair in results.values():
        for result in pair.values():
            assert Interval(**result["metrics"]["auroc"]).percent() in page

    checkpoint = run / "training" / "checkpoint_best.pt"
    before = checkpoint.stat().st_mtime_ns
    again = demo.main(argv)
    assert checkpoint.stat().st_mtime_ns == before and "keeping the SYNTHETIC" in caplog.text
    assert all(
        again[kind][name]["metrics"] == results[kind][name]["metrics"] for kind in results for name in results[kind]
    )

    with pytest.raises(ValueError, match="was drawn with"):  # other settings do not mix with what is there
        demo.main(["--pairs", "301", "--epochs", "1", "--output-dir", str(tmp_path / "out")])


def test_an_unknown_objective_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        demo.get_args_parser().parse_args(["--objective", "moco"])
    assert "slip" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """As a newcomer runs it: its own settings, one command, a process of its own."""
    done = subprocess.run(
        [sys.executable, demo.__file__, "--output-dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SYNTHETIC" in done.stdout and "trained minus untrained" in done.stdout
    results = json.loads((tmp_path / "slip_seed0" / "results.json").read_text())
    gains = {kind: results[kind]["trained"]["difference"]["auroc"] for kind in ("calc", "mass")}
    print(gains)
    assert all(gain["value"] > 0 for gain in gains.values()), gains
