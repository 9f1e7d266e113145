"""Time and memory of a loss, tile by tile, beside the full logit matrices, on one process.

    python benchmarks/bench_loss.py                batches 256 to 16,384, on the GPU if there is one
    python benchmarks/bench_loss.py --batches 65536 --skip-full
    python benchmarks/bench_loss.py --loss siglip  the sigmoid loss beside open_clip's

The baseline of SLIP is losses.slip_loss, the formula: every logit matrix at once, through torch's cross entropy. Values
and gradients of the two are compared before anything is timed. Each measurement runs in a process of its own; memory is
the peak above the inputs during forward and backward (resident set on a CPU, the allocator's count on a GPU).
`minimum` is what any method must hold beside the inputs: the gradients of the embeddings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import losses

NAMES = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")
EMBEDDINGS = {"slip": NAMES, "siglip": NAMES[:2]}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=list(EMBEDDINGS), default="slip")
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


def open_clips(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sigmoid loss as open_clip has it."""
    from open_clip.loss import SigLipLoss

    image, text = (F.normalize(outputs[name], dim=-1) for name in EMBEDDINGS["siglip"])
    return {"loss": SigLipLoss()(image, text, outputs["logit_scale"], outputs["logit_bias"])}


METHODS = {
    "slip": {"tiles": losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1)), "full": full_matrices},
    "siglip": {"tiles": losses.SigLIPLoss(), "full": open_clips},
}


def make_inputs(loss: str, batch: int, dim: int, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    inputs = {name: torch.randn(batch, dim, generator=g, device=device).requires_grad_() for name in EMBEDDINGS[loss]}
    numbers = {"logit_scale": 14.3} | ({"logit_bias": -10.0} if loss == "siglip" else {})
    return inputs | {k: torch.tensor(v, device=device, requires_grad=True) for k, v in numbers.items()}


def measure(name: str, method: str, batch: int, dim: int, runs: int, device: torch.device) -> dict:
    """Seconds of a forward and backward pass and its peak memory above the inputs."""
    loss = METHODS[name][method]
    warm = make_inputs(name, 64, dim, device)
    loss(warm)["loss"].backward()
    inputs = make_inputs(name, batch, dim, device)
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


def compare(name: str, device: torch.device, dim: int) -> float:
    """Largest relative difference of loss and gradients between the two methods at batch 1,024."""
    results = {}
    for method, loss in METHODS[name].items():
        inputs = make_inputs(name, 1024, dim, device)
        value = loss(inputs)["loss"]
        value.backward()
        results[method] = [value.detach(), *(x.grad for x in inputs.values())]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results.values(), strict=True))


def main(argv: list[str] | None = None) -> list[dict]:
    args = get_args_parser().parse_args(argv)
    device = common.choose_device(args.cpu)
    if args.one:
        method, batch = args.one.split(":")
        print(json.dumps(measure(args.loss, method, int(batch), args.dim, args.runs, device)))
        return []
    print(common.describe(device, args.runs))
    print(
        f"largest relative difference of loss and gradients at batch 1,024: {compare(args.loss, device, args.dim):.1e}"
    )
    rows = []
    print(
        f"{'batch':>7} {'tiles s':>9} {'full s':>9} {'ratio':>6} {'tiles MiB':>10} {'full MiB':>10} {'ratio':>6} "
        f"{'minimum MiB':>12}"
    )
    for batch in args.batches:
        row = {"batch": batch, "minimum": len(EMBEDDINGS[args.loss]) * batch * args.dim * 4}
        for method in ("tiles",) if args.skip_full else ("tiles", "full"):
            command = [
                sys.executable,
                __file__,
                "--one",
                f"{method}:{batch}",
                "--loss",
                args.loss,
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
