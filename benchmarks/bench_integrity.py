"""What it costs to notice a damaged checkpoint: reading one with its checks, beside torch.load alone.

    python benchmarks/bench_integrity.py

Writes a checkpoint of 2 GB (half weights, half the optimizer's), and reads it in turn by torch.load and by
load_checkpoint, which compares the CRC-32 of each tensor and looks for NaN in the weights; from the page cache, which
is the dearest case for the checks. Nothing is done to drop that cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
import torch

from runtime import checkpoints


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    side = max(1, int((args.gigabytes * 1e9 / 4 / 200) ** 0.5))
    state = {part: {f"{part}{i}": torch.randn(side, side) for i in range(100)} for part in ("state_dict", "optimizer")}
    seconds: dict[str, list[float]] = {"torch.load": [], "load_checkpoint": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        checkpoints.save_checkpoint(state, path)
        size = path.stat().st_size
        del state
        ways = {"torch.load": lambda: torch.load(path, weights_only=True),
                "load_checkpoint": lambda: checkpoints.load_checkpoint(path)}  # fmt: skip
        for _ in range(args.runs + 1):  # the first is thrown away
            for name, read in ways.items():
                start = time.perf_counter()
                read()
                seconds[name].append(time.perf_counter() - start)
    print(common.describe(torch.device("cpu"), args.runs))
    median = {name: common.median(found[1:]) for name, found in seconds.items()}
    for name, value in median.items():
        ratio = value / median["torch.load"]
        print(f"{name:<16} {value:6.2f} s for {size / 1e9:.2f} GB  {ratio:5.2f} times torch.load")
    return median


if __name__ == "__main__":
    main()
