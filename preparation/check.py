"""A finished download: how many images each split has, and which of them cannot be decoded.

python make_dataset.py check --dataset roco --root /path/to/roco
python make_dataset.py check --set pets --catalog my_catalog.json
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from evaluation import downstream
from evaluation.catalog import CATALOG, read_catalog
from inputs.images import UnreadableImage
from inputs.reader import NoSplit, Reader
from preparation.processes import add_workers_argument, over_processes
from runtime.command_line import HelpFormatter, UsageError
from runtime.logs import progress
from utils import atomic_write

log = logging.getLogger("medslip")


def add_parser(commands: Any) -> None:
    """The flags of `check`."""
    parser = commands.add_parser(
        "check",
        help="count a finished download, and name the images that cannot be decoded",
        description="Decodes every image of a dataset of main.py, or of a set of the catalog, split by split. "
        "Exit code 1 where some cannot be decoded; they are named in --output.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--dataset", default="", choices=["", *datasets.READERS], help="which reader, as for main.py")
    parser.add_argument("--root", default="", help="folder of the dataset, as for main.py")
    parser.add_argument("--metadata", default="", help="file of captions where the layout does not fix it")
    parser.add_argument("--set", default="", metavar="NAME", help="a labelled set of the catalog instead")
    parser.add_argument("--catalog", default=str(CATALOG), help="where the labelled sets are")
    parser.add_argument("--output", type=Path, default=Path("unreadable.txt"), help="the images that cannot be decoded")
    add_workers_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Count and decode every split; ValueError, after the last one, where images cannot be decoded."""
    if bool(args.dataset) == bool(args.set):
        raise UsageError("check takes --dataset with --root, or --set, one of the two")
    bad: list[str] = []
    for split, source in (open_pairs(args) if args.dataset else open_set(args)).items():
        found = unreadable(source, args.workers, split)
        bad += found
        log.info(f"{split}: {describe(source)}, {len(found):,} of them cannot be decoded")
    if bad:
        atomic_write(
            args.output,
            lambda file: file.write("".join(f"{line}\n" for line in bad).encode("utf-8", "surrogateescape")),
        )
        raise ValueError(f"{len(bad)} images cannot be decoded, first {bad[0].split(chr(9))[0]}: see {args.output}")


def open_pairs(args: argparse.Namespace) -> dict[str, Any]:
    """A reader for each split that is there."""
    found = {}
    for split in datasets.READERS[args.dataset].splits:
        try:
            found[split] = datasets.create_reader(args.dataset, args.root, args.metadata, split)
        except (FileNotFoundError, NoSplit) as error:
            log.info(f"{split}: not there ({error})")
            continue
        for line in found[split].log:
            log.info(f"{split}: {line}")
    if not found:
        raise FileNotFoundError(f"no split of {args.dataset} at {args.root!r}")
    return found


def open_set(args: argparse.Namespace) -> dict[str, Any]:
    """Both splits of a labelled set."""
    catalog = read_catalog(args.catalog)
    return {part: downstream.create_downstream(args.set, part == "train", None, catalog) for part in ("train", "test")}


def describe(source: Any) -> str:
    """How many images a split has, and of a labelled set their classes and groups."""
    if isinstance(source, Reader):
        return f"{len(source):,} images with captions"
    of_class = Counter(source.labels.tolist())
    fewest, most = min(of_class.values()), max(of_class.values())
    groups = len({row["group"] for row in source.rows if row.get("group")})
    return f"{len(source):,} images, {len(source.classes):,} classes of {fewest:,} to {most:,}" + (
        f", {groups:,} groups" if groups else ""
    )


def unreadable(source: Any, workers: int, title: str) -> list[str]:
    """A line for each image that cannot be decoded: its name, a tab, and why."""
    with (
        over_processes(workers, source, chunk=32) as each,
        progress(desc=title, total=len(source), unit=" images") as bar,
    ):
        found = []
        for line in each(why_unreadable, range(len(source))):
            found += [line] * bool(line)
            bar.update()
    return found


def why_unreadable(source: Any, i: int) -> str:
    """ "" for an image that can be decoded, else its name, a tab, and why not."""
    try:
        source.image(i)
    except (UnreadableImage, FileNotFoundError) as error:
        name = source.name(i) if hasattr(source, "name") else str(i)
        return f"{name}\t{error}"
    return ""
