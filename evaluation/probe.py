"""What the evaluations of one frozen tower share: the tower, its settings, kept features, and the head that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import utils
from evaluation.features import Backbone, Loading, extract_or_reuse, load_backbone
from evaluation.heads import Linear, load_heads, save_heads
from evaluation.resamples import BOOTSTRAP, Bootstrap
from evaluation.run_folder import places_of


@dataclass(frozen=True)
class Probe:
    """A frozen tower, and how it is evaluated on a labelled set, whichever that is."""

    dataset: str  # its name
    backbone: Backbone
    loading: Loading
    output_dir: Path
    settings: dict[str, Any]  # what determines the predictions; results of others are set aside
    weights: dict[str, Any]  # what results.json says of the weights: the file, and how far they were trained
    baselines: Sequence[str] = ()  # other runs' predictions.csv
    bootstrap: Bootstrap = BOOTSTRAP

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.loading.processes.is_main

    def features(self, images: Dataset, title: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, d) and the numbers (n,) of their images, extracted once for all runs in the folder."""
        return extract_or_reuse(self.backbone, images, title, self.loading, self.output_dir / "features")

    def described(self) -> dict[str, Any]:
        """How results.json begins, whatever was evaluated."""
        return {
            "model": self.backbone.name,
            "dataset": self.dataset,
            "features": self.backbone.features,
            "settings": self.settings,
            "weights": self.weights,
        }

    def keep_heads(
        self, heads: Sequence[Linear], features: np.ndarray | None, classes: Sequence[str] | None, **about: Any
    ) -> None:
        """head.safetensors: the layer, of several findings one each, and in its header what using it takes.

        Args:
            features: of the training images (n, d), for the distance of new ones from them; None where there is none.
            classes: in the order of the layer's columns; None for findings.
            about: what else belongs in the header: operating_point, the name of the view, findings, greys.
        """
        if not heads or not self.is_main:  # no finding has two images of either outcome
            return
        first = heads[0] if features is None else heads[0].knowing(features)
        described = {
            "classes": classes and list(classes),
            "features": self.backbone.features,
            "preprocess": self.backbone.preprocess.to_dict(),
            "weights_sha256": self.settings["weights_sha256"],
            "tower": self.backbone.source,
            "operating_point": None,
            "precision": self.loading.processes.precision,
            **about,
        }
        save_heads(self.output_dir / "head.safetensors", [first, *heads[1:]], described)


@dataclass(frozen=True)
class FittedProbe:
    """A probe as a run left it."""

    heads: list[Linear]
    about: dict[str, Any]  # what `Probe.keep_heads` wrote of it
    backbone: Backbone


def fitted_probe(folder: Path, weights: str = "", device: torch.device | str = "cpu") -> FittedProbe:
    """The head of a run of main_linear.py and the tower that it was fitted on, from their files alone.

    Args:
        weights: where the tower's weights are now, if they were moved.

    Raises:
        FileNotFoundError, ValueError: no head or weights there; other weights than the head was fitted on.
    """
    heads, about = load_heads(folder / "head.safetensors")
    source = {**(about.get("tower") or _tower_of_flags(folder))}
    size, stored = about["preprocess"]["size"], source["pretrained"]
    places = [weights] if weights else places_of(stored, folder)
    if not places:
        raise FileNotFoundError(
            f"{stored}, the weights that {folder} was fitted on, are not there, nor where they lay from it: name them "
            "by --weights"
        )
    for place in places:
        source["pretrained"] = place
        backbone = load_backbone(**source, features=about["features"], size=size, device=device)
        if backbone.fingerprint() == about["weights_sha256"]:
            return FittedProbe(heads, about, backbone)
    raise ValueError(
        f"{' and '.join(places)} are not the weights that {folder} was fitted on" + ("" if weights else ": --weights")
    )


def _tower_of_flags(folder: Path) -> dict[str, Any]:
    """Where the tower of an earlier run came from, whose head does not say it: from the run's flags."""
    args = utils.read_json(folder / "settings.json").get("args")
    names = ("pretrained", "model", "arch", "untrained", "seed")
    if not isinstance(args, dict) or set(names) - set(args):
        raise ValueError(f"{folder / 'settings.json'} is not of a probe: its args lack one of {', '.join(names)}")
    return {name: args[name] for name in names}


@dataclass(frozen=True)
class Fitting:
    """How a probe's layer is fitted, and what chooses its setting."""

    protocol: str = "logistic"  # of probes.PROTOCOLS
    class_weights: str = "none"  # of probes.CLASS_WEIGHTS
    folds: int = 0  # over all training groups, in place of one validation split; 0 for that
    seed: int = 0


@dataclass(frozen=True)
class Fractions:
    """Which fractions of the labels a probe is fitted on as well."""

    wanted: Sequence[float] = ()
    draws: int = 3  # of each fraction

    def __post_init__(self) -> None:
        for fraction in self.wanted:
            if not 0 < fraction <= 1:
                raise ValueError(f"--fraction {fraction}: a fraction of the training set is above 0 and at most 1")
