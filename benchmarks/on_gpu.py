"""What only a machine with a GPU can show, by one command: the suite's GPU tests, then every row of RESULTS.md for one.

    python benchmarks/on_gpu.py --output gpu.json                 ten minutes on an H100
    python benchmarks/on_gpu.py --only step:MEDSLIP_VIT colours   some of the rows

Each row is a process of its own with a time limit; one that fails or runs out of time is named and the others go on.
Written after each: the JSON, and beside it the rows as Markdown. A row that is there already, measured on the same
machine and commit, is not measured again. On a CPU (--cpu) sizes are tiny: that shows that the script works, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_loss
import bench_step
import common
import numpy as np
import torch
from PIL import Image

import distributed
import main as training
import models
import utils
from evaluation import features
from inputs import colour
from runtime.command_line import run_script
from runtime.logs import read_rows
from runtime.versions import versions

STEPS = ("SLIP_VITB16", "MEDSLIP_VIT", "MEDSLIP_RESNET")
TINY = {"--image-size": "32", "--override": "vision.patch_size=8 vision.depth=1 text_layers=1"}
LIMITS = {"tests": 240, "step": 150, "largest": 120}  # s; others 90


def row_names() -> list[str]:
    return [
        "tests",
        *(f"step:{name}" for name in STEPS),
        *(f"step:{name}:no-compile" for name in STEPS),
        *(f"profile:{name}" for name in STEPS),
        "loss", "colours", "input",
        *(f"features:{name}" for name in STEPS),
        *(f"largest:{name}" for name in STEPS),
    ]  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("on_gpu.json"), help="the rows; .md is written beside it")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=[], help=", ".join(row_names()))
    parser.add_argument("--limit", type=float, default=1.0, help="factor on the rows' time limits, for slower machines")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in a process of its own
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def step(name: str, args: argparse.Namespace, *options: str) -> dict:
    """bench_step's row: main.py's step beside the plain fp16 one."""
    model, _, variant = name.partition(":")
    flags = ["--models", model, "--runs", "3", *(["--skip-memory"] if variant else []), *options]
    if args.cpu:
        flags = ["--models", "SLIP_VITT16", "--cpu", "--runs", "1", "--steps", "1", "--batch-size", "4"]
        flags += [part for key, value in TINY.items() for part in (key, *value.split())]
    return bench_step.main([*flags, *(["--no-compile"] if variant else [])])[0]


def profile(name: str, args: argparse.Namespace) -> dict:
    """Where three of our steps spend the device's time: its kernels by their share, and how long it does nothing."""
    device = common.choose_device(args.cpu)
    small = [part for key, value in TINY.items() for part in (key, *value.split())] + ["--no-compile"]
    flags = bench_step.training_flags("SLIP_VITT16" if args.cpu else name, small if args.cpu else [])
    ours = bench_step.Ours(flags, device)
    batch = bench_step.make_batch(ours, 4 if args.cpu else 128, device)
    bench_step.time_run(ours, batch, 3, device)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as found:
        seconds = bench_step.time_run(ours, batch, 3, device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [e for e in found.key_averages() if device.type == "cpu" or e.device_type.name == "CUDA"]
    events = sorted(((getattr(e, key) / 3e3, e.count // 3, e.key) for e in events), reverse=True)
    busy = sum(ms for ms, _, _ in events)
    return {
        "step_ms": 1e3 * seconds, "busy_ms": busy,
        "kernels": [{"ms": round(ms, 3), "calls": calls, "name": name[:110]} for ms, calls, name in events[:20]],
    }  # fmt: skip


def largest(name: str, args: argparse.Namespace) -> dict:
    """The largest batch of our step that fits, doubling from 256, with gradient checkpointing where the tower can."""
    if args.cpu:
        return {}
    flags = argparse.Namespace(cpu=False, memory_limit=None)
    model = training.build_model(bench_step.training_flags(name, []))[0]
    rest = ["--no-compile", *(["--grad-checkpointing"] if model.joint_views else [])]
    del model
    return bench_step.largest_batch(name, 512, flags, rest)


def loss(name: str, args: argparse.Namespace) -> dict:
    batches = ["16", "64"] if args.cpu else ["1024", "4096", "16384"]
    rows = bench_loss.main(["--batches", *batches, *(["--cpu"] if args.cpu else [])])
    return {"rows": rows}


def colours(name: str, args: argparse.Namespace) -> dict:
    """Changing the colours of 256 views of 224 pixels on the device; compared to the bit with the host's."""
    device = common.choose_device(args.cpu)
    n, side = (8, 32) if args.cpu else (256, 224)
    rng = np.random.default_rng(0)
    drawn = [colour.draw_colour(rng) for _ in range(n)]
    batch = colour.Colours.of(drawn)
    pixels = torch.from_numpy(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)).to(device)
    seconds = []
    for _ in range(8):
        common.synchronise(device)
        start = time.perf_counter()
        out = colour.apply_colour_batch(pixels, batch)
        common.synchronise(device)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    host = [colour.apply_colour(x.numpy(), c) for x, c in zip(pixels.cpu(), drawn, strict=True)]
    differing = sum(
        not np.array_equal(np.broadcast_to(ours, (3, side, side)), x.numpy())
        for ours, x in zip(host, out.cpu(), strict=True)
    )
    return {
        "views": n, "side": side, "seconds": common.median(seconds[2:]),
        "host_seconds": time.perf_counter() - start, "views_that_differ": differing,
    }  # fmt: skip


def input_wait(name: str, args: argparse.Namespace) -> dict:
    """main.py on images of ROCO's sizes, with 16 workers: how much of the time does a step wait for data?"""
    pairs, batch, model, extra = 4096, 256, "SLIP_VITB16", []
    if args.cpu:
        pairs, batch, model = 32, 8, "SLIP_VITT16"
        extra = [part for key, value in TINY.items() for part in (key, *value.split())]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "train" / "radiology"
        (root / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        kept = 64  # different images; the others are links to them
        for i in range(kept):
            width, height = int(rng.integers(500, 900)), int(rng.integers(400, 800))
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32), dtype=np.uint8))
            noise = rng.normal(0, 12, (height, width))
            img = np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise, 0, 255)
            Image.fromarray(img.astype(np.uint8)).convert("RGB").save(root / "images" / f"ROCO_{i:05d}.jpg", quality=90)
        for i in range(kept, pairs):
            os.link(root / "images" / f"ROCO_{i % kept:05d}.jpg", root / "images" / f"ROCO_{i:05d}.jpg")
        captions = (f"ROCO_{i:05d}\t {bench_step.SENTENCE}case {i}.\n" for i in range(pairs))
        (root / "captions.txt").write_text("".join(captions))
        run = Path(folder) / "run"
        training.main(
            ["--dataset", "roco", "--root", folder, "--output-dir", str(run), "--model", model, "--lr", "1e-4",
             "--batch-size", str(batch), "--epochs", "2", "--print-freq", "4", "-j", "16", "--warmup-epochs", "0",
             *(["--gpu", "-1"] if args.cpu else []), *extra]
        )  # fmt: skip
        trained = read_rows(run / "log.jsonl", "train")
    last = [row for row in trained if row["epoch"] == 1][1:] or trained[-1:]  # without start and compilation
    return {
        "batch": batch, "workers": min(16, distributed.cores()),
        "waiting_for_data": float(np.mean([row["waiting_for_data"] for row in last])),
        "samples_per_second": float(np.mean([row["samples_per_second"] for row in last])),
    }  # fmt: skip


def feature_extraction(name: str, args: argparse.Namespace) -> dict:
    """Images a second through the frozen tower, in each precision, the images being on the device."""
    device = common.choose_device(args.cpu)
    n, repeats = (4, 1) if args.cpu else (256, 10)
    small: dict[str, Any] = {"image_size": 32, "vision_kwargs": {"patch_size": 8, "depth": 1}} if args.cpu else {}
    model = models.create_model("SLIP_VITT16" if args.cpu else name, **small).eval().to(device)
    pixels = torch.randint(256, (n, 3, *model.preprocess.shape), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {"batch": n}
    reference = None
    for precision in ("fp32",) if device.type == "cpu" else ("fp32", distributed.resolve_precision("auto", device)):
        loading = features.Loading(processes=distributed.Processes(device=device, precision=precision))
        with torch.inference_mode():
            for _ in range(3):
                out = loading.encode(model.visual, model.preprocess.normalise(pixels))
            common.synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats):
                out = loading.encode(model.visual, model.preprocess.normalise(pixels))
            common.synchronise(device)
        found[f"{precision}_images_per_second"] = repeats * n / (time.perf_counter() - start)
        reference = out if reference is None else reference
        found[f"{precision}_least_cosine"] = torch.cosine_similarity(out, reference).min().item()
    return found


def tests(name: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    lines = done.stdout.strip().splitlines()
    # 5: nothing was collected; on a CPU every one is skipped
    return {
        "rc": done.returncode,
        "summary": lines[-1] if lines else "",
        "tail": lines[-25:] if done.returncode else [],
    }


KINDS = {
    "tests": tests, "step": step, "profile": profile, "loss": loss, "colours": colours, "input": input_wait,
    "features": feature_extraction, "largest": largest,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def measure(name: str, args: argparse.Namespace) -> dict:
    """A row in a process of its own: its figures, or what went wrong."""
    limit = args.limit * LIMITS.get(name.partition(":")[0], 90)
    command = [sys.executable, __file__, "--row", name, *(["--cpu"] if args.cpu else [])]
    start = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"ran past {limit:.0f} s"}
    if done.returncode:
        return {"failed": f"ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-1500:]}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": time.time() - start}


def markdown(report: dict) -> str:
    head = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    lines = [head, "", "| row | figures |", "|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {describe(name, row)} |")
    return "\n".join(lines) + "\n"


def describe(name: str, row: dict) -> str:
    """The figures of one row in words."""
    if "failed" in row:
        return "FAILED: " + row["failed"].splitlines()[-1]
    kind = name.partition(":")[0]
    if kind == "tests":
        return row["summary"]
    if kind == "step":
        ours, peak = row["ours_seconds"], row["ours_matrix_peak"]
        memory = (
            f", {row['ours_peak'] / 2**30:.1f} beside {row['plain_peak'] / 2**30:.1f} GiB" if row["ours_peak"] else ""
        )
        return (
            f"batch {row['batch']}: {1e3 * ours:.1f} ms a step, {row['batch'] / ours:.0f} pairs/s, "
            f"{row['flops'] / ours / 1e12:.0f} TFLOP/s = {row['flops'] / ours / peak:.1%} of the {peak / 1e12:.0f} "
            f"measured; {row['plain_seconds'] / ours:.2f} times the plain {row['plain_precision']} step{memory}"
        )
    if kind == "profile":
        first = "; ".join(f"{k['ms']:.2f} ms {k['name'][:60]}" for k in row["kernels"][:5])
        return f"{row['step_ms']:.1f} ms a step under the profiler, {row['busy_ms']:.1f} busy: {first}"
    if kind == "loss":
        cells = [
            f"{r['batch']}: {1e3 * r['tiles_seconds']:.1f} beside {1e3 * r['full_seconds']:.1f} ms, "
            f"{r['tiles_peak'] / 2**20:.0f} beside {r['full_peak'] / 2**20:.0f} MiB"
            for r in row["rows"] if "tiles_seconds" in r and "full_seconds" in r
        ]  # fmt: skip
        return "; ".join(cells)
    if kind == "colours":
        return (
            f"{row['views']} views of {row['side']}: {1e3 * row['seconds']:.2f} ms, on one core of the host "
            f"{1e3 * row['host_seconds']:.0f} ms; {row['views_that_differ']} views differ"
        )
    if kind == "input":
        return (
            f"batch {row['batch']}, {row['workers']} workers: {row['samples_per_second']:.0f} samples/s, "
            f"{row['waiting_for_data']:.1%} of the time waiting for data"
        )
    return ", ".join(f"{k.replace('_', ' ')} {v:.6g}" for k, v in row.items() if k != "wall_seconds") or "not on a CPU"


def machine(args: argparse.Namespace) -> dict:
    device = common.choose_device(args.cpu)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": where, "cores": str(distributed.cores()), **versions()}


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    if args.row:
        kind, _, rest = args.row.partition(":")
        print(json.dumps(KINDS[kind](rest, args)))
        return {}
    if not args.cpu and not torch.cuda.is_available():
        raise ValueError("no GPU is available; --cpu runs tiny sizes on the CPU")
    if unknown := [name for name in args.only if name not in row_names()]:
        raise ValueError(f"unknown row {unknown[0]!r}; choose from {', '.join(row_names())}")
    here = machine(args)
    report: dict = {"machine": here, "rows": {}}
    if args.output.is_file():
        earlier = json.loads(args.output.read_text())
        if earlier.get("machine") == here:
            report["rows"] = {name: row for name, row in earlier["rows"].items() if "failed" not in row}
    print(", ".join(f"{k} {v}" for k, v in here.items()), flush=True)
    for name in args.only or row_names():
        if name not in report["rows"]:
            report["rows"][name] = measure(name, args)
            utils.write_json(args.output, report)
            args.output.with_suffix(".md").write_text(markdown(report))
        print(f"{name}: {describe(name, report['rows'][name])}", flush=True)
    return report


if __name__ == "__main__":
    run_script(main)
