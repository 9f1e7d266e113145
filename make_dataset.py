"""Turns downloads into what the readers want, by subcommand.

python make_dataset.py                  YFCC15M, from the three files of its README section in this folder
python make_dataset.py yfcc15m ...      the same with paths: yfcc15m.pkl and yfcc100m.pkl
python make_dataset.py cbis --root R    CBIS-DDSM: R/calc.csv and R/mass.csv, one lesion a row
python make_dataset.py shards ...       any dataset of main.py as tar shards, shrunk if you like
python make_dataset.py shrink ...       a copy of a folder of images, shrunk
python make_dataset.py unpack ...       ROCO's parquet folders or zips to ROCO's layout
python make_dataset.py check ...        counts of a finished download, and the images that cannot be decoded
python make_dataset.py audit ...        near duplicates within a set of images, or between two
python make_dataset.py demo --root R    a small synthetic radiology world in the ROCO and CBIS-DDSM layouts
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from flags.preparing import get_args_parser
from runtime.command_line import run_script
from runtime.logs import progress, start_logging

log = logging.getLogger("medslip")


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; without one, YFCC15M's, as published."""
    argv = sys.argv[1:] if argv is None else argv
    args = get_args_parser().parse_args(argv or ["yfcc15m"])
    with start_logging():
        run = run_demo if args.command == "demo" else importlib.import_module(f"preparation.{args.module}").run
        run(args)


def run_demo(args: argparse.Namespace) -> None:
    """Draw the world and make its lesion tables."""
    from preparation import cbis_tables
    from synthetic.world import make_demo  # whose drawing processes import no torch

    make_demo(args.root, args.seed, args.pairs, size=args.size, workers=args.workers, progress=progress)
    cbis_tables.make_cbis(args.root / "cbis")


if __name__ == "__main__":
    run_script(main)
