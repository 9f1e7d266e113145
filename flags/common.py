"""Flags that several commands share."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import tokenize
from pathlib import Path
from typing import Any

from flags.names import PRECISIONS

LAYOUT = (tokenize.COMMENT, tokenize.NL)


def description(script: str) -> str:
    """The docstring of a file, which is its --help; read, because an import would load PyTorch."""
    with tokenize.open(Path(__file__).resolve().parents[1] / script) as source:
        # The first token alone: parsing all of main.py was a seventh of its --help.
        first = next(token for token in tokenize.generate_tokens(source.readline) if token.type not in LAYOUT)
    return inspect.cleandoc(ast.literal_eval(first.string)) if first.type == tokenize.STRING else ""


# fmt: off
def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of processes, device and precision, the same for all scripts."""
    group = parser.add_argument_group("processes and device")
    group.add_argument(
        "--world-size", default=1, type=int, help="number of processes; torchrun and submitit set it, so leave it alone"
    )
    group.add_argument("--rank", default=0, type=int, help="rank of this process; set by the launcher")
    group.add_argument(
        "--local_rank",
        "--local-rank",
        default=0,
        type=int,
        help="rank of this process on its node; set by the launcher",
    )
    group.add_argument(
        "--dist-url",
        default="env://",
        type=str,
        help="rendezvous; env:// reads MASTER_ADDR and MASTER_PORT, which torchrun sets",
    )
    group.add_argument("--dist-backend", default="nccl", type=str, help="nccl on GPUs; on the CPU gloo is always used")
    group.add_argument(
        "--dist-timeout",
        default=600,
        type=float,
        metavar="SECONDS",
        help="a collective that hangs longer than this ends the run",
    )
    group.add_argument(
        "--gpu",
        default=None,
        type=int,
        help="index of the GPU to use; by default the local rank's. -1 computes on the CPU",
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="what the towers are computed in; weights and losses stay in float32. auto: bf16 on a GPU that has it, "
        "else fp16; on a CPU fp32-onednn where it is found to be faster (linear layers by oneDNN: AMD's Zen 5), else "
        "fp32; bf16 is faster still if the processor has units for it (recent server CPUs)",
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def add_column_arguments(parser: Any) -> None:
    """What the columns of one's own table of pairs are called."""
    parser.add_argument("--image-column", default="", type=str, metavar="NAME",
                        help="csv: the column of image files (default: image, filepath or the like)")
    parser.add_argument("--caption-columns", default=[], nargs="+", type=str, metavar="NAME",
                        help="csv: the column of captions, or the sections of a report (findings impression), which "
                        "are joined in this order (default: caption, text, report or the like)")


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """`-j`, how many processes."""
    parser.add_argument(
        "-j",
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; about one for each CPU core it may use",
    )
# fmt: on
