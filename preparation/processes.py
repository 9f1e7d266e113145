"""Work spread over processes that share one object."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from utils import write_json


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
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _keep, (shared,)) as pool:
        yield lambda function, items: pool.map(partial(_call, function), items, chunksize=chunk)


_kept: Any = None  # of a process of the pool, and of this module alone: who asks for it is handed it


def _keep(shared: object) -> None:
    global _kept
    _kept = shared


def _call(function: Callable, item: object) -> Any:
    return function(_kept, item)


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """`-j`, how many processes."""
    parser.add_argument(
        "-j",
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; about one for each CPU core it may use",
    )


def keep_settings(path: Path, settings: dict, output: str) -> None:
    """Note the settings of what fills a folder with `output`; ValueError if it was begun with others."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path.parent} was begun with {name} {before.get(name)!r}, not {value!r}: choose another folder"
                )
    elif any(path.parent.glob(output)):
        raise ValueError(f"{path.parent} is not empty and not begun by this command: choose another folder")
    else:
        write_json(path, settings)
