"""The lesions behind a table: who they are, which were misread, and what their scores come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets import create_reader
from evaluation import metrics, neighbours, saliency
from evaluation.predictions import Predictions
from evaluation.run_folder import places_of
from inputs import cbis
from inputs.images import read_image
from reporting.pictures import data_uri, jpeg, thumbnail
from reporting.runs import MISSING, ResultTable, Runs, read_json

SHOWN = 6  # images of each kind of error


def lesion_tables(runs: Runs) -> dict[str, list[dict[str, str]]]:
    """Rows of the lesion tables on disk, of the tables that have results."""
    found = {}
    for kind in set(runs.tables) & set(cbis.CBIS_KINDS):
        path = (runs.cbis or Path()) / f"{kind}.csv"
        if runs.cbis is not None and path.is_file():
            found[kind] = cbis.read_lesions(path)
            runs.read.append(path)
    return found


def splits_table(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """Table 1: counts by split, a line for each value of what the case tables say."""
    parts = [[row for row in rows if row["split"] == split] for split in cbis.CBIS_SPLITS]
    lines = [["", *cbis.CBIS_SPLITS], ["patients", *(str(len({r["patient"] for r in part})) for part in parts)],
             ["lesions (a lesion in two views counts twice)", *(str(len(part)) for part in parts)]]  # fmt: skip
    for title, column in (("pathology", "pathology"), ("view", "view"), ("side", "side"), ("breast density", "density"),
                          ("BI-RADS assessment", "assessment"), ("subtlety", "subtlety")):  # fmt: skip
        values = sorted({row.get(column, "") for row in rows})
        if values == [""]:
            lines.append([title, *[MISSING] * len(parts)])
            continue
        for value in values:
            counts = (Counter(row.get(column, "") for row in part)[value] for part in parts)
            cells = (f"{n} ({100 * n / max(len(part), 1):.0f}%)" for n, part in zip(counts, parts, strict=True))
            lines.append([f"{title}: {value or 'not stated'}", *cells])
    lines.append(["crop, median width × height in pixels", *map(median_crop, parts)])
    return lines


def median_crop(part: Sequence[dict[str, str]]) -> str:
    """Of a split's crops, width and height in pixels, for people."""
    sizes = np.array([[float(row[name]) for name in cbis.CROP_SIZE] for row in part if row.get("crop_width")])
    return "{:.0f} × {:.0f}".format(*np.median(sizes, axis=0)) if len(sizes) else MISSING


PROBE_FILES = ("predictions.csv", "settings.json", "head.safetensors")


def missed_cancers(found: Predictions) -> np.ndarray:
    """Numbers of the cancers with the lowest malignant probability."""
    target = cbis.CBIS_CLASSES.index(metrics.MALIGNANT)
    cancers = np.flatnonzero(found.labels == target)
    return cancers[np.argsort(found.prob[cancers, target], kind="stable")][:SHOWN]


def explained(table: ResultTable, rows: Sequence[dict[str, str]], runs: Runs, most: int, images: bool) -> dict | None:
    """Saliency of the table's last probe; what prevents it is told."""
    if not most or runs.cbis is None:
        return None
    if (model := table.last(*PROBE_FILES)) is None:
        return {"why": f"no probe has all of {', '.join(PROBE_FILES)}"}
    folder = model.folders[0]
    try:
        own = Predictions.read(folder / "predictions.csv")
        missed = [own.rows[i]["lesion"] for i in missed_cancers(own)]
        settings = read_json(folder / "settings.json", runs)
        found, named = saliency.explain_run(folder, rows, runs.cbis, most, missed)
        scores = saliency.score_maps(found)
    except (ImportError, ValueError, FileNotFoundError) as error:
        return {"why": str(error)}
    energy = {e.lesion: saliency.energy_inside(e.heat, e.mask) for e in [*found, *named]}
    farthest = sorted(found, key=lambda e: energy[e.lesion] - e.chance)
    groups = {
        "Cancers with the lowest malignant probability": named,
        "Maps with the least inside the outline, beside its size": farthest,
        "Drawn by lot": found,
    }  # fmt: skip
    plates = [
        {"title": title, "images": [
            {"lesion": e.lesion, "data": saliency.plate(e), "energy": energy[e.lesion], "chance": e.chance}
            for e in part[:SHOWN]
        ]} for title, part in groups.items()
    ] if images else []  # fmt: skip
    return {"model": model.name, "source": str(folder / "head.safetensors"), "lesions": len(found), "why": "",
            "fitted_on_crops": settings["args"].get("image_kind") == "crop",
            "scores": [(SALIENCY[name], percent_cell(value)) for name, value in scores.items()],
            "plates": plates}  # fmt: skip


SALIENCY = {
    "pointing": "Highest value inside the outline",
    "pointing_random_weights": "the same, weights drawn anew",
    "energy_inside": "Energy inside the outline",
    "energy_inside_random_weights": "the same, weights drawn anew",
    "chance": "Chance: the outline's fraction of the view",
    "rank_correlation_with_random_weights": "Rank correlation with the map of weights drawn anew",
    "pointing_minus_chance": "Highest value inside, minus chance",
    "energy_minus_chance": "Energy inside, minus chance",
    "empty": "Maps without a place that speaks for it",
}


def nearest(table: ResultTable, rows: Sequence[dict[str, str]], runs: Runs, roco: Path | None) -> dict | None:
    """The nearest captions and images of ROCO's validation split for the cancers that the last probe missed."""
    if roco is None or runs.cbis is None:
        return None
    if (model := table.last(*PROBE_FILES)) is None:
        return None
    own = Predictions.read(model.folders[0] / "predictions.csv")
    crops = {row["lesion"]: runs.cbis / row["crop"] for row in rows if row["crop"]}
    names = [own.rows[i]["lesion"] for i in missed_cancers(own)]
    names = [name for name in names if name in crops and thumbnail(crops[name])]
    stored = read_json(model.folders[0] / "settings.json", runs)["args"]["pretrained"]
    weights = next(iter(places_of(stored, model.folders[0])), stored)
    try:
        bank = neighbours.Neighbours(weights, create_reader("roco", str(roco), "", "validation", "all"))
        found = bank.of([read_image(crops[name]) for name in names])
    except (ValueError, FileNotFoundError) as error:
        return {"why": str(error)}
    lines = [
        {"lesion": name, "data": thumbnail(crops[name]),
         "captions": [(bank.captions[i], cosine) for i, cosine in near["captions"]],
         "images": [
             (bank.captions[i], data_uri(jpeg(bank.reader.image(i), 110)), cosine) for i, cosine in near["images"]
         ]}
        for name, near in zip(names, found, strict=True)
    ]  # fmt: skip
    return {"why": "", "model": weights, "source": str(roco), "lines": lines}


def percent_cell(value: dict[str, Any] | None) -> str:
    """Percent with the interval, or why there is none; a dash for what a publication does not report."""
    if value is None:
        return "–"
    if "low" not in value:
        return "–" if value.get("value") is None else f"{100 * value['value']:.2f}"
    return metrics.Interval.of(value).percent()
