"""The probe on features extracted once, beside the published method, on the same images, tower and machine.

    python make_dataset.py demo --root phantoms
    python benchmarks/bench_probe.py --root phantoms/cbis       CBIS-DDSM's layout (phantoms) and scikit-learn's digits
    python benchmarks/bench_probe.py --root phantoms/cbis --pretrained checkpoint.pt

The published method sends every image, decoded anew, through the frozen tower in each of --epochs epochs, with a
linear layer trained by SGD on top. All epochs are run, none is extrapolated. Both minimise the same loss: features are
standardised (there by batch normalisation without weights), and the weights decay by the penalty that the sweep chose,
a choice which the published method is thus spared. Both see the same test images once, after everything is chosen.

Printed are the seconds of each method from images to test probabilities (and its CPU seconds, for machines that are
not idle), those of a second run that finds the features on disk, and those of one fit beside the sweep over the
penalties; then the test metrics with 95% intervals over patients (digits: over images) and the paired difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401  first: it finds the modules below
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

import distributed
import models
import utils
from evaluation import downstream, heads, predictions
from evaluation.features import Backbone, Loading, extract_or_reuse, load_backbone
from evaluation.metrics import score_outputs
from evaluation.resamples import Resamples
from inputs.cbis import CBIS_CLASSES, CBIS_KINDS, CbisLesions
from inputs.transforms import Preprocess, eval_view
from runtime.versions import versions

SETS = (*(f"cbis_{kind}" for kind in CBIS_KINDS), "digits")
SHOWN = ("auroc", "f1", "recall")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["cbis_calc", "digits"], choices=SETS)
    parser.add_argument("--root", type=Path, help="CBIS-DDSM's layout, after `make_dataset.py cbis` or `demo`")
    parser.add_argument("--pretrained", default="", help="a checkpoint; without it --arch with fresh weights")
    parser.add_argument("--arch", default="resnet18", help="timm's name of the untrained tower")
    parser.add_argument("--size", type=int, default=64, help="pixels; with --pretrained the checkpoint's own")
    parser.add_argument("--epochs", type=int, default=50, help="of the published method")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.3, help="of the published method, for a batch of 256")
    parser.add_argument("-j", "--workers", type=int, default=0, help="loader processes, of both methods")
    parser.add_argument(
        "--fits",
        type=int,
        default=5,
        help="timed runs of what is fast (cached method, fits, sweeps); their median is printed",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


@dataclass(frozen=True)
class Splits:
    """The labelled images of one set, each split an indexable of (tensor (3, S, S), label)."""

    train: Dataset
    val: Dataset
    test: Dataset
    labels: dict[str, np.ndarray]  # of each split, (n,)
    groups: list[str]  # what the bootstrap draws: the patient of each test image, or the image itself
    classes: list[str]
    score: Callable[[np.ndarray, np.ndarray], float]  # what chooses the penalty, as in main_linear.py


def open_set(name: str, root: Path | None, preprocess: Preprocess, seed: int) -> Splits:
    if name == "digits":
        whole: Any = downstream.create_downstream(name, True, None)
        held_out = heads.stratified_part(whole.labels, 0.1, 1, np.random.default_rng(seed))
        fitted = np.setdiff1d(np.arange(len(whole)), held_out)
        view = partial(view_of, preprocess)
        parts: list[Any] = [
            downstream.ImageArray(whole.pixels[rows], whole.classes, whole.labels[rows], view, whole.upsample)
            for rows in (fitted, held_out)
        ]
        parts.append(downstream.create_downstream(name, False, view))
        groups, classes = [str(i) for i in range(len(parts[2]))], whole.classes
        score = top1
    else:
        if root is None:
            raise ValueError(f"{name} needs --root: `python make_dataset.py demo --root DIR` draws DIR/cbis")
        kind = name.removeprefix("cbis_")
        parts: list[Any] = [CbisLesions(root, kind, split, "crop", preprocess) for split in ("train", "val", "test")]
        groups, classes = [row["patient"] for row in parts[2].rows], list[str](CBIS_CLASSES)
        score = predictions.macro_auroc
    names = ("train", "val", "test")
    labels = {split: np.array(part.labels) for split, part in zip(names, parts, strict=True)}
    train, val, test = parts
    return Splits(train, val, test, labels, groups, classes, score)


def top1(labels: np.ndarray, prob: np.ndarray) -> float:
    return score_outputs(labels, prob, "top1")["score"]


def view_of(preprocess: Preprocess, image) -> torch.Tensor:
    return eval_view(preprocess)(image, None)


def published(backbone: Backbone, splits: Splits, penalty: float, args: argparse.Namespace) -> np.ndarray:
    """Test probabilities (n, k) of a linear layer trained with the tower in the loop."""
    torch.manual_seed(args.seed)
    labelled = ConcatDataset([splits.train, splits.val])
    loading = dict(batch_size=args.batch_size, num_workers=args.workers)
    # Batch normalisation cannot standardise a lone image, so a last batch of one is left out of its epoch.
    lone = len(labelled) % args.batch_size == 1
    loader = DataLoader(
        labelled, shuffle=True, drop_last=lone, collate_fn=first_two, persistent_workers=args.workers > 0, **loading
    )
    linear = nn.Linear(backbone.width(), len(splits.classes))
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    layer = nn.Sequential(nn.BatchNorm1d(backbone.width(), affine=False), linear).to(args.device)
    rate = args.lr * args.batch_size / 256
    decay = [{"params": [linear.weight], "weight_decay": penalty}, {"params": [linear.bias]}]
    optimizer = torch.optim.SGD(decay, rate, momentum=0.9)
    for epoch in range(args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
        for images, labels in loader:
            with torch.no_grad():
                features = backbone.encode(images.to(args.device)).float()  # (B, d)
            loss = F.cross_entropy(layer(features), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layer.eval()
    prob = []
    with torch.no_grad():
        for images, _ in DataLoader(splits.test, collate_fn=first_two, **loading):
            prob.append(layer(backbone.encode(images.to(args.device)).float()).softmax(1).cpu())
    return torch.cat(prob).numpy()


def first_two(samples: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([sample[0] for sample in samples]), torch.tensor([sample[1] for sample in samples])


def cached(
    backbone: Backbone, splits: Splits, args: argparse.Namespace, folder: Path
) -> tuple[np.ndarray, dict[str, float], tuple[heads.Samples, heads.Samples, heads.Head]]:
    """Test probabilities (n, k) as main_linear.py gets them, the seconds of its parts, and what was fitted on."""
    loading = Loading(args.batch_size, args.workers, processes=args.processes)
    start = time.perf_counter()
    features = {
        name: extract_or_reuse(backbone, getattr(splits, name), name, loading, folder)[0]
        for name in ("train", "val", "test")
    }
    extracted = time.perf_counter()
    train, val = (heads.Samples(features[name], splits.labels[name]) for name in ("train", "val"))
    head = heads.fit_logistic(train, val, len(splits.classes), splits.score)
    prob = head.probabilities(features["test"])
    end = time.perf_counter()
    return prob, {"features": extracted - start, "head": end - extracted, "all": end - start}, (train, val, head)


def time_fits(train: heads.Samples, penalty: float, num_classes: int, fits: int) -> dict[str, float]:
    """Median seconds of one fit, of the sweep over all penalties, and of scikit-learn's fit as it comes."""

    def scikit_learn() -> None:
        x = StandardScaler().fit_transform(train.features)
        LogisticRegression(C=1 / (penalty * len(x)), max_iter=5000).fit(x, train.labels)

    todo = {
        "one_fit": lambda: heads.logistic_path(train, [penalty], num_classes),
        "sweep": lambda: heads.logistic_path(train, heads.LAMBDAS, num_classes),
        "one_fit_scikit_learn": scikit_learn,
    }
    seconds = {name: [] for name in todo}
    for _ in range(fits):  # in turn, so that a disturbance meets all three
        for name, fit in todo.items():
            start = time.perf_counter()
            fit()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def cpu_seconds() -> float:
    """Of this process and of its loader processes that have ended; other programs on the machine do not count."""
    return sum(os.times()[:4])


def measure(name: str, backbone: Backbone, args: argparse.Namespace) -> dict:
    splits = open_set(name, args.root, backbone.preprocess, args.seed)
    backbone.encode(torch.stack([splits.train[i][0] for i in range(4)]).to(args.device))  # warm
    runs = []
    for _ in range(args.fits):
        with tempfile.TemporaryDirectory() as folder:
            start = cpu_seconds()
            ours, seconds, (train, _, head) = cached(backbone, splits, args, Path(folder))
            seconds |= {"cpu": cpu_seconds() - start}
            again, seconds_again, _ = cached(backbone, splits, args, Path(folder))
            runs.append((seconds, seconds_again))
    seconds, seconds_again = (
        {part: float(np.median([run[i][part] for run in runs])) for part in runs[0][i]} for i in (0, 1)
    )
    start, start_cpu = time.perf_counter(), cpu_seconds()
    theirs = published(backbone, splits, head.chosen["lambda"], args)
    seconds_published = {"all": time.perf_counter() - start, "cpu": cpu_seconds() - start_cpu}
    resamples = Resamples(
        splits.labels["test"], splits.groups, splits.classes, positive=splits.classes[-1], seed=args.seed
    )  # fmt: skip
    both = {method: resamples.intervals(prob) for method, prob in (("published", theirs), ("cached", ours))}
    difference = resamples.difference(ours, theirs)
    return {
        "set": name,
        "tower": backbone.name,
        "size": backbone.preprocess.size,
        "feature_dim": train.features.shape[1],
        "samples": {split: len(labels) for split, labels in splits.labels.items()},
        "epochs": args.epochs,
        "seconds_published": seconds_published,
        "seconds_cached": seconds,
        "seconds_again": seconds_again,
        "ratio": seconds_published["all"] / seconds["all"],
        "ratio_cpu": seconds_published["cpu"] / seconds["cpu"],
        "ratio_again": seconds_published["all"] / seconds_again["all"],
        "same_again": bool(np.array_equal(ours, again)),
        "penalties": len(heads.LAMBDAS),
        "penalty": head.chosen["lambda"],
        "seconds_fit": time_fits(train, head.chosen["lambda"], len(splits.classes), args.fits),
        "metrics": {method: {m: asdict(values[m]) for m in SHOWN} for method, values in both.items()},
        "difference": {m: asdict(difference[m]) for m in SHOWN},
        "text": {
            m: [both["published"][m].percent(), both["cached"][m].percent(), difference[m].percent()] for m in SHOWN
        },
    }


def describe(row: dict) -> str:
    part, fit = row["seconds_cached"], row["seconds_fit"]
    lines = [
        f"{row['set']}: {row['tower']} at {row['size']} pixels, {row['feature_dim']} features, {row['samples']}",
        f"  published, {row['epochs']} epochs  {row['seconds_published']['all']:9.2f} s, "
        f"{row['seconds_published']['cpu']:.2f} CPU",
        f"  cached                {part['all']:9.2f} s, {part['cpu']:.2f} CPU  ({part['features']:.2f} features, "
        f"{part['head']:.2f} sweep of {row['penalties']} and last fit): {row['ratio']:.1f} times faster, "
        f"{row['ratio_cpu']:.1f} in CPU seconds",
        f"  cached, again         {row['seconds_again']['all']:9.2f} s: {row['ratio_again']:.0f} times faster"
        + ("" if row["same_again"] else "; NOT THE SAME PROBABILITIES"),
        f"  on the features       {fit['one_fit']:9.3f} s one fit, {fit['sweep']:.3f} s the sweep; scikit-learn's one "
        f"fit {fit['one_fit_scikit_learn']:.3f} s (lambda {row['penalty']:.2g})",
    ]
    for name, (theirs, ours, difference) in row["text"].items():
        lines.append(f"  {name:<7} published {theirs}   cached {ours}   difference {difference}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure each of --sets; prints a report and a JSON line for each and returns them."""
    args = get_args_parser().parse_args(argv)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.processes = distributed.Processes(0, 1, 0, args.device)
    if args.pretrained:
        backbone = load_backbone(args.pretrained, arch=args.arch, device=args.device)
    else:
        utils.seed_everything(args.seed)
        model = models.create_model("CLIP_VITT16", vision_tower=args.arch, image_size=args.size)
        model = model.eval().requires_grad_(False).to(args.device)
        backbone = Backbone(model.visual, model, model.preprocess, "backbone", f"{args.arch}, untrained")
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, {args.workers} loader processes; {versions()}")
    rows = []
    for name in args.sets:
        row = measure(name, backbone, args)
        rows.append(row)
        print(f"{describe(row)}\n{json.dumps({k: v for k, v in row.items() if k != 'text'})}", flush=True)
    return rows


if __name__ == "__main__":
    main()
