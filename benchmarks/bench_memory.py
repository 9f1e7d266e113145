"""How much memory do the captions of a large dataset take once parent and workers have read them all?

    python benchmarks/bench_memory.py                  15 million rows, about 2.5 GB of text; some minutes
    python benchmarks/bench_memory.py --rows 100000    seconds; the interpreter's own memory then outweighs the text

Builds a reader of synthetic rows, a title of 30 bytes and a caption each, through the index of the large datasets;
then the parent and 4 forked workers read every caption of every row, and the proportional set sizes of the five
processes are summed: a page that n processes share counts 1/n in each. Below 1.3 times the bytes of the text, the texts
are neither wrapped in objects nor copied by the processes that touch them. The same sum for a reader of a single row,
which is what Python and torch take, is given beside it. Linux only: reads /proc/<pid>/smaps_rollup.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import common  # noqa: F401  first: it finds the modules below
import numpy as np

from inputs.columns import Row
from inputs.reader import Reader

LIMIT = 1.3
TITLE_BYTES = 30
# Bytes in UTF-8 of the 8,180 captions of ROCO v1's validation split (radiology), white space stripped: their minimum,
# 5%, 10%, ... 95% quantiles and maximum. Their mean is 137.
CAPTION_QUANTILES = (3, 34, 46, 56, 63, 72, 79, 87, 96, 105, 114, 123, 133, 143, 157, 175, 194, 218, 254, 317, 2045)
TOP_QUANTILES = ((0.97, 370), (0.98, 409), (0.99, 489), (0.995, 568))  # the last twentieth is far from straight


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=15_000_000, help="rows of the dataset (default: 15 million)")
    parser.add_argument("--workers", type=int, default=4, help="forked processes beside the parent (default: 4)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="the index is written here, about 190 bytes a row, and removed (default: a temporary one)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the captions' lengths")
    return parser


def caption_lengths(n: int, seed: int) -> np.ndarray:
    """(n,) int64: lengths in bytes, distributed as ROCO's captions are, linearly between the quantiles."""
    points = dict(zip(np.linspace(0, 1, len(CAPTION_QUANTILES)).tolist(), CAPTION_QUANTILES, strict=True))
    points = dict(sorted({**points, **dict(TOP_QUANTILES)}.items()))
    draws = np.random.default_rng(seed).random(n)
    return np.interp(draws, list(points), list(points.values())).round().astype(np.int64)


class SyntheticRows(Reader):
    """Rows of a title and a caption; `metadata` names a JSON file {"rows": n, "seed": s}."""

    splits = ("train",)
    indexed = numbered = True

    def locate(self, metadata: str) -> None:
        self.find(metadata)

    def rows(self) -> Iterator[Row]:
        settings = json.loads(self.files[0].read_text())
        letters = np.random.default_rng(1).integers(ord("a"), ord("z") + 1, 1 << 16).astype(np.uint8)
        words = letters.tobytes().decode()
        for i, length in enumerate(caption_lengths(settings["rows"], settings["seed"])):
            start = (i * 7919) % (len(words) - 4096)
            yield Row("", i, [words[start : start + TITLE_BYTES], words[start + 1 : start + 1 + length]])

    def finder(self):
        return lambda row: True


def read_all(reader: Reader) -> int:
    """Bytes of all captions, each read as training would read it."""
    return sum(len(text) for i in range(len(reader)) for text in reader.captions(i))


def work(reader: Reader, pipe: Connection) -> None:
    pipe.send(read_all(reader))
    pipe.recv()  # stay until all are measured


def set_size(pid: int) -> int:
    """Proportional set size in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no proportional set size of process {pid}: this needs Linux 4.14 or later")


def measure(reader: Reader, workers: int) -> dict:
    """Let parent and workers read everything, then sum their sizes; checks that all read the same."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for _ in range(workers):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(reader, theirs)))
        processes[-1].start()
        pipes.append(mine)
    text = read_all(reader)
    totals = {pipe.recv() for pipe in pipes}
    sizes = [set_size(pid) for pid in (os.getpid(), *(process.pid for process in processes))]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    if totals - {text}:
        raise RuntimeError(f"the parent read {text} bytes, the workers {totals}")
    return {
        "rows": len(reader),
        "text_bytes": text,
        "pss_bytes": sum(sizes),
        "pss_parent": sizes[0],
        "pss_workers": sizes[1:],
        "ratio": round(sum(sizes) / text, 3),
    }


def build(folder: str, rows: int, seed: int) -> str:
    """Write the dataset and its index; returns its metadata file. The memory that building takes ends with a process
    of its own, as it does for all runs but the first."""
    metadata = Path(folder) / f"synthetic_{rows}.json"
    metadata.write_text(json.dumps({"rows": rows, "seed": seed}))
    builder = multiprocessing.get_context("fork").Process(target=SyntheticRows, args=(folder, str(metadata)))
    builder.start()
    builder.join()
    return str(metadata)


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        alone = measure(SyntheticRows(folder, build(folder, 1, args.seed)), args.workers)["pss_bytes"]
        times = [time.monotonic()]
        metadata = build(folder, args.rows, args.seed)
        times.append(time.monotonic())
        reader = SyntheticRows(folder, metadata)
        times.append(time.monotonic())
        result = measure(reader, args.workers)
        times.append(time.monotonic())
    for name, seconds in zip(("build", "start", "read"), np.diff(times).tolist(), strict=True):
        result[f"seconds_to_{name}"] = round(seconds, 3)
    text = result["text_bytes"]
    result |= {"pss_of_one_row": alone, "ratio_without": round((result["pss_bytes"] - alone) / text, 3)}
    print(json.dumps(result, indent=2))
    print(
        f"{result['pss_bytes'] / 1e9:.2f} GB for {text / 1e9:.2f} GB of text: {result['ratio']} times, "
        f"{'below' if result['ratio'] < LIMIT else 'NOT below'} {LIMIT}; "
        f"without the {alone / 1e9:.2f} GB of Python and torch {result['ratio_without']} times"
    )
    return result


if __name__ == "__main__":
    main()
