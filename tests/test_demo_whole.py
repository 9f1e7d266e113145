"""The demo as a newcomer runs it: its own settings, one command, a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    demo = Path(__file__).parent.parent / "demo.py"
    done = subprocess.run([sys.executable, str(demo), "--output-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SYNTHETIC" in done.stdout and "trained minus untrained" in done.stdout
    results = json.loads((tmp_path / "slip_seed0" / "results.json").read_text())
    gains = {kind: results[kind]["trained"]["difference"]["auroc"] for kind in ("calc", "mass")}
    print(gains)
    assert all(gain["value"] > 0 for gain in gains.values()), gains
