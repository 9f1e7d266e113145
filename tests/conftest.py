"""Tests use one thread a process and no network. pyproject.toml says where they import from."""

import os
import re
import shutil
import signal
from pathlib import Path

# Tests send these to what they start, where nohup has the one ignored, and a script's background job the other.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # `-n auto`: what a test starts shares the cores with the other workers' tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where memory is plenty it holds the tests' files, 5 GB at most: making and removing folders on a disk took a third of
# the time.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 8 << 30:
    available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if available and int(available[1]) > 16 << 20:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import torch  # noqa: E402

from runtime import memory  # noqa: E402

# Workers of many tests would each keep up to 2 GiB; what a test starts as a process keeps its memory as users' do.
memory.keep_freed_memory = lambda: False

# Forked ranks inherit the parent's OpenMP state: with a single thread there is no pool that a child could hang on.
torch.set_num_threads(1)
