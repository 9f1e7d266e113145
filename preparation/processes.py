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
    """A `map` over this many processes, in each of which `_shared` is the given object; one works in this process.

    A process takes `chunk` items at a time.
    """
    if workers < 2:
        _share(shared)
        yield map
        return
    # Forked where the system can: a reader of many million rows is then inherited, not sent.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), _share, (shared,)) as pool:
        yield partial(pool.map, chunksize=chunk)


_shared: Any = None


def _share(shared: object) -> None:
    global _shared
    _shared = shared


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
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
