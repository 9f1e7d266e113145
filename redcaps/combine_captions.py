"""Merges RedCaps' annotation files into the one list that `--dataset redcaps` reads.

    python redcaps/combine_captions.py --input /path/to/redcaps/annotations --output /path/to/redcaps_v1.json

The input is a folder of `<subreddit>_<year>.json`, each an object with a list `annotations`; the output is one JSON
list of all annotations, unchanged, in the order of the files' names. Annotations pass through one by one: memory does
not grow with their number. The output appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inputs.metadata import fields_of, iter_json  # noqa: E402
from runtime.command_line import run_script  # noqa: E402
from runtime.logs import progress, start_logging  # noqa: E402
from utils import atomic_write  # noqa: E402

log = logging.getLogger("medslip")


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of the downloaded annotation files")
    parser.add_argument("--output", type=Path, required=True, help="file to write, e.g. redcaps_v1.json")
    parser.add_argument(
        "--subreddits",
        nargs="+",
        default=[],
        metavar="NAME",
        help="keep the annotations of these alone, e.g. itap birding (default: all); names are "
        "compared without regard to case",
    )
    return parser


def annotation_files(folder: Path, output: Path) -> list[Path]:
    """The `*.json` of the folder by name, without the output of an earlier run."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--input {folder} is not a folder: give that of the annotation files")
    files = [path for path in sorted(folder.glob("*.json")) if path.resolve() != output.resolve()]
    if not files:
        raise FileNotFoundError(f"no annotation files (<subreddit>_<year>.json) in {folder}")
    return files


def read_annotations(files: list[Path], counts: Counter) -> Iterator[dict]:
    """All annotations, counted by subreddit; ValueError names file and annotation where a field is absent."""
    item: Any
    for path in progress(files, "combining", unit=" files"):
        for number, item in enumerate(iter_json(path, "annotations")):
            fields = fields_of(item, f"{path} annotation {number}", image_id=str, subreddit=str, caption=str)
            counts[fields[1].lower()] += 1
            yield item


def combine(files: list[Path], output: Path, subreddits: list[str]) -> tuple[Counter, Counter]:
    """Write the list; returns how many annotations of each subreddit were found and how many were kept.

    Raises ValueError for a malformed file and for a subreddit that no annotation belongs to; then nothing is written.
    """
    wanted = {name.lower() for name in subreddits}
    found, kept = Counter(), Counter()

    def write(file) -> None:
        file.write(b"[")
        for item in read_annotations(files, found):
            name = item["subreddit"].lower()
            if not wanted or name in wanted:
                file.write((b",\n" if kept else b"\n") + json.dumps(item).encode())
                kept[name] += 1
        file.write(b"\n]\n")
        if absent := sorted(wanted - set(kept)):
            raise ValueError(f"no annotations of {', '.join(absent)}; there are {', '.join(sorted(found))}")
        if not kept:
            raise ValueError(f"no annotations in the {len(files)} files of {files[0].parent}")

    atomic_write(output, write)
    return found, kept


def main(argv: list[str] | None = None) -> None:
    """Merge as the command line says, and count what was merged."""
    args = get_args_parser().parse_args(argv)
    with start_logging():
        files = annotation_files(args.input, args.output)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        found, kept = combine(files, args.output, args.subreddits)
        for name in sorted(kept) if args.subreddits else ():
            log.info(f"{name}: {kept[name]:,}")
        log.info(
            f"{args.output}: {kept.total():,} of {found.total():,} annotations, {len(kept):,} of {len(found):,} "
            f"subreddits, {len(files):,} files"
        )


if __name__ == "__main__":
    run_script(main)
