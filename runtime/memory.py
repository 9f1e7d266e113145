"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# Of mallopt (malloc.h). The largest int is the most that may lie free at the end of the heap, 2 GiB.
TRIM_THRESHOLD, MMAP_MAX, MOST = -1, -4, 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for what is allocated next, and say whether it does.

    By itself it takes every large block from the kernel and gives it back, so that each tensor of each step is new
    memory, page by page filled with zeros: 910,000 faults in a step of SLIP_VITS16 at batch 16. Whoever has told malloc
    what to do, by its variables in the environment, is left alone; so are other C libraries.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    with suppress(OSError, ValueError):  # another C library need not know the name
        if os.confstr("CS_GNU_LIBC_VERSION"):
            mallopt = ctypes.CDLL(None).mallopt
            return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, MOST))
    return False
