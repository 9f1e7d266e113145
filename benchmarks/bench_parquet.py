"""What one image costs out of a parquet file, beside an image file: reading and decoding, in random order.

    python benchmarks/bench_parquet.py

Writes JPEGs of a radiograph's size once as files and once as the Hub writes them (a struct of bytes and path, snappy),
in row groups of 100 and of 1,000, and reads the same random images from each. The whole row group of an image has to be
decompressed for it.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

from inputs.images import decode_image


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--reads", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 36), dtype=np.uint8))
        img = np.asarray(coarse.resize((720, 600), Image.Resampling.BICUBIC)) + rng.normal(0, 12, (600, 720))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(img, 0, 255).astype(np.uint8)).convert("RGB").save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    order = [random.Random(0).randrange(args.images) for _ in range(args.reads)]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(args.images):
            (root / f"{i}.jpg").write_bytes(jpegs[i % len(jpegs)])
        rows = {"image": [{"bytes": jpegs[i % len(jpegs)], "path": f"{i}.jpg"} for i in range(args.images)]}
        for size in (100, 1000):
            pq.write_table(pa.table(rows), root / f"{size}.parquet", row_group_size=size, use_dictionary=False)

        def from_file(i: int) -> bytes:
            return (root / f"{i}.jpg").read_bytes()

        def from_parquet(size: int, i: int) -> bytes:
            group = files[size].read_row_group(i // size, columns=["image"])
            return group.column("image")[i % size]["bytes"].as_py()

        files = {size: pq.ParquetFile(root / f"{size}.parquet") for size in (100, 1000)}
        ways = {"image files": from_file}
        ways |= {f"row groups of {size:,}": lambda i, size=size: from_parquet(size, i) for size in files}
        for _ in range(args.runs):
            for name, read in ways.items():
                start = time.perf_counter()
                for i in order[: args.reads if name == "image files" else max(10, args.reads // 10)]:
                    decode_image(read(i), name)
                count = args.reads if name == "image files" else max(10, args.reads // 10)
                found.setdefault(name, []).append((time.perf_counter() - start) / count)
    print(common.describe(torch.device("cpu"), args.runs))
    median = {name: common.median(seconds) for name, seconds in found.items()}
    for name, seconds in median.items():
        ratio = seconds / median["image files"]
        print(f"{name:<22} {1e3 * seconds:8.2f} ms an image, decoded  {ratio:6.2f} times an image file")
    return median


if __name__ == "__main__":
    main()
