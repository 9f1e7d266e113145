"""What a folder of results already holds: other settings' results, and readings of the test table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import utils
from towers.sources import is_name

log = logging.getLogger("medslip")


def settings_that_differ(path: str | Path, ours: dict[str, Any]) -> dict[str, list]:
    """What else than the weights a baseline's run did otherwise: name -> [there, here]; {} where it does not say."""
    beside = Path(path).with_name("results.json")
    if not beside.is_file():
        return {}
    theirs = utils.read_json(beside)
    theirs |= theirs["settings"] if isinstance(theirs.get("settings"), dict) else {}
    ours = json.loads(json.dumps(ours))  # as a file holds them
    return {k: [theirs[k], v] for k, v in ours.items() if k in theirs and theirs[k] != v}


def places_of(stored: str, folder: Path) -> list[str]:
    """Where a file may be now that a run in `folder` names by its place then: there, or as it lay from the run.

    A run that was moved with what lies around it has the same names above and beside it. Those that are there, the
    stored place first; what is no path stays as it is.
    """
    if not stored or is_name(stored):
        return [stored]
    parts, here = Path(stored).parts, folder.absolute()
    beside = [
        above.joinpath(*parts[-kept:])
        for above in (here, *list(here.parents)[:3])
        for kept in range(min(len(parts) - 1, 3), 0, -1)
    ]
    return list(dict.fromkeys(str(path) for path in (Path(stored), *beside) if path.exists()))


RESULT_FILES = ("results.json", "predictions.csv", "settings.json", "head.safetensors")


def set_aside_other_results(output_dir: str | Path, settings: dict[str, Any], baselines: Sequence[str] = ()) -> None:
    """Moves results of other settings into a folder of their own, earlier_1/ and so on; the log says what differs.

    A baseline that this run would replace is a ValueError.
    """
    folder = Path(output_dir)
    own = folder / "predictions.csv"
    for baseline in baselines:
        if own.exists() and own.samefile(baseline):
            raise ValueError(f"--baseline {baseline} is what this run would overwrite: choose another --output-dir")
    differ = settings_that_differ(own, settings)
    if not differ:
        return
    number = 1 + len(list(folder.glob("earlier_*")))
    while (aside := folder / f"earlier_{number}").exists():
        number += 1
    aside.mkdir()
    for name in RESULT_FILES:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    named = "; ".join(f"{name} {there} there, {here} now" for name, (there, here) in differ.items())
    log.info(f"the results in {folder} are of other settings ({named}): moved to {aside}")


def count_reading(output_dir: str | Path, settings: dict[str, Any]) -> int:
    """Adds a line with the time to test_readings.jsonl, before a test table is read; returns how many it has."""
    path = Path(output_dir) / "test_readings.jsonl"
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **settings}
    with open(path, "a") as file:
        file.write(json.dumps(entry, default=str) + "\n")
    return len(path.read_text().splitlines())
