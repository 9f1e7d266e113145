"""A step with freed memory kept for the next one, as every script has it, beside glibc's own way.

    python benchmarks/bench_allocator.py                                 SLIP_VITT16 at 64 pixels and SLIP_VITS16
    python benchmarks/bench_allocator.py --models CLIP_VITB16 --batch-size 8

Processes of the two take turns; each makes two steps, then those that are measured. Printed are medians: seconds a
step, of them in the kernel (CPU), pages that the kernel hands out in a step, and the memory taken at most.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import bench_step
import common
import torch

from runtime.memory import keep_freed_memory

WAYS = {"glibc's own": lambda: None, "kept": keep_freed_memory}
MODELS = {"SLIP_VITT16": ["--image-size", "64"], "SLIP_VITS16": []}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="processes of each way")
    parser.add_argument("--steps", type=int, default=3, help="measured in each process")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def measure(way: str, name: str, batch_size: int, steps: int) -> dict[str, float]:
    """In this process: `steps` steps after two others."""
    WAYS[way]()
    device = torch.device("cpu")
    before = common.memory_now(device)
    step = bench_step.METHODS["ours"](bench_step.training_flags(name, MODELS.get(name, [])), device)
    batch = bench_step.make_batch(step, batch_size, device)
    bench_step.time_run(step, batch, 2, device)
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    bench_step.time_run(step, batch, steps, device)
    seconds, then = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "s": seconds / steps, "CPU s": (then.ru_utime + then.ru_stime - used.ru_utime - used.ru_stime) / steps,
        "in the kernel": (then.ru_stime - used.ru_stime) / steps, "pages": (then.ru_minflt - used.ru_minflt) / steps,
        "MiB": (common.peak_memory(device) - before) / 2**20,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    args = get_args_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.models[0], args.batch_size, args.steps)))
        return {}
    print(common.describe(torch.device("cpu"), args.runs))
    all_found = {}
    for name in args.models:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.runs):
            for way, rows in found.items():
                command = [sys.executable, __file__, "--one", way, "--models", name]
                command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\n{name}, batch {args.batch_size}, {args.steps} steps a process")
        all_found[name] = medians = {way: {key: common.median([row[key] for row in rows]) for key in rows[0]}
                   for way, rows in found.items()}  # fmt: skip
        for way, row in medians.items():
            print(f"{way:>12}  " + "  ".join(f"{value:.2f} {key}" for key, value in row.items()))
        given_back, kept = (row["s"] for row in medians.values())
        print(f"kept is {given_back / kept:.2f} times as fast")
    return all_found


if __name__ == "__main__":
    main()
