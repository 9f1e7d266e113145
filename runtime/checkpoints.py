"""Checkpoints: written whole, read without running what they may hold, found again where a run goes on."""

from __future__ import annotations

import argparse
import logging
import math
import os
import pathlib
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from runtime.integrity import check_archive
from utils import atomic_write

log = logging.getLogger("medslip")


class _Float64:
    """For numpy.dtype in a checkpoint: double precision and nothing else."""

    def __init__(self, code: str, *flags: bool):
        if code != "f8":
            raise ValueError(f"a numpy number of type {code!r}")
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "="):
            raise ValueError(f"a numpy number of byte order {state[1]!r}")
        self.order = state[1]


def _scalar(dtype: _Float64, data: bytes) -> float:
    return struct.unpack(f"{dtype.order}d", data)[0]


# What the published SLIP checkpoints hold beside tensors and plain values. SLIP's own training left its learning rate
# as a numpy.float64, whose module has another name from numpy 2 on; it becomes a plain number.
_PUBLISHED_TYPES: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (_Float64, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write tensors and plain values so that a kill at any moment leaves either the old file or the new one."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """Read a checkpoint of ours or a published SLIP file onto the CPU without running any code it might carry.

    Args:
        mmap: map tensors into memory instead of reading them, where only the plain values are of interest.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: torn, damaged, foreign, or holding types other than tensors and plain values (named in the
            message), or NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    utils.refuse_lfs_pointer(path)
    # Of a mapped file no more than the plain values is read here, and no more is looked at.
    check_archive(path, (lambda name: "/data/" not in name) if mmap else (lambda name: True))
    try:
        with torch.serialization.safe_globals(_PUBLISHED_TYPES):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the restricted unpickler raises any kind on bytes that are no checkpoint
        why = _why_unreadable(path, error)
        raise ValueError(f"{path} is not a readable checkpoint: {why}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    if not mmap:
        refuse_not_finite({key: value for key, value in state.items() if key != "optimizer"}, path)
    return state


def is_finetuned(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of run_class_finetuning.py."""
    return isinstance(state.get("settings"), dict) and "data_set" in state["settings"]


def refuse_finetuned(state: Mapping[str, Any], path: str | Path) -> None:
    """ValueError for a checkpoint of run_class_finetuning.py where a pre-trained model is wanted: what takes it."""
    if not is_finetuned(state):
        return
    args = state.get("args")
    start = args.get("finetune") if isinstance(args, dict) else ""
    raise ValueError(
        f"{path} is a fine-tuned classifier and no pre-trained model: `python predict.py classify {Path(path).parent} "
        "IMAGES` answers with it" + (f"; it was fine-tuned from {start}, which is one" if start else "")
    )


def take_average(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A training checkpoint, as `state_dict` the moving average of its weights where it holds one; the log says so.

    Raises ValueError as `find_average`.
    """
    name, weights = find_average(state, path)
    if not weights:
        return state
    log.info(f"{path} holds weights and their moving average: the average, {name}, is taken")
    return {**state, "state_dict": weights}


def find_average(state: Mapping[Any, Any], path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The moving average of a training checkpoint's weights and the key that holds it; ("", {}) where there is none.

    Trainers call it model_ema, ema_state_dict or the like, and put the weights there or one key deeper, beside a decay
    or a count. timm's names come first, in the order of its own loader (timm.models.load_state_dict).

    Raises:
        ValueError: tensors under such a key in another form: the weights beside them may not be those that were meant.
    """
    named = [name for name, value in state.items() if "ema" in re.split("[^a-z]+", str(name).lower()) and
             not isinstance(value, Tensor) and _holds_tensors(value)]  # fmt: skip
    if not named:
        return "", {}
    name = next((name for name in ("state_dict_ema", "model_ema") if name in named), named[0])
    value = state[name]
    if isinstance(value, dict):
        value = next((value[key] for key in _WEIGHTS if isinstance(value.get(key), dict)), value)
        weights = {key: tensor for key, tensor in value.items() if key != "n_averaged"}  # of torch's AveragedModel
        if weights and all(isinstance(tensor, Tensor) for tensor in weights.values()):
            return name, weights
    held = f"it holds {', '.join(map(str, list(value)[:5]))}" if isinstance(value, dict) else type(value).__name__
    raise ValueError(
        f"{path} holds tensors under {name!r}, which look like a moving average of its weights, in a form that is not "
        f"known ({held}): write a file with the weights that you mean alone"
    )


_WEIGHTS = ("module", "state_dict", "model", "model_state_dict")  # what trainers call the weights in an average's entry


def _holds_tensors(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or any(map(_holds_tensors, parts))


def refuse_not_finite(weights: Mapping[Any, Any], source: str | Path) -> None:
    """ValueError naming a tensor, also in dictionaries within, that holds NaN or infinity.

    With one NaN a network answers the same of every image. A mask, of attention, may hold minus infinity.
    """
    for name, value in weights.items():
        if isinstance(value, dict):
            refuse_not_finite(value, source)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            continue
        low, high = (value if value.element_size() > 1 else value.float()).aminmax()  # keeps NaN; one pass, no copy
        if math.isnan(low) or (math.inf in (high, -low) and not str(name).endswith("mask")):
            raise ValueError(f"{source} is of no use: {name} holds {'NaN' if math.isnan(low) else 'infinity'}")


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is, as far as its first bytes tell, or the refused type without torch's advice to trust it."""
    with open(path, "rb") as file:
        start = file.read(512)
    kinds = {
        b"\xff\xd8\xff": "a JPEG image",
        b"\x89PNG": "a PNG image",
        b"\x1f\x8b": "a gzip archive",
        b"%PDF": "a PDF",
    }
    if not start:
        return "the file is empty"
    for mark, kind in kinds.items():
        if start.startswith(mark):
            return f"it is {kind}"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "its end is missing, as where a copy or a download was cut off: copy it again"
    if start.lstrip()[:1] in (b"{", b"<") or _is_text(start):
        return f"it is text that begins {start.lstrip()[:40]!r}, perhaps a failed download"
    if named := re.search(r"(?:GLOBAL|type|global) (\S+) (?:was not|is not|that)", str(error)):
        return f"it holds {named[1]}, which is neither a tensor nor a plain value and would be code to run"
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_text(start: bytes) -> bool:
    try:
        return start.decode("utf8", "strict" if len(start) < 512 else "ignore").replace("\n", "").isprintable()
    except UnicodeDecodeError:
        return False


def training_progress(state: dict, path: str | Path) -> dict[str, Any]:
    """How far a checkpoint's weights were trained and whether their run was finished; {} where it does not say."""
    args = state.get("args")
    epochs = args.get("epochs") if isinstance(args, dict) else None
    if "step_in_epoch" not in state or not epochs:
        return {}
    progress = {"epoch": state["epoch"], "epochs": epochs, "finished": not unfinished(state, path)}
    return progress | ({"step": state["step"]} if "step" in state else {})


def unfinished(state: dict, path: str | Path) -> str:
    """What to say of a training checkpoint whose run has not reached its end; "" for one that has, or is no run's.

    The best checkpoint of a run is of an earlier epoch; whether the run was finished says the newest one beside it.
    """
    path = Path(path)
    newest = path.with_name("checkpoint.pt")
    if path.name == "checkpoint_best.pt" and newest.is_file():
        with suppress(ValueError):
            state = load_checkpoint(newest, mmap=True)
    args = state.get("args")
    epochs = args.get("epochs") if isinstance(args, dict) else None
    if "step_in_epoch" not in state or not epochs or state["epoch"] >= epochs:
        return ""
    step = f", step {state['step']} of {state['steps_per_epoch'] * epochs}" if "steps_per_epoch" in state else ""
    return f"unfinished: epoch {state['epoch']} of {epochs}{step}"


def strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without what DistributedDataParallel, torch.compile and Lightning put before them."""
    out = {}
    for key, value in state_dict.items():
        key = key.replace("_orig_mod.", "")  # also inside, where towers were compiled one by one
        while key.startswith("module."):
            key = key.removeprefix("module.")
        out[key] = value
    if out and all(key.startswith("model.") for key in out):  # Lightning's module holds the model
        out = {key.removeprefix("model."): value for key, value in out.items()}
    return out


@dataclass(frozen=True)
class RunFiles:
    """What a run calls its checkpoints."""

    numbered: str = "checkpoint_step"  # and the updates so far: of these the newest few are kept
    newest: str = "checkpoint.pt"  # another name of the newest
    best: str = "checkpoint_best.pt"

    @property
    def prefix(self) -> str:
        """What all of them begin with, `checkpoint`."""
        return os.path.commonprefix([self.numbered, self.newest, self.best])

    def found(self, output_dir: Path) -> list[Path]:
        """The numbered ones of a run, newest first."""
        every = output_dir.glob(f"{self.numbered}*.pt")
        pattern = re.compile(rf"{self.numbered}\d+\.pt")
        return sorted((path for path in every if pattern.fullmatch(path.name)), reverse=True)


TRAINING = RunFiles()


def save_training_checkpoint(
    state: dict, output_dir: Path, step: int, is_best: bool, keep_last: int, files: RunFiles = TRAINING
) -> None:
    """Write the run's state after `step` updates and drop all but the newest `keep_last` such files."""
    for torn in output_dir.glob(f".{files.prefix}*.tmp"):  # left by a kill in the middle of a write
        torn.unlink()
    # The best first: a kill after it repeats the epoch, which makes the same one again.
    names = [files.best] * is_best + [f"{files.numbered}{step:08d}.pt", files.newest]
    path = output_dir / names[0]
    save_checkpoint(state, path)
    for name in names[1:]:
        link = output_dir / f".{name}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, output_dir / name)
    for old in files.found(output_dir)[keep_last:]:
        old.unlink()


def refuse_full_disk(output_dir: Path, parameters: Iterable[Tensor], kept: int, files: RunFiles = TRAINING) -> None:
    """OSError where not even one checkpoint of a run fits; a warning where `kept`, the best and one in writing do not.

    Each holds the weights and the optimizer's two averages of those that learn; of the others a second copy lies beside
    adapters. Those that the run has already are taken off.
    """
    there = {status.st_ino: status.st_size for status in map(os.stat, output_dir.glob(f"{files.prefix}*.pt"))}
    each = checkpoint_bytes(parameters)
    free = utils.refuse_full(output_dir, each, "a checkpoint's weights and averages")
    needed = (kept + 2) * each - sum(there.values())
    if needed > free:
        log.warning(
            f"{output_dir} has {free / 1e9:.1f} GB free; up to {kept + 2} checkpoints will be there, which take "
            f"{needed / 1e9:.1f} GB more (--keep-last)"
        )


def checkpoint_bytes(parameters: Iterable[Tensor]) -> int:
    """Of one checkpoint: the weights, and the optimizer's two averages of those that learn or a second copy."""
    return 4 * sum((3 if parameter.requires_grad else 2) * parameter.numel() for parameter in parameters)


def find_training_checkpoint(
    output_dir: Path, notify: Callable[[str], object] = log.info, files: RunFiles = TRAINING
) -> dict | None:
    """The newest readable checkpoint of a run, or None where the run has none.

    A torn file is reported by name and the one before it used.

    Raises:
        ValueError: there are checkpoints and none can be read: a fresh start would overwrite them.
    """
    newest = output_dir / files.newest
    candidates = files.found(output_dir)
    for path in candidates or [p for p in [newest] if p.exists()]:
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            notify(f"warning: {error}")
            continue
        notify(f"resuming from {path}")
        return state
    if candidates or newest.exists():
        raise ValueError(f"no checkpoint in {output_dir} can be read; move them away to start afresh")
    return None


def differences(theirs: dict, ours: dict) -> list[str]:
    """What the settings of two runs do not share. What a checkpoint does not record is taken to agree."""
    theirs = {**ours, **theirs}
    return [f"{k}: {theirs[k]!r} there, {ours.get(k)!r} now" for k in sorted(theirs) if theirs[k] != ours.get(k)]


# ---------------------------------------------------------------------------------------------------------------------
# Settings of earlier versions
# ---------------------------------------------------------------------------------------------------------------------

# Settings of a training that came later, and what a run did before there was one.
ADDED_LATER = {
    "mask_duplicates": False, "hold_batchnorm": False, "lora": 0, "held out by": "", "sentences": False,
    "study_views": False, "shared_view": False, "patch_dropout": 0.0,
}  # fmt: skip


def upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """A training's settings as this version would have recorded them."""
    return _precision_for_disable_amp({**ADDED_LATER, **settings})


def _precision_for_disable_amp(settings: dict[str, Any]) -> dict[str, Any]:
    """Until --precision came, --disable-amp was the only choice."""
    settings = dict(settings)
    off = settings.pop("disable_amp", None)
    return settings if off is None else {**settings, "precision": "fp32" if off else "auto"}
