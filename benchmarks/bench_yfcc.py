"""What does `make_dataset.py yfcc15m` cost? Time and peak memory on a synthetic table, by default of 2 GB.

    python benchmarks/bench_yfcc.py --folder /tmp/yfcc

The table has YFCC100M's 25 columns; of its rows 96% are on the list of downloaded images and 15% on that of the
captioned ones, as in the real files. The command runs as a process of its own, whose peak the kernel reports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "make_dataset.py"
TITLE = "Sunset+over+the+bay%2C+<b>evening</b>"
DESCRIPTION = (
    "We+walked+<a+href%3D%22http%3A%2F%2Fexample.org%2Fpath%22>along+the+shore</a>+for+two+hours+and+saw+"
    "nothing+but+%C3%A9normous+gulls.+More+at+http%3A%2F%2Fexample.org%2Fgulls"
)
REST = "\t".join(["x" * 24] * 15)  # 650 bytes a row, the real table's mean


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the sources and the lists are written here")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the table in 10^9 bytes")
    return parser


def write_sources(folder: Path, size: int) -> int:
    """The three files; returns the number of the table's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    row = f"{{}}\t1234567890\thash\tuser@N00\tnick\tdate\tdate\tcamera\t{TITLE}\t{DESCRIPTION}\t{REST}\n"
    rows = max(1, size // len(row.format(10**7)))
    numbers = np.arange(rows, dtype=np.int64) * (10**8 // rows)
    np.save(folder / "flickr_unique_ids.npy", rng.permutation(numbers[rng.random(rows) < 0.96]))
    with open(folder / "yfcc100m_subset_data.tsv", "w") as file:
        file.writelines(f"{n}\t1234567890\thash\n" for n in numbers[rng.random(rows) < 0.15])
    with open(folder / "yfcc100m_dataset.txt", "w") as file:
        file.writelines(map(row.format, numbers.tolist()))
    return rows


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    rows = write_sources(args.folder, int(args.gigabytes * 1e9))
    start = time.monotonic()
    subprocess.run([sys.executable, str(SCRIPT)], cwd=args.folder, check=True)
    seconds = time.monotonic() - start
    result = {
        "table_gb": (args.folder / "yfcc100m_dataset.txt").stat().st_size / 1e9,
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "written": {
            name: os.path.getsize(args.folder / name) for name in ("yfcc15m.pkl", "yfcc15m.pkl.rows", "yfcc100m.pkl")
        },
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
