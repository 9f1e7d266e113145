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
import logging
import sys
from pathlib import Path

from preparation import audit, cbis_tables, check, shards, shrink, unpack, yfcc
from runtime.command_line import HelpFormatter, run_script
from runtime.logs import progress, start_logging

log = logging.getLogger("medslip")


def get_args_parser() -> argparse.ArgumentParser:
    """The subcommands; each of preparation/ adds its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(title="datasets", dest="command", required=True)
    for subcommand in (yfcc, cbis_tables, shards, shrink, unpack, check, audit):
        subcommand.add_parser(commands)
    add_demo_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; without one, YFCC15M's, as published."""
    argv = sys.argv[1:] if argv is None else argv
    args = get_args_parser().parse_args(argv or ["yfcc15m"])
    with start_logging():
        args.run(args)


def add_demo_parser(commands) -> None:
    """The flags of `demo`."""
    parser = commands.add_parser(
        "demo",
        help="draw a small SYNTHETIC radiology world",
        description="Draws mammogram-like and other radiology-like phantoms with captions: --root/roco in the "
        "layout of ROCO v1, --root/cbis in that of CBIS-DDSM with its lesion tables. All of it is synthetic; "
        "results on it say nothing about patients.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder to draw into; a finished one of equal settings is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other patients")
    parser.add_argument("--pairs", type=int, default=6000, help="training pairs of the ROCO part")
    parser.add_argument("--size", type=int, default=64, help="pixels along the short side of an image")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; the result is the same")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    """Draw the world and make its lesion tables."""
    from synthetic.world import make_demo  # whose drawing processes import no torch

    make_demo(args.root, args.seed, args.pairs, size=args.size, workers=args.workers, progress=progress)
    cbis_tables.make_cbis(args.root / "cbis")


if __name__ == "__main__":
    run_script(main)
