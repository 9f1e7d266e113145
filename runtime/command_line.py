"""What every command does with its flags and its errors."""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.imports import defer_compiler, end_deferral
from runtime.memory import keep_freed_memory
from runtime.signals import ENDS_WITH_PARENT, end_with_parent

HERE = Path(__file__).resolve().parents[1]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each flag's default and the description's own line breaks."""


class Parser(argparse.ArgumentParser):
    """A parser that answers bad usage with one line, which names what is nearest, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End with the line, from one rank alone; the usage of a hundred flags would hide it."""
        if wrong := re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            message += nearest(wrong[1], re.findall(r"'(.*?)'|([^\s,']+)", wrong[2]))
        if int(os.environ.get("RANK", 0)) == 0:
            self._print_message(f"error: {message} ({self.prog} --help)\n", sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but for what it says of flags that are not there."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
            known = self._of_command(getattr(found, "command", None))._option_string_actions
            said = [f"no flag {flag}{nearest(flag, known)}" for flag in flags]
            self.error("; ".join(said) if said else f"nothing is known of {' '.join(unknown)}")
        return found

    def _of_command(self, name: str | None) -> argparse.ArgumentParser:
        """The parser of a subcommand, or this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                return action.choices[name]
        return self


def nearest(word: str, known: Iterable[Any]) -> str:
    """ ", did you mean ..." with up to two of those that are spelt almost so; "" where none is."""
    names = ["".join(name) for name in known]
    folded = {name.lower().replace("_", "-"): name for name in names}
    word = word.lower().replace("_", "-")
    found = difflib.get_close_matches(word, folded, n=2, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, name, word).ratio() for name in found]
    found = [name for name, ratio in zip(found, ratios, strict=True) if ratio > ratios[0] - 0.1]  # as near, or nearly
    return f": did you mean {' or '.join(folded[name] for name in found)}?" if found else ""


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
    known = {action.dest for action in parser._actions}
    if "config" not in known:
        return parser.parse_args(argv)
    first = Parser(parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="")
    path = first.parse_known_args(argv)[0].config
    if path:
        try:
            settings = json.loads(Path(path).read_text(encoding="utf8"))["args"]
            given = {name: value for name, value in settings.items() if name not in _NOT_REPLAYED}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--config {path} is no settings.json of a run: {error!r}") from error
        if unknown := sorted(set(given) - known):
            raise ValueError(f"--config {path} is of another script or version: no flag for {', '.join(unknown)}")
        parser.set_defaults(**given)
    return parser.parse_args(argv)


def given_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The flags whose values are not the parser's defaults, as a command line has them."""
    found = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or not action.option_strings:
            continue
        name = next((text for text in action.option_strings if text.startswith("--")), action.option_strings[0])
        if isinstance(value, bool):
            negative = f"--no-{name.removeprefix('--')}"
            found.append(name if value or negative not in action.option_strings else negative)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            found.append(shlex.join([name, *map(str, values)]))
    return " ".join(found) or "the defaults"


def answer_flags(parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], object] | None = None) -> None:
    """What a script calls before it loads PyTorch: --help, a typo and flags that do not go together end it at once."""

    def answer() -> None:
        args = parse_with_config(parser, None)
        if check is not None:
            check(args)

    run_script(answer)
    # Until the script's own run_script. What libraries make while they are imported stays: looking for garbage among it
    # again and again took a sixth of a command's time to its first answer.
    defer_compiler()
    gc.disable()


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
    keep_freed_memory()
    end_deferral()
    gc.freeze()  # nor is it looked at later, in workers either
    gc.enable()
    try:
        result = main()
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if "--debug" in sys.argv or not (isinstance(error, OSError) or _raised_here(error)):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            text = re.sub(r"\[Errno -?\d+\] ", "", text)  # a number that helps nobody
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
