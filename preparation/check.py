"""A finished download: how many images each split has, and which of them cannot be decoded.

python make_dataset.py check --dataset roco --root /path/to/roco
python make_dataset.py check --set pets --catalog my_catalog.json
python make_dataset.py check --set vindr_birads --root /path/to/vindr-mammo
"""

from __future__ import annotations

import argparse
import logging
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
from evaluation import downstream
from evaluation.set_probes import find_set
from evaluation.set_rows import files_without_row
from inputs.columns import PairColumns, TextColumn
from inputs.conventions import crossing
from inputs.files import on_disk
from inputs.images import UnreadableImage
from inputs.reader import NoSplit, Reader
from preparation.processes import over_processes
from runtime.command_line import UsageError
from runtime.logs import aligned, progress
from utils import atomic_write

log = logging.getLogger("medslip")


def run(args: argparse.Namespace) -> None:
    """Count and decode every split; ValueError, after the last one, where images cannot be decoded."""
    if bool(args.dataset) == bool(args.set):
        raise UsageError("check takes --dataset with --root, or --set, one of the two")
    bad: list[str] = []
    sources = open_pairs(args) if args.dataset else open_set(args)
    for line in overview(sources):
        log.info(line)
    for split, source in sources.items():
        found = unreadable(source, args.workers, split)
        bad += found
        kind = "images with captions" if args.dataset else "images"
        log.info(f"{split}: {len(source):,} {kind}, {len(found):,} of them cannot be decoded")
    if bad:
        atomic_write(
            args.output,
            lambda file: file.write("".join(f"{line}\n" for line in bad).encode("utf-8", "surrogateescape")),
        )
        raise ValueError(f"{len(bad)} images cannot be decoded, first {bad[0].split(chr(9))[0]}: see {args.output}")


def open_pairs(args: argparse.Namespace) -> dict[str, Any]:
    """A reader for each split that is there."""
    found = {}
    named = PairColumns(args.image_column, tuple(args.caption_columns))
    for split in datasets.READERS[args.dataset].splits:
        try:
            found[split] = datasets.create_reader(args.dataset, args.root, args.metadata, split, named=named)
        except (FileNotFoundError, NoSplit) as error:
            log.info(f"{split}: not there ({error})")
            continue
        for line in found[split].log:
            log.info(f"{split}: {line}")
    if not found:
        raise FileNotFoundError(f"no split of {args.dataset} at {args.root!r}")
    return found


def open_set(args: argparse.Namespace) -> dict[str, Any]:
    """Both splits of a labelled set; all of a table that has none."""
    catalog = find_set(args.set, args.root, args.catalog)
    if downstream.has_splits(args.set, catalog):
        found: dict[str, Any] = dict(zip(("train", "test"), downstream.open_splits(args.set, catalog), strict=True))
    else:
        found = {"all": downstream.open_every_row(args.set, catalog, None)}
        log.info(
            f"{args.set} has no column that tells a training and a test split: main_linear.py --cross-validate 5, "
            "make_tables.py and eval_zeroshot.py take all of its rows"
        )
    if empty := [split for split, images in found.items() if not len(images)]:
        raise ValueError(f"{args.set}: no image of {' and '.join(empty)}")
    if catalog[args.set]["type"] == "csv":
        folder, alone = files_without_row(catalog[args.set])
        if alone:
            log.info(f"{folder}: {len(alone):,} images are of no row of the table, first {alone[0]}")
    return found


MOST_CLASSES = 10  # that have a column each


def overview(sources: dict[str, Any]) -> list[str]:
    """A table of all splits, and a line for what they share and for names in another form than the disk's."""
    tables = {split: counts_of(source) for split, source in sources.items()}
    columns = list(dict.fromkeys(name for counts in tables.values() for name in counts))
    rows = [[split, *(counts.get(name, "") for name in columns)] for split, counts in tables.items()]
    lines = ["\n" + aligned([["", *columns], *rows])]
    groups = {split: source.groups for split, source in sources.items() if isinstance(source, Reader)}
    for one, other in combinations(groups, 2):  # a labelled set with such groups is refused when it is read
        splits_of = {
            name: [split for split in (one, other) if name in groups[split]] for name in groups[one] | groups[other]
        }
        if shared := crossing(splits_of):
            lines.append(f"{len(shared):,} groups are in both {one} and {other}, first {shared[0]}")
    for split, counts in tables.items():
        if counts.get("other form"):
            lines.append(
                f"{split}: {counts['other form']:,} names differ from the disk's in the form of accented letters alone "
                "(NFC, NFD) and are found"
            )
    return lines


def counts_of(source: Any) -> dict[str, Any]:
    """What a split's line of the table says, by column: images, groups, images of each class, names not found."""
    counts: dict[str, Any] = {"images": f"{len(source):,}"}
    if isinstance(source, Reader):
        if source.groups:
            counts["groups"] = f"{len(source.groups):,}"
        counts["not found"] = f"{source.dropped:,}"
        images = source.images
        files = type(source).data is Reader.data  # no members of archives
        _, other = names_of(source.root, images if files and isinstance(images, TextColumn) else [])
    else:
        if source.scheme is not None and source.scheme.unit != "images":
            counts[source.scheme.unit] = f"{len({row[source.scheme.group] for row in source.rows}):,}"
        number = source.images_of_classes()
        if len(number) <= MOST_CLASSES:
            counts |= {str(name): f"{n:,}" for name, n in zip(source.classes, number, strict=True)}
        else:
            counts["classes"] = f"{sum(map(bool, number)):,} of {min(filter(None, number)):,} to {max(number):,}"
        absent, other = names_of(getattr(source, "root", Path()), getattr(source, "paths", []))
        counts["not found"] = f"{absent:,}"
    return counts | ({"other form": other} if other else {})


def names_of(root: Path, paths: TextColumn | list[str]) -> tuple[int, int]:
    """How many paths are not there, and how many only in another form of their accented letters."""
    absent = other = 0
    for i in range(len(paths)):
        if not os.path.exists(path := root / paths[i]):  # nor is the image that a link to nothing names
            there = on_disk(path).exists()
            absent, other = absent + (not there), other + there
    return absent, other


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
        name = source.name(i) if hasattr(source, "name") else source.rows[i]["image"] if source.rows else str(i)
        return f"{name}\t{error}"
    return ""
