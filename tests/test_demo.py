"""demo.py end to end on a small world: what it writes and prints, that it reruns and needs no network."""

from __future__ import annotations

import json
import socket
from functools import partial

import pytest

import demo
import phantoms
from metrics import METRICS

SMALL = {"calc": {"train": 80, "test": 60}, "mass": {"train": 160, "test": 120}}
ARGS = ("--pairs", "300", "--epochs", "1")


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch):
    connect = socket.socket.connect

    def only_local(self, address):  # loader processes talk through Unix sockets
        if self.family != socket.AF_UNIX:
            raise OSError(f"the demo asked the network for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)
    monkeypatch.setattr(phantoms, "make_demo", partial(phantoms.make_demo, lesions=SMALL, workers=1))


def test_the_demo_trains_probes_and_reruns(tmp_path, capsys):
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

    checkpoint = run / "training" / "checkpoint_best.pt"
    before = checkpoint.stat().st_mtime_ns
    again = demo.main(argv)
    assert checkpoint.stat().st_mtime_ns == before and "keeping the SYNTHETIC" in capsys.readouterr().out
    assert all(
        again[kind][name]["metrics"] == results[kind][name]["metrics"] for kind in results for name in results[kind]
    )

    with pytest.raises(ValueError, match="was drawn with"):  # other settings do not mix with what is there
        demo.main(["--pairs", "301", "--epochs", "1", "--output-dir", str(tmp_path / "out")])


def test_an_unknown_objective_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        demo.get_args_parser().parse_args(["--objective", "moco"])
    assert "slip" in capsys.readouterr().err
