"""A training step of main.py beside the plain one that SLIP was published with, on the same weights and batch.

    python benchmarks/bench_step.py                      the GPU's three models at 224 pixels, or a small one on a CPU
    python benchmarks/bench_step.py --models SLIP_VITB16 --batch-size 256 --largest-batch
    python benchmarks/bench_step.py --no-compile         flags of main.py apply to our step: --compile, --image-size,
                                                         --grad-checkpointing, --override ...

Ours is main.update as training calls it, from 8-bit views on; on a GPU it changes their colours, too. The plain step
gets normalised floats, runs the image tower once for each view and the text tower over all 77 tokens, writes every
attention score and every logit to memory, keeps images and convolutions contiguous, uses AdamW one parameter at a
time and fp16 with loss scaling (float32 on a CPU), and reads its loss after each step. Before anything is timed, loss
and gradients of the two are compared, dropout off, in float32, and in float64, which tells rounding from a real
difference. Runs of the two alternate.

`of peak` is the share of the speed that this device reaches in large matrix products of the same type, on a CPU by
the faster of MKL and oneDNN: the plain step's matrix and convolution FLOPs, counted by torch, over the step's time.
Ours is given the same number, though it skips padding. Captions have the lengths of ROCO's. Memory is the peak of two
steps in a process of their own, with weights and optimizer state (resident set on a CPU, the allocator's count on a
GPU).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import bench_loss
import bench_memory
import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import datasets
import distributed
import main as training
import models
import utils
from inputs.colour import draw_colour
from runtime.command_line import positive_int
from towers import clip_text, padding
from towers.padding import Packing

SMALL = [
    "--image-size",
    "64",
    "--ssl-mlp-dim",
    "1024",
    "--override",
    "vision.patch_size=8",
    "vision.depth=6",
    "text_layers=4",
]  # 65 tokens an image
DEFAULTS = {  # models, batch size, steps in a run, and flags of main.py for each kind of device
    "cuda": (["SLIP_VITB16", "MEDSLIP_VIT", "MEDSLIP_RESNET"], 128, 10, []),
    "cpu": (["SLIP_VITT16"], 16, 2, SMALL),
}
EQUAL = 1e-5
SQUARE = {"cuda": 8192, "cpu": 2048}  # side of the matrices whose product is the peak
COMPARED = 32  # samples at most in the comparison, whose numbers take up to four times the memory of fp16
SENTENCE = "axial contrast enhanced computed tomography of the chest with a round mass in the left upper lobe (arrow), "


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        choices=[name for name, config in models.MODELS.items() if config.objective == "slip"],
        help="SLIP_* and MEDSLIP_* models; naming one leaves the CPU's small sizes out",
    )
    parser.add_argument("--batch-size", type=positive_int, help="pairs a step (default: 128, on a CPU 16)")
    parser.add_argument("--runs", type=positive_int, default=5, help="timed runs of each; the median is printed")
    parser.add_argument("--steps", type=positive_int, help="steps in a run (default: 10, on a CPU 2)")
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="also double our batch until memory ends, with --grad-checkpointing where the tower can",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="memory a step may take; --largest-batch needs it on a CPU, where the batch that exceeds "
        "it is still run: leave half of the machine free",
    )
    parser.add_argument("--skip-memory", action="store_true", help="leave out the processes that measure peak memory")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)  # memory, in a process of its own
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The two steps
# ---------------------------------------------------------------------------------------------------------------------


class Ours:
    """main.py's own step: its model, optimizer, precision, and update."""

    floats = False

    def __init__(self, args: argparse.Namespace, device: torch.device):
        precision = distributed.resolve_precision(distributed.wanted_precision(args), device)
        processes = distributed.Processes(device=device, precision=precision)
        utils.seed_everything(args.seed)
        model, self.tokenizer = training.build_model(args)
        step = training.prepare_learner(args, processes, model)
        nothing: Any = None
        self.run = training.Run(
            **vars(step),
            tokenizer=self.tokenizer,
            loader=nothing,
            sampler=nothing,
            steps_per_epoch=1000,
            writer=nothing,
            settings={},
        )
        self.run.wrapped.train()
        self.model: Any = step.model
        self.trim = not self.model.text.reads_padding
        self.totals = training.Totals.zero(len(self.model.objective.metrics), device)
        self.precision, self.dtype = precision, distributed.PRECISIONS[precision]

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss without mixed precision, with gradients left on the model."""
        run = replace(self.run, autocast=nullcontext, scaler=torch.amp.GradScaler(enabled=False))
        inputs = [
            training.to_device(batch, key, self.model.preprocess, run.processes.device)
            for key in self.model.objective.inputs
        ]
        (metrics,) = training.accumulate_micro(run, [inputs])
        return metrics["loss"].detach()

    def step(self, batch: dict[str, Tensor]) -> None:
        training.update(self.run, [batch], self.totals)

    def end_of_interval(self) -> None:
        """What the loop does at each log line: the one wait for the device."""
        skipped = self.totals.skipped.item()
        self.totals = training.Totals.zero(len(self.model.objective.metrics), self.run.processes.device)
        if skipped:
            raise FloatingPointError(f"{skipped:.0f} updates were not finite")


class Plain:
    """The published way of doing the same, written plainly."""

    trim = False
    floats = True

    def __init__(self, args: argparse.Namespace, device: torch.device):
        utils.seed_everything(args.seed)
        args = argparse.Namespace(**{**vars(args), "grad_checkpointing": False})
        model, self.tokenizer = training.build_model(args)
        self.model: Any = write_scores_out(model).to(device).train()
        self.device, self.args = device, args
        self.optimizer = torch.optim.AdamW(
            utils.parameter_groups(model, args.wd),
            lr=args.lr,
            betas=tuple(args.betas),
            eps=args.eps,
            foreach=False,
            fused=False,
        )
        half = device.type == "cuda" and distributed.wanted_precision(args) != "fp32"
        self.precision, self.dtype = ("fp16", torch.float16) if half else ("fp32", torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        image, text, view1, view2 = (
            batch[key].to(self.device, non_blocking=True) for key in self.model.objective.inputs
        )
        with patch.object(padding, "WORTH", 0):  # padding is computed with
            features, text_embed = self.model.visual(image), self.model.encode_text(text)
        features1, features2 = self.model.visual(view1), self.model.visual(view2)
        outputs = self.model.heads(features, text_embed, features1, features2)
        return bench_loss.full_matrices(outputs, self.args.ssl_temp, self.args.ssl_scale)["loss"]

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def step(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.scaler.is_enabled()):
            loss = self.loss(batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the plain step's loss is not finite")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.logit_scale.data.clamp_(0, models.LOGIT_SCALE_MAX)

    def end_of_interval(self) -> None:
        pass


class OursInHalf(Ours):
    """The same in bf16, on a CPU with units for it."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        super().__init__(argparse.Namespace(**{**vars(args), "precision": "bf16"}), device)


class OursWithLora(Ours):
    """The same with --lora 8: adapters and heads learn, the towers' own weights do not."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        super().__init__(argparse.Namespace(**{**vars(args), "lora": 8}), device)


METHODS = {"ours": Ours, "plain": Plain, "bf16": OursInHalf, "lora": OursWithLora}


def methods_for(flags: argparse.Namespace, device: torch.device) -> list[str]:
    """Ours and the plain step; ours in bf16 on a CPU with units for it, unless a precision is named; ours with adapters
    where peft is there."""
    half = device.type == "cpu" and distributed.cpu_has_bf16() and distributed.wanted_precision(flags) == "auto"
    return ["ours", "plain"] + ["bf16"] * half + ["lora"] * (find_spec("peft") is not None)


def write_scores_out(model: Any) -> Any:
    """Every attention of the model as matrix product, softmax, matrix product."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm
            module.fused_attn = False
        elif hasattr(module, "set_attn_implementation"):  # transformers
            module.set_attn_implementation("eager")
        elif isinstance(module, clip_text.CausalSelfAttention):
            module.forward = partial(causal_attention, module)
    return model


def causal_attention(attention: clip_text.CausalSelfAttention, x: Tensor, packing: Packing | None = None) -> Tensor:
    """What CausalSelfAttention computes, with a mask (L, L) added to the scores (B, heads, L, L)."""
    assert packing is None
    B, L, D = x.shape
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (B, L, 3*D)
    q, k, v = qkv.view(B, L, 3, attention.heads, D // attention.heads).permute(2, 0, 3, 1, 4)
    later = torch.full((L, L), -torch.inf, device=x.device, dtype=q.dtype).triu(1)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(D // attention.heads) + later).softmax(-1)
    return attention.out_proj((weights @ v).transpose(1, 2).reshape(B, L, D))


def make_batch(method: Ours | Plain, batch_size: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Random images, and captions of ROCO's lengths, as each method's loader delivers them for `device`.

    The plain one delivers normalised floats; ours 8 bits, on a GPU with colours still to be changed.
    """
    on_gpu = device is not None and device.type == "cuda"
    g, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    shape = method.model.preprocess.shape
    views = [key for key in method.model.objective.inputs if key != "text"]
    lengths = bench_memory.caption_lengths(batch_size, seed=0)
    samples = [
        {
            **{key: torch.randint(256, (3, *shape), generator=g, dtype=torch.uint8) for key in views},
            "index": i,
            "text": (SENTENCE * (1 + length // len(SENTENCE)))[:length],
        }
        for i, length in enumerate(lengths)
    ]
    if on_gpu and not method.floats:
        samples = [
            {**sample, **{f"{key}_colour": draw_colour(rng) for key in views if key != "image"}} for sample in samples
        ]
    batch = datasets.Collate(method.tokenizer, method.trim)(samples)
    if method.floats:
        batch = as_floats(method, batch)
    return {key: x.pin_memory() if on_gpu and isinstance(x, Tensor) else x for key, x in batch.items()}


def as_floats(method: Ours | Plain, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    normalise = method.model.preprocess.normalise
    return {
        key: (normalise(x) if x.dtype == torch.uint8 else x).to(dtype).contiguous() if x.ndim == 4 else x
        for key, x in batch.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def without_dropout(*steps: Ours | Plain):
    """No random numbers in the towers inside the block."""
    rates = [
        (module, name, getattr(module, name))
        for step in steps
        for module in step.model.modules()
        for name in ("p", "drop_prob", "attention_dropout")
        if isinstance(getattr(module, name, None), float)
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def compare(ours: Ours, plain: Plain, batch_size: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Relative difference of the loss, and of all gradients as one vector; the models are left in float32."""
    plain.model.load_state_dict(ours.model.state_dict())
    losses, vectors = [], []
    for method in (ours, plain):
        batch = as_floats(method, make_batch(method, batch_size), dtype)
        method.model.to(dtype)
        # Not compiled: torch 2.11's compiler makes kernels of float64 that Triton refuses.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with without_dropout(method), exact, torch.compiler.set_stance("force_eager"):
            losses.append(method.backward(batch).item())
        grads = {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}
        vectors.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
        method.model.zero_grad()
        method.model.float()
    return abs(losses[0] - losses[1]) / abs(losses[1]), ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()


def count_flops(plain: Plain, batch_size: int) -> float:
    """FLOPs of a plain forward and backward pass: per sample in the towers, per pair of samples in the loss.

    Counted at batches 2 and 4, which determines both, so that no batch is too large to count.
    """
    counts = []
    for n in (2, 4):
        with FlopCounterMode(display=False) as counter:
            plain.backward(make_batch(plain, n))
        counts.append(counter.get_total_flops())
        plain.model.zero_grad()
    per_pair = (counts[1] - 2 * counts[0]) / 8
    return (counts[0] / 2 - 2 * per_pair) * batch_size + per_pair * batch_size**2


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second in the fastest of 20 products of two square matrices; float32 on a CPU by the faster library."""
    n = SQUARE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [F.linear]
    if device.type == "cpu" and dtype == torch.float32 and distributed.onednn_is_there():
        ways.append(distributed.onednn_linear)
    return 2 * n**3 / min(fastest_product(way, a, b) for way in ways)


def fastest_product(way: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Seconds."""
    seconds = []
    for _ in range(23):
        common.synchronise(a.device)
        start = time.perf_counter()
        way(a, b)
        common.synchronise(a.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[3:])


def time_run(method: Ours | Plain, batch: dict[str, Tensor], steps: int, device: torch.device) -> float:
    """Seconds a step."""
    common.synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        method.step(batch)
    method.end_of_interval()
    common.synchronise(device)
    return (time.perf_counter() - start) / steps


def measure_one(
    method: str, flags: argparse.Namespace, batch_size: int, limit: float | None, device: torch.device
) -> dict:
    """Peak memory and time of a few steps in this process, or {"out_of_memory": True}."""
    if method == "lora":
        import_module("peft")  # whose code is no part of a step's memory, as torch's is none
    before = common.memory_now(device)
    if limit and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            limit * 2**30 / torch.cuda.get_device_properties(device).total_memory
        )
    try:
        step = METHODS[method](flags, device)
        batch = make_batch(step, batch_size, device)
        time_run(step, batch, 2, device)
        seconds = time_run(step, batch, 2, device)
    except RuntimeError as error:  # PyTorch's OutOfMemoryError is one, and what Triton and the driver raise
        if "out of memory" not in str(error).lower():
            raise
        return {"out_of_memory": True}
    peak = common.peak_memory(device) - before
    # Measured, not enforced, on a CPU: its kernels have no common way to say that an allocation was refused.
    if limit and peak > limit * 2**30:
        return {"out_of_memory": True}
    return {"peak": peak, "seconds": seconds}


def in_own_process(method: str, name: str, batch_size: int, args: argparse.Namespace, rest: list[str]) -> dict:
    command = [
        sys.executable,
        __file__,
        "--one",
        method,
        "--models",
        name,
        "--batch-size",
        str(batch_size),
        *rest,
        *(["--cpu"] if args.cpu else []),
        *(["--memory-limit", str(args.memory_limit)] if args.memory_limit else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def largest_batch(name: str, batch_size: int, args: argparse.Namespace, rest: list[str]) -> dict:
    """Our step at the largest power-of-two multiple of `batch_size` that fits, {} where none does."""
    best, n = {}, batch_size
    while not (found := in_own_process("ours", name, n, args, rest)).get("out_of_memory"):
        best = {
            "largest_batch": n,
            "largest_batch_peak": found["peak"],
            "largest_batch_samples_per_second": n / found["seconds"],
        }
        n *= 2
    return best


def bench(name: str, batch_size: int, args: argparse.Namespace, rest: list[str], device: torch.device) -> dict:
    """All rows of one model; `rest` are flags of main.py."""
    flags = training_flags(name, rest)
    steps = {key: METHODS[key](flags, device) for key in methods_for(flags, device)}
    differences = {
        str(dtype).removeprefix("torch."): compare(steps["ours"], steps["plain"], min(batch_size, COMPARED), dtype)
        for dtype in (torch.float32, torch.float64)
    }
    torch.compiler.reset()  # the comparison's batch size and type must not leave kernels for variable ones
    row = {
        "model": name,
        "batch": batch_size,
        "differences": differences,
        "flops": count_flops(steps["plain"], batch_size),
    }
    batches = {key: make_batch(step, batch_size, device) for key, step in steps.items()}
    row |= {f"{key}_tokens": batch["text"].shape[1] for key, batch in batches.items()}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for key, step in steps.items():
        time_run(step, batches[key], min(3, args.steps), device)  # compilation, and the choice of kernels
    for _ in range(args.runs):
        for key, step in steps.items():
            seconds[key].append(time_run(step, batches[key], args.steps, device))
    for key, step in steps.items():
        row[f"{key}_seconds"] = common.median(seconds[key])
        row[f"{key}_precision"] = step.precision
        row[f"{key}_matrix_peak"] = matrix_peak(device, step.dtype)
    compiled = training.compiles(flags, device)
    checkpointing = ["--grad-checkpointing"] if steps["ours"].model.joint_views else []  # not with BatchNorm
    names = list(steps)
    del steps, batches, step
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for key in names:
        peak = {} if args.skip_memory else in_own_process(key, name, batch_size, args, rest)
        row[f"{key}_peak"] = peak.get("peak")
    if args.largest_batch:
        row |= largest_batch(name, batch_size, args, rest + checkpointing)
    return row | {"compiled": compiled}


def training_flags(name: str, rest: list[str]) -> argparse.Namespace:
    return training.get_args_parser().parse_args(["--model", name, "--lr", "1e-4", *rest])


def show(row: dict) -> None:
    print(
        f"\n{row['model']}, batch {row['batch']}, {row['flops'] / 1e9:.1f} GFLOP a step, "
        f"{'compiled' if row['compiled'] else 'not compiled'}"
    )
    for dtype, (loss, gradient) in row["differences"].items():
        print(
            f"in {dtype} the loss differs by {loss:.1e}, the gradients by {gradient:.1e} (relative)"
            + (f": ABOVE {EQUAL:g}" if max(loss, gradient) > EQUAL else "")
        )
    print(
        f"{'step':>6} {'precision':>11} {'tokens':>7} {'samples/s':>10} {'ms a step':>10} {'TFLOP/s':>8} "
        f"{'of peak':>8} {'peak TFLOP/s':>13} {'MiB':>8}"
    )
    for key in (key for key in METHODS if f"{key}_seconds" in row):
        speed, memory = row["flops"] / row[f"{key}_seconds"], row[f"{key}_peak"]
        print(
            f"{key:>6} {row[f'{key}_precision']:>11} {row[f'{key}_tokens']:>7} "
            f"{row['batch'] / row[f'{key}_seconds']:>10.1f} {1e3 * row[f'{key}_seconds']:>10.1f} "
            f"{speed / 1e12:>8.3f} "
            f"{speed / row[f'{key}_matrix_peak']:>8.1%} {row[f'{key}_matrix_peak'] / 1e12:>13.3f} "
            f"{memory / 2**20 if memory else math.nan:>8.0f}"
        )
    print(f"ours is {row['plain_seconds'] / row['ours_seconds']:.2f} times as fast")
    if "bf16_seconds" in row:
        print(f"ours in bf16 is {row['ours_seconds'] / row['bf16_seconds']:.2f} times as fast as ours")
    if "lora_seconds" in row:
        print(f"ours with --lora 8 is {row['ours_seconds'] / row['lora_seconds']:.2f} times as fast as ours")
    if "largest_batch" in row:
        print(
            f"largest batch that fits: {row['largest_batch']} at {row['largest_batch_samples_per_second']:.1f} "
            f"samples/s, {row['largest_batch_peak'] / 2**20:.0f} MiB"
        )


def main(argv: list[str] | None = None) -> list[dict]:
    args, rest = get_args_parser().parse_known_args(argv)
    device = common.choose_device(args.cpu)
    names, batch_size, steps, flags = DEFAULTS[device.type]
    if not args.models:
        rest = flags + rest
    names, batch_size, args.steps = args.models or names, args.batch_size or batch_size, args.steps or steps
    if args.one:
        print(json.dumps(measure_one(args.one, training_flags(names[0], rest), batch_size, args.memory_limit, device)))
        return []
    if args.largest_batch and device.type == "cpu" and not args.memory_limit:
        raise ValueError("--largest-batch on a CPU needs --memory-limit: it would fill the machine's memory")
    print(common.describe(device, args.runs), f"of {args.steps} steps", flush=True)
    rows = []
    for name in names:
        rows.append(bench(name, batch_size, args, rest, device))
        show(rows[-1])
    return rows


if __name__ == "__main__":
    main()
