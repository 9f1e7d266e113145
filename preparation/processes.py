"""What the commands that prepare images share: work over processes, a folder's settings, room on the disk."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from runtime.signals import end_with_parent, signals_held_back
from utils import TEMPORARY, refuse_full, write_json

log = logging.getLogger("medslip")


@contextmanager
def over_processes(workers: int, shared: object, chunk: int = 1) -> Iterator[Callable]:
    """A `map(function, items)` over this many processes that calls function(shared, item); one works in this process.

    Args:
        shared: what every call gets first. Each process has it once, whatever the number of items.
        chunk: items that a process takes at a time.
    """
    if workers < 2:
        yield lambda function, items: map(partial(function, shared), items)
        return
    # Forked where the system can: a reader of many million rows is then inherited, not sent.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _keep, (shared,))

    def each(function: Callable, items: Iterable) -> Iterator:
        with signals_held_back():  # the first call forks
            return pool.map(partial(_call, function), items, chunksize=chunk)

    try:
        yield each
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process has ended in the middle of its work, as the system ends one when memory runs out: with a "
            "smaller -j less is needed, and the same command goes on from here"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_kept: Any = None  # of a process of the pool, and of this module alone: who asks for it is handed it


def _keep(shared: object) -> None:
    global _kept
    end_with_parent(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # by which the pool ends it
    _kept = shared


def _call(function: Callable, item: object) -> Any:
    return function(_kept, item)


def keep_settings(path: Path, settings: dict, output: str) -> None:
    """Note the settings of what fills a folder with `output`; ValueError if it was begun with others."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path.parent} was begun with {name} {before.get(name)!r}, not {value!r}: choose another folder"
                )
    elif any(not TEMPORARY.fullmatch(found.name) for found in path.parent.glob(output)):  # which a killed start leaves
        raise ValueError(f"{path.parent} is not empty and not begun by this command: choose another folder")
    else:
        write_json(path, settings)


def say_room(output: Path, sources: Iterable[str | Path], copied: bool) -> None:
    """Say what the files take that are to be written, at most, and what is free.

    Args:
        copied: they are written as they are: where they do not fit, that is an OSError before the first one.
    """
    needed = 0
    for path in sources:
        with suppress(OSError):  # absent or unreadable, which is said where it is read
            found = os.stat(path)
            needed += found.st_size if stat.S_ISREG(found.st_mode) else 0
    if needed:
        free = refuse_full(output, needed if copied else 0, "the images")
        log.info(f"{output}: at most {needed / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
