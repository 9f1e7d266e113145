"""Small runs of the scripts, and what tests compare of them."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime import checkpoints

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
TINY = [
    "--image-size",
    "32",
    "--ssl-mlp-dim",
    "32",
    "--ssl-emb-dim",
    "16",
    "--context-length",
    "24",
    "--override",
    "vision.patch_size=8",
    "vision.embed_dim=32",
    "vision.depth=2",
    "vision.num_heads=2",
    "text_width=32",
    "text_layers=1",
    "text_heads=2",
    "embed_dim=16",
]
DROPOUT = ["vision.proj_drop_rate=0.1", "vision.drop_path_rate=0.1"]  # makes every step draw random numbers


def command(roco, output_dir, *extra, model="SLIP_VITT16"):
    return [
        "--dataset",
        "roco",
        "--root",
        str(roco),
        "--model",
        model,
        "--output-dir",
        str(output_dir),
        "-j",
        "0",
        "--batch-size",
        "8",
        "--epochs",
        "2",
        "--lr",
        "1e-3",
        "--print-freq",
        "1",
        *TINY,
        *extra,
    ]


def weights(output_dir):
    return checkpoints.load_checkpoint(Path(output_dir) / "checkpoint.pt")["state_dict"]


def assert_same_run(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def slow(*values) -> list:
    """Values of a parameter that are tried with the slow tests, where others stand for them in the fast ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def stop_after(function):
    def wrapped(*args):
        function(*args)
        raise KeyboardInterrupt

    return wrapped


def signal_after(function, calls: int, number: int):
    """The function, and after so many calls a signal to this process."""
    made = []

    def calling(*args):
        found = function(*args)
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), number)
        return found

    return calling


def environment(**extra) -> dict[str, str]:
    """This process's, with one thread for each rank as in the tests' own processes, and no launcher's variables."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | extra


def wait_for(condition, seconds: float, what: str, every: float = 0.02):
    """What `condition()` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{seconds} s without {what}"
        time.sleep(every)
    return value


QUICK = ("-j", "0", "--gpu", "-1")


def load_script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # where a dataclass looks for its own module
    spec.loader.exec_module(module)
    return module
