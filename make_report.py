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

import logging
from pathlib import Path
from typing import Any

from flags.report import get_args_parser
from runtime.command_line import answer_flags, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser())

from reporting.page import build_page, write_report
from reporting.runs import gather
from runtime.logs import start_logging

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parent


# fmt: off
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
