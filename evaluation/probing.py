"""What the probes of CBIS-DDSM, of other sets and by SGD share: features, and the head that is kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

import distributed
from evaluation.features import Backbone, Loading, extract_or_reuse
from evaluation.probes import Linear, save_heads


def weights_of(args: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """What results.json says of the weights: the file, and how far they were trained where it tells."""
    return {"path": args.pretrained, "untrained": args.untrained or not args.pretrained, **backbone.training}


def loading_of(args: argparse.Namespace, processes: distributed.Processes) -> Loading:
    """--workers is a node's, to be divided among its processes."""
    workers = args.workers // distributed.processes_of_node(processes)
    return Loading(args.batch_size, workers, args.skip_broken, processes)


def kept_features(
    args: argparse.Namespace, backbone: Backbone, dataset: Dataset, title: str, processes: distributed.Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and the numbers (n,) of their samples, extracted once for all runs in --output-dir."""
    return extract_or_reuse(backbone, dataset, title, loading_of(args, processes), Path(args.output_dir) / "features")


def keep_heads(
    args: argparse.Namespace, backbone: Backbone, heads: Sequence[Linear], results: dict[str, Any],
    features: np.ndarray | None, **about: Any,
) -> None:  # fmt: skip
    """head.safetensors: the layer, of several findings one each, and in its header what using it takes.

    Args:
        features: of the training images (n, d), for the distance of new ones from them; None where there is none.
        about: of other sets than CBIS-DDSM: classes, the name of the view, findings.
    """
    if not heads:  # no finding has two images of either outcome
        return
    first = heads[0] if features is None else heads[0].knowing(features)
    described = {
        "classes": results.get("classes"),
        "features": backbone.features,
        "preprocess": backbone.preprocess.to_dict(),
        "weights_sha256": results["settings"]["weights_sha256"],
        "operating_point": results.get("operating_point"),
        "precision": results["settings"].get("precision", "fp32"),
        **about,
    }
    save_heads(Path(args.output_dir) / "head.safetensors", [first, *heads[1:]], described)
