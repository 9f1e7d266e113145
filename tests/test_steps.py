"""The steps of make_tables.py: one signal stops them all, and none outlives its parent."""

import signal
import subprocess
import sys

import pytest
from helpers import ROOT, environment, slow, wait_for

from reporting import steps

STEP = """
import sys, time
from pathlib import Path
from runtime.command_line import run_script
from runtime.signals import StopRequest
from runtime.one_run import one_run

folder = Path(sys.argv[1])

def main():
    with one_run(folder), StopRequest() as stop:
        (folder / "started").write_text("")
        while not stop.name and not (folder / "end").exists():
            time.sleep(0.02)
        (folder / "stopped").write_text(stop.name)
        time.sleep(float(sys.argv[2]))  # its checkpoint
    (folder / "result").write_text("")
    return {"stopped_by": stop.name}

run_script(main)
"""
DRIVER = """
import sys
from pathlib import Path
from reporting.steps import Step, run_steps
from runtime.command_line import run_script
from runtime.logs import start_logging

out, script = Path(sys.argv[1]), sys.argv[2]

def main():
    with start_logging():
        names = ["first", "second"]
        steps = [Step(n, out / n, [sys.executable, script, str(out / n), "0.3"], out / n / "result") for n in names]
        return {"stopped_by": run_steps(steps)}

run_script(main)
"""


@pytest.fixture
def driver(tmp_path):
    """A process that runs two steps, of which the first has started when the call returns."""
    script, out = tmp_path / "step.py", tmp_path / "out"
    script.write_text(STEP)

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(out), str(script)]
        env = environment(PYTHONPATH=str(ROOT))
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        wait_for((out / "first" / "started").exists, 60, "the first step")
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)])
def test_one_signal_stops_all_steps(tmp_path, driver, number):
    process = driver()
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert (tmp_path / "out" / "first" / "stopped").read_text() == name
    assert not (tmp_path / "out" / "second").exists()
    assert f"    stopped by {name} after" in said and f"[2/2] second: not run: stopped by {name}" in said
    assert "FAILED" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_step_ends_with_its_parent_and_the_next_start_waits_for_it(tmp_path, driver, monkeypatch):
    first = tmp_path / "out" / "first"
    process = driver()
    process.kill()
    process.wait()
    with steps.Signals() as signals:
        assert steps.wait_for_folder(steps.Step("first", first, [], first / "result"), signals) == ""
    assert (first / "stopped").read_text() == "SIGTERM"


def test_a_folder_that_stays_in_use_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PATIENCE", 0)
    monkeypatch.setattr(steps, "in_use", lambda folder: "x is in use by process 1")
    step = steps.Step("first", tmp_path, [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "result")
    assert steps.run_steps([step]) == "" and step.status == "not run: x is in use by process 1"
