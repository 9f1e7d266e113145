"""Exit codes and messages: what the user can mend is one line, a fault of the code keeps its traceback."""

import importlib.util
import os
import signal
import sys

import pytest

import distributed
from runtime import command_line

CODE = "def fail():\n    raise ValueError('{0} said so')\n"


def module_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(path.stem))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["script.py", "inputs/reader.py"])
def test_our_own_error_is_one_line(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as left:
        command_line.run_script(module_at(tmp_path / place).fail)
    assert left.value.code == 1 and capsys.readouterr().err == f"error: {(tmp_path / place).stem} said so\n"


@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages/numpy/core.py", "../elsewhere.py"])
def test_a_librarys_error_keeps_its_traceback_wherever_the_environment_lies(tmp_path, monkeypatch, place):
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(command_line, "HERE", checkout)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ValueError, match="said so"):
        command_line.run_script(module_at((checkout / place).resolve()).fail)


def test_a_fault_within_a_line_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    (tmp_path / "ours.py").write_text("def fail():\n    int('seven')\n")
    spec = importlib.util.spec_from_file_location("ours", tmp_path / "ours.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="seven"):
        command_line.run_script(module.fail)


@pytest.fixture
def press(monkeypatch):
    """Ctrl-C at a moment in seconds."""
    now = [100.0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def at(seconds):
        now[0] = 100.0 + seconds
        os.kill(os.getpid(), signal.SIGINT)

    return at


def test_ctrl_c_answers_at_once_and_the_third_ends(press, capfd):
    with command_line.StopRequest(unsaved=lambda: 125.0) as stop:
        press(0)
        assert stop.name == "SIGINT"
        assert capfd.readouterr().err == "\nSIGINT: stopping after this step, a checkpoint follows\n"
        press(1)
        said = "\na third Ctrl-C ends at once and loses the last 2m05s of training\n"
        assert capfd.readouterr().err == said
        with pytest.raises(KeyboardInterrupt):
            press(2)


@pytest.mark.parametrize("launcher, apart", [({}, 0.2), ({"TORCHELASTIC_RUN_ID": "1"}, 2.0)], ids=["alone", "torchrun"])
def test_a_doubled_ctrl_c_is_one(press, capfd, monkeypatch, launcher, apart):
    """A terminal sends it to the whole group, and torchrun once more to each rank."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with command_line.StopRequest() as stop:
        for start in (0, 10):
            press(start)
            press(start + 0.9 * apart)
        assert stop.presses == 2
        with pytest.raises(KeyboardInterrupt):
            press(10 + apart + 0.01)


def test_other_signals_are_no_presses_and_the_main_process_speaks(press, capfd):
    with command_line.StopRequest(distributed.Processes(rank=1, world_size=2)) as silent:
        os.kill(os.getpid(), signal.SIGTERM)
        assert silent.name == "SIGTERM" and capfd.readouterr().err == ""
    with command_line.StopRequest(distributed.Processes(rank=0, world_size=2)) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert "SIGTERM: stopping after the next step that is printed" in capfd.readouterr().err
        press(0)  # the first of three
        assert stop.name == "SIGTERM" and stop.presses == 1


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command_line.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.name
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with command_line.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)
