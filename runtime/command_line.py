"""What every command does with its flags, its errors and the signals that ask it to stop."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import distributed
from runtime.logs import format_seconds

HERE = Path(__file__).resolve().parents[1]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each flag's default and the description's own line breaks."""


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


# What belongs to a run's place and moment and not to what it does.
_NOT_REPLAYED = {
    "config", "output_dir", "resume", "start_epoch", "evaluate", "rank", "world_size", "local_rank", "dist_url", "gpu",
    "dist_backend", "dist_timeout", "debug",
}  # fmt: skip


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """`--config`, which `parse_with_config` reads."""
    parser.add_argument(
        "--config",
        default="",
        type=str,
        metavar="SETTINGS.JSON",
        help="start with another run's settings; flags on the command line win, and its folder, checkpoint and devices "
        "are not taken",
    )


def parse_with_config(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line over the settings of --config, a settings.json that a run has written.

    Raises:
        FileNotFoundError, ValueError: no such file; not a run's settings; settings that this script does not know.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="")
    path = first.parse_known_args(argv)[0].config
    if path:
        try:
            settings = json.loads(Path(path).read_text(encoding="utf8"))["args"]
            given = {name: value for name, value in settings.items() if name not in _NOT_REPLAYED}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--config {path} is no settings.json of a run: {error!r}") from error
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"--config {path} is of another script or version: no flag for {', '.join(unknown)}")
        parser.set_defaults(**given)
    return parser.parse_args(argv)


class UsageError(ValueError):
    """Flags that do not go together; the exit code is argparse's for bad usage, 2."""


ENDS_WITH_PARENT = "MEDSLIP_ENDS_WITH_PARENT"  # in the environment of a command that another command waits for


def run_script(main: Callable[[], object]) -> None:
    """Call a script's main as the command line does, and leave with its exit code.

    What the user can mend (our own errors about data, files and flags) is one line, `error: ...`, with exit code 1, or
    2 for bad usage, from one rank alone. Anything else is a fault of the code and keeps its traceback, as does
    everything with --debug. A run that a signal has stopped leaves with 128 + the signal's number, as a shell expects:
    what follows it after `&&` then does not start on a half-trained model.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.pop(ENDS_WITH_PARENT, ""):  # of this process, not of those that it starts
        distributed.end_with_parent()
    try:
        result = main()
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if "--debug" in sys.argv or not (isinstance(error, OSError) or _raised_here(error)):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            print(f"error: {text or type(error).__name__}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    stopped_by = result.get("stopped_by") if isinstance(result, dict) else None
    if stopped_by:
        sys.exit(128 + signal.Signals[stopped_by])


def _raised_here(error: BaseException) -> bool:
    """Whether this project's code raised the error on purpose, rather than a library that it called.

    Ours are the files at the root and those one folder below it. The libraries of an environment that lies inside the
    checkout, as the README makes it, lie deeper.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or "raise" not in (frames[-1].line or "raise"):
        return False
    file = Path(frames[-1].filename)
    return file.is_relative_to(HERE) and len(file.relative_to(HERE).parts) <= 2


# That ask a run to stop. SIGHUP is a terminal that was closed; nohup has it ignored, and then it stays so.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Remembers one of SIGNALS, so that the loop can checkpoint and leave between two steps, and says so at once.

    A second Ctrl-C says what a third one would lose; the third raises KeyboardInterrupt wherever the program stands.

    Args:
        processes: of several the main one speaks, and they stop where they next meet.
        unsaved: seconds since the last checkpoint.
    """

    def __init__(self, processes: distributed.Processes | None = None, unsaved: Callable[[], float] = lambda: 0.0):
        self.processes, self.unsaved = processes or distributed.Processes(), unsaved
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
            when = "this step" if self.processes.world_size == 1 else "the next step that is printed (--print-freq)"
            self._say(f"{self.name}: stopping after {when}, a checkpoint follows")
        elif self.presses == 2:
            self._say(f"a third Ctrl-C ends at once and loses the last {format_seconds(self.unsaved())} of training")

    def _say(self, line: str) -> None:
        # Past the log and its locks, one of which the interrupted code may hold.
        if self.processes.is_main:
            with suppress(OSError):  # a terminal that was closed
                os.write(2, f"\n{line}\n".encode())
