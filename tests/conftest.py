"""Flat scripts are imported by name; helpers of the tests too. Tests use one or two threads and no network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402

# Forked ranks inherit the parent's OpenMP state: with a single thread there is no pool that a child could hang on.
torch.set_num_threads(1)
