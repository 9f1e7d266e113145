"""A mammogram's DICOM file and its smaller copies: bytes, and CPU time from the file to a view of 224 pixels.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_shrink.py               a drawn mammogram of 3,518 x 2,800 pixels of 12 bits; a minute

Files take turns, on one thread. Before anything is timed, the copy's pixels are compared with full decoding followed by
the same resize: none differs, or the script ends.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from bench_dicom import KINDS, mammogram, write

from inputs.images import read_image
from inputs.transforms import Preprocess, eval_view
from preparation.breast import breast_box
from preparation.shrink import shrink, smaller

VIEW = eval_view(Preprocess(224))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed turns of each file")
    parser.add_argument("--size", type=int, nargs=2, default=(3518, 2800), help="rows and columns")
    parser.add_argument("--kinds", nargs="+", default=["raw", "JPEG Lossless"], choices=list(KINDS), help="encodings")
    parser.add_argument("--short-side", type=int, nargs="+", default=[448, 896], help="of the copies")
    return parser


def seconds_of(path: Path) -> float:
    start = time.process_time()
    VIEW(read_image(path, grey=True), None)
    return time.process_time() - start


def main(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    torch.set_num_threads(1)
    print(common.describe(torch.device("cpu"), args.runs, "pillow", "pydicom"), "of CPU time")
    values, out = mammogram(*args.size), {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            source = Path(folder) / "a.dcm"
            write(source, values, *KINDS[kind])
            files, whole, made = {"whole": source}, read_image(source), {}
            for side in args.short_side:
                for crop in (False, True):
                    name = f"{side}{', cropped' * crop}"
                    start = time.process_time()
                    copy = smaller(source.read_bytes(), "a", side, crop)
                    made[name] = time.process_time() - start
                    assert copy is not None  # the drawn image is larger
                    files[name] = Path(folder) / f"{name}.dcm"
                    files[name].write_bytes(copy)
                    expected = shrink(whole.crop(breast_box(whole)) if crop else whole, side)
                    if not np.array_equal(np.asarray(read_image(files[name])), np.asarray(expected)):
                        raise SystemExit(f"{kind}, {name}: the copy shows something else")
            timed: dict[str, list[float]] = {name: [] for name in files}
            for _ in range(args.runs):
                for name, path in files.items():
                    timed[name].append(seconds_of(path))
            for name, path in files.items():
                row = {"KB": path.stat().st_size / 1e3, "ms": 1000 * common.median(timed[name])}
                row |= {"made in ms": 1000 * made[name]} if name in made else {}
                out[f"{kind}, {name}"] = row
                print(f"{kind}, {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
    return out


if __name__ == "__main__":
    main()
