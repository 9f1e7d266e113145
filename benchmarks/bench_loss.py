"""Time and memory of the SLIP loss, tile by tile, beside the full logit matrices, on one process.

    python benchmarks/bench_loss.py                batches 256 to 16,384, on the GPU if there is one
    python benchmarks/bench_loss.py --batches 65536 --skip-full

The baseline is losses.slip_loss, the formula: every logit matrix at once, through torch's cross entropy. Values
and gradients of the two are compared before anything is timed. Each measurement runs in a process of its own; memory is
the peak above the inputs during forward and backward (resident set on a CPU, the allocator's count on a GPU).
`minimum` is what any method must hold beside the inputs: the gradients of the four embeddings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import common
import torch
from torch import Tensor

import losses

NAMES = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--dim", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--runs", type=int, default=3, help="timed runs; the median is printed")
    parser.add_argument("--skip-full", action="store_true", help="leave out the baseline, which needs much memory")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a single measurement, in the process of its own
    return parser


def full_matrices(outputs: dict[str, Tensor], temperature: float = 0.1, ssl_scale: float = 1.0) -> dict[str, Tensor]:
    """The formula, with all logits at once."""
    embeddings = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (outputs[name] for name in NAMES))
    scale = outputs["logit_scale"]
    return {"loss": losses.slip_loss(*embeddings, scale=scale, ssl_scale=ssl_scale, temperature=temperature)}


METHODS = {"tiles": losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1)), "full": full_matrices}


def make_inputs(batch: int, dim: int, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    inputs = {name: torch.randn(batch, dim, generator=g, device=device).requires_grad_() for name in NAMES}
    return inputs | {"logit_scale": torch.tensor(14.3, device=device, requires_grad=True)}


def measure(method: str, batch: int, dim: int, runs: int, device: torch.device) -> dict:
    """Seconds of a forward and backward pass and its peak memory above the inputs."""
    loss = METHODS[method]
    warm = make_inputs(64, dim, device)
    loss(warm)["loss"].backward()
    inputs = make_inputs(batch, dim, device)
    seconds, peak = [], 0
    for _ in range(runs):
        for x in inputs.values():
            x.grad = None
        before = common.memory_now(device)
        start = time.perf_counter()
        loss(inputs)["loss"].backward()
        common.synchronise(device)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, common.peak_memory(device) - before)
    return {"seconds": common.median(seconds), "peak": peak}


def compare(device: torch.device, dim: int) -> float:
    """Largest relative difference of loss and gradients between the two methods at batch 1,024."""
    results = {}
    for name, loss in METHODS.items():
        inputs = make_inputs(1024, dim, device)
        value = loss(inputs)["loss"]
        value.backward()
        results[name] = [value.detach(), *(x.grad for x in inputs.values())]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results.values(), strict=True))


def main(argv: list[str] | None = None) -> list[dict]:
    args = get_args_parser().parse_args(argv)
    device = common.choose_device(args.cpu)
    if args.one:
        method, batch = args.one.split(":")
        print(json.dumps(measure(method, int(batch), args.dim, args.runs, device)))
        return []
    print(common.describe(device, args.runs))
    print(f"largest relative difference of loss and gradients at batch 1,024: {compare(device, args.dim):.1e}")
    rows = []
    print(
        f"{'batch':>7} {'tiles s':>9} {'full s':>9} {'ratio':>6} {'tiles MiB':>10} {'full MiB':>10} {'ratio':>6} "
        f"{'minimum MiB':>12}"
    )
    for batch in args.batches:
        row = {"batch": batch, "minimum": 4 * batch * args.dim * 4}
        for method in ("tiles",) if args.skip_full else ("tiles", "full"):
            command = [
                sys.executable,
                __file__,
                "--one",
                f"{method}:{batch}",
                "--dim",
                str(args.dim),
                "--runs",
                str(args.runs),
                *(["--cpu"] if args.cpu else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                row |= {f"{method}_{k}": v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
            else:
                print(f"{method} at batch {batch} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        rows.append(row)
        cell = {k: f"{row[k]:.3f}" if k.endswith("seconds") else f"{row[k] / 2**20:.0f}" for k in row if k != "batch"}
        ratios = [
            f"{row[f'full_{k}'] / max(row[f'tiles_{k}'], 1):.1f}"
            if f"full_{k}" in row and k == "peak"
            else f"{row[f'full_{k}'] / row[f'tiles_{k}']:.2f}"
            if f"full_{k}" in row
            else "-"
            for k in ("seconds", "peak")
        ]
        print(
            f"{batch:>7} {cell.get('tiles_seconds', '-'):>9} {cell.get('full_seconds', '-'):>9} {ratios[0]:>6} "
            f"{cell.get('tiles_peak', '-'):>10} {cell.get('full_peak', '-'):>10} {ratios[1]:>6} "
            f"{cell['minimum']:>12}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
