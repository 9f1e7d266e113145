"""What training shares: compilation, files written whole, the schedule, parameter groups, random states.

Every command shares what a name becomes in a file's name and in the cell of a CSV.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import distributed

log = logging.getLogger("medslip")


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def compilation_pays(device: torch.device) -> bool:
    """Whether torch.compile is worth its start: on GPUs that Triton supports, where it and a C compiler are there."""
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, compilers))
    )


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the CPU with the threads that compute on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.get_num_threads()} threads)"


def compile_towers(model: nn.Module, **options) -> None:
    """Have torch compile the towers at their first call, in place: parameters keep their names.

    Where a transformer's blocks are alike they are compiled once for all of them, which starts much sooner than the
    whole tower; a tower whose blocks differ, a Swin or a ResNet, is compiled as a whole.

    Args:
        options: of torch.compile.
    """
    for tower in filter(None, (getattr(model, name, None) for name in ("visual", "transformer", "bert"))):
        blocks = [m for m in tower.modules() if type(m).__name__ in distributed.TRANSFORMER_BLOCKS]
        alike = len({str(block) for block in blocks}) == 1  # the text holds shapes and drop rates
        for module in blocks if alike else [tower]:
            module.compile(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def atomic_write(path: str | Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file, then rename it to `path`: readers see the old file or the whole new one.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as file:
        write(file)


@contextmanager
def replacing(path: str | Path) -> Iterator[WrittenFile]:
    """A temporary file, open for writing and reading, that is `path` once the block has ended without an error.

    Its name cannot be foretold and no link is followed; the mode of the file that was there is kept. What a process
    that died has left in the folder is removed.

    Raises:
        OSError: naming `path`, and the full disk where that is why; the file that was there stays intact.
    """
    path = Path(path)
    _remove_left_over(path.parent)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    file = None
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        file = WrittenFile(io.FileIO(os.open(temporary, flags, 0o666), "r+"))
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a file system without modes
                os.chmod(temporary, os.stat(path).st_mode & 0o777)
        _lock(file.fileno())
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError of its own words
        why = file.failed if file is not None and file.failed is not None else error
        full = isinstance(why, OSError) and why.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space is left on its disk" if full else why
        raise OSError(f"could not write {path}: {reason}; what was there before is intact") from error
    finally:
        if file is not None:  # else it is another's
            temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself reaches the disk
    finally:
        os.close(directory)


class WrittenFile(io.BufferedRandom):
    """A file that remembers why a write failed: torch's writer answers with words of its own."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        """As that of any file."""
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # what `replacing` calls its file
_looked_in: set[Path] = set()  # folders, once a process: one may hold a million files


def _lock(descriptor: int) -> bool:
    """Hold a file until it is closed; False where another process holds it or the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):
        return False


def _remove_left_over(folder: Path) -> None:
    """Remove temporary files that no process holds any more."""
    if folder in _looked_in:
        return
    _looked_in.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            # Of one made a moment ago the lock may be on its way.
            if time.time() - entry.stat().st_mtime < 60:
                continue
            with suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if _lock(descriptor):
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)


def refuse_full(folder: str | Path, needed: int, what: str) -> int:
    """The bytes that are free for `folder`, which need not be there yet.

    Raises:
        OSError: there are fewer than `needed`, which `what` says of what.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free; {what} take {needed / 1e9:.1f} GB")
    return free


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all; what JSON cannot hold becomes text."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def lfs_pointer(data: bytes) -> str:
    """What to say of a file's first bytes where they are those of a pointer of Git LFS; "" for any other file."""
    return _LFS_POINTER if data.startswith(b"version https://git-lfs.github.com/spec/") else ""


_LFS_POINTER = "it is a Git LFS pointer in place of the file: `git lfs pull` in its folder brings the file"


def refuse_lfs_pointer(path: str | Path) -> None:
    """ValueError where a file is a pointer that a clone without Git LFS has left in its place; an absent one passes."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            if pointer := lfs_pointer(file.read(64)):
                raise ValueError(f"{path} cannot be read: {pointer}")


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's JSON object; a ValueError names one that holds none."""
    refuse_lfs_pointer(path)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Notepad writes a byte-order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object with keys")
    return found


_FILE_NAME = re.compile(r"\w(?:[\w .,+()=@-]*[\w+)])?")  # letters of any script


def file_name(name: str) -> str:
    """A name out of a file as one part of a path: it leaves no folder, and no other name becomes the same.

    What is a file's name already stays as it is. In any other what cannot stand there becomes `_`, and `~` with a hash
    follows, by which `a/b` is neither `a_b` nor `A/B`: no name that stays as it is holds a `~`.
    """
    if _FILE_NAME.fullmatch(name) and len(name.encode()) <= 150:  # of 255 bytes; callers put words around it
        return name
    digest = hashlib.sha256(name.encode("utf8", "surrogatepass")).hexdigest()[:16]
    return re.sub(r"[^A-Za-z0-9+-]+", "_", name)[:40] + "~" + digest


# What makes a spreadsheet run a cell as a formula (OWASP, CSV injection), behind any quotation marks of our own; the
# sign of a number does not.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines of cells as CSV that people may open in a spreadsheet: a text that it would run as a formula begins with '.

    Numbers stay numbers, -1 too, and None is an empty cell. `csv_value` gives back the very text.
    """
    found = []
    for cells in lines:
        line = io.StringIO(newline="")
        # This end of a line makes the writer quote either of its signs in a cell; a bare \r would end the row.
        csv.writer(line, lineterminator="\r\n").writerow("" if cell is None else _csv_cell(str(cell)) for cell in cells)
        found.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(found)


def _csv_cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def csv_value(cell: str) -> str:
    """The text of which `csv_text` made a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of weights, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and parameter groups
# ---------------------------------------------------------------------------------------------------------------------


def cosine_lr(step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0) -> float:
    """Value at `step` of a linear warm-up from `start` to `base` over `warmup` steps, then half a cosine to `final`.

    Defined for every step: 0 before the first, `final` kept after the last (Loshchilov and Hutter 2017, equation 5,
    without restarts).
    """
    if step < warmup:
        return start + (base - start) * max(step, 0) / max(warmup - 1, 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
) -> np.ndarray:
    """The whole schedule as an array of epochs * niter_per_ep values, as SLIP's users import it."""
    total, warmup = epochs * niter_per_ep, warmup_epochs * niter_per_ep
    return np.array([cosine_lr(i, total, base_value, final_value, warmup, start_warmup_value) for i in range(total)])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups: weights decay; vectors, scalars, biases and tables of biases do not.

    The split is that of the published SLIP models. Each group carries its `name` and its parameters' `names`.
    """
    members: dict[str, list] = {"decay": [], "no decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rsplit(".", 1)[-1] in ("bias", "relative_position_bias_table")
        title = "no decay" if parameter.ndim < 2 or is_bias else "decay"
        if distributed.is_sharded(model) and not distributed.is_split(parameter):
            title += ", whole"  # an optimizer cannot update sharded and whole parameters together
        members.setdefault(title, []).append((name, parameter))
    return [
        {
            "name": title,
            "names": [n for n, _ in group],
            "params": [p for _, p in group],
            "weight_decay": weight_decay if title.startswith("decay") else 0.0,
        }
        for title, group in members.items()
    ]


def describe_groups(groups: list[dict]) -> str:
    """The groups of `parameter_groups`, with their numbers of tensors and parameters, for people."""
    return "; ".join(
        f"{g['name']} {g['weight_decay']:g}: {len(g['params'])} tensors, "
        f"{sum(p.numel() for p in g['params']):,} parameters"
        for g in groups
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility
# ---------------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed every generator of this process: Python's, NumPy's and PyTorch's on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict:
    """Every generator that this process draws from, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """The reverse of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
