"""Pre-training and fine-tuning of CLIP, SigLIP, SimCLR and SLIP models on images with captions.

    python main.py --dataset roco --root /path/to/roco --model MEDSLIP_VIT --medclip-weights medclip-vit.zip ...
    torchrun --nproc_per_node=8 main.py --root /path/to/yfcc100m --model SLIP_VITB16 --lr 3e-3 --wd 0.1

The same command runs on a CPU, a GPU, or under torchrun. An interrupted run continues by itself when it is started
again with the same --output-dir. Validation each epoch measures retrieval on the whole validation split.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import logging
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from flags.training import check_arguments, get_args_parser
from runtime.command_line import UsageError, answer_flags, given_flags, parse_with_config, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import datasets
import distributed
import losses
import models
import utils
from distributed import Processes
from evaluation import downstream
from evaluation.features import Loading, classify_zeroshot, embed_pairs
from evaluation.metrics import percent, retrieval_metrics
from inputs import loader
from inputs.colour import apply_colour_batch
from inputs.columns import PairColumns
from inputs.reader import NoSplit, NothingKept, Reader
from inputs.transforms import Preprocess
from runtime.checkpoints import (
    checkpoint_bytes,
    differences,
    find_training_checkpoint,
    load_checkpoint,
    refuse_finetuned,
    refuse_full_disk,
    save_checkpoint,
    save_training_checkpoint,
    upgraded,
)
from runtime.logs import MetricWriter, format_seconds, start_logging
from runtime.meeting import Rhythm
from runtime.one_run import SETTINGS, one_run, own_folder, stored_args
from runtime.signals import StopRequest
from runtime.versions import versions
from tokenizer import SimpleTokenizer, Tokenizer, WordPieceTokenizer, create_tokenizer
from towers import lora, onednn, sources
from towers import pretrained as pretrained_towers
from towers.build import drop_patches

log = logging.getLogger("medslip")
# What must not differ between a run and its continuation: the model, the data, and the schedule.
RESUME_SETTINGS = (
    "dataset", "caption_filter", "epochs", "warmup_epochs", "lr", "lr_start", "lr_end", "update_freq",
    "accum_negatives", "wd", "betas", "eps", "seed", "ssl_scale", "ssl_temp", "gather_with_grad", "freeze",
    "shard", "mask_duplicates", "hold_batchnorm", "lora", "sentences", "study_views", "shared_view",
    "patch_dropout",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Building the parts of a run
# ---------------------------------------------------------------------------------------------------------------------


def parse_overrides(pairs: list[str]) -> dict:
    """["text_layers=4", "vision.depth=2"] to {"text_layers": 4, "vision_kwargs": {"depth": 2}}."""
    out: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--override takes KEY=VALUE, got {pair!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if key.startswith("vision."):
            out.setdefault("vision_kwargs", {})[key.removeprefix("vision.")] = value
        else:
            out[key] = value
    return out


def build_model(args: argparse.Namespace) -> tuple[models.ImageModel, Tokenizer | None]:
    """The model with the weights it starts from, and its tokenizer (None for an objective without text)."""
    overrides: dict[str, Any] = dict(ssl_mlp_dim=args.ssl_mlp_dim, ssl_emb_dim=args.ssl_emb_dim)
    for key in ("image_size", "vision_tower", "context_length", "text_pooling"):
        if getattr(args, key) is not None:
            overrides[key] = getattr(args, key)
    parts, given = other_libraries(args), {}
    for part in parts:  # a single tower after the whole; flags of the run before both
        given |= part.config
    overrides = given | overrides
    own_text, own_image = (any(getattr(part, f"has_{side}") for part in parts) for side in ("text", "image"))
    bert = pretrained_towers.read_bert(args.text_weights) if args.text_weights and not own_text else None
    overrides |= (bert["config"] if bert else {}) | parse_overrides(args.override)
    expected = None
    if args.vision_weights and not own_image:
        tower = models.resolve_config(args.model, **overrides).vision_tower
        expected = pretrained_towers.vision_data(tower, args.vision_weights)
        overrides.setdefault("image_size", expected["size"])
    own = next((part.tokenizer for part in parts if part.tokenizer is not None), None)
    config = models.resolve_config(args.model, **overrides)
    tokenizer = (
        at_length(own, config.context_length) if own else build_tokenizer(args, config, bert and bert["tokenizer"])
    )
    if overrides.setdefault("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={overrides['vocab_size']} does not fit the tokenizer, which has "
            f"{tokenizer.vocab_size} tokens; leave it out"
        )

    if models.objective_of(config).text:
        refuse_other_widths(parts, config.embed_dim)
    model = models.create_model(args.model, **overrides)
    if args.medclip_weights:
        if not models.is_medclip(model.config):
            raise ValueError(f"--medclip-weights fits the MEDCLIP_* and MEDSLIP_* models, not {args.model}")
        models.initialise(model, args.medclip_weights)
        log.info(f"{args.model}: towers loaded from {args.medclip_weights}")
    elif args.init and not parts:
        models.initialise(model, args.init, tokenizer if model.objective.text else None)
        log.info(f"{args.model}: weights loaded from {args.init}")
    for part in parts:
        sources.load(part, model)
        log.info(f"{args.model}: {part.name} loaded")
    if expected:
        pretrained_towers.load_vision(model, args.vision_weights)
        model.preprocess = replace(model.preprocess, mean=expected["mean"], std=expected["std"])
        log.info(f"{args.model}: image tower {model.config['vision_tower']} loaded from {args.vision_weights}")
    if bert:
        if not model.objective.text:
            raise ValueError(f"--text-weights is for models that read captions, not {args.model}")
        pretrained_towers.load_text(model, args.text_weights)
        log.info(f"{args.model}: text tower loaded from {args.text_weights}")
    if parts and model.objective.text and not (own_text or bert):
        log.info(f"{args.model}: the text tower, CLIP's, starts from fresh weights: --text-weights gives it others")
    if not (args.medclip_weights or args.init or expected or bert or parts):
        log.info(f"{args.model}: no weights given, every parameter starts from its initial distribution")
    if args.freeze:
        model.freeze(args.freeze)
    if args.hold_batchnorm:
        held = model.hold_batchnorm()
        if not held:
            raise ValueError(f"--hold-batchnorm: {model.config['vision_tower']} has no BatchNorm")
        log.info(f"image tower: {held} BatchNorm layers keep their statistics")
    if args.shared_view:  # what is compared with the caption is also the first of the two views
        model.objective = replace(model.objective, inputs=("image", "text", "view2"))
    if args.patch_dropout:
        drop_patches(model.visual, model.config["vision_tower"], args.patch_dropout)
    if args.grad_checkpointing:
        model.checkpoint_gradients()
    if args.lora:
        adapt_towers(args, model)
    return model, tokenizer if model.objective.text else None


def adapt_towers(args: argparse.Namespace, model: models.ImageModel) -> None:
    """--lora; a tower that starts from no weights has nothing to adapt, which a warning says."""
    said = lora.adapt_model(model, args.lora)
    whole = args.init or args.medclip_weights or args.resume
    given = {"image": whole or args.vision_weights, "text": whole or args.text_weights}
    if fresh := [side for side in model.parts if not given[side] and side != args.freeze]:
        log.warning(f"--lora holds the {' and the '.join(fresh)} tower at random weights: no file is given for it")
    log.info(said)


def other_libraries(args: argparse.Namespace) -> list[sources.Found]:
    """What the flags name of other libraries' models: one as a whole, and single towers of others."""
    found = []
    if args.init and sources.library_of(args.init):
        if args.model.lower() not in models.OBJECTIVES:
            generic = ", ".join(map(str.upper, models.OBJECTIVES))
            raise ValueError(
                f"--init {args.init} brings towers of its own: --model is one of {generic}, not {args.model}"
            )
        found.append(sources.read_source(args.init))
    if sources.library_of(args.vision_weights) in ("open-clip", "transformers", "hub"):
        found.append(sources.read_source(args.vision_weights).side("image"))
    if args.text_weights and sources.library_of(args.text_weights) and not reads_as_medclip(args):
        found.append(sources.read_source(args.text_weights).side("text"))
    if args.vision_tower and any(part.has_image for part in found):
        raise ValueError(f"--vision-tower {args.vision_tower}: the image tower comes from the weights that are named")
    return found


def reads_as_medclip(args: argparse.Namespace) -> bool:
    """Whether --text-weights goes into MedCLIP's text tower, which averages three layers of a BERT: in a model whose
    towers are named, where it fits. All else is transformers' own module, with the mean of the last layer.
    """
    if args.model.lower() in models.OBJECTIVES or sources.library_of(args.text_weights) != "transformers":
        return False
    return pretrained_towers.is_medclips(args.text_weights)


def refuse_other_widths(parts: list[sources.Found], width: int) -> None:
    """ValueError for towers that end in embeddings of another width than the model's."""
    for part in parts:
        if (own := part.config.get("embed_dim", width)) != width:
            raise ValueError(
                f"{part.name} gives embeddings of {own} numbers, and the other side of this model {width}: beside it a "
                "tower works that has no last layer of its own, such as a BERT of transformers or a tower of timm"
            )


def at_length(tokenizer: Any, length: int) -> Tokenizer:
    """The same for captions of so many tokens at most."""
    if tokenizer.context_length == length:
        return tokenizer
    return create_tokenizer({**tokenizer.spec(), "context_length": length})


def build_tokenizer(args: argparse.Namespace, config: models.ModelConfig, bert: dict | None = None) -> Tokenizer:
    """The text tower's; `bert` are the settings of a WordPiece vocabulary that comes with --text-weights."""
    if bert:
        return WordPieceTokenizer(context_length=config.context_length, **bert)
    if config.text_tower != "bert" or not args.bert_vocab:
        if config.text_tower == "bert" and args.medclip_weights:
            raise ValueError("--medclip-weights needs --bert-vocab: the vocab.txt of Bio_ClinicalBERT (28,996 lines)")
        if config.text_tower == "bert":
            log.info(f"{args.model}: no --bert-vocab, so the text tower reads CLIP's vocabulary")
        return SimpleTokenizer(context_length=config.context_length)
    tokenizer = WordPieceTokenizer(args.bert_vocab, config.context_length)
    if args.medclip_weights and tokenizer.vocab_size != models.BERT_VOCABULARY:
        raise ValueError(
            f"--bert-vocab {args.bert_vocab} has {tokenizer.vocab_size} tokens, MedCLIP's text tower "
            f"{models.BERT_VOCABULARY}: give the vocab.txt of Bio_ClinicalBERT"
        )
    return tokenizer


def pretrained_model(args: argparse.Namespace) -> tuple[models.ImageModel, Tokenizer | None]:
    """For --evaluate: model and tokenizer as their checkpoint describes them, by default this run's best."""
    own = [path for name in ("checkpoint_best.pt", "checkpoint.pt") if (path := Path(args.output_dir) / name).exists()]
    path = args.resume or args.init or args.medclip_weights or (own[0] if own else None)
    if path is None:
        raise ValueError(
            f"--evaluate needs weights: --resume, --init or --medclip-weights; there is no checkpoint in "
            f"{args.output_dir}"
        )
    loaded = models.load_pretrained(path, bert_vocab=args.bert_vocab or None, text_pooling=args.text_pooling)
    if loaded.model.objective.text and loaded.tokenizer is None:
        raise ValueError("MedCLIP's weights need --bert-vocab: the vocab.txt of Bio_ClinicalBERT (28,996 lines)")
    log.info(f"evaluating {loaded.source}")
    return loaded.model, loaded.tokenizer


def build_reader(args: argparse.Namespace, split: str, caption_filter: str, quiet: bool = False) -> Reader:
    """The pairs of a split as the flags name them; what the reader found is logged unless `quiet`."""
    if not args.root:
        raise ValueError(f"--root is missing: the folder of the {args.dataset} dataset")
    # The published default belongs to yfcc15m alone.
    metadata = "" if args.dataset != "yfcc15m" and args.metadata == "yfcc15m.pkl" else args.metadata
    try:
        reader = datasets.create_reader(
            args.dataset,
            args.root,
            metadata,
            split,
            caption_filter,
            cache_dir=args.cache_dir,
            val_fraction=args.val_fraction,
            by_image=began_by_image(args),
            named=PairColumns(
                args.image_column, tuple(args.caption_columns), study=args.study_views and split == "train"
            ),
        )
    except FileNotFoundError as error:
        if args.dataset != "yfcc15m":
            raise
        others = ", ".join(name for name in datasets.READERS if name != "yfcc15m")
        raise FileNotFoundError(f"{error}; if it is not YFCC15M, say by --dataset what it is: {others}") from error
    for line in () if quiet else reader.log:
        log.info(f"{args.dataset} {split}: {line}")
    return reader


def began_by_image(args: argparse.Namespace) -> bool:
    """Whether the run that is continued or evaluated holds out images one by one, and not whole patients.

    Runs of versions that knew no patients do, and those whose table had no column of them when they began.
    """
    if args.dataset != "csv":
        return False
    begun = [args.resume, args.init if args.evaluate else "", *sorted(Path(args.output_dir).glob("checkpoint*.pt"))]
    for path in filter(None, begun):
        with suppress(ValueError, FileNotFoundError):  # which is said where the weights are read
            settings = load_checkpoint(path, mmap=True).get("settings")
            if isinstance(settings, dict):
                return not upgraded(settings)["held out by"]
    return False


@dataclass
class Validation:
    """What a run is validated on: nothing, where neither is there."""

    readers: dict[str, Reader]  # for retrieval: `val` as the caption filter leaves it, `val_full` all of it
    zero_shot: downstream.ZeroShotSet | None


def build_validation(args: argparse.Namespace, model: models.ImageModel) -> Validation:
    """The validation split and the labelled set, as far as the objective has a use for them and they are there."""
    if not model.objective.validation:
        log.info("validation: nothing measures this objective on held-out data; the last epoch counts as the best")
        return Validation({}, None)
    readers = {}
    if "retrieval" in model.objective.validation:
        readers = retrieval_readers(args)
    zero_shot = None
    if "zero-shot" in model.objective.validation:
        try:
            zero_shot = downstream.load_zeroshot_set(args.zeroshot_set, model.preprocess, args.catalog)
        except FileNotFoundError as error:
            log.info(f"validation: no zero-shot classification ({error})")
    return Validation(readers, zero_shot)


def retrieval_readers(args: argparse.Namespace) -> dict[str, Reader]:
    """Readers of the validation split by name; none, with a notice, where the dataset has no such split."""
    if "validation" not in datasets.READERS[args.dataset].splits:
        log.info(f"validation: {args.dataset} has no validation pairs, so there is no retrieval")
        return {}
    readers = {}
    try:
        readers["val"] = build_reader(args, "validation", args.caption_filter)
    except (FileNotFoundError, NoSplit) as error:
        log.info(f"validation: no retrieval ({error})")
        return {}
    except NothingKept as error:
        log.info(f"validation: {error}, so all candidates choose the best checkpoint")
    if args.caption_filter != "all":
        readers["val_full"] = build_reader(args, "validation", "all", quiet=True)
    return readers


def build_loader(
    args: argparse.Namespace,
    reader: Reader,
    model: Any,
    tokenizer: Tokenizer | None,
    processes: Processes,
) -> DataLoader:
    """Batches of this rank, the same ones whatever the number of workers and ranks."""
    dataset = datasets.ContrastiveDataset(
        reader,
        model.objective.inputs,
        model.preprocess,
        args.seed,
        bad_samples=Path(args.output_dir) / "bad_samples.txt",
        max_bad_fraction=args.max_bad_fraction,
        colour_later=processes.device.type == "cuda",
        identities=args.mask_duplicates,
        sentences=tokenizer if args.sentences else None,
    )
    return loader.make_loader(
        dataset,
        workers=loader.loader_processes(args.workers, processes),
        device=processes.device,
        batch_sampler=datasets.GlobalBatchSampler(
            len(reader), args.batch_size, processes.rank, processes.world_size, args.seed
        ),
        collate=datasets.Collate(tokenizer, trim=model.objective.text and not model.text.reads_padding),
        persistent=True,
        generator=torch.Generator(),  # its own, so that starting a loader leaves dropout's numbers alone
    )


def compiles(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the towers are compiled: as the flag says, else where it pays."""
    return not args.shard and utils.compilation_pays(device) if args.compile is None else args.compile


@dataclass
class Learner:
    """What one optimizer step takes beside its data."""

    args: argparse.Namespace
    processes: Processes
    model: Any  # the bare models.ImageModel
    wrapped: nn.Module  # what a training step calls: the model, or what averages its gradients over the processes
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager]
    scaler: torch.amp.GradScaler


@dataclass
class Run(Learner):
    """The parts of a run that the epoch loop, validation and checkpoints share."""

    tokenizer: Tokenizer | None
    loader: DataLoader
    sampler: datasets.GlobalBatchSampler
    steps_per_epoch: int
    writer: MetricWriter
    settings: dict  # compared when a run is continued
    epoch: int = 0
    step_in_epoch: int = 0  # updates done in this epoch
    best: float = -math.inf  # highest validation score so far
    epoch_sums: list[float] = field(default_factory=list)  # sums of the metrics over this epoch, then their count
    last_save: float = field(default_factory=time.monotonic)
    pace: float = 0.0  # seconds of a step, as the ranks measured it last

    @property
    def step(self) -> int:
        """Updates done in all epochs."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def add(self, sums: Sequence[float]) -> None:
        """To the epoch's sums: of the metrics and, last, of their number."""
        self.epoch_sums = [total + value for total, value in zip(self.epoch_sums, sums, strict=True)]


def prepare_learner(args: argparse.Namespace, processes: Processes, model: Any) -> Learner:
    """Model on its device and over the processes, compiled where that pays, with loss, optimizer and precision."""
    if compiles(args, processes.device) and processes.precision == distributed.ONEDNN:
        processes = replace(processes, precision="fp32")  # what is compiled has products of its own
    model = onednn.place(distributed.synchronise_batchnorm(model, processes), processes)
    if not args.shard:  # FSDP2 takes contiguous parameters only
        model.to(memory_format=torch.channels_last)
    if compiles(args, processes.device):
        # With --accum-negatives full the second pass must draw the first one's dropout, which only eager numbers do.
        utils.compile_towers(model, options={"fallback_random": args.accum_negatives == "full"})
    wrapped = model
    if args.shard:
        distributed.shard(model, processes)
    elif args.accum_negatives == "micro":  # `full` calls towers and heads by themselves
        wrapped = distributed.replicate(model, processes)
    optimizer = torch.optim.AdamW(
        utils.parameter_groups(model, args.wd), lr=args.lr, betas=tuple(args.betas), eps=args.eps, fused=True
    )
    settings = losses.LossSettings(
        args.ssl_scale, args.ssl_temp, args.gather_with_grad, args.mask_duplicates, args.study_views
    )
    loss = model.objective.loss(settings)
    return Learner(args, processes, model, wrapped, loss, optimizer, processes.autocast, processes.scaler())


def build_run(
    args: argparse.Namespace,
    processes: Processes,
    writer: MetricWriter,
    model: models.ImageModel,
    tokenizer: Tokenizer | None,
    reader: Reader,
) -> Run:
    """A run at its first step."""
    if args.batch_size * processes.world_size < 2:
        raise UsageError("in a batch of 1 there is nothing to contrast a pair with: --batch-size 2 or more")
    learner = prepare_learner(args, processes, model)
    utils.seed_everything(args.seed + processes.rank)  # dropout differs between ranks
    batches = build_loader(args, reader, learner.model, tokenizer, processes)
    sampler: Any = batches.batch_sampler
    return Run(
        **vars(learner),
        tokenizer=tokenizer,
        loader=batches,
        sampler=sampler,
        steps_per_epoch=math.ceil(len(sampler) / args.update_freq),
        writer=writer,
        settings=resume_settings(args, learner.model, tokenizer, processes, reader),
        epoch=args.start_epoch,
    )


def record_settings(args: argparse.Namespace, run: Run, n_pairs: int) -> None:
    """Everything that determines this run, written before its first step, and the lines a person wants to see."""
    world = run.processes.world_size
    effective = args.batch_size * args.update_freq * world
    derived = {
        "world_size": world,
        "device": str(run.processes.device),
        "precision": run.processes.precision,
        "training_pairs": n_pairs,
        "loader_processes": run.loader.num_workers,
        "compiled": compiles(args, run.processes.device),
        "global_batch": args.batch_size * world,
        "effective_batch": effective,
        "steps_per_epoch": run.steps_per_epoch,
        "total_steps": run.steps_per_epoch * args.epochs,
        "learning_rate": args.lr,
        "model_config": run.model.config,
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    if run.processes.is_main:
        settings = {"args": stored_args(args), "derived": derived, "versions": versions()}
        utils.write_json(Path(args.output_dir) / SETTINGS, settings)
    log.info(f"settings: {given_flags(get_args_parser(), args)}; all of them are in {SETTINGS}")
    log.info(", ".join(f"{k} {v}" for k, v in versions().items()))
    log.info(f"weight decay: {utils.describe_groups(run.optimizer.param_groups)}")
    if run.model.objective.sigmoid:
        scale, bias = run.model.logit_scale.exp().item(), run.model.logit_bias.item()
        log.info(f"the sigmoid loss goes on from scale {scale:.4g} and bias {bias:.4g}")
    log.info(
        f"{n_pairs:,} pairs; {args.batch_size} x {args.update_freq} micro-batch(es) x {world} process(es) = effective "
        f"batch {effective}; {run.steps_per_epoch} steps an epoch; learning rate {args.lr:g} (not scaled)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def resume_settings(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer | None, processes: Processes, reader: Reader
) -> dict:
    """What is compared when the run is continued, as JSON would hold it."""
    settings = {key: getattr(args, key) for key in RESUME_SETTINGS}
    settings |= {
        "precision": distributed.wanted_precision(args),
        "model": args.model,
        "global_batch": args.batch_size * processes.world_size,
        "pairs": len(reader),
        "images and captions": reader.fingerprint(),
        "held out by": reader.held_out_by,
        **{f"model.{k}": v for k, v in model.config.items()},
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.spec()).encode()).hexdigest() if tokenizer else None,
    }
    return json.loads(json.dumps(settings))  # tuples and lists compare equal after a round trip


def save(run: Run, is_best: bool = False) -> None:
    """Checkpoint the run as it stands; every rank calls this."""
    random_states = distributed.gather_objects(run.processes, utils.random_state(run.processes.device))
    weights, optimizer = distributed.training_state(run.model, run.optimizer)
    weights = lora.stored(weights)
    run.last_save = time.monotonic()
    if not run.processes.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        **weights,
        "optimizer": optimizer,
        "scaler": run.scaler.state_dict(),
        "best_acc1": run.best,  # SLIP's name for it, which stays
        "epoch_sums": run.epoch_sums,
        "random": random_states,
        "settings": run.settings,
        "precision": run.processes.precision,
        "args": json.loads(json.dumps(stored_args(run.args), default=str)),
        "model": {"name": run.model.name, "config": run.model.config},
        "preprocess": run.model.preprocess.to_dict(),
        "tokenizer": run.tokenizer.spec() if run.tokenizer else None,
        "versions": versions(),
    }
    output_dir = Path(run.args.output_dir)
    save_training_checkpoint(state, output_dir, run.step, is_best, run.args.keep_last)
    if is_best and exports_medclip(run):
        from towers import medclip

        (output_dir / "medclip_export").mkdir(exist_ok=True)
        exported = medclip.export_medclip(run.model, weights["state_dict"])
        save_checkpoint(exported, output_dir / "medclip_export" / medclip.WEIGHTS_NAME)


def exports_medclip(run: Run) -> bool:
    """Whether MedCLIP's own code could load this model: both its towers, and its text tower's own vocabulary."""
    return models.is_medclip(run.model.config) and run.tokenizer is not None and run.tokenizer.kind == "bert-wordpiece"


def resume(run: Run) -> None:
    """Continue from --resume, else from the newest checkpoint in the output directory, if there is one."""
    output_dir = Path(run.args.output_dir)
    state, source = find_training_checkpoint(output_dir), f"the run in {output_dir}"
    if run.args.resume:
        named = load_checkpoint(run.args.resume)
        if state is not None and state.get("step", 0) >= named.get("step", 0):
            log.info(
                f"{source} is as far as {run.args.resume} or further, so it is continued; to go back, "
                "choose another --output-dir"
            )
        else:
            state, source = named, run.args.resume
            log.info(f"resuming from {source}")
    if state is None:
        return
    refuse_finetuned(state, run.args.resume or output_dir / "checkpoint.pt")
    if "settings" not in state or "preprocess" not in state:
        raise ValueError(
            f"{source} was not written by this code and cannot be continued; --init starts a new run from its weights"
        )
    theirs = upgraded(state["settings"])
    differ = differences(theirs, run.settings)
    # That of --vision-weights, which a tower cannot say itself.
    if state["preprocess"] != run.model.preprocess.to_dict():
        differ.append(f"preprocess: {state['preprocess']} there, {run.model.preprocess.to_dict()} now")
    if differ:
        longer = ""
        if state["epoch"] >= theirs["epochs"]:  # how a finished run goes on
            longer = (
                "; it is finished, and its schedule has reached --lr-end: to train it further, start a new run from it "
                f"with --init {run.args.resume or output_dir / 'checkpoint.pt'} and another --output-dir, which warms "
                "up and decays again over its own --epochs (--warmup-epochs 0 and a low --lr for a gentle one)"
            )
        raise ValueError(
            f"cannot continue {source}, its settings differ (choose another --output-dir for a new run): "
            + "; ".join(differ)
            + longer
        )
    distributed.load_training_state(run.model, run.optimizer, lora.restored(state), state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    if not compiles(run.args, run.processes.device):
        wanted, earlier = distributed.wanted_precision(run.args), state.get("precision", "fp32")
        run.processes = onednn.continued(run.processes, wanted, earlier, run.model)
    run.epoch, run.step_in_epoch, run.best = state["epoch"], state["step_in_epoch"], state["best_acc1"]
    run.epoch_sums = list(state["epoch_sums"])
    if not (output_dir / "checkpoint_best.pt").exists():
        run.best = -math.inf  # the best of another folder is not here to be beaten
    if len(state["random"]) == run.processes.world_size:
        utils.set_random_state(state["random"][run.processes.rank], run.processes.device)
    else:
        log.info("the number of processes has changed: dropout goes on from fresh random numbers")
    if run.epoch >= run.args.epochs:
        log.info(f"this run is finished: it has done {run.epoch} of {run.args.epochs} epochs")
        return
    log.info(
        f"continuing in epoch {run.epoch + 1} of {run.args.epochs}, step {run.step_in_epoch} of {run.steps_per_epoch}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums since the last log line. They stay on the device, so that no step waits for it."""

    metrics: Tensor  # (K,), each metric over the micro-batches
    count: Tensor  # (), micro-batches with finite metrics
    skipped: Tensor  # (), updates whose gradient was not finite

    @classmethod
    def zero(cls, k: int, device: torch.device) -> Totals:
        """For `k` metrics, before the first step."""
        return cls(torch.zeros(k, device=device), torch.zeros((), device=device), torch.zeros((), device=device))

    def flat(self) -> Tensor:
        """(K + 2,): the metrics' sums and their count, as `Run.epoch_sums` has them, then the updates skipped."""
        return torch.cat([self.metrics, self.count[None], self.skipped[None]])


TOLD = ("identities", "studies")  # of a batch, which the model does not see


def accumulate_micro(
    run: Run, micro_batches: list[list[Tensor]], told: list[dict[str, Tensor]] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the mean loss of the micro-batches, each contrasted within itself; yields each one's metrics.

    Each weighs the same however many there are, so a short group at the end of an epoch is no weaker step.

    Args:
        micro_batches: of each the objective's inputs, (B, ...).
        told: of each what the loss asks for beside embeddings: which pairs are no negatives (B, G).
    """
    for i, inputs in enumerate(micro_batches):
        with distributed.gradient_exchange(run.wrapped, last=i == len(micro_batches) - 1):
            with run.autocast():
                outputs = run.wrapped(*inputs)
            outputs |= told[i] if told else {}
            metrics = run.loss(outputs)
            run.scaler.scale(metrics["loss"] / len(micro_batches)).backward()
        yield metrics
    distributed.average_whole_gradients(run.model, run.processes)


def accumulate_full(
    run: Run, micro_batches: list[list[Tensor]], told: list[dict[str, Tensor]] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the loss over all micro-batches as one batch, in the memory of one; yields the step's metrics.

    The towers' outputs are computed without graph, the heads and the loss see them all, and each micro-batch goes
    through the towers again, with the same dropout, to carry its part of the gradient back (Gao et al. 2021, section
    3.2, "gradient cache").
    """
    # First pass: features only. BatchNorm's statistics wait for the second, or each micro-batch would count twice.
    states, features = [], []
    with torch.no_grad(), distributed.batchnorm_statistics_kept(run.model.visual):
        for inputs in micro_batches:
            states.append(utils.random_state(run.processes.device))
            with run.autocast():
                features.append(run.model.towers(*inputs))
    leaves = [torch.cat(parts).requires_grad_() for parts in zip(*features, strict=True)]  # (k*B, ...) each
    with run.autocast():
        outputs = run.model.heads(*leaves)
    told = told or [{}]
    outputs |= {key: torch.cat([of_batch[key] for of_batch in told]) for key in told[0]}
    metrics = run.loss(outputs)
    run.scaler.scale(metrics["loss"]).backward()  # the heads' gradients, and those of the features
    # Second pass: the same features with a graph, through which each micro-batch's part of the gradient flows on.
    after = utils.random_state(run.processes.device)
    sizes = [len(inputs[0]) for inputs in micro_batches]
    parts = [leaf.grad.split(sizes) for leaf in leaves if leaf.grad is not None]  # every leaf has one
    for inputs, state, grads in zip(micro_batches, states, zip(*parts, strict=True), strict=True):
        utils.set_random_state(state, run.processes.device)  # the first pass's dropout once more
        with run.autocast():
            outputs = run.model.towers(*inputs)
        learning = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        if learning:  # none where the towers are frozen
            features_of_learning, gradients = zip(*learning, strict=True)
            torch.autograd.backward(features_of_learning, gradients)
    utils.set_random_state(after, run.processes.device)
    # DistributedDataParallel averages what runs through its own forward, which the towers did not.
    distributed.average_gradients(run.model.parameters(), run.processes)
    yield metrics


def to_device(batch: dict[str, Any], key: str, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Tokens as they are; images finished and normalised there, (B, 3, S, S), the channels innermost in memory."""
    x = batch[key].to(device, non_blocking=True)
    if x.dtype != torch.uint8:
        return x
    if f"{key}_colour" in batch:
        x = apply_colour_batch(x, batch[f"{key}_colour"])
    return preprocess.normalise(x).to(memory_format=torch.channels_last)


def update(run: Run, batches: list[dict[str, Any]], totals: Totals) -> None:
    """One optimizer step over micro-batches, whose metrics are added to `totals`.

    An update whose gradient is not finite is skipped, decided on the device and alike on all ranks. An error leaves
    model and optimizer as they were before the step.
    """
    args, model, device = run.args, run.model, run.processes.device
    lr = utils.cosine_lr(
        run.step,
        total=run.steps_per_epoch * args.epochs,
        base=args.lr,
        final=args.lr_end,
        warmup=args.warmup_epochs * run.steps_per_epoch,
        start=args.lr_start,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    # Data to the device, and what forward passes change set aside: BatchNorm's running statistics.
    micro_batches = [[to_device(b, key, model.preprocess, device) for key in model.objective.inputs] for b in batches]
    told = [{key: b[key].to(device, non_blocking=True) for key in TOLD if key in b} for b in batches]
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    before = [b.clone() for b in buffers]

    # Gradients.
    accumulate = accumulate_full if args.accum_negatives == "full" else accumulate_micro
    try:
        found = list(accumulate(run, micro_batches, told))
        finite = distributed.gradients_finite(model)
    except Exception:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
        raise

    # The step, or none of it.
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
    if not run.scaler.is_enabled():
        optimizer: Any = run.optimizer
        optimizer.found_inf = (~finite).float()  # the fused optimizer leaves everything as it is where this is 1
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    # CLIP, section 2.5. A sigmoid's scale is free, as in its paper: the bias learns along and balances it, and
    # published ones are above 100.
    if model.objective.text and not model.objective.sigmoid:
        with torch.no_grad():
            model.logit_scale.clamp_(0, models.LOGIT_SCALE_MAX)
    run.step_in_epoch += 1

    # Metrics.
    for metrics in found:
        values = torch.stack([metrics[key].detach().float() for key in model.objective.metrics])
        usable = values.isfinite().all()
        totals.metrics += torch.where(usable, values, 0)
        totals.count += usable
    totals.skipped += ~finite


def train_one_epoch(run: Run, stop: StopRequest) -> bool:
    """The rest of the epoch that `run` stands in; False when a signal ended it early, after a checkpoint."""
    args, keys, device = run.args, run.model.objective.metrics, run.processes.device
    run.wrapped.train()
    run.sampler.set_epoch(run.epoch, start_step=run.step_in_epoch * args.update_freq)
    batches = loader.batches(run.loader)
    totals = Totals.zero(len(keys), device)
    run.epoch_sums = run.epoch_sums or [0.0] * (len(keys) + 1)
    shown = run.processes.is_main and sys.stderr.isatty()
    bar = tqdm(
        desc=f"epoch {run.epoch + 1}",
        total=run.steps_per_epoch,
        initial=run.step_in_epoch,
        leave=False,
        disable=not shown,
    )
    interval, rhythm = Interval(run), Rhythm(run.processes, stop, args.print_freq, run.pace)
    with closing(bar):
        while run.step_in_epoch < run.steps_per_epoch:
            random_numbers = utils.random_state(device)  # of the last whole step
            try:
                with interval.waiting():
                    micro_batches = list(islice(batches, args.update_freq))
                interval.images += sum(len(batch["index"]) for batch in micro_batches) * run.processes.world_size
                update(run, micro_batches, totals)
            except Exception:
                utils.set_random_state(random_numbers, device)
                save_last_step(run, totals)
                raise
            bar.update()
            if not rhythm.due(run.step_in_epoch, run.steps_per_epoch):
                continue

            # The one point of the interval at which the host waits for the device.
            save_due = run.processes.is_main and time.monotonic() - run.last_save > 60 * args.save_every_minutes
            meeting = rhythm.meet(totals.flat(), save_due)
            run.pace = rhythm.pace
            totals = Totals.zero(len(keys), device)
            *sums, skipped = meeting.sums
            run.add(sums)
            interval.log(means(keys, sums), skipped / run.processes.world_size)
            interval = Interval(run)
            if meeting.stopping:
                save(run)
                log.info(
                    f"stopped by {stop.name}: checkpoint written in epoch {run.epoch + 1}, step {run.step_in_epoch}; "
                    "the same command continues from it"
                )
                return False
            if meeting.save_due and run.step_in_epoch < run.steps_per_epoch:
                save(run)
    return True


def means(keys: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Each metric's mean from the metrics' sums and, last, how many were summed; NaN where none was."""
    *totals, count = sums
    return {key: total / count if count else math.nan for key, total in zip(keys, totals, strict=True)}


def save_last_step(run: Run, totals: Totals) -> None:
    """A checkpoint of the last whole step when the next one has failed, in its data or otherwise.

    Of one process: where there are several, a lost one has taken its random numbers with it, without which the run
    could not be continued exactly, and the last checkpoint of all of them is what there is.
    """
    if run.processes.world_size > 1 or not run.step_in_epoch:
        return
    run.add(totals.flat().tolist()[:-1])
    try:
        save(run)
    except Exception as error:  # the first one is what the user needs to see
        log.warning(f"no checkpoint of the last step: {error}")
    else:
        log.info(f"checkpoint of the last whole step written: epoch {run.epoch + 1}, step {run.step_in_epoch}")


class Interval:
    """The time between two log lines."""

    def __init__(self, run: Run):
        self.run, self.first = run, run.step_in_epoch
        self.since, self.waited = time.monotonic(), 0.0  # s; for data
        self.images = 0  # of all processes

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data, inside the block."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    def log(self, metrics: dict[str, float], skipped: float) -> None:
        """One line and one row about the updates since the last.

        Raises:
            FloatingPointError: none of the updates was finite.
        """
        run, args = self.run, self.run.args
        steps, seconds = run.step_in_epoch - self.first, time.monotonic() - self.since
        scale = {"logit_scale": run.model.logit_scale.exp().item()} if run.model.objective.text else {}
        if run.model.objective.sigmoid:
            scale["logit_bias"] = run.model.logit_bias.item()
        row = {
            "epoch": run.epoch,
            **metrics,
            **scale,
            "lr": run.optimizer.param_groups[0]["lr"],
            "samples_per_second": self.images / seconds,
            "waiting_for_data": self.waited / seconds,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if run.processes.device.type == "cuda" else 0.0,
            "skipped_updates": skipped,
        }
        left = (run.steps_per_epoch * args.epochs - run.step) * seconds / steps
        parts = "  ".join(f"{k} {v:.4g}" for k, v in {**metrics, **scale}.items())
        log.info(
            f"epoch {run.epoch + 1}/{args.epochs} [{run.step_in_epoch}/{run.steps_per_epoch}]  {parts}  "
            f"lr {row['lr']:.3g}  {row['samples_per_second']:.0f} samples/s  data {100 * row['waiting_for_data']:.0f}%"
            + (f"  mem {row['memory_gib']:.1f} GiB" if row["memory_gib"] else "")
            + f"  left {format_seconds(left)}"
        )
        run.writer.row("train", run.step, row)
        if skipped:
            log.warning(f"{skipped:.0f} of {steps} updates had a gradient that is not finite and were skipped")
        if skipped >= steps and not (run.scaler.is_enabled() and math.isfinite(metrics["loss"])):
            raise FloatingPointError(
                f"loss or gradient not finite in all {steps} updates up to epoch {run.epoch + 1}, step "
                f"{run.step_in_epoch}: lower --lr, or look at the data; the last checkpoint is intact"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def validate(
    args: argparse.Namespace, processes: Processes, model: Any, tokenizer: Any, validation: Validation
) -> tuple[dict, float | None]:
    """Metrics of the whole validation split, each sample once on any number of processes.

    Returns them and the score that chooses the best checkpoint: the mean of recall at 1, 5 and 10 in both directions,
    else zero-shot accuracy, else None.
    """
    row, score = {}, None
    loading = Loading(args.batch_size, min(args.workers, 4), args.skip_broken, processes)
    for name, reader in validation.readers.items():
        with distributed.unsharded(model):
            images, texts, captions = embed_pairs(model, reader, model.preprocess, tokenizer, loading)
        scores = percent(retrieval_metrics(images, texts, captions))
        row |= {f"{name}_{k}": v for k, v in scores.items()}
        recalls = [v for k, v in scores.items() if k[:5] in ("i2t_r", "t2i_r")]
        if name == "val" or "val" not in validation.readers:
            score = sum(recalls) / len(recalls)
        log.info(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    if validation.zero_shot is not None:
        with distributed.unsharded(model):
            scores = percent(classify_zeroshot(model, tokenizer, validation.zero_shot, loading))
        row |= {f"{args.zeroshot_set}_{k}": v for k, v in scores.items()}
        score = scores["top1"] if score is None else score
        log.info(f"zero-shot {args.zeroshot_set}: {scores['metric']} {scores['score']:.2f}")
    return row, score


def finish_epoch(run: Run, validation: Validation) -> dict:
    """Validate where it is due, checkpoint, and keep the best; returns the epoch's scores."""
    args, done = run.args, run.epoch + 1
    row = {"epoch": run.epoch, **means(run.model.objective.metrics, run.epoch_sums)}
    score = None
    if done % args.eval_freq == 0 or done == args.epochs:
        save(run)  # validation does not answer signals; a kill in it must not cost the end of the epoch
        with torch.compiler.set_stance("force_eager"):  # other shapes, seen a few times: not worth compiling for
            scores, score = validate(args, run.processes, run.model, run.tokenizer, validation)
        row |= scores
    # Where nothing can be measured the last epoch counts as the best.
    is_best = score > run.best if score is not None else not validation.readers and validation.zero_shot is None
    run.best = score if is_best and score is not None else run.best
    run.epoch, run.step_in_epoch, run.epoch_sums = done, 0, []
    run.writer.row("epoch", run.step, {**row, "best": run.best if math.isfinite(run.best) else None})
    save(run, is_best)
    return row


def evaluate(args: argparse.Namespace, processes: Processes) -> dict[str, float]:
    """Validate a checkpoint, once the processes have met."""
    model, tokenizer = pretrained_model(args)
    validation = build_validation(args, model)
    return validate(args, processes, onednn.place(model, processes), tokenizer, validation)[0]


def train(args: argparse.Namespace, processes: Processes, writer: MetricWriter) -> dict:
    """All epochs that are left, once the processes have met."""
    utils.seed_everything(args.seed)  # all ranks start from the same weights
    model, tokenizer = build_model(args)
    with distributed.main_process_first(processes):
        reader = build_reader(args, "train", args.caption_filter)
        validation = build_validation(args, model)
    run = build_run(args, processes, writer, model, tokenizer, reader)
    resume(run)  # first, because a refusal leaves the run's files as they are
    record_settings(args, run, len(reader))
    refuse_full_disk(Path(args.output_dir), run.model.parameters(), args.keep_last)

    scores = {}
    with StopRequest(processes, lambda: time.monotonic() - run.last_save) as stop:
        while run.epoch < args.epochs:
            if not train_one_epoch(run, stop):
                return {**scores, "stopped_by": stop.name}
            scores = finish_epoch(run, validation)
    return scores


WARM_STEPS, MEASURED_STEPS = 2, 5  # of --estimate; the first ones compile


def estimate(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """What a run with these flags takes, from a few of its steps; nothing stays in --output-dir.

    Returns samples_per_second, waiting_for_data (a fraction), memory_gib (of this process), hours (of the training
    without validation), steps, and disk_gb.
    """
    utils.seed_everything(args.seed)
    model, tokenizer = build_model(args)
    with distributed.main_process_first(processes):
        reader = build_reader(args, "train", args.caption_filter)
    with tempfile.TemporaryDirectory() as folder:  # for the names of images that cannot be read
        kept = argparse.Namespace(**{**vars(args), "output_dir": folder})
        run = build_run(kept, processes, MetricWriter(Path(folder), False), model, tokenizer, reader)
        run.wrapped.train()
        totals = Totals.zero(len(run.model.objective.metrics), processes.device)
        # While the first steps compile, the loader's processes fill their queue: it is emptied before the clock starts.
        ahead = run.loader.num_workers * (run.loader.prefetch_factor or 0)
        warm = min(WARM_STEPS + math.ceil(ahead / args.update_freq), run.steps_per_epoch - 1)
        last = warm + max(MEASURED_STEPS, math.ceil(run.loader.num_workers / args.update_freq))
        batches, interval = loader.batches(run.loader), Interval(run)
        for step in range(min(last, run.steps_per_epoch)):
            if step == warm:
                totals.flat().tolist()  # waits for the device
                interval = Interval(run)
            with interval.waiting():
                micro_batches = list(islice(batches, args.update_freq))
            interval.images += sum(len(batch["index"]) for batch in micro_batches) * processes.world_size
            update(run, micro_batches, totals)
        totals.flat().tolist()
        seconds, measured = time.monotonic() - interval.since, run.step_in_epoch - interval.first
    steps = run.steps_per_epoch * (args.epochs - args.start_epoch)
    found = {
        "samples_per_second": interval.images / seconds,
        "waiting_for_data": interval.waited / seconds,
        "memory_gib": peak_memory(processes.device),
        "steps": steps,
        "hours": steps * seconds / measured / 3600,
        "disk_gb": (args.keep_last + 2) * checkpoint_bytes(run.model.parameters()) / 1e9,
    }
    log.info(
        f"estimate from {measured} steps on {utils.device_name(processes.device)} in {processes.precision}: "
        f"{found['samples_per_second']:.3g} samples/s, {100 * found['waiting_for_data']:.0f}% of the time waiting for "
        f"data; peak memory {found['memory_gib']:.1f} GiB a process"
    )
    length = format_seconds(3600 * found["hours"])
    log.info(
        f"{len(reader):,} pairs, {run.steps_per_epoch:,} steps an epoch, {steps:,} steps: {length}, validation not "
        f"counted; up to {args.keep_last + 2} checkpoints: {found['disk_gb']:.1f} GB of disk"
    )
    return found


def peak_memory(device: torch.device) -> float:
    """GiB: what tensors took of a GPU at most, or this process of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def main(argv: list[str] | None = None) -> dict:
    """Train as the command line says; returns the last epoch's scores, and `stopped_by` where a signal came first."""
    args = parse_with_config(get_args_parser(), argv)
    check_arguments(args)
    processes = distributed.init_distributed(args)
    if args.shard and processes.world_size == 1:
        raise UsageError("--shard splits the model over several processes: start it with torchrun or submitit")
    if args.evaluate or args.estimate:  # which write nothing
        with start_logging(is_main=processes.is_main), distributed.ending_together(processes):
            return (evaluate if args.evaluate else estimate)(args, processes)
    with start_logging(is_main=processes.is_main):
        own_folder(args, "training")
        with (
            one_run(args.output_dir, processes),
            start_logging(args.output_dir, processes.is_main),
            distributed.ending_together(processes),
            closing(MetricWriter(Path(args.output_dir), processes.is_main, args.wandb, vars(args))) as writer,
        ):
            return train(args, processes, writer)


if __name__ == "__main__":
    run_script(main)
