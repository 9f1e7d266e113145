"""What several benchmarks share: where they run, and how much memory a stretch of code takes.

Imported before the project's modules, since it is what finds them: a benchmark is run as a script of its own.
"""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # behind benchmarks/ itself

from runtime.checkpoints import save_checkpoint  # noqa: E402
from runtime.versions import versions  # noqa: E402


def choose_device(cpu: bool) -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() and not cpu else torch.device("cpu")


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of `x` from the same in float64."""
    return ((x.double() - exact).norm() / exact.norm()).item()


def describe(device: torch.device, runs: int, *peers: str) -> str:
    """Hardware, versions, those of peers that are installed, commit and number of runs, for the head of a table."""
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    found = versions()
    for name in peers:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return f"{where}; " + ", ".join(f"{k} {v}" for k, v in found.items()) + f"; {runs} runs, median"


def write_checkpoint(model: Any, tokenizer: Any, path: Path) -> None:
    """What load_pretrained and export.py read of a model."""
    save_checkpoint({
        "state_dict": model.state_dict(), "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(), "tokenizer": tokenizer.spec(),
    }, path)  # fmt: skip


def median(values: list[float]) -> float:
    """The middle value, of an even number the upper of the two in the middle."""
    return sorted(values)[len(values) // 2]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def memory_now(device: torch.device) -> int:
    """Bytes in use, from which peak_memory counts on: the allocator's on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use since memory_now was called."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")
