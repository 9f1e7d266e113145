"""Flags of make_report.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from flags.common import description
from runtime.command_line import HelpFormatter, Parser


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("make_report.py", description=description("make_report.py"), formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folders with tables.json, results.json, zeroshot.json or log.jsonl, or above such")
    parser.add_argument("--output-dir", default=Path("report"), type=Path, help="report.html and the rest go here")
    parser.add_argument("--title", default="MedSLIP: results", type=str, help="of the page")
    parser.add_argument("--cbis", default=None, type=Path,
                        help="folder of CBIS-DDSM for images and the table of its splits (default: the runs' own)")
    parser.add_argument("--no-images", action="store_true",
                        help="leave out images of patients, and the list of cases that goes with them")
    parser.add_argument("--saliency", default=0, type=int, metavar="LESIONS",
                        help="explain the last probe of each table on up to this many test cancers, on the whole "
                        "mammogram against the radiologist's outline; needs captum and the run's weights")
    parser.add_argument("--roco", default=None, type=Path,
                        help="folder of ROCO: the nearest captions and images of its validation split for the missed "
                        "cancers, by the last probe's model; passes that split once")
    return parser
# fmt: on
