"""Run a function on several gloo processes; a failing rank fails the test with its traceback."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank, function, world, port, args):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        function(rank, world, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function, world: int, *args) -> None:
    """Call function(rank, world, *args) on `world` processes joined by gloo.

    Forked, so that a rank starts in milliseconds with torch loaded; one thread each, since a forked process must not
    use the parent's thread pool.
    """
    mp.start_processes(_entry, (function, world, free_port(), args), nprocs=world, start_method="fork")
