"""One folder, one run: a second command that would write into a run's folder is refused while the first one lives.

A command of another kind has a folder of its own in it, also afterwards.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import distributed
import utils

log = logging.getLogger("medslip")
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # in the folder, while a run is in it; it holds who that is
BEAT = 5.0  # s between two signs of life, where the file system has no locks


SETTINGS = "settings.json"
# Kinds of commands that write SETTINGS, and a flag by which it is known whose it is.
KINDS = {"training": "ssl_scale", "linear": "cache_features", "finetuned": "finetune"}


PATHS = (
    "root", "metadata", "cache_dir", "output_dir", "catalog", "resume", "init", "medclip_weights", "bert_vocab",
    "vision_weights", "text_weights", "pretrained", "finetune", "data_path", "eval_data_path", "baseline",
)  # fmt: skip


def stored_args(args: argparse.Namespace) -> dict:
    """Flags as a run's files keep them: what names a file or a folder that is there, from the root of the system."""

    def absolute(value: object) -> object:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return os.path.abspath(value) if isinstance(value, str) and value and os.path.exists(value) else value

    return {name: absolute(value) if name in PATHS else value for name, value in vars(args).items()}


class FolderInUse(ValueError):
    """Another run writes into the folder."""


def own_folder(args: argparse.Namespace, kind: str) -> None:
    """Point `args.output_dir` at the folder `kind` in it where another kind of command has written its settings there.

    All of them have ./ by default, and what they call settings.json and log.jsonl would be overwritten or mixed.

    Args:
        kind: one of KINDS.

    Raises:
        ValueError: a settings.json that is not JSON; the folder in the folder is another's too.
    """
    given = Path(args.output_dir)
    if not (theirs := _not_ours(given, kind)):
        return
    if _not_ours(own := given / kind, kind):
        raise ValueError(f"{given} and {own} hold the runs of other commands: choose another --output-dir")
    log.info(f"{given} holds {theirs}, which stays as it is: this run is in {own}")
    args.output_dir = str(own)


def _not_ours(folder: Path, kind: str) -> str:
    """Whose SETTINGS a folder holds, for people; "" where there is none or it is of `kind`."""
    if not (file := folder / SETTINGS).is_file():
        return ""
    args = utils.read_json(file).get("args")
    found = [name for name, flag in KINDS.items() if isinstance(args, dict) and flag in args]
    return "" if kind in found else f"a run of another command ({', '.join(found) or f'whose {SETTINGS} is not ours'})"


@contextmanager
def one_run(folder: str | Path, processes: distributed.Processes | None = None) -> Iterator[None]:
    """Inside the block the folder is this run's alone; it is made where it is not there.

    The main process holds the lock, and all know whether it has it. The system frees the lock of a process that dies,
    on another machine too. On file systems without locks the holder touches the file every BEAT seconds, and who finds
    it watches for three of them whether somebody does.

    Raises:
        FolderInUse: on all processes, naming host, process and command of the run that is there. Nothing is written.
    """
    processes = processes or distributed.Processes()
    lock, error = None, None
    if processes.is_main:
        try:
            lock = _Lock(Path(folder))
        except (FolderInUse, OSError) as reason:
            error = reason
    error = distributed.gather_objects(processes, error)[0]
    if error is not None:
        distributed.leave_distributed(processes)
        raise error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def in_use(folder: str | Path) -> str:
    """Who else writes into the folder now, for people; "" where nobody does."""
    try:
        _Lock(Path(folder)).release()
    except FolderInUse as error:
        return str(error)
    return ""


_held: dict[Path, int] = {}  # the files that this process holds, and by which descriptors


def _close_in_child() -> None:
    """Loader processes outlive a main process that is killed, for seconds: the lock must not live on in them."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_in_child)


class _Lock:
    """A folder's lock from here to `release`. A command that calls another's main asks twice and has it once."""

    def __init__(self, folder: Path):
        self.made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.resolve() / LOCK
        self.first = self.path not in _held
        self.ended = threading.Event()
        if self.first:
            _held[self.path] = self._take()

    def release(self) -> None:
        """Free the folder; the file goes, and with it a folder that was made for it and into which nothing came."""
        self.ended.set()
        if self.first and self.path in _held:  # not in a process that was forked meanwhile
            with suppress(OSError):
                self.path.unlink()
            os.close(_held.pop(self.path))
            if self.made:
                with suppress(OSError):
                    self.path.parent.rmdir()

    def _take(self) -> int:
        """The descriptor of the file, signed; FolderInUse where another process has it."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(self.path, flags, 0o666)
            try:
                locks = _lock(descriptor)
                if not locks:
                    self._watch()
                # Whoever had it may have removed the file between the two calls: then the lock is on nothing.
                if self.path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._sign(descriptor, 0)
                    if not locks:
                        threading.Thread(target=self._beat, daemon=True).start()
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise FolderInUse(self._in_use()) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _sign(self, descriptor: int, beat: int) -> None:
        holder = {
            "command": shlex.join(sys.argv)[:300], "process": os.getpid(), "host": socket.gethostname(),
            "since": f"{datetime.now():%Y-%m-%d %H:%M}", "beat": beat,
        }  # fmt: skip
        text = json.dumps(holder).encode().ljust(2048)
        os.pwrite(descriptor, text, 0)  # in one piece: who reads sees no half of it
        os.ftruncate(descriptor, len(text))  # a longer one was before
        os.fsync(descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self.ended.wait(BEAT):
            beat += 1
            with suppress(OSError, KeyError):
                self._sign(_held[self.path], beat)

    def _watch(self) -> None:
        """Return where the file is new, or nobody has signed it again for three beats."""
        found, end = self.path.read_bytes(), time.monotonic() + 3 * BEAT
        while found and time.monotonic() < end:
            time.sleep(BEAT / 5)
            if self.path.read_bytes() != found:
                raise FolderInUse(self._in_use())

    def _in_use(self) -> str:
        who = "another run"
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(self.path.read_bytes())
            who = "process {process} on {host}, since {since}: {command}".format(**holder)
        return f"{self.path.parent} is in use by {who}; wait for it, stop it, or choose another folder"


def _lock(descriptor: int) -> bool:
    """Whether the file system has locks and this one is ours now; BlockingIOError where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return False
    return True
