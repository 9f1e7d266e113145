"""Flags of eval_zeroshot.py."""

from __future__ import annotations

import argparse

from flags.common import add_column_arguments, add_distributed_arguments
from flags.names import CATALOG, MODELS, READERS
from inputs.sizes import ImageSize
from runtime.command_line import Parser, UsageError, positive_int


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups."""
    parser = Parser("eval_zeroshot.py", description="Zero-shot classification and image-text retrieval")
    add_model_arguments(parser)
    add_data_arguments(parser)
    run = parser.add_argument_group("running")
    # fmt: off
    run.add_argument("--output-dir", default="./", type=str,
                     help="zeroshot.json is written here, and features/ with the prompts' embeddings for the next run")
    run.add_argument("--batch-size", default=256, type=positive_int,
                     help="images, or prompts, for each process at a time; memory and speed only")
    run.add_argument("-j", "--workers", default=10, type=int,
                     help="loader processes for each process, no more than there are cores; 0 for none")
    # fmt: on
    add_distributed_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model is evaluated."""
    model = parser.add_argument_group("model")
    # fmt: off
    model.add_argument("--resume", default="", type=str, metavar="CKPT",
                       help="checkpoint of this project, published SLIP file, MedCLIP's folder, zip or "
                       "pytorch_model.bin, or a model of another library: its folder, hf:ID, open-clip:NAME/TAG "
                       "(default: checkpoint_best.pt in --output-dir)")
    model.add_argument("--model", default=None, choices=list(MODELS), metavar="NAME",
                       help="model that a published file holds, where the file itself does not say")
    model.add_argument("--bert-vocab", default=None, type=str, metavar="VOCAB.TXT",
                       help="vocabulary of Bio_ClinicalBERT; only MedCLIP's own weights need it")
    model.add_argument("--text-pooling", default=None, choices=("masked", "medclip"),
                       help="BERT towers: average over a caption's own tokens, or padding too (default: as trained)")
    model.add_argument("--image-size", default=None, action=ImageSize,
                       help="pixels of the images, a side or height and width, where it is not the size that the "
                       "weights were trained with; position embeddings follow")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sets, and which pairs for retrieval."""
    data = parser.add_argument_group("data")
    # fmt: off
    data.add_argument("--datasets", default=[], nargs="+", type=str, metavar="NAME",
                      help="sets of the catalog to evaluate (default: all of them, in its order)")
    data.add_argument("--catalog", default=str(CATALOG), type=str, metavar="JSON",
                      help="where each set lies; edit the paths in dataset_catalog.json or name a copy of it, to which "
                      "sets of your own can be added")
    data.add_argument("--download", action="store_true",
                      help="let torchvision fetch cifar10, cifar100, stl10 and mnist into their catalog path")
    data.add_argument("--skip-broken", action="store_true",
                      help="skip images that are missing or corrupt and report the reduced number; else an error")

    pairs = parser.add_argument_group("retrieval")
    pairs.add_argument("--retrieval", action="store_true",
                       help="image-text retrieval only: over --root, or over the catalog's sets of pairs")
    pairs.add_argument("--dataset", default="roco", choices=READERS, metavar="READER",
                       help=f"what lies at --root: {', '.join(READERS)}")
    pairs.add_argument("--root", default="", type=str, help="folder of the image-text pairs")
    pairs.add_argument("--metadata", default="", type=str, help="caption file (default: the publisher's place)")
    add_column_arguments(pairs)
    pairs.add_argument("--split", default="test", type=str, help="split of the pairs: train, validation or test")
    pairs.add_argument("--caption-filter", default="all", type=str,
                       help="all, mammo-xray, mammo or a regular expression: which pairs are the candidates")
# fmt: on


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that exclude each other."""
    if args.root and not args.retrieval:
        raise UsageError("--root is where --retrieval reads its pairs; add --retrieval, or edit the catalog")
    if args.root and args.datasets:
        raise UsageError("--root is one set of pairs, and --datasets are sets of the catalog: choose one of the two")
