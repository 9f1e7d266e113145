"""What a run says while it runs: lines for people, rows for programs, progress bars."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from runtime.versions import commit

log = logging.getLogger("medslip")


class _Lines(logging.Formatter):
    """The message alone; a warning or an error says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return level + super().format(record)


class _Terminal(logging.Handler):
    """Lines on standard output that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def start_logging(output_dir: str | Path | None = None, is_main: bool = True) -> Iterator[None]:
    """Inside the block the lines of the logger `medslip` go to the terminal and, with `output_dir`, to its log.txt.

    Ranks other than the main one say nothing short of an error, so callers never ask who they are.
    """
    level, handlers = log.level, []
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if is_main:
        commit()
        if not any(isinstance(handler, _Terminal) for handler in log.handlers):  # a script may call another's main
            handlers.append(_Terminal())
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf8", delay=True)
            if file.baseFilename not in {getattr(handler, "baseFilename", "") for handler in log.handlers}:
                handlers.append(file)
    for handler in handlers:
        handler.setFormatter(_Lines())
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def aligned(lines: Iterable[Iterable[object]]) -> str:
    """Rows of cells as columns of text, ranged right."""
    rows = [[str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


ROWS_FILE = "log.jsonl"


class MetricWriter:
    """Records for programs: log.jsonl, TensorBoard and, on request, Weights & Biases.

    The files are opened with the first row, so that a run which ends before leaves them alone. Ranks other than the
    main one hold a writer that does nothing.
    """

    def __init__(self, output_dir: Path, enabled: bool = True, wandb: bool = False, settings: dict | None = None):
        self.enabled = enabled
        self._sinks: list[Callable[[dict, int], object]] = []
        self._output_dir, self._settings = output_dir, settings
        self._wandb: Any = None
        self._board: Any = None
        self._rows: TextIO | None = None
        if enabled and wandb:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise ValueError("--wandb needs the wandb package: pip install wandb") from error
            self._wandb = wandb_module

    def row(self, kind: str, step: int, values: dict) -> None:
        """One record: `kind` is train, epoch or test, `step` the number of updates so far."""
        if not self.enabled:
            return
        rows = self._rows or self._open()
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        rows.write(json.dumps(record, allow_nan=False) + "\n")
        for sink in self._sinks:
            sink({f"{kind}/{k}": v for k, v in values.items()}, step)

    def _open(self) -> TextIO:
        from torch.utils.tensorboard import SummaryWriter

        self._output_dir.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self._output_dir / ROWS_FILE)
        self._rows = open(self._output_dir / ROWS_FILE, "a", buffering=1, encoding="utf8")
        self._board = board = SummaryWriter(str(self._output_dir / "tensorboard"))
        self._sinks.append(
            lambda row, step: [board.add_scalar(k, v, step) for k, v in row.items() if isinstance(v, (int, float))]
        )
        if self._wandb is not None:
            folder = self._output_dir.resolve()
            run = self._wandb.init(
                project="medslip",
                config=self._settings,
                dir=str(folder),
                resume="allow",
                name=folder.name,
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            )
            self._sinks.append(lambda row, step: run.log(row, step=step))
        return self._rows

    def close(self) -> None:
        """Close what was opened; later rows are dropped."""
        for file in (self._board, self._rows):
            if file is not None:
                file.close()
        self.enabled = False


def drop_torn_line(path: Path) -> None:
    """Take off what a kill left of a line, to which the next row would be joined."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind that a MetricWriter has written, in the order of their steps.

    A run that was killed repeats what it did after its last checkpoint, and its rows: the last of a step counts. A line
    that is no record, as a kill tears one, is left out and named in the log.
    """
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            if row["kind"] == kind:
                found[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            if line.strip():
                log.warning(f"{path}, line {number} is left out: no record of a run")
    return [found[step] for step in sorted(found)]


QUIET_SECONDS = 10  # without a line, at most, where there is no terminal


def progress(
    steps: Iterable[Any] | None = None, desc: str = "", total: int | None = None, initial: int = 0, unit: str = ""
) -> tqdm | ProgressLines:
    """tqdm's bar on a terminal, after a second; elsewhere a line each ten seconds, with the time left given a `total`.

    Both iterate over `steps`, or count by `update`, as context managers.

    Args:
        unit: what is counted, with the space before it: " images"; "B" for bytes.
    """
    if not sys.stderr.isatty():
        return ProgressLines(steps, desc, total, initial, unit)
    return tqdm(steps, desc, total, initial=initial, unit=unit, unit_scale=unit == "B", leave=False, delay=1)


class ProgressLines:
    """What a bar says where there is no terminal. No tqdm: its bars are redrawn by each line that is logged."""

    def __init__(self, steps: Iterable[Any] | None, desc: str, total: int | None, initial: int, unit: str):
        total = len(steps) if total is None and isinstance(steps, Sized) else total  # as tqdm
        self.steps, self.desc, self.total, self.n, self.initial, self.unit = steps, desc, total, initial, initial, unit
        self.began = self.said = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for step in self.steps or ():
            yield step
            self.update()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self.n += n
        now = time.monotonic()
        if now - self.said < QUIET_SECONDS:
            return
        self.said = now
        of = left = ""
        if self.total:
            of = f" of {self.count(self.total)}"
            seconds = (now - self.began) * (self.total - self.n) / max(self.n - self.initial, 1)
            left = f", {format_seconds(seconds)} left"
        log.info(f"{self.desc}: {self.count(self.n)}{of}{self.unit if self.unit != 'B' else ''}{left}")

    def count(self, n: int) -> str:
        """Bytes with their prefix, as the bar has them, or the number itself."""
        return tqdm.format_sizeof(n, "B", 1000) if self.unit == "B" else f"{n:,}"

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def format_seconds(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds, for people."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
