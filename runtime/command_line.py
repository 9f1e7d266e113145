"""What every command does with its flags and its errors."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from runtime.signals import ENDS_WITH_PARENT, end_with_parent

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
    # The mark is taken away: it is of this process, not of those that it starts.
    if os.environ.pop(ENDS_WITH_PARENT, "") or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
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
