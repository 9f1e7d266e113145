"""The labelled sets that are fine-tuned on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation import downstream, predictions
from evaluation.catalog import cbis_root, entry_of, metric_of, read_catalog, with_selection
from inputs import cbis
from runtime.command_line import UsageError

log = logging.getLogger("medslip")


@dataclass
class Sets:
    """Labelled images without a transform: to train on, to choose on (None where there is no such split), to report."""

    train: downstream.Downstream
    val: downstream.Downstream | None
    test: downstream.Downstream
    metric: str  # one of metrics.SET_METRICS; CBIS-DDSM reports its own
    lesions: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # CBIS: rows of each split
    absent: dict[str, int] = field(default_factory=dict)  # CBIS: lesions without an image, where they are skipped

    @cached_property
    def unlearnt(self) -> list[int]:
        """Numbers of the classes that no training image has, which the log names when it is first asked."""
        return predictions.unlearnt_classes(self.classes, self.train.labels, "training split")

    @property
    def classes(self) -> list[str]:
        """Names in the order of the labels' numbers."""
        return self.train.classes


def open_sets(args: argparse.Namespace) -> Sets:
    """The set that the flags name; ValueError with the choices for an unknown one."""
    if args.data_set in cbis.CBIS_SETS:
        return open_lesions(args)
    if args.data_set == "image_folder":
        with_selection(args.data_set, {}, args.where)
        if not args.data_path or not args.eval_data_path:
            raise UsageError("--data_set image_folder needs --data_path and --eval_data_path")
        folders = Path(args.data_path), Path(args.eval_data_path)
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder of class folders")
        train, test = (downstream.image_folders(own, None, other=other) for own, other in (folders, folders[::-1]))
        downstream.name_missing_classes(args.data_set, {"training": train, "test": test})
        return Sets(train, None, test, "top1")
    aliases = {"IMNET": "imagenet", "CIFAR": "cifar100"}
    name: str = aliases.get(args.data_set) or args.data_set
    catalog = read_catalog(args.catalog)
    entry = entry_of(name, catalog)
    if args.data_path:
        catalog[name] = {**entry, "path": args.data_path}
    catalog[name] = with_selection(name, catalog[name], args.where)
    train, test = downstream.open_splits(name, catalog)
    if test.findings is not None:
        raise ValueError(f"{name} has several findings for each image; fine-tuning takes sets with one class each")
    for baseline in args.baseline:
        if test.scheme is None:
            raise ValueError(f"--baseline needs a test split with known rows, and that of {name} is too large for them")
        predictions.check_baseline(baseline, test.rows, test.scheme)
    return Sets(train, None, test, metric_of(name, catalog))


def open_lesions(args: argparse.Namespace) -> Sets:
    """CBIS-DDSM: its patient-grouped validation split chooses the epoch, its test table is read at the end."""
    root = cbis_root(args.data_set, args.data_path, args.catalog)
    images, rows, absent = {}, {}, {}
    table = Path(root) / f"{cbis.CBIS_SETS[args.data_set]}.csv"
    for line in cbis.select_lesions(cbis.read_lesions(table), args.where, table)[1]:
        log.info(line)
    for split in cbis.CBIS_SPLITS:
        lesions = cbis.CbisLesions(
            root, cbis.CBIS_SETS[args.data_set], split, args.image_kind, None, args.skip_broken, args.where
        )
        images[split] = downstream.lesion_images(lesions, None)
        rows[split], absent[split] = lesions.rows, lesions.dropped
    parts = {"training": images["train"], "validation": images["val"], "test": images["test"]}
    downstream.name_missing_classes(args.data_set, parts)
    if lacking := np.setdiff1d(images["train"].labels, images["val"].labels).tolist():
        raise ValueError(f"{args.data_set}: the validation split, which chooses the epoch, has no lesion of "
                         f"{images['train'].classes[lacking[0]]}")  # fmt: skip
    for baseline in args.baseline:  # before hours of training
        predictions.check_baseline(baseline, rows["test"])
    return Sets(images["train"], images["val"], images["test"], "top1", rows, absent)


def class_weights(args: argparse.Namespace, labels: np.ndarray, classes: Sequence[str]) -> Tensor | None:
    """(classes,), of mean 1 over the training images; None where all weigh the same."""
    if args.class_weights == "none":
        return None
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        raise ValueError(f"--class_weights balanced: class {classes[int(counts.argmin())]} has no training images")
    return torch.from_numpy(len(labels) / (len(classes) * counts)).float()
