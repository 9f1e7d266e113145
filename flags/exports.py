"""Flags of export.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from flags.common import description
from flags.names import FORMATS
from runtime.command_line import HelpFormatter, Parser


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("export.py", description=description("export.py"), formatter_class=HelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="checkpoint",
                        help="any weights that this project reads; of several, which started from the same weights, "
                        "the mean")
    parser.add_argument("--to", required=True, choices=FORMATS,
                        help="open-clip holds both towers; transformers both of its own pairs, of others the image "
                        "tower; timm the image tower's features, not projected; onnx, one graph for each side, "
                        "needs pip install onnx onnxscript")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--bert-vocab",
        default=None,
        metavar="VOCAB.TXT",
        help="vocabulary of Bio_ClinicalBERT; only MedCLIP's own weights need it",
    )
    parser.add_argument(
        "--results",
        default=[],
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of probes and fine-tunings whose results.json goes into the card",
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser
# fmt: on
