"""End-to-end fine-tuning of an image tower on labelled images, by BEiT's recipe (Bao et al. 2021, appendix H).

    torchrun --nproc_per_node=8 beit_finetuning/run_class_finetuning.py --model beit_base_patch16_224 \
        --finetune slip_base_100ep.pt --model_key state_dict --model_prefix module.visual. \
        --disable_rel_pos_bias --abs_pos_emb --use_cls --nb_classes 1000 ...
    python beit_finetuning/run_class_finetuning.py --data_set cbis_mass --data_path /path/to/cbis-ddsm \
        --finetune runs/vit_mammo/checkpoint_best.pt --batch_size 32 --lr 1e-4 --epochs 20 ...

--model names BEiT's architecture, as the published commands do, or stays `tower`: then the tower of --finetune,
whatever it is (ViT, MedCLIP's Swin or ResNet-50, any of timm), gets a linear layer. What is chosen (the epoch, on
CBIS-DDSM) is chosen on the validation split; without one the last epoch is the result. An interrupted run continues by
itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file, whose folder is then the first place of imports
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from flags.finetuning import check_arguments, get_args_parser
from runtime.command_line import answer_flags, given_flags, parse_with_config, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
import utils
from beit_finetuning import optim
from beit_finetuning.networks import Network, adapt_network, build_network, described
from beit_finetuning.results import Evaluation, Finished, report
from beit_finetuning.sets import Sets, class_weights, open_sets
from beit_finetuning.views import Augmentation, Criterion, EvalView, Mix, TrainView
from datasets import GlobalBatchSampler
from distributed import Processes
from evaluation import downstream, metrics
from evaluation.features import Loading, greys_of
from evaluation.resamples import Bootstrap
from inputs import cbis, loader
from runtime.checkpoints import (
    differences,
    find_training_checkpoint,
    is_finetuned,
    refuse_full_disk,
    save_training_checkpoint,
)
from runtime.logs import MetricWriter, format_seconds, start_logging
from runtime.meeting import Rhythm
from runtime.one_run import SETTINGS, one_run, own_folder, stored_args
from runtime.signals import StopRequest
from runtime.versions import versions
from towers import lora, onednn

log = logging.getLogger("medslip")
# What must not differ between a run and its continuation.
RESUME_SETTINGS = (
    "model", "data_set", "image_kind", "nb_classes", "input_size", "epochs", "warmup_epochs", "warmup_steps", "lr",
    "min_lr", "layer_decay", "weight_decay", "weight_decay_end", "opt_betas", "opt_eps", "update_freq", "clip_grad",
    "drop_path", "drop", "attn_drop_rate", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode",
    "smoothing", "aa", "color_jitter", "train_interpolation", "reprob", "remode", "recount", "hflip", "class_weights",
    "model_ema", "model_ema_decay", "seed", "enable_deepspeed", "lora", "where",
)  # fmt: skip


# fmt: off
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A fine-tuning in progress."""

    args: argparse.Namespace
    processes: Processes
    model: Any  # the bare network
    wrapped: nn.Module  # what averages its gradients over the processes
    ema: Any  # timm's moving average, or None
    network: Network  # of `model`: what it is for people, and what it is rebuilt from
    evaluation: Evaluation
    criterion: Criterion
    mix: Mix | None
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager]
    scaler: torch.amp.GradScaler
    source: DataLoader
    sampler: GlobalBatchSampler
    writer: MetricWriter
    settings: dict
    lr: float  # peak, scaled
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -math.inf  # validation score
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the loss, and updates
    last_save: float = field(default_factory=time.monotonic)
    pace: float = 0.0  # seconds of an update, as the ranks measured it last

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch; the last may have fewer micro-batches."""
        return math.ceil(len(self.sampler) / self.args.update_freq)

    @property
    def step(self) -> int:
        """Updates done in all epochs."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def warmup(self) -> int:
        """Updates of warm-up."""
        return self.args.warmup_steps if self.args.warmup_steps >= 0 else self.args.warmup_epochs * self.steps_per_epoch


def build_run(args: argparse.Namespace, processes: Processes, writer: MetricWriter) -> Run:
    """A run at its first update; ValueError where sets, classes and flags do not go together."""
    sets = open_sets(args)
    num_classes = len(sets.classes)
    if args.nb_classes not in (0, num_classes):
        raise ValueError(f"--nb_classes {args.nb_classes}: {args.data_set} has {num_classes} classes")
    utils.seed_everything(args.seed)  # all ranks start from the same head
    network = build_network(args, num_classes)
    if args.lora:
        adapt(args, network)
    preprocess = network.preprocess
    model = onednn.place(distributed.synchronise_batchnorm(network.model, processes), processes)
    groups = optim.parameter_groups(
        model,
        args.weight_decay,
        args.layer_decay,
        decay_relative_tables=not args.disable_weight_decay_on_rel_pos_bias,
    )
    batch = args.batch_size * processes.world_size * args.update_freq
    lr = args.lr * batch / args.lr_for_batch if args.lr_for_batch else args.lr
    optimizer = optim.create_optimizer(groups, lr, tuple(args.opt_betas), args.opt_eps)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    mix = None
    if mixes:
        minmax = tuple(args.cutmix_minmax) if args.cutmix_minmax else None
        mix = Mix(num_classes, args.mixup, args.cutmix, minmax, args.mixup_prob, args.mixup_switch_prob,
                  args.mixup_mode, args.smoothing)  # fmt: skip
    augmentation = Augmentation(
        args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount, args.hflip
    )
    sampler = GlobalBatchSampler(len(sets.train), args.batch_size, processes.rank, processes.world_size, args.seed)
    criterion = Criterion(args.smoothing, class_weights(args, sets.train.labels, sets.classes)).to(processes.device)
    if args.enable_deepspeed and distributed.wanted_precision(args) == "auto" and processes.device.type == "cuda":
        processes = replace(processes, precision="fp16")
    utils.seed_everything(args.seed + processes.rank)  # dropout differs between ranks
    return Run(
        args=args,
        processes=processes,
        model=model,
        wrapped=distributed.replicate(model, processes),
        ema=moving_average(model, args),
        network=network,
        evaluation=Evaluation(
            sets,
            EvalView(preprocess, args.crop_pct),
            Loading(args.batch_size, args.num_workers, args.skip_broken, processes),
        ),
        criterion=criterion,
        mix=mix,
        optimizer=optimizer,
        autocast=processes.autocast,
        scaler=processes.scaler(),
        source=loader.make_loader(
            downstream.Views(sets.train, TrainView(preprocess, augmentation), args.seed),
            batch_sampler=sampler,
            workers=loader.loader_processes(args.num_workers, processes),
            device=processes.device,
            persistent=True,
            generator=torch.Generator(),
        ),
        sampler=sampler,
        writer=writer,
        settings=resume_settings(args, sets, preprocess, sampler.global_batch),
        lr=lr,
    )


def adapt(args: argparse.Namespace, network: Network) -> None:
    """--lora; fresh weights have nothing to adapt, which a warning says."""
    said = adapt_network(network, args.lora)
    if not args.finetune:
        log.warning("--lora holds the tower at random weights: --finetune names none")
    log.info(said)


def moving_average(model: nn.Module, args: argparse.Namespace) -> Any:
    """timm's average of the weights where the flags ask for one, else None."""
    if not args.model_ema:
        return None
    from timm.utils import ModelEmaV2

    return ModelEmaV2(model, decay=args.model_ema_decay)


def resume_settings(args: argparse.Namespace, sets: Sets, preprocess: Any, global_batch: int) -> dict:
    """What is compared when the run is continued, as JSON would hold it."""
    settings = {key: getattr(args, key) for key in RESUME_SETTINGS}
    settings["precision"] = distributed.wanted_precision(args)
    settings |= {
        "classes": sets.classes,
        "training_images": len(sets.train),
        "preprocess": preprocess.to_dict(),
        "global_batch": global_batch,
    }
    return json.loads(json.dumps(settings))


def record_settings(run: Run) -> None:
    """Everything that determines this run, and the lines a person wants to see."""
    args, world, sets = run.args, run.processes.world_size, run.evaluation.sets
    effective = run.sampler.global_batch * args.update_freq
    derived = {
        "model": run.network.name,
        "preprocess": run.settings["preprocess"],
        "training_images": len(sets.train),
        "classes": len(sets.classes),
        "world_size": world,
        "device": str(run.processes.device),
        "precision": run.processes.precision,
        "effective_batch": effective,
        "steps_per_epoch": run.steps_per_epoch,
        "learning_rate": run.lr,
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    if run.processes.is_main:
        settings = {"args": stored_args(args), "derived": derived, "versions": versions()}
        utils.write_json(Path(args.output_dir) / SETTINGS, settings)
    log.info(f"settings: {given_flags(get_args_parser(), args)}; all of them are in {SETTINGS}")
    scales = sorted({group["lr_scale"] for group in run.optimizer.param_groups})
    log.info(f"{run.network.name}: {derived['parameters']:,} parameters")
    log.info(f"factors on the rate {scales[0]:.3g} to {scales[-1]:g}, from the stem to the head")
    log.info(
        f"{args.data_set}: {len(sets.train):,} training images, {len(sets.classes)} classes; {args.batch_size} "
        f"x {args.update_freq} x {world} process(es) = batch {effective}; {run.steps_per_epoch} updates an epoch; "
        f"learning rate {run.lr:g}" + ("" if args.lr_for_batch else " (not scaled)")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def update(run: Run, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One optimizer step over micro-batches; returns the mean loss () on the device."""
    args, total = run.args, run.steps_per_epoch * run.args.epochs
    rate = optim.learning_rate(run.step, total, run.lr, args.min_lr, run.warmup)
    decay = optim.scheduled_weight_decay(run.step, total, args.weight_decay, args.weight_decay_end)
    optim.set_rates(run.optimizer, rate, decay if args.weight_decay_end is not None else None)
    losses = []
    for i, (images, labels) in enumerate(batches):
        images = images.to(run.processes.device, non_blocking=True)
        target = labels.to(run.processes.device, non_blocking=True)
        if run.mix is not None:
            rng = np.random.default_rng((args.seed, run.processes.rank, run.step, i))
            images, target = run.mix(images, target, rng)
        with distributed.gradient_exchange(run.wrapped, last=i == len(batches) - 1):
            with run.autocast():
                logits = run.wrapped(images)
            loss = run.criterion(logits, target) / len(batches)
            run.scaler.scale(loss).backward()
        losses.append(loss.detach())
    if args.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.model)
    run.step_in_epoch += 1
    return torch.stack(losses).sum()


def train_one_epoch(run: Run, stop: StopRequest) -> bool:
    """The rest of the epoch that `run` stands in; False when a signal ended it early, after a checkpoint."""
    args, processes = run.args, run.processes
    run.wrapped.train()
    run.sampler.set_epoch(run.epoch, start_step=run.step_in_epoch * args.update_freq)
    batches = loader.batches(run.source)
    rhythm = Rhythm(processes, stop, args.print_freq, run.pace)
    loss_sum, updates, since, images = torch.zeros((), device=processes.device), 0, time.monotonic(), 0
    while run.step_in_epoch < run.steps_per_epoch:
        group = list(islice(batches, args.update_freq))
        images += sum(len(labels) for _, labels in group) * processes.world_size
        loss_sum += update(run, group)
        updates += 1
        if not rhythm.due(run.step_in_epoch, run.steps_per_epoch):
            continue
        # The one point at which the host waits for the device.
        save_due = processes.is_main and time.monotonic() - run.last_save > 60 * args.save_every_minutes
        meeting = rhythm.meet(loss_sum[None], save_due)
        run.pace = rhythm.pace
        mean = meeting.sums[0] / processes.world_size / updates
        if not math.isfinite(mean):  # the same on every rank
            raise FloatingPointError(
                f"the loss is {mean} up to epoch {run.epoch + 1}, update {run.step_in_epoch}: lower --lr {args.lr:g}; "
                "the last checkpoint is intact"
            )
        run.epoch_sums = [run.epoch_sums[0] + mean * updates, run.epoch_sums[1] + updates]
        rate = max(group["lr"] for group in run.optimizer.param_groups)
        seconds = time.monotonic() - since
        speed = images / seconds
        left = (run.steps_per_epoch * args.epochs - run.step) * seconds / updates
        log.info(
            f"epoch {run.epoch + 1}/{args.epochs} [{run.step_in_epoch}/{run.steps_per_epoch}]  loss {mean:.4f}  "
            f"lr {rate:.3g}  {speed:.0f} images/s  left {format_seconds(left)}"
        )
        run.writer.row("train", run.step, {"loss": mean, "lr": rate, "images_per_second": speed})
        loss_sum, updates, since, images = torch.zeros_like(loss_sum), 0, time.monotonic(), 0
        if meeting.stopping:
            save(run)
            log.info(
                f"stopped by {stop.name}: checkpoint written in epoch {run.epoch + 1}, update {run.step_in_epoch}; the "
                "same command continues from it"
            )
            return False
        if meeting.save_due and run.step_in_epoch < run.steps_per_epoch:
            save(run)
    return True


def finish_epoch(run: Run) -> None:
    """Evaluate where it is due, checkpoint, and keep the best of the validation split."""
    args, done = run.args, run.epoch + 1
    row = {"epoch": run.epoch, "loss": run.epoch_sums[0] / max(run.epoch_sums[1], 1)}
    score = None
    if run.evaluation.sets.val is not None:
        score = run.evaluation.validation_score(run.model)
        row["validation"] = score
        log.info(f"epoch {done}: validation macro AUROC {score:.4f}")
    elif not args.disable_eval_during_finetuning and done < args.epochs:
        scores = run.evaluation.test_scores(run.model)
        row |= {f"test_{k}": v for k, v in metrics.percent(scores).items() if k != "metric"}
        log.info(f"epoch {done}: test {metrics.shown_score(scores)}")
    is_best = score > run.best if score is not None else True
    run.best = max(run.best, score) if score is not None else run.best
    run.epoch, run.step_in_epoch, run.epoch_sums = done, 0, [0.0, 0.0]
    run.writer.row("epoch", run.step, row)
    save(run, is_best)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save(run: Run, is_best: bool = False) -> None:
    """Checkpoint the run as it stands; every rank calls this."""
    states = distributed.gather_objects(run.processes, utils.random_state(run.processes.device))
    run.last_save = time.monotonic()
    if not run.processes.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        "network": described(run.network),
        **lora.stored(run.model.state_dict()),
        **({"state_dict_ema": None} if run.ema is None else lora.stored(run.ema.module.state_dict(), "_ema")),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "best": run.best,
        "epoch_sums": run.epoch_sums,
        "random": states,
        "settings": run.settings,
        "precision": run.processes.precision,
        "args": json.loads(json.dumps(stored_args(run.args), default=str)),
        "versions": versions(),
    }
    save_training_checkpoint(state, Path(run.args.output_dir), run.step, is_best, keep_last=2)


def resume(run: Run) -> None:
    """Continue from the newest checkpoint in the output directory, if there is one."""
    output_dir = Path(run.args.output_dir)
    state = find_training_checkpoint(output_dir)
    if state is None:
        return
    if not is_finetuned(state):
        raise ValueError(f"{output_dir} holds the checkpoints of another kind of run: choose another --output_dir")
    earlier = {"lora": 0, "where": "", **state["settings"]}  # these two were not always recorded
    if differ := differences(earlier, run.settings):
        raise ValueError(
            f"cannot continue the run in {output_dir}, its settings differ (a new run takes another --output_dir): "
            + "; ".join(differ)
        )
    run.model.load_state_dict(lora.restored(state))
    if run.ema is not None:
        run.ema.module.load_state_dict(lora.restored(state, "_ema"))
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    wanted, earlier = distributed.wanted_precision(run.args), state.get("precision", "fp32")
    average = None if run.ema is None else run.ema.module
    run.processes = onednn.continued(run.processes, wanted, earlier, run.model, average)
    run.epoch, run.step_in_epoch = state["epoch"], state["step_in_epoch"]
    run.best, run.epoch_sums = state["best"], list(state["epoch_sums"])
    if len(state["random"]) == run.processes.world_size:
        utils.set_random_state(state["random"][run.processes.rank], run.processes.device)
    else:
        log.info("the number of processes has changed: dropout goes on from fresh random numbers")
    log.info(
        f"continuing in epoch {run.epoch + 1} of {run.args.epochs}, update {run.step_in_epoch} of {run.steps_per_epoch}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def finished(run: Run) -> Finished:
    """The run as its results are made from it."""
    args = run.args
    compared = {"dataset": args.data_set, "protocol": "fine-tuning", "seed": args.seed, "where": args.where}
    if args.data_set in cbis.CBIS_SETS:
        compared["image_kind"] = args.image_kind
    average = None if run.ema is None else run.ema.module
    bootstrap = Bootstrap(args.resamples, args.seed)
    settings = {**run.settings, "precision": run.processes.precision}
    return Finished(
        run.model, average, run.network.name, args.data_set, Path(args.output_dir), settings, compared,
        args.finetune, args.baseline, bootstrap,
    )  # fmt: skip


def fine_tune(args: argparse.Namespace, processes: Processes, writer: MetricWriter) -> dict:
    """All epochs that are left, then the results, once the processes have met."""
    run = build_run(args, processes, writer)
    resume(run)
    if args.evaluate:
        if run.epoch == 0:
            raise ValueError(f"--eval needs a finished run in --output_dir; there is none in {args.output_dir}")
    else:
        record_settings(run)
        refuse_full_disk(Path(args.output_dir), run.model.parameters(), kept=2)
        with StopRequest(processes, lambda: time.monotonic() - run.last_save) as stop:
            while run.epoch < args.epochs:
                if not train_one_epoch(run, stop):
                    return {"stopped_by": stop.name}
                finish_epoch(run)
    results = report(finished(run), run.evaluation) | {"greys": greys_of(run.evaluation.sets.train)}
    if processes.is_main:
        utils.write_json(Path(args.output_dir) / "results.json", results)
    return results


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune as the command line says; returns what results.json holds, or `stopped_by` after a signal."""
    args = parse_with_config(get_args_parser(), argv)
    check_arguments(args)
    processes = distributed.init_distributed(args)
    with start_logging(is_main=processes.is_main):
        own_folder(args, "finetuned")
        with (
            one_run(args.output_dir, processes),
            start_logging(args.output_dir, processes.is_main),
            distributed.ending_together(processes),
            closing(MetricWriter(Path(args.output_dir), processes.is_main)) as writer,
        ):
            return fine_tune(args, processes, writer)


if __name__ == "__main__":
    run_script(main)
