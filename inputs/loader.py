"""Loader processes: how many there are, how they end, and what is said when one of them dies or gets stuck.

PyTorch's DataLoader does the loading. What is added here:

- signals are left to the parent: Slurm, torchrun, `timeout` and a terminal send them to the whole group, and a worker
  that dies of one would take the run down before its checkpoint is written;
- a worker that dies for another reason is found out between two batches, never in the middle of a step;
- no batch is waited for without limit, and a full /dev/shm is named;
- an unreadable image comes back as the error that it is, without a worker's traceback around it.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import distributed
from inputs.images import UnreadableImage
from runtime.signals import signals_held_back

log = logging.getLogger("medslip")

POLL_SECONDS = 5  # between looks at the workers while a batch is waited for
LIMIT_SECONDS = 600  # that a batch may take
SHARED_MEMORY = "/dev/shm"


class LoaderFailed(RuntimeError):
    """The loader processes deliver no more: one has died, or all are stuck."""


def loader_processes(wanted: int, processes: distributed.Processes) -> int:
    """Loader processes of this process: together those of a node are never more than its cores."""
    most = distributed.cores() // distributed.processes_of_node(processes)
    if wanted > most:
        _say_fewer(wanted, most)
    return min(wanted, most)


@functools.cache  # once a run
def _say_fewer(wanted: int, most: int) -> None:
    log.info(f"{most} instead of {wanted} loader processes for each process: there are {distributed.cores()} cores")


class _Failure:
    """An error on its way from a worker to the training loop."""

    def __init__(self, error: Exception):
        self.error = error


class _Forwarding(Dataset):
    """The same samples; errors about data become values. Raised in a worker they would come with its traceback."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (UnreadableImage, OSError) as error:
            return _Failure(error)


class _Collate:
    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        return next((s for s in samples if isinstance(s, _Failure)), None) or self.collate(samples)


def make_loader(
    dataset: Any,
    *,
    workers: int,
    device: torch.device,
    batch_sampler: Sampler | None = None,
    batch_size: int = 1,
    collate: Callable[[list], Any] = torch.utils.data.default_collate,
    persistent: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """A DataLoader for `batches`, in the dataset's order or that of `batch_sampler`.

    Args:
        workers: loader processes, 0 to load in this one; `loader_processes` says how many make sense.
        persistent: keep the processes from one epoch to the next.
        generator: what seeds the workers; its own where starting a loader must leave other random numbers alone.
    """
    chunks: dict[str, Any] = (
        {"batch_sampler": batch_sampler} if batch_sampler is not None else {"batch_size": batch_size}
    )
    return DataLoader(
        _Forwarding(dataset),
        **chunks,
        collate_fn=_Collate(collate),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        # Forked workers share the reader's texts; from Python 3.14 on that has to be asked for.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        timeout=POLL_SECONDS if workers else 0,
        generator=generator,
    )


def batches(loader: DataLoader, limit: float = LIMIT_SECONDS) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        UnreadableImage, OSError: of a sample.
        LoaderFailed: a worker has died, or no batch came for `limit` seconds.
    """
    with signals_held_back():  # workers inherit that and never see them
        iterator: Any = iter(loader)
    _started.update(worker.pid for worker in getattr(iterator, "_workers", ()))
    # torch's handler raises wherever the main process stands when a worker ends, also in the middle of a step or of a
    # checkpoint. The iterator itself looks at its workers as well, between two batches, and that is soon enough.
    with suppress(ValueError):  # not in the main thread, where there is no such handler either
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        asked = time.monotonic()
        while True:
            try:
                batch = next(iterator)
                break
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two where a worker dies while it sends
                _still_hopeful(iterator, error, time.monotonic() - asked, limit)
        if isinstance(batch, _Failure):
            raise batch.error
        yield batch


def _still_hopeful(iterator: Any, error: Exception, waited: float, limit: float) -> None:
    """Return where the error only says that the next batch takes a while; else raise what is to be said."""
    workers = getattr(iterator, "_workers", ())
    dead = [f"{w.pid} {_ending(w.exitcode)}" for w in workers if not w.is_alive()]
    if dead:
        raise LoaderFailed(f"a loader process has died: {'; '.join(dead)}{_shared_memory()}") from error
    if not workers or "timed out" not in str(error):
        raise error
    if waited > limit or (waited > 2 * POLL_SECONDS and _shared_memory()):
        raise LoaderFailed(f"no batch came for {waited:.0f} s from {len(workers)} loader processes{_shared_memory()}")


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"with exit code {code}"
    why = {
        signal.SIGKILL: ", as the system does when memory is short: use fewer --workers",
        signal.SIGBUS: ", as happens when shared memory is full",
    }
    return f"by {signal.Signals(-code).name}{why.get(signal.Signals(-code), '')}"


def _shared_memory() -> str:
    """A remark where shared memory, through which batches come, is nearly used up."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return ""
    if usage.free > 2**20:
        return ""
    return (
        f"; shared memory is full: {SHARED_MEMORY} has {usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB left. "
        "Enlarge it (docker run --shm-size=8g), or load in the main process: --workers 0"
    )


_started: set[int] = set()


@atexit.register
def _end_workers() -> None:
    """Workers that are stuck in a read when everything else is done: they have nothing to lose, and ignore SIGTERM."""
    import multiprocessing

    for process in multiprocessing.active_children():
        if process.pid in _started and os.getpid() == process._parent_pid:  # type: ignore[attr-defined]
            process.kill()
