"""Signals that ask a run to stop, and processes that end with the one that started them."""

import os
import signal

import pytest

import distributed
from runtime import signals


@pytest.fixture
def press(monkeypatch):
    """Ctrl-C at a moment in seconds."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def at(seconds):
        now[0] = 100.0 + seconds
        os.kill(os.getpid(), signal.SIGINT)

    return at


def test_ctrl_c_answers_at_once_and_the_third_ends(press, capfd):
    with signals.StopRequest(unsaved=lambda: 125.0) as stop:
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
    with signals.StopRequest() as stop:
        for start in (0, 10):
            press(start)
            press(start + 0.9 * apart)
        assert stop.presses == 2
        with pytest.raises(KeyboardInterrupt):
            press(10 + apart + 0.01)


def test_other_signals_are_no_presses_and_the_main_process_speaks(press, capfd):
    with signals.StopRequest(distributed.Processes(rank=1, world_size=2)) as silent:
        os.kill(os.getpid(), signal.SIGTERM)
        assert silent.name == "SIGTERM" and capfd.readouterr().err == ""
    with signals.StopRequest(distributed.Processes(rank=0, world_size=2)) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert "SIGTERM: stopping after the next step that is printed" in capfd.readouterr().err
        press(0)  # the first of three
        assert stop.name == "SIGTERM" and stop.presses == 1


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.name
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)
