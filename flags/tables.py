"""Flags of make_tables.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from flags.common import description
from flags.names import CATALOG
from runtime.command_line import HelpFormatter, Parser, UsageError, positive_int

HERE = Path(__file__).resolve().parents[1]


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("make_tables.py", description=description("make_tables.py"), formatter_class=HelpFormatter)
    data = parser.add_argument_group("what the rows are made from")
    data.add_argument("--roco", default="", type=str, help="folder of ROCO")
    data.add_argument("--cbis", default="", type=str, help="folder of CBIS-DDSM; its tables are prepared where absent")
    data.add_argument("--medclip-vit", default="", type=str, help="MedCLIP's medclip-vit: folder, zip or .bin")
    data.add_argument("--medclip-resnet", default="", type=str, help="MedCLIP's medclip-resnet: folder, zip or .bin")
    data.add_argument("--bert-vocab", default="", type=str, help="vocab.txt of Bio_ClinicalBERT")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--rows", default=str(HERE / "table_rows.json"), type=str, metavar="JSON",
                      help="the rows; copy the default to change them")
    rows.add_argument("--catalog", default=str(CATALOG), type=str,
                      help="where the labelled sets are that the rows file's `tables` names beside calc and mass")
    rows.add_argument("--seeds", default=[0, 1, 2], nargs="+", type=int,
                      help="trainings of each row. One says nothing of the training's chance, three are few; a "
                      "published model as it is has none")
    rows.add_argument("--primary", default=None, nargs=2, metavar=("TABLE", "ROW"),
                      help="the one comparison that is tested without correction, named before results are there "
                      "(default: the rows file's)")
    rows.add_argument("--resamples", default=2000, type=positive_int, help="of the patients, for intervals")
    run = parser.add_argument_group("running")
    run.add_argument("--output-dir", default="./tables", type=str, help="runs and tables go here")
    run.add_argument("-j", "--workers", default=8, type=int, help="loader processes of each step")
    run.add_argument("--dry-run", action="store_true", help="check everything, print each step's command and stop")
    run.add_argument("--submit", default=None, nargs="?", const="", type=str, metavar="FLAGS",
                     help="send the trainings to Slurm through run_with_submitit.py with these flags, e.g. "
                     "--submit='--partition gpu --nodes 1 --ngpus 1'; the same command again says which still wait or "
                     "run, and goes on when they have ended")
    return parser
# fmt: on


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for a seed that is there twice."""
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {args.seeds}: a seed is there twice")
