"""The signals that ask a run to stop. PyTorch stays unloaded: the demo's painters start faster without it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from runtime.logs import format_seconds

if TYPE_CHECKING:
    from distributed import Processes

ENDS_WITH_PARENT = "MEDSLIP_ENDS_WITH_PARENT"  # in the environment of a command that another command waits for
# That ask a run to stop. SIGHUP is a terminal that was closed; nohup has it ignored, and then it stays so.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals that come inside the block are heard after it; processes that are started inside never hear them.

    A Ctrl-C in the middle of a fork would be lost: Python swallows what is raised in the functions that it calls there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the system send this signal to this process when the one that started it has ended.

    torchrun passes on what --signals-to-handle names; of another signal, and of SIGKILL, it dies and its ranks would go
    on alone. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


class StopRequest:
    """Remembers one of SIGNALS, so that the loop can checkpoint and leave between two steps, and says so at once.

    A second Ctrl-C says what a third one would lose; the third raises KeyboardInterrupt wherever the program stands.

    Args:
        processes: None is one. Of several the main one speaks, and they stop where they next meet.
        unsaved: seconds since the last checkpoint.
    """

    def __init__(self, processes: Processes | None = None, unsaved: Callable[[], float] = lambda: 0.0):
        self.processes, self.unsaved = processes, unsaved
        self.name = ""
        self.presses, self.last_press = 0, -math.inf
        # s within which a Ctrl-C is the one before: torchrun passes on what the terminal has sent its ranks already.
        self.same_press = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.2
        self.previous = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: signals belong to whoever runs us
                break
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        first = not self.name
        if first:
            self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self.last_press <= self.same_press:
                return
            self.presses, self.last_press = self.presses + 1, now
            if self.presses == 3:
                raise KeyboardInterrupt
        if first:
            when = (
                "this step"
                if self.processes is None or self.processes.world_size == 1
                else "the next step that is printed (--print-freq)"
            )
            self._say(f"{self.name}: stopping after {when}, a checkpoint follows")
        elif self.presses == 2:
            self._say(f"a third Ctrl-C ends at once and loses the last {format_seconds(self.unsaved())} of training")

    def _say(self, line: str) -> None:
        # Past the log and its locks, one of which the interrupted code may hold.
        if self.processes is None or self.processes.is_main:
            with suppress(OSError):  # a terminal that was closed
                os.write(2, f"\n{line}\n".encode())
