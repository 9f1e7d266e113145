"""What a file of weights of our kinds holds: checkpoints and exports of ours, SLIP's files, MedCLIP's weights."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from torch import Tensor

import utils
from runtime.checkpoints import load_checkpoint, refuse_finetuned, refuse_not_finite, take_average
from runtime.integrity import check_sums

RUN_WEIGHTS = ("checkpoint_best.pt", "checkpoint.pt")
SAFETENSORS_FORMAT = "medslip 1"  # of config.json beside model.safetensors, which export.py writes
PREPROCESS = "preprocess.json"  # beside what other libraries read: Preprocess.to_dict()


def is_medclip_state(state: dict) -> bool:
    """Whether tensors bear the names that MedCLIP gives them."""
    return "text_model.projection_head.weight" in state


def read_pretrained(path: str | Path) -> dict:
    """The contents of a checkpoint of ours, a published SLIP file, or MedCLIP's weights (folder, zip or .bin).

    Raises:
        FileNotFoundError, ValueError: nothing there; unreadable; a fine-tuned classifier.
    """
    path = Path(path)
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _read_exported(path)
    if path.is_dir() or path.suffix == ".zip":
        _refuse_run(path)
        from towers import medclip

        return medclip.read_weights(path)
    state = load_checkpoint(path)
    refuse_finetuned(state, path)
    state = take_average(state, path)
    bare = state and all(isinstance(value, Tensor) for value in state.values()) and not is_medclip_state(state)
    if bare and not any("visual." in key for key in state):
        raise ValueError(
            f"{path} holds weights by themselves, called {', '.join(list(state)[:3])} and so on, of no model of this "
            "project: an image tower of timm starts a training by --vision-tower NAME --vision-weights FILE, and goes "
            "elsewhere by timm:NAME or as a folder with its config.json"
        )
    return {"state_dict": state} if bare else state


def _refuse_run(folder: Path) -> None:
    """ValueError for a folder of a run in place of its weights, FileNotFoundError for an empty one."""
    if folder.is_dir() and (found := [name for name in RUN_WEIGHTS if (folder / name).is_file()]):
        raise ValueError(f"{folder} is the folder of a run: name its weights, {folder / found[0]}")
    if folder.is_dir() and not any(folder.iterdir()):
        raise FileNotFoundError(f"{folder} is an empty folder: no weights are there")


def _read_exported(folder: Path) -> dict:
    """A folder that export.py wrote, as the checkpoint it came from."""
    utils.refuse_lfs_pointer(folder / "model.safetensors")
    try:
        for name in ("config.json", "model.safetensors"):
            check_sums(folder / name)
        about = json.loads((folder / "config.json").read_text(encoding="utf8"))
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        weights = {name: value.clone() for name, value in stored.items()}  # that is the file itself, as it changes
    except Exception as error:  # SafetensorError has no public base
        raise ValueError(f"{folder} is not a readable export: {error}") from error
    if not isinstance(about, dict) or about.get("format") != SAFETENSORS_FORMAT:
        raise ValueError(f"{folder} is no folder of export.py --to safetensors: config.json does not say its format")
    refuse_not_finite(weights, folder)
    return {**about, "state_dict": weights}
