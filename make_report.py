"""One page about runs: tables, curves, errors and images, every number with the file that it comes from.

    python make_report.py tables --output-dir report
    python make_report.py runs/vit_mammo/calc runs/vit_mammo/mass runs/vit_mammo

Takes folders of make_tables.py, main_linear.py, run_class_finetuning.py, eval_zeroshot.py and main.py, and what lies
below them. Written are report.html (no network, light and dark), report.md with figures/ (SVG for pages, PNG for
slides), tables.csv and tables.tex. The page shows test images with what each model says of them, to sort and look
through, and searches that `predict.py search --output FILE.csv` left among the runs; it is one file, but for images
beyond 8 MiB, which go beside it (report_images/). A number that no file holds is shown as missing; nothing is computed
from training data.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from reporting.page import build_page, write_report
from reporting.runs import gather
from runtime.command_line import HelpFormatter, run_script
from runtime.logs import start_logging

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parent


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("make_report.py", description=__doc__, formatter_class=HelpFormatter)
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Write the report; returns what the page shows."""
    args = get_args_parser().parse_args(argv)
    with start_logging():
        runs = gather(args.runs, args.cbis)
        page = build_page(runs, args.title, not args.no_images, args.saliency, args.roco, args.runs)
        write_report(page, args.output_dir)
        log.info(f"{len(page['read'])} files read, {len(page['figures'])} figures: {args.output_dir / 'report.html'}")
    return page


if __name__ == "__main__":
    run_script(main)
