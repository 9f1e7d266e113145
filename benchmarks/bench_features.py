"""Frozen features of images beside what open_clip and onnxruntime make of the same model.

    python benchmarks/bench_features.py                               CLIP_VITB16 with random weights, batch 16

From normalised floats to unit vectors: ours as the probes and predict.py embed compute them, the other two from what
export.py writes. On a CPU in float32, each with as many threads as OMP_NUM_THREADS says; vectors are compared before
anything is timed. Timed as well are our linear layers alone, each on what comes into it: the bound of any other way of
calling the same products. Runs alternate, medians are printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import export
import models
import tokenizer
from evaluation.features import Loading, load_backbone
from runtime.memory import keep_freed_memory
from towers.onednn import place

EQUAL = 1e-5  # largest difference of a unit vector's numbers


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="CLIP_VITB16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7, help="batches of each way")
    return parser


def methods(name: str, folder: Path) -> tuple[dict[str, Callable[[Tensor], Any]], Any]:
    """Ways from pixels (n, 3, H, W) to unit vectors (n, d), and our image tower."""
    import onnxruntime
    import open_clip

    torch.manual_seed(0)
    model: Any = models.create_model(name)
    common.write_checkpoint(model, tokenizer.SimpleTokenizer(), folder / "checkpoint.pt")
    for form in ("open-clip", "onnx"):
        export.export([folder / "checkpoint.pt"], form, folder / form)
    backbone = load_backbone(folder / "checkpoint.pt", features="projection")
    precision = distributed.resolve_precision("auto", torch.device("cpu"))
    loading = Loading(processes=distributed.Processes(precision=precision))
    place(backbone.model, loading.processes)
    print(f"ours in {precision}")
    theirs: Any = open_clip.create_model(f"local-dir:{folder / 'open-clip'}").eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "image.onnx"), options)
    return {
        "ours": lambda pixels: F.normalize(loading.encode(backbone.encode, pixels), dim=1),
        "open_clip": lambda pixels: theirs.encode_image(pixels, normalize=True),
        "onnxruntime": lambda pixels: torch.from_numpy(session.run(None, {"image": pixels.numpy()})[0]),
    }, backbone.model.visual


def products(tower: nn.Module, pixels: Tensor) -> Callable[[Tensor], Any]:
    """All linear layers of the tower, one after the other, on what comes into each when the tower sees `pixels`."""
    seen: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in tower.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0]))) for layer in layers]
    tower(pixels)
    for hook in hooks:
        hook.remove()

    def run(_pixels: Tensor) -> None:
        for layer, given in seen:
            layer(given)

    return run


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, float]:
    args = get_args_parser().parse_args(argv)
    keep_freed_memory()  # as every script does
    print(common.describe(torch.device("cpu"), args.runs, "open_clip_torch", "onnxruntime"))
    with tempfile.TemporaryDirectory() as folder:
        ways, tower = methods(args.model, Path(folder))
        size = models.create_model(args.model).preprocess.shape
        pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(args.batch_size, 3, *size)).astype(np.float32))
        vectors = {name: way(pixels) for name, way in ways.items()}
        for name, vector in vectors.items():
            apart = float((vector - vectors["ours"]).abs().max())
            print(f"{name} differs by {apart:.1e}")
            if not apart < EQUAL:
                raise RuntimeError(f"{args.model}: the vectors of {name} differ by {apart:.1e}")
        ways["ours, linear layers alone"] = products(tower, pixels)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(-1, args.runs):
            for name, way in ways.items():
                start = time.perf_counter()
                way(pixels)
                if run >= 0:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: common.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:>26} {args.batch_size / value:7.2f} images/s, {medians['ours'] / value:.2f} times ours")
    return medians


if __name__ == "__main__":
    main()
