"""Scripts started from a process that has the libraries loaded: in a tenth of a second, where Python takes six.

What a script does after its imports is what it does for users: its process group, its signals, its exit code.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm  # noqa: F401
import torch

import main  # noqa: F401
import main_linear  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
STARTING = threading.Lock()


def process(target, args: tuple, daemon: bool = False) -> multiprocessing.Process:
    """Started, from a server that has imported this module."""
    with STARTING, pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or the server finds nothing to preload, and is silent
        CONTEXT.set_forkserver_preload(["quick_start"])
        multiprocessing.forkserver.ensure_running()
    made = CONTEXT.Process(target=target, args=args, daemon=daemon)
    made.start()
    return made


class Script:
    """The part of subprocess.Popen that is used here: a command `python SCRIPT ...` whose output goes to a file."""

    def __init__(self, command, stdout, stderr=subprocess.STDOUT, env=None, process_group=None):
        assert command[0] == sys.executable and stderr == subprocess.STDOUT
        argv, environment = [str(part) for part in command[1:]], dict(os.environ if env is None else env)
        self.process = process(_run, (argv, str(Path(stdout.name).absolute()), environment))
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("script", timeout or 0)
        return self.process.exitcode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def run(command, **options) -> subprocess.CompletedProcess:
    """As subprocess.run: a Script to its end."""
    return subprocess.CompletedProcess(command, Script(command, **options).wait())


class Quick:
    """In place of a module's `subprocess`."""

    Popen, run, STDOUT = Script, staticmethod(run), subprocess.STDOUT


def _run(argv: list[str], output: str, environment: dict[str, str]) -> None:
    os.setsid()
    said = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(said, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")
