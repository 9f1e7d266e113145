"""Linear classification by SGD over random crops and flips, as SLIP did it (after MoCo v3)."""

from __future__ import annotations

import argparse
import logging
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import nn
from torch.utils.data import DataLoader

import distributed
import utils
from datasets import GlobalBatchSampler
from evaluation import downstream, metrics
from evaluation.catalog import Catalog, metric_of
from evaluation.features import extract, greys_of
from evaluation.heads import Linear
from evaluation.predictions import Predictions, describe_measured, unlearnt_classes
from evaluation.probe import Probe
from evaluation.subgroups import report_set
from inputs import loader
from inputs.transforms import linear_eval_view, linear_train_view
from runtime.checkpoints import (
    RunFiles,
    differences,
    find_training_checkpoint,
    load_checkpoint,
    save_training_checkpoint,
)
from runtime.logs import MetricWriter, format_seconds
from runtime.meeting import Rhythm
from runtime.signals import StopRequest

log = logging.getLogger("medslip")
FILES = RunFiles(numbered="linear_step", newest="linear_checkpoint.pt", best="linear_best.pt")


@dataclass(frozen=True)
class Recipe:
    """How the layer is trained; the flags of main_linear.py that say so."""

    epochs: int = 90
    start_epoch: int = 0
    batch_size: int = 128  # images for each process
    lr: float = 0.1
    lr_scaling: str = "linear"  # linear or slip; see `learning_rate`
    momentum: float = 0.9
    wd: float = 0.0
    seed: int = 0
    print_freq: int = 10  # steps
    eval_freq: int = 10  # epochs
    resume: str = ""  # a file to continue from
    evaluate: bool = False  # only evaluate the layer of that file


def learning_rate(recipe: Recipe | argparse.Namespace, world_size: int) -> float:
    """The learning rate at the first step: `lr` is for 256 images, of all processes or, as published, of one."""
    batch = recipe.batch_size * world_size if recipe.lr_scaling == "linear" else recipe.batch_size // world_size
    return recipe.lr * batch / 256


@dataclass
class LinearRun:
    """One linear layer in training on a frozen tower."""

    probe: Probe
    recipe: Recipe
    head: nn.Linear
    wrapped: nn.Module  # the head, or its DistributedDataParallel wrapper
    optimizer: torch.optim.Optimizer
    base_lr: float
    source: DataLoader
    sampler: GlobalBatchSampler
    writer: MetricWriter
    settings: dict[str, Any]  # compared when the run is continued
    epoch: int = 0
    step_in_epoch: int = 0
    pace: float = 0.0  # seconds of a step, as the processes measured it last
    best: float = -math.inf  # score on the test split
    last_save: float = field(default_factory=time.monotonic)
    unlearnt: list[int] = field(default_factory=list)  # classes that no training image has

    @property
    def processes(self) -> distributed.Processes:
        """This process among its peers."""
        return self.probe.loading.processes

    @property
    def step(self) -> int:
        """Updates done in all epochs."""
        return self.epoch * len(self.sampler) + self.step_in_epoch


def train_sgd(probe: Probe, catalog: Catalog, recipe: Recipe) -> dict[str, Any]:
    """Train one linear layer and evaluate it; returns the metrics of the last epoch and the best score of any.

    The best is the best on the test split, as published, hence too good; the last epoch's score is the result. Where a
    signal comes first there is a checkpoint within the epoch, and only `stopped_by` in what is returned.
    """
    train, test = downstream.open_splits(
        probe.dataset, catalog, test=partial(linear_eval_view, probe.backbone.preprocess)
    )
    if train.findings is not None:
        raise ValueError(f"{probe.dataset} has several findings for each image: add --cache-features")
    metric = metric_of(probe.dataset, catalog)
    run = build_linear_run(probe, recipe, train)
    run.unlearnt = unlearnt_classes(train.classes, train.labels, probe.dataset)
    resume_sgd(run)
    if recipe.evaluate:
        run.epoch = recipe.epochs
    log.info(
        f"{len(train):,} training images, {len(train.classes)} classes; {recipe.batch_size} x "
        f"{run.processes.world_size} process(es) = batch {run.sampler.global_batch}; learning rate {run.base_lr:g}"
    )
    outputs = None  # of the test split by the layer as it stands
    with closing(run.writer), StopRequest(run.processes, lambda: time.monotonic() - run.last_save) as stop:
        while run.epoch < recipe.epochs:
            if not train_epoch(run, stop):
                return {"stopped_by": stop.name}
            is_best, outputs = False, None
            if run.epoch == recipe.epochs or run.epoch % recipe.eval_freq == 0:
                outputs = pass_test(run, test)
                scores = score_test(run, test, metric, *outputs)
                shown = metrics.percent(scores)
                is_best, run.best = shown["score"] > run.best, max(run.best, shown["score"])
                run.writer.row("test", run.step, {k: v for k, v in shown.items() if k != "metric"})
                log.info(f"epoch {run.epoch}: test {metrics.shown_score(scores)} (best {run.best:.2f})")
            save_sgd(run, is_best)
    outputs = outputs or pass_test(run, test)
    if probe.backbone.fingerprint() != run.settings["weights_sha256"]:
        raise RuntimeError("the frozen tower has changed; its features and this result are not those of --pretrained")
    scores = score_test(run, test, metric, *outputs)
    reported = report_test(run, test, *outputs)
    log.info(
        "\n".join([
            *describe_measured(reported, f"{probe.dataset}, by SGD"),
            f"{probe.dataset}: {metrics.shown_score(scores)} after {recipe.epochs} epochs",
        ])
    )  # fmt: skip
    keep_layer(run, train)
    return {
        **probe.described(),
        "protocol": "sgd",
        "unit": "fraction",
        "settings": run.settings,
        **({"unlearnt": [str(train.classes[c]) for c in run.unlearnt]} if run.unlearnt else {}),
        **scores,
        **reported,
        "best_score_on_test": run.best if metric == "quadratic_kappa" else run.best / 100,
    }


def build_linear_run(probe: Probe, recipe: Recipe, train: downstream.Downstream) -> LinearRun:
    """The run at its first step; the layer starts as published, normal with a deviation of 0.01."""
    backbone, processes = probe.backbone, probe.loading.processes
    sampler = GlobalBatchSampler(len(train), recipe.batch_size, processes.rank, processes.world_size, recipe.seed)
    head = nn.Linear(backbone.width(), len(train.classes)).to(processes.device)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(recipe.seed)))
        head.bias.zero_()
    base = learning_rate(recipe, processes.world_size)
    return LinearRun(
        probe=probe,
        recipe=recipe,
        head=head,
        wrapped=distributed.replicate(head, processes),
        optimizer=torch.optim.SGD(head.parameters(), base, momentum=recipe.momentum, weight_decay=recipe.wd),
        base_lr=base,
        source=loader.make_loader(
            downstream.Views(train, partial(linear_train_view, backbone.preprocess), recipe.seed),
            batch_sampler=sampler,
            workers=probe.loading.loader_processes(),
            device=processes.device,
            persistent=True,
        ),
        sampler=sampler,
        writer=MetricWriter(probe.output_dir, processes.is_main),
        settings={
            "dataset": probe.dataset,
            "epochs": recipe.epochs,
            "learning_rate": base,
            "momentum": recipe.momentum,
            "wd": recipe.wd,
            "global_batch": sampler.global_batch,
            "seed": recipe.seed,
            "features": backbone.features,
            "weights_sha256": backbone.fingerprint(),
            "images and labels": train.fingerprint(),
            "precision": processes.precision,
            **({"where": where} if (where := probe.settings.get("where")) else {}),  # which earlier runs did not record
        },
        epoch=recipe.start_epoch,
    )


def train_epoch(run: LinearRun, stop: StopRequest) -> bool:
    """The rest of the epoch that `run` stands in; False when a signal ended it early, after a checkpoint."""
    recipe, backbone, processes, steps = run.recipe, run.probe.backbone, run.processes, len(run.sampler)
    rate = run.base_lr * 0.5 * (1 + math.cos(math.pi * run.epoch / recipe.epochs))
    run.optimizer.param_groups[0]["lr"] = rate
    run.sampler.set_epoch(run.epoch, start_step=run.step_in_epoch)
    backbone.model.eval()
    sums = torch.zeros(3, device=processes.device)  # loss, correct and images, since the epoch's start
    rhythm, since, first = Rhythm(processes, stop, recipe.print_freq, run.pace), time.monotonic(), run.step_in_epoch
    for images, labels in loader.batches(run.source):
        labels = labels.to(processes.device, non_blocking=True)  # (B,)
        with torch.no_grad():
            features = backbone.encode(images.to(processes.device, non_blocking=True)).float()  # (B, d)
        logits = run.wrapped(features)  # (B, C)
        loss = F.cross_entropy(logits, labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.step_in_epoch += 1
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([loss.detach() * len(labels), correct.float(), sums.new_full((), len(labels))])
        if not rhythm.due(run.step_in_epoch, steps):
            continue
        meeting = rhythm.meet(sums)
        run.pace = rhythm.pace
        left = (steps * recipe.epochs - run.step) * (time.monotonic() - since) / (run.step_in_epoch - first)
        loss_sum, found, seen = meeting.sums
        if not math.isfinite(loss_sum):  # the same on every process
            raise ValueError(f"the loss is {loss_sum} in epoch {run.epoch + 1}: lower --lr {recipe.lr:g}")
        log.info(
            f"epoch {run.epoch + 1}/{recipe.epochs} step {run.step_in_epoch}/{steps}: loss {loss_sum / seen:.4f}, "
            f"top-1 {100 * found / seen:.2f}, learning rate {rate:.4g}, {format_seconds(left)} left"
        )
        run.writer.row("train", run.step, {"loss": loss_sum / seen, "top1": 100 * found / seen, "lr": rate})
        if meeting.stopping and run.step_in_epoch < steps:
            save_sgd(run)
            log.info(f"stopped by {stop.name} in epoch {run.epoch + 1}: the same command continues from the checkpoint")
            return False
    run.epoch, run.step_in_epoch = run.epoch + 1, 0
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The test split
# ---------------------------------------------------------------------------------------------------------------------


def pass_test(run: LinearRun, test: downstream.Downstream) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, C) and the numbers (n,) of their images, each image once on any number of processes."""
    backbone = run.probe.backbone
    whole = replace(backbone, encode=lambda images: run.head(backbone.encode(images).float()))
    return extract(whole, test, f"{run.probe.dataset} test", run.probe.loading)


def score_test(
    run: LinearRun, test: downstream.Downstream, metric: str, logits: np.ndarray, kept: np.ndarray
) -> metrics.Scores:
    """All metrics of the set, of what `pass_test` returned."""
    skipped = {"samples_skipped": len(test) - len(kept)} if len(kept) < len(test) else {}
    return {**metrics.score_outputs(test.labels[kept], logits, metric, run.unlearnt), **skipped}


def report_test(run: LinearRun, test: downstream.Downstream, logits: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """What known rows allow: predictions.csv and intervals over groups."""
    if test.scheme is None:
        return {}
    prob, scheme = softmax(logits.astype(np.float64), axis=1), test.scheme.without(run.unlearnt)
    found = Predictions([test.rows[i] for i in kept], prob, scheme)
    if run.probe.is_main:
        found.write(run.probe.output_dir / "predictions.csv")
    return report_set(found, None, [], run.settings, run.probe.bootstrap)


def keep_layer(run: LinearRun, train: downstream.Downstream) -> None:
    """head.safetensors of the trained layer, on features as they are."""
    weight, bias = run.head.weight.detach().cpu().numpy().T, run.head.bias.detach().cpu().numpy()  # (d, C), (C,)
    layer = Linear(np.zeros(len(weight), np.float32), np.ones(len(weight), np.float32), weight, bias)
    run.probe.keep_heads([layer], None, train.classes, view="linear", greys=greys_of(train))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def resume_sgd(run: LinearRun) -> None:
    """Continue from the recipe's file, else from the newest readable checkpoint in the folder, if there is one."""
    recipe, folder = run.recipe, run.probe.output_dir
    state = load_checkpoint(recipe.resume) if recipe.resume else find_training_checkpoint(folder, files=FILES)
    if state is None:
        if recipe.evaluate:
            raise ValueError("--evaluate needs --resume, the linear layer to evaluate")
        return
    source = recipe.resume or f"the run in {folder}"
    if "settings" not in state:
        raise ValueError(f"{source} is no checkpoint of main_linear.py: it has no settings")
    compared = ("dataset", "features", "weights_sha256") if recipe.evaluate else (*run.settings, *state["settings"])
    theirs, ours = ({k: v for k, v in s.items() if k in compared} for s in (state["settings"], run.settings))
    if differ := differences(theirs, ours):
        raise ValueError(f"{source} is of another run ({'; '.join(differ)}): choose another --output-dir")
    run.head.load_state_dict(state["state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.step_in_epoch, run.best = state["epoch"], state.get("step_in_epoch", 0), state["best_acc1"]
    if not (folder / FILES.best).exists():
        run.best = -math.inf  # the best of another folder is not here to be beaten
    random = state.get("random", [])
    if len(random) == run.processes.world_size:
        utils.set_random_state(random[run.processes.rank], run.processes.device)


def save_sgd(run: LinearRun, is_best: bool = False) -> None:
    """Checkpoint the run as it stands; every rank calls this."""
    run.last_save = time.monotonic()
    states = distributed.gather_objects(run.processes, utils.random_state(run.processes.device))
    if not run.processes.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "steps_per_epoch": len(run.sampler),
        "step": run.step,
        "state_dict": run.head.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best_acc1": run.best,  # SLIP's name for it, which stays
        "random": states,
        "settings": run.settings,
        "args": asdict(run.recipe),
    }
    save_training_checkpoint(state, run.probe.output_dir, run.step, is_best, keep_last=2, files=FILES)
