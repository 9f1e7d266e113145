"""float32 linear layers on a CPU by oneDNN beside MKL, which torch asks: speed, error, a step, features.

    python benchmarks/bench_products.py                       SLIP ViT-S/16 and CLIP ViT-B/16, batch 8
    python benchmarks/bench_products.py --models SLIP_VITT16 --skip-models     products alone
    python benchmarks/bench_products.py --models SLIP_VITT16 --image-size 64   flags of main.py apply to the model

The two are `--precision fp32` and `fp32-onednn` of every script (towers/onednn.py), between which `auto` chooses by the
machine.

Times are CPU seconds of this process, medians of alternating runs. Errors are relative to float64, of a product, and of
all gradients as one vector (dropout off).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import bench_step
import common
import torch
import torch.nn.functional as F
from common import distance
from torch import Tensor, nn

import distributed
import models
from distributed import ONEDNN, Processes
from runtime.command_line import positive_int
from towers import onednn

CPU = torch.device("cpu")
LINEAR = {"MKL": F.linear, "oneDNN": distributed.onednn_linear}
PRECISION = {"MKL": "fp32", "oneDNN": ONEDNN}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=["SLIP_VITS16", "CLIP_VITB16"], choices=list(models.MODELS),
                        metavar="NAME", help="with a ViT as image tower")  # fmt: skip
    parser.add_argument("--batch-size", type=positive_int, default=8, help="pairs a step, images a pass")
    parser.add_argument("--runs", type=positive_int, default=3, help="timed runs of each; the median is printed")
    parser.add_argument("--skip-models", action="store_true", help="products alone")
    return parser


def alternate(work: Callable[[], object], runs: int, model: nn.Module) -> dict[str, float]:
    """CPU seconds of `work` with `model`'s layers by each library, the first run of each not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in LINEAR}
    for _ in range(1 + runs):
        for name, times in seconds.items():
            place(model, name)
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return {name: common.median(times[1:]) for name, times in seconds.items()}


def place(model: nn.Module, name: str) -> None:
    """Have the model's linear layers multiply by one of the libraries."""
    onednn.place(model, Processes(precision=PRECISION[name]))


def measure_product(rows: int, inner: int, columns: int, runs: int) -> dict[str, tuple[float, float]]:
    """FLOPs a second, and the error, of (rows, inner) times (inner, columns) with a bias, as a linear layer has it."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((rows, inner), (columns, inner), (columns,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    seconds: dict[str, list[float]] = {name: [] for name in LINEAR}
    for _ in range(1 + runs):
        for name, way in LINEAR.items():
            start = time.process_time()
            way(x, weight, bias)
            seconds[name].append(time.process_time() - start)
    return {
        name: (2 * rows * inner * columns / common.median(seconds[name][1:]), distance(way(x, weight, bias), exact))
        for name, way in LINEAR.items()
    }


def products_of(width: int, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Rows, inner length and columns of the products of a ViT's block, MLP of four times the width."""
    return {
        "q, k, v": (tokens, width, 3 * width),
        "MLP, first": (tokens, width, 4 * width),
        "MLP, second": (tokens, 4 * width, width),
        "gradient of the MLP's weight": (width, tokens, 4 * width),
    }


def gradients(step: bench_step.Ours, batch_size: int, dtype: torch.dtype) -> Tensor:
    """All gradients of the loss of one batch, as one vector in float64; the model is left in float32."""
    batch = bench_step.as_floats(step, bench_step.make_batch(step, batch_size), dtype)
    step.model.to(dtype)
    with bench_step.without_dropout(step):
        step.backward(batch)
    grads = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    vector = torch.cat([grads[name].flatten().double() for name in sorted(grads)])
    step.model.zero_grad()
    step.model.float()
    return vector


def bench_model(step: bench_step.Ours, args: argparse.Namespace) -> dict:
    """CPU seconds of a step and of a pass for features, and distances of gradients and features from float64."""
    found: dict = {"gradients": {}, "features": {}}
    images = torch.randn(args.batch_size, 3, *step.model.preprocess.shape, generator=torch.Generator().manual_seed(0))
    exact = gradients(step, args.batch_size, torch.float64)
    for name in LINEAR:
        place(step.model, name)
        found["gradients"][name] = distance(gradients(step, args.batch_size, torch.float32), exact)
    step.model.eval()
    with torch.no_grad():
        exact = step.model.double().visual(images.double())
        step.model.float()
        for name in LINEAR:
            place(step.model, name)
            found["features"][name] = distance(step.model.visual(images), exact)
        found["pass_seconds"] = alternate(lambda: step.model.visual(images), args.runs, step.model)
    step.model.train()
    batch = bench_step.make_batch(step, args.batch_size)
    found["step_seconds"] = alternate(lambda: step.step(batch), args.runs, step.model)
    return found


def compared(title: str, unit: str, values: dict[str, float], faster: bool) -> str:
    """A line with both values and their quotient."""
    a, b = values.values()
    says = f"oneDNN is {a / b:.2f} times as fast" if faster else f"{b / a:.2f} times MKL's"
    return f"  {title}: " + ", ".join(f"{name} {v:.4g}{unit}" for name, v in values.items()) + f"; {says}"


def main(argv: list[str] | None = None) -> dict:
    args, rest = get_args_parser().parse_known_args(argv)
    print(common.describe(CPU, args.runs), f"; bf16 units: {distributed.cpu_has_bf16()}", flush=True)
    rows = {}
    for name in args.models:
        step = bench_step.Ours(bench_step.training_flags(name, [*rest, "--precision", "fp32"]), CPU)
        tower = step.model.visual
        width, tokens = tower.embed_dim, args.batch_size * (1 + tower.patch_embed.num_patches)
        row = rows[name] = {"products": {}}
        print(f"\n{name}, batch {args.batch_size}")
        print(f"  {'product':29} {'sizes':>17} {'MKL GFLOP/s':>12} {'oneDNN':>7} {'ratio':>6} {'MKL error':>10} "
              f"{'oneDNN':>8} {'ratio':>6}")  # fmt: skip
        for title, sizes in products_of(width, tokens).items():
            found = row["products"][title] = measure_product(*sizes, max(args.runs, 9))
            (a, a_error), (b, b_error) = found["MKL"], found["oneDNN"]
            print(f"  {title:29} {'x'.join(map(str, sizes)):>17} {a / 1e9:>12.0f} {b / 1e9:>7.0f} {b / a:>6.2f} "
                  f"{a_error:>10.2e} {b_error:>8.1e} {b_error / a_error:>6.2f}", flush=True)  # fmt: skip
        if args.skip_models:
            continue
        row |= bench_model(step, args)
        print(compared("gradients from float64", "", row["gradients"], False))
        print(compared("features from float64", "", row["features"], False))
        print(compared("features", " CPU s", row["pass_seconds"], True))
        print(compared("step", " CPU s", row["step_seconds"], True), flush=True)
    return rows


if __name__ == "__main__":
    main()
