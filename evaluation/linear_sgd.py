"""Linear classification by SGD over random crops and flips, as SLIP did it (after MoCo v3)."""

from __future__ import annotations

import argparse
import json
import logging
import math
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
from datasets import GlobalBatchSampler
from evaluation import downstream, metrics
from evaluation.catalog import metric_of
from evaluation.features import Backbone, extract
from evaluation.predictions import Predictions, report_rows
from evaluation.probes import Linear
from evaluation.probing import keep_heads, loading_of, weights_of
from evaluation.set_probes import find_set, score_set
from inputs import loader
from inputs.transforms import Preprocess, linear_eval_view, random_resized_crop
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.command_line import StopRequest
from runtime.logs import MetricWriter

log = logging.getLogger("medslip")


def linear_train_view(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator) -> Tensor:
    """SLIP's view for linear classification: a crop of 0.08 to 1 of the area, flipped half of the time."""
    view = random_resized_crop(preprocess.pixels(img), preprocess.size, (0.08, 1.0), rng)
    return preprocess.normalise(view.flip(-1) if rng.random() < 0.5 else view)


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """The actual learning rate at the start."""
    batch = args.batch_size * world_size if args.lr_scaling == "linear" else args.batch_size // world_size
    return args.lr * batch / 256


@dataclass
class LinearRun:
    """One linear layer in training on a frozen tower."""

    args: argparse.Namespace
    processes: distributed.Processes
    backbone: Backbone
    head: nn.Linear
    called: nn.Module  # the head, or its DistributedDataParallel wrapper
    optimizer: torch.optim.Optimizer
    base_lr: float
    source: DataLoader
    sampler: GlobalBatchSampler
    writer: MetricWriter
    settings: dict  # compared when the run is continued
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -math.inf  # score on the test split

    @property
    def step(self) -> int:
        return self.epoch * len(self.sampler) + self.step_in_epoch


def train_sgd(args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes) -> dict:
    """Train one linear layer for --epochs and evaluate it; returns the metrics of the last epoch and of the best.

    The best is the best on the test split, as published, hence too good; the last epoch's score is the result. Where a
    signal comes first there is a checkpoint within the epoch, and only `stopped_by` in what is returned.
    """
    catalog = find_set(args)
    train = downstream.create_downstream(args.dataset, True, None, catalog)
    test = downstream.create_downstream(args.dataset, False, partial(linear_eval_view, backbone.preprocess), catalog)
    if train.findings is not None:
        raise ValueError(f"{args.dataset} has several findings for each image: add --cache-features")
    metric = metric_of(args.dataset, catalog)
    run = build_linear_run(args, processes, backbone, train)
    resume_sgd(run)
    evaluate = partial(evaluate_linear, run, test, metric)
    if args.evaluate:
        run.epoch = args.epochs
    log.info(
        f"{len(train):,} training images, {len(train.classes)} classes; {args.batch_size} x "
        f"{processes.world_size} process(es) = batch {run.sampler.global_batch}; learning rate {run.base_lr:g}"
    )
    scores = None
    with closing(run.writer), StopRequest() as stop:
        while run.epoch < args.epochs:
            if not train_epoch(run, stop):
                return {"stopped_by": stop.name}
            is_best = False
            if run.epoch == args.epochs or run.epoch % args.eval_freq == 0:
                scores = evaluate()
                is_best, run.best = scores["score"] > run.best, max(run.best, scores["score"])
                run.writer.row("test", run.step, {k: v for k, v in scores.items() if k != "metric"})
                log.info(f"epoch {run.epoch}: test {scores['metric']} {scores['score']:.2f} (best {run.best:.2f})")
            save_sgd(run, is_best)
    scores = scores or evaluate()
    if test.scheme is not None and test.findings is None:
        scores |= linear_rows(run, test)
    if backbone.fingerprint() != run.settings["weights_sha256"]:
        raise RuntimeError("the frozen tower has changed; its features and this result are not those of --pretrained")
    log.info(f"{args.dataset}: {scores['metric']} {scores['score']:.2f} after {args.epochs} epochs")
    results = {
        "model": backbone.name,
        "dataset": args.dataset,
        "features": backbone.features,
        "protocol": "sgd",
        "unit": "percent",
        "settings": run.settings,
        "weights": weights_of(args, backbone),
        **scores,
        "best_score_on_test": run.best,
    }
    if processes.is_main:
        weight, bias = run.head.weight.detach().cpu().numpy().T, run.head.bias.detach().cpu().numpy()
        layer = Linear(np.zeros(len(weight), np.float32), np.ones(len(weight), np.float32), weight, bias)
        settings = {**run.settings, "precision": processes.precision}
        keep_heads(args, backbone, [layer], {"settings": settings}, None, classes=list(train.classes), view="linear")
    return results


def build_linear_run(
    args: argparse.Namespace, processes: distributed.Processes, backbone: Backbone, train: downstream.Downstream
) -> LinearRun:
    """The run at its first step; the layer starts as published, normal with a std of 0.01."""
    sampler = GlobalBatchSampler(len(train), args.batch_size, processes.rank, processes.world_size, args.seed)
    head = nn.Linear(backbone.width(), len(train.classes)).to(processes.device)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(args.seed)))
        head.bias.zero_()
    base = learning_rate(args, processes.world_size)
    return LinearRun(
        args=args,
        processes=processes,
        backbone=backbone,
        head=head,
        called=distributed.replicate(head, processes),
        optimizer=torch.optim.SGD(head.parameters(), base, momentum=args.momentum, weight_decay=args.wd),
        base_lr=base,
        source=loader.make_loader(
            downstream.Views(train, partial(linear_train_view, backbone.preprocess), args.seed),
            batch_sampler=sampler,
            workers=loading_of(args, processes).loader_processes(),
            device=processes.device,
            persistent=True,
        ),
        sampler=sampler,
        writer=MetricWriter(Path(args.output_dir), processes.is_main),
        settings={
            "dataset": args.dataset,
            "epochs": args.epochs,
            "learning_rate": base,
            "momentum": args.momentum,
            "wd": args.wd,
            "global_batch": sampler.global_batch,
            "seed": args.seed,
            "features": backbone.features,
            "weights_sha256": backbone.fingerprint(),
        },
        epoch=args.start_epoch,
    )


def train_epoch(run: LinearRun, stop: StopRequest) -> bool:
    """The rest of the epoch that `run` stands in; False when a signal ended it early, after a checkpoint."""
    args, processes, steps = run.args, run.processes, len(run.sampler)
    rate = run.base_lr * 0.5 * (1 + math.cos(math.pi * run.epoch / args.epochs))
    run.optimizer.param_groups[0]["lr"] = rate
    run.sampler.set_epoch(run.epoch, start_step=run.step_in_epoch)
    run.backbone.model.eval()
    loss_sum, correct, seen = torch.zeros((), device=processes.device), 0.0, 0
    for images, labels in loader.batches(run.source):
        labels = labels.to(processes.device, non_blocking=True)
        with torch.no_grad():
            features = run.backbone.encode(images.to(processes.device, non_blocking=True)).float()  # (B, d)
        logits = run.called(features)  # (B, C)
        loss = F.cross_entropy(logits, labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.step_in_epoch += 1
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if run.step_in_epoch % args.print_freq and run.step_in_epoch < steps:
            continue
        parts = distributed.gather_objects(processes, (float(loss_sum), float(correct), seen, stop.name))
        mean_loss, top1 = (sum(part[i] for part in parts) / sum(part[2] for part in parts) for i in (0, 1))
        if not math.isfinite(mean_loss):  # the same on every process
            raise ValueError(f"the loss is {mean_loss} in epoch {run.epoch}: lower --lr {args.lr:g}")
        log.info(
            f"epoch {run.epoch + 1}/{args.epochs} step {run.step_in_epoch}/{steps}: loss {mean_loss:.4f}, "
            f"top-1 {100 * top1:.2f}, learning rate {rate:.4g}"
        )
        run.writer.row("train", run.step, {"loss": mean_loss, "top1": 100 * top1, "lr": rate})
        if (names := [part[3] for part in parts if part[3]]) and run.step_in_epoch < steps:
            stop.name = names[0]
            save_sgd(run)
            log.info(f"stopped by {stop.name} in epoch {run.epoch + 1}: the same command continues from the checkpoint")
            return False
    run.epoch, run.step_in_epoch = run.epoch + 1, 0
    return True


def evaluate_linear(run: LinearRun, test: downstream.Downstream, metric: str) -> metrics.Scores:
    """Metrics of the linear layer on the test split, each image once on any number of processes."""
    whole = replace(run.backbone, encode=lambda images: run.head(run.backbone.encode(images).float()))
    logits, kept = extract(whole, test, f"{run.args.dataset} test", loading_of(run.args, run.processes))
    skipped = {"samples_skipped": len(test) - len(kept)} if len(kept) < len(test) else {}
    return {**score_set(test.labels[kept], logits, metric), **skipped}


def linear_rows(run: LinearRun, test: downstream.Downstream) -> dict:
    """What known rows allow: predictions.csv and intervals over groups."""
    assert test.scheme is not None
    whole = replace(run.backbone, encode=lambda images: run.head(run.backbone.encode(images).float()))
    logits, kept = extract(whole, test, f"{run.args.dataset} test", loading_of(run.args, run.processes))
    found = Predictions([test.rows[i] for i in kept], softmax(logits.astype(np.float64), axis=1), test.scheme)
    if run.processes.is_main:
        found.write(Path(run.args.output_dir) / "predictions.csv")
    return report_rows(found, None, [], run.settings, run.args.resamples, run.args.seed)


def resume_sgd(run: LinearRun) -> None:
    """Continue from --resume or this directory's checkpoint, if there is one."""
    args, settings = run.args, run.settings
    path = Path(args.resume or Path(args.output_dir) / "linear_checkpoint.pt")
    if not args.resume and not path.is_file():
        if args.evaluate:
            raise ValueError("--evaluate needs --resume, the linear layer to evaluate")
        return
    state = load_checkpoint(path)
    if "settings" not in state:
        raise ValueError(f"{path} is no checkpoint of main_linear.py: it has no settings")
    compared = ("dataset", "features", "weights_sha256") if args.evaluate else settings
    differ = [
        f"{k} {state['settings'].get(k)} there, {settings[k]} now"
        for k in compared
        if state["settings"].get(k) != settings[k]
    ]
    if differ:
        raise ValueError(f"{path} is of another run ({'; '.join(differ)}): choose another --output-dir")
    run.head.load_state_dict(state["state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.best = state["epoch"], state["best_acc1"]
    run.step_in_epoch = state.get("step_in_epoch", 0)


def save_sgd(run: LinearRun, is_best: bool = False) -> None:
    if not run.processes.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "steps_per_epoch": len(run.sampler),
        "step": run.step,
        "state_dict": run.head.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best_acc1": run.best,
        "settings": run.settings,
        "args": json.loads(json.dumps(vars(run.args))),
    }
    for name in ["linear_checkpoint.pt"] + ["linear_best.pt"] * is_best:
        save_checkpoint(state, Path(run.args.output_dir) / name)
