"""Flags of predict.py."""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from pathlib import Path

from flags.common import description
from flags.names import PRECISIONS
from inputs.display import FRAMES, add_frame_argument
from runtime.command_line import HelpFormatter, Parser, UsageError, positive_int


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    parser = Parser("predict.py", description=description("predict.py"), formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="by a fitted probe or a fine-tuned tower",
                                   formatter_class=HelpFormatter)
    classify.add_argument("run", type=Path, help="folder of main_linear.py, with head.safetensors and settings.json, "
                          "or of run_class_finetuning.py")
    add_images(classify)
    classify.add_argument("--weights", default="", type=str, help="where the run's weights are now, if they were moved")
    classify.add_argument("--explain", default=None, type=Path, metavar="DIR",
                          help="write each image and, beside it, the same with the places in red that its score comes "
                          "from, the malignant one or the predicted class's; make_report.py --saliency says how far to "
                          "trust such maps")

    zero = commands.add_parser("zero-shot", help="by labels in words", formatter_class=HelpFormatter)
    add_weights(zero)
    add_images(zero)
    zero.add_argument("--labels", default=[], nargs="+", type=str, help="the classes, in words; quote those of several")
    zero.add_argument("--templates", default=["{}."], nargs="+", type=str, metavar="TEXT",
                      help="prompts with {} for the label; several are averaged")
    zero.add_argument("--set", default="", type=str, metavar="NAME",
                      help="take labels and templates from this entry of the catalog, labels.json and templates.json")

    embed = commands.add_parser("embed", help="images or captions to a file of vectors",
                                formatter_class=HelpFormatter)
    add_weights(embed)
    add_images(embed, nargs="*")
    embed.add_argument("--captions", default="", type=str, metavar="TXT", help="a file of captions instead, one a line")

    search = commands.add_parser("search", help="nearest in an embedded set", formatter_class=HelpFormatter)
    search.add_argument("bank", type=Path, help="what embed wrote: images or captions")
    add_images(search, nargs="*")
    search.add_argument("--text", default=[], nargs="+", type=str, help="captions to look for")
    search.add_argument("-k", default=5, type=positive_int, help="how many of the nearest")
    search.add_argument("--weights", default="", type=str, help="where the set's weights are now, if they were moved")
    search.add_argument("--bert-vocab", default=None, type=str, help="for MedCLIP's own weights")
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument("weights", type=str, help="a checkpoint, a published SLIP file or MedCLIP's weights")
    parser.add_argument("--bert-vocab", default=None, type=str, metavar="VOCAB.TXT",
                        help="Bio_ClinicalBERT's vocabulary; only MedCLIP's own weights need it")


def add_images(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """Which images, where answers go, and how the images are loaded."""
    parser.add_argument("images", nargs=nargs, type=Path, help="image files, folders, or CSVs with a column image")
    add_frame_argument(parser, "of DICOM files and TIFFs with several frames or pages: first, middle, a number from 1, "
                       "or all, each an answer of its own called FILE#NUMBER", words=(*FRAMES, "all"))
    parser.add_argument("--window", default=None, nargs=2, type=float, metavar=("CENTER", "WIDTH"),
                        help="show images of more than 8 bits through this window (in what the device measured, "
                        "Hounsfield units for CT) in place of the file's own or their percentiles")
    parser.add_argument("--output", default="", type=str, help="CSV, or .npz of embed (embed needs one)")
    parser.add_argument("--batch-size", default=64, type=positive_int, help="memory and speed only")
    parser.add_argument("-j", "--workers", default=0, type=int, help="loader processes")
    parser.add_argument("--gpu", default=None, type=int, help="index of the GPU; by default the first, -1: the CPU")
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS),
                        help="of features; auto: a run's own where this machine has it, else bf16 on a GPU and "
                        "float32 on a CPU")
# fmt: on


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that lack something or exclude each other."""
    if args.window and args.window[1] < 1:
        raise UsageError(f"--window {args.window[0]:g} {args.window[1]:g}: a width is at least 1")
    if args.output and Path(args.output).is_dir():
        raise UsageError(f"--output {args.output} is a folder: name a file in it")
    {"classify": check_classify, "zero-shot": check_zero_shot, "embed": check_embed, "search": check_search}[
        args.command
    ](args)


def check_classify(args: argparse.Namespace) -> None:
    """Whether --explain can be done."""
    if args.explain and importlib.util.find_spec("captum") is None:
        raise UsageError("--explain needs captum: pip install captum")


def check_zero_shot(args: argparse.Namespace) -> None:
    """Labels and templates."""
    if args.set and args.labels:
        raise UsageError("--set brings its labels: leave out --labels, or --set")
    if not args.set and len(args.labels) < 2:
        raise UsageError("zero-shot needs --labels, at least two, or --set")
    if not args.set and (twice := [label for label, n in Counter(args.labels).items() if n > 1]):
        raise UsageError(f"--labels holds {twice[0]!r} more than once: a column of the answers is of one label")
    if lacking := [template for template in args.templates if "{}" not in template]:
        raise UsageError(f"template {lacking[0]!r} has no {{}} for the label")


def check_embed(args: argparse.Namespace) -> None:
    """One kind of input, and a file for it."""
    if not args.output.endswith(".npz"):
        raise UsageError(f"embed needs --output with the ending .npz, not {args.output!r}")
    if bool(args.images) == bool(args.captions):
        raise UsageError("embed takes images or --captions, one of the two")


def check_search(args: argparse.Namespace) -> None:
    """Something to look for."""
    if not args.images and not args.text:
        raise UsageError("search needs images or --text to look for")
