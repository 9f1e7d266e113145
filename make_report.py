"""One page about runs: tables, curves, errors and images, every number with the file that it comes from.

    python make_report.py tables --output-dir report
    python make_report.py runs/vit_mammo/calc runs/vit_mammo/mass runs/vit_mammo

Takes folders of make_tables.py, main_linear.py, run_class_finetuning.py, eval_zeroshot.py and main.py, and what lies
below them. Written are report.html (one file, no network, light and dark), report.md with figures/, tables.csv and
tables.tex. A number that no file holds is shown as missing; nothing is computed from training data.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

import cbis
import checklists
import figures
import metrics
import neighbours
import saliency
import utils
from datasets import create_reader
from images import UnreadableImage, read_image
from make_tables import TABLES, is_synthetic
from predictions import Predictions, describe_interval

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parent
MISSING = "missing"
BANDS = 200  # resamples of the patients behind a curve's band
SHOWN = 6  # images of each kind of error


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make_report.py", description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folders with tables.json, results.json, zeroshot.json or log.jsonl, or above such")
    parser.add_argument("--output-dir", default=Path("report"), type=Path, help="report.html and the rest go here")
    parser.add_argument("--title", default="MedSLIP: results", type=str, help="of the page")
    parser.add_argument("--cbis", default=None, type=Path,
                        help="folder of CBIS-DDSM for images and the table of its splits (default: the runs' own)")
    parser.add_argument("--no-images", action="store_true", help="leave out images of patients")
    parser.add_argument("--saliency", default=0, type=int, metavar="LESIONS",
                        help="explain the last probe of each table on up to this many test cancers, on the whole "
                        "mammogram against the radiologist's outline; needs captum and the run's weights")
    parser.add_argument("--roco", default=None, type=Path,
                        help="folder of ROCO: the nearest captions and images of its validation split for the missed "
                        "cancers, by the last probe's model; passes that split once")
    return parser
# fmt: on

# ---------------------------------------------------------------------------------------------------------------------
# What the runs hold
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of a results table and the runs behind it."""

    name: str
    kind: str  # published, reference or measured
    metrics: dict[str, dict[str, float]]  # fractions, with low and high where there is an interval
    source: str  # the file that the numbers come from
    folders: list[Path] = field(default_factory=list)
    detection: dict[str, dict] = field(default_factory=dict)
    units: dict[str, dict] = field(default_factory=dict)
    subgroups: list[dict] = field(default_factory=list)
    confusion: list[list[float]] | None = None
    two_class: list[dict] = field(default_factory=list)  # AUROC of each seed
    never_predicted: list[str] = field(default_factory=list)
    leaves_out: str = ""
    point: metrics.OperatingPoint | None = None


@dataclass
class ResultTable:
    """One of the two results tables."""

    kind: str  # calc, mass or both; or another set's name
    classes: tuple[str, ...] = cbis.CBIS_CLASSES
    rows: list[Row] = field(default_factory=list)
    comparisons: list[dict] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    lesions: int | None = None
    patients: int | None = None


@dataclass
class Runs:
    """All that was found."""

    tables: dict[str, ResultTable] = field(default_factory=dict)
    primary: dict | None = None
    zeroshot: list[tuple[str, dict]] = field(default_factory=list)
    other: list[tuple[str, dict]] = field(default_factory=list)  # results on other sets, and their files
    fractions: list[tuple[str, str, list[dict]]] = field(default_factory=list)  # row, set, fractions
    trainings: dict[str, list[Path]] = field(default_factory=dict)  # name -> folders, a seed each
    settings: list[tuple[str, dict]] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    skipped: dict[str, dict] = field(default_factory=dict)  # table -> lesions without image, by split
    cbis: Path | None = None
    synthetic: bool = False
    read: list[Path] = field(default_factory=list)


def read_json(path: Path, runs: Runs) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if path not in runs.read:
        runs.read.append(path)
    return found


def gather(folders: Sequence[Path], cbis_root: Path | None = None) -> Runs:
    """Everything that a report can show, from the files of runs. Raises where a folder has none."""
    runs = Runs(cbis=cbis_root)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of a run")
        before = len(runs.read)
        if (folder / "tables.json").is_file():
            add_tables(folder, runs)
        else:
            found = [path for path in sorted(folder.rglob("results.json")) if "earlier_" not in str(path)]
            # A run that is compared with others comes after them.
            for path in sorted(found, key=lambda path: "differences" in read_json(path, runs)):
                add_results(path, folder, runs)
        for path in sorted(folder.rglob("zeroshot.json")):
            add_zeroshot(path, folder, runs)
        for path in sorted(folder.rglob("log.jsonl")):
            add_training(path, folder, runs)
        for path in sorted(folder.rglob("settings.json")):
            settings = read_json(path, runs)
            runs.settings.append((named(path.parent, folder), settings))
            root = settings.get("args", {}).get("root")
            if runs.cbis is None and str(settings.get("args", {}).get("dataset", "")).startswith("cbis_") and root:
                runs.cbis = Path(root)
        if len(runs.read) == before:
            raise ValueError(f"{folder} holds no tables.json, results.json, zeroshot.json or log.jsonl")
    if runs.cbis is not None:
        runs.synthetic |= is_synthetic(runs.cbis)
    return runs


def named(path: Path, folder: Path) -> str:
    """A run's name: its place below the folder that was given, or that folder's own name."""
    below = path.relative_to(folder).as_posix()
    return folder.resolve().name if below == "." else below


def row_name(path: Path, folder: Path, kind: str) -> str:
    """A probe's name without its table: vit_mammo for vit_mammo/calc, untrained for probe/calc_untrained."""
    words = [re.sub(rf"^{kind}_|_{kind}$", "", part) for part in named(path, folder).split("/")]
    return "/".join(word for word in words if word not in (kind, "probe", "")) or named(path, folder)


def add_tables(folder: Path, runs: Runs) -> None:
    """A folder of make_tables.py."""
    path = folder / "tables.json"
    content = read_json(path, runs)
    runs.synthetic |= content["synthetic"]
    runs.primary, runs.steps = content["primary"], content["steps"]
    runs.cbis = runs.cbis or Path(content["cbis"])
    for kind, table in content["tables"].items():
        mine = runs.tables.setdefault(kind, ResultTable(kind))
        mine.lesions, mine.patients = table["lesions"], table["patients"]
        mine.comparisons += table["comparisons"]
        mine.absent |= table["absent"]
        for name, values in table["published"].items():
            percent = {key: {"value": value / 100} for key, value in values.items()}
            mine.rows.append(Row(f"{name} (as published)", "published", percent, str(path)))
        for row in table["rows"]:
            places = [folder / name for name in row["files"]]
            results = [read_json(place / "results.json", runs) for place in places]
            mine.rows.append(
                Row(
                    row["name"], row["kind"], row["metrics"], str(path), places, row.get("detection", {}),
                    row.get("units", {}), row.get("subgroups", []), row.get("confusion"), row.get("two_class", []),
                    row.get("never_predicted", []), row["leaves_out"], point_of(results[0]) if results else None,
                )
            )  # fmt: skip
            for result in results[:1]:
                runs.skipped.setdefault(kind, result.get("lesions_skipped", {}))
                if result.get("fractions"):
                    runs.fractions.append((row["name"], TABLES[kind], result["fractions"]))


def two_class_of(result: dict) -> list[dict]:
    return [result["two_class"]["metrics"]["auroc"]] if result.get("two_class") else []


def point_of(result: dict) -> metrics.OperatingPoint | None:
    point = result.get("operating_point")
    return point and metrics.OperatingPoint(point["temperature"], point["threshold"])


def add_results(path: Path, folder: Path, runs: Runs) -> None:
    """A results.json of a probe or a fine-tuned model."""
    result = read_json(path, runs)
    runs.synthetic |= bool(result.get("synthetic"))
    dataset = result.get("dataset", "")
    if not isinstance(dataset, str) or not dataset:
        return  # a summary of other runs, such as the demo's
    if "metrics" not in result:
        runs.other.append((str(path), result))
        return
    kind = str(cbis.CBIS_SETS.get(dataset, dataset))
    table = runs.tables.setdefault(kind, ResultTable(kind, tuple(result["classes"])))
    name = row_name(path.parent, folder, kind)
    table.lesions, table.patients = int(np.sum(result["confusion"])), result["test_patients"]
    runs.skipped.setdefault(kind, result.get("lesions_skipped", {}))
    untrained = result.get("weights", {}).get("untrained")
    table.rows.append(
        Row(
            name, "measured", result["metrics"], str(path), [path.parent], result.get("detection", {}),
            result.get("units", {}), result.get("subgroups", []), result["confusion"], two_class_of(result),
            result.get("never_predicted", []), "" if untrained else "one run: leaves out the training's chance",
            point_of(result),
        )
    )  # fmt: skip
    for entry in result.get("differences", []):
        table.comparisons.append({**entry, "row": name, "leaves_out": table.rows[-1].leaves_out, "primary": False})
    if result.get("fractions"):
        runs.fractions.append((name, TABLES.get(kind, kind), result["fractions"]))


def add_zeroshot(path: Path, folder: Path, runs: Runs) -> None:
    """A file of eval_zeroshot.py; sets whose rows are known become rows of their table."""
    result = read_json(path, runs)
    runs.zeroshot.append((named(path.parent, folder), result))
    for dataset, scores in result.get("zero_shot", {}).items():
        if "rows" not in scores:
            continue
        kind, found = str(cbis.CBIS_SETS.get(dataset, dataset)), scores["rows"]
        table = runs.tables.setdefault(kind, ResultTable(kind, tuple(found["classes"])))
        if table.lesions is None:
            table.lesions, table.patients = int(np.sum(found["confusion"])), found["test_patients"]
        name = f"zero-shot, {named(path.parent, folder)}"
        row = Row(name, "measured", found["metrics"], str(path), confusion=found["confusion"])
        row.never_predicted = found["never_predicted"]
        table.rows.append(row)


def add_training(path: Path, folder: Path, runs: Runs) -> None:
    """The log of a training run; the seeds of a row are one entry."""
    runs.read.append(path)
    parts = [part for part in path.parent.relative_to(folder).parts if part not in ("runs", "training")]
    row = "/".join(part for part in parts if not part.startswith("seed")) or folder.resolve().name
    runs.trainings.setdefault(row, []).append(path.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of what was found
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    name: str  # file name
    title: str
    svg: str
    source: str


class Gallery:
    """The report's figures in order, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Figure] = {}

    def add(self, name: str, title: str, svg: str, source: str) -> str:
        self.found[name] = Figure(name, title, svg, source)
        return name


def interval(value: dict[str, float]) -> metrics.Interval:
    return metrics.Interval(value["value"], value["low"], value["high"])


def table_figures(table: ResultTable, runs: Runs, gallery: Gallery) -> dict[str, list[str]]:
    """Forest plots, curves and confusion matrices of a results table; returns the names by section."""
    title, synthetic = TABLES.get(table.kind, table.kind), runs.synthetic
    models = [row for row in table.rows if row.kind == "measured"]
    found: dict[str, list[str]] = {"overview": [], "curves": [], "confusion": []}
    with_interval = [row for row in table.rows if "low" in row.metrics.get("auroc", {})]
    if with_interval:
        name = f"{title}: AUROC of each row"
        svg = figures.forest([(r.name, interval(r.metrics["auroc"])) for r in with_interval], name,
                             "macro AUROC, percent, 95% interval", synthetic)  # fmt: skip
        found["overview"].append(gallery.add(f"{table.kind}_auroc", name, svg, sources(with_interval)))
    if table.comparisons:
        name = f"{title}: AUROC, differences"
        pairs = [(f"{short(c['row'])} − {short(c['baseline'], table.kind)}", interval(c["difference"]["auroc"]))
                 for c in table.comparisons]  # fmt: skip
        svg = figures.forest(pairs, name, "percentage points, paired over patients, 95% interval", synthetic, zero=0.0)
        compared = [row for row in models if row.name in {c["row"] for c in table.comparisons}]
        found["overview"].append(gallery.add(f"{table.kind}_differences", name, svg, sources(compared)))
    each = [(row, read_predictions(row, runs)) for row in models] if table.classes == cbis.CBIS_CLASSES else []
    each = [(row, group) for row, group in each if group]
    if each:
        found["curves"] = list(curve_figures(table.kind, title, each, runs, gallery))
    for row in models:
        if row.confusion is not None:
            name = f"{title}, {short(row.name)}: confusion" + (" (mean over seeds)" if len(row.folders) > 1 else "")
            svg = figures.confusion(np.array(row.confusion, dtype=float), table.classes, name, synthetic)
            key = f"{table.kind}_confusion_{len(found['confusion'])}"
            found["confusion"].append(gallery.add(key, name, svg, row.source))
    return found


def sources(rows: Sequence[Row]) -> str:
    """The file of all rows, or that each has its own."""
    files = {row.source for row in rows}
    return files.pop() if len(files) == 1 else "each row's own file"


def short(name: str, kind: str = "") -> str:
    """A path's telling part: the folder of a predictions.csv, without its table."""
    if not name.endswith("predictions.csv"):
        return name
    folder = Path(name).parent
    return row_name(folder, folder.parents[1], kind) if kind else folder.name


def read_predictions(row: Row, runs: Runs) -> list[Predictions]:
    found = []
    for folder in row.folders:
        path = folder / "predictions.csv"
        if path.is_file():
            found.append(Predictions.read(path))
            runs.read.append(path)
    return found


def curve_figures(
    kind: str, title: str, each: list[tuple[Row, list[Predictions]]], runs: Runs, gallery: Gallery
) -> Iterator[str]:
    """ROC, precision-recall and calibration of malignant against the rest; bands over patients (and seeds' mean)."""
    roc, precision, calibration = [], [], []
    target = cbis.CBIS_CLASSES.index(metrics.MALIGNANT)
    for row, group in each:
        first = group[0]
        positive = first.labels == target
        scores = [p.in_order_of(first.rows, row.name).prob[:, target] for p in group]
        weights = metrics.resample_weights(positive.astype(int), first.patients, 2, BANDS, 0)
        one = np.ones((1, len(positive)))
        for rows, on_grid in ((roc, figures.roc_on_grid), (precision, figures.precision_on_grid)):
            line = np.mean([on_grid(positive, s, one)[0] for s in scores], axis=0)
            drawn = np.mean([on_grid(positive, s, weights) for s in scores], axis=0)
            rows.append((row.name, figures.GRID, line, *np.quantile(drawn, (0.025, 0.975), axis=0)))
        if row.point is not None:
            x, y = figures.reliability(positive, row.point.calibrated(first.prob)[:, target])
            calibration.append((row.name, x, y, np.array([]), np.array([])))
    source, band = "predictions.csv of each row", "95% bands over patients"
    name = f"{title}: ROC, malignant against the rest ({band})"
    yield gallery.add(f"{kind}_roc", name, figures.curves(
        roc, name, ("1 − specificity", "sensitivity"), runs.synthetic, diagonal=True), source)  # fmt: skip
    name = f"{title}: precision and recall, malignant against the rest ({band})"
    yield gallery.add(f"{kind}_precision", name, figures.curves(
        precision, name, ("recall", "precision"), runs.synthetic), source)  # fmt: skip
    if calibration:
        name = f"{title}: calibration of the malignant class, after the temperature from validation (first seed)"
        yield gallery.add(f"{kind}_calibration", name, figures.curves(
            calibration, name, ("mean probability", "observed fraction"), runs.synthetic, diagonal=True),
            source)  # fmt: skip


def training_figures(runs: Runs, gallery: Gallery) -> list[str]:
    """Loss and validation recall over epochs; the seeds of a row are a band from the lowest to the highest."""
    curves: dict[str, list] = {"loss": [], "recall": []}
    for name, folders in runs.trainings.items():
        logs = [[row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
                 if row["kind"] == "epoch"] for folder in folders]  # fmt: skip
        epochs = min((len(log) for log in logs), default=0)
        if not epochs:
            continue
        for key, pick in (("loss", epoch_loss), ("recall", epoch_recall)):
            values = np.array([[pick(row) for row in log[:epochs]] for log in logs], dtype=float)
            kept = ~np.isnan(values).any(0)
            if kept.any():
                x, values = np.flatnonzero(kept) + 1, values[:, kept]
                band = (values.min(0), values.max(0)) if len(values) > 1 else (np.array([]), np.array([]))
                curves[key].append((name, x, values.mean(0), *band))
    found = []
    for key, axis in (("loss", "training loss"), ("recall", "validation recall, mean of six, percent")):
        if curves[key]:
            several = any(len(folders) > 1 for folders in runs.trainings.values())
            title = f"Training: {axis}" + (", mean and range of the seeds" if several else "")
            svg = figures.curves(curves[key], title, ("epoch", axis), runs.synthetic, unit=False)
            found.append(gallery.add(f"training_{key}", title, svg, "log.jsonl of each training"))
    return found


def epoch_loss(row: dict) -> float:
    value = row.get("loss")
    return np.nan if value is None else float(value)


def epoch_recall(row: dict) -> float:
    values = [value for key, value in row.items() if key.startswith(("val_i2t_r", "val_t2i_r"))]
    return float(np.mean(values)) if values else np.nan


def fraction_figures(runs: Runs, gallery: Gallery) -> list[str]:
    by_set: dict[str, list] = {}
    for row, dataset, parts in runs.fractions:
        x = np.array([part["fraction"] for part in parts])
        if all("metrics" in part for part in parts):
            values = [part["metrics"]["auroc"] for part in parts]
            columns = [np.array([100 * v[key] for v in values]) for key in ("value", "low", "high")]
        else:  # of a set without intervals: mean and range of the draws
            each = [part["scores"] for part in parts]
            columns = [np.array([of(scores) for scores in each]) for of in (np.mean, np.min, np.max)]
        by_set.setdefault(dataset, []).append((row, x, *columns))
    found = []
    for dataset, rows in by_set.items():
        title = f"{dataset}: score by fraction of the labels"
        axes = ("fraction of the training patients or images", "macro AUROC (CBIS-DDSM) or the set's metric, percent")
        svg = figures.curves(rows, title, axes, runs.synthetic, unit=False)
        found.append(gallery.add(f"fractions_{len(found)}", title, svg, "results.json, fractions"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The lesions: who they are, how they came here, and which were misread
# ---------------------------------------------------------------------------------------------------------------------


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
    sizes = np.array([[float(row[name]) for name in cbis.CROP_SIZE] for row in part if row.get("crop_width")])
    return "{:.0f} × {:.0f}".format(*np.median(sizes, axis=0)) if len(sizes) else MISSING


def flow_figure(kind: str, rows: Sequence[dict[str, str]], runs: Runs, gallery: Gallery) -> str:
    """From the case tables to the lesions that were evaluated, with everything that was left out."""
    title = f"{TABLES.get(kind, kind)}: the lesions and what was left out"
    patients = len({row["patient"] for row in rows})
    skipped = runs.skipped.get(kind, {})
    no_crop = sum(not row["crop"] for row in rows)
    counts = Counter(row["split"] for row in rows)
    steps = [
        (f"case tables: {len(rows)} lesions of {patients} patients", ""),
        (f"with a crop: {len(rows) - no_crop}", f"{no_crop} without an image"),
        ("  ".join(f"{split} {counts[split]}" for split in cbis.CBIS_SPLITS), "whole patients in a split"),
        (f"test lesions evaluated: {counts['test'] - int(skipped.get('test', 0))}",
         f"skipped, missing or corrupt: train {skipped.get('train', MISSING)}, val {skipped.get('val', MISSING)}, "
         f"test {skipped.get('test', MISSING)}"),
    ]  # fmt: skip
    return gallery.add(f"{kind}_flow", title, figures.flow(steps, title, runs.synthetic), f"{kind}.csv, results.json")


def misread(table: ResultTable, rows: Sequence[dict[str, str]], runs: Runs) -> list[dict[str, Any]]:
    """Of the table's last model: cancers with the lowest malignant probability, and the most confident errors."""
    models = [row for row in table.rows if row.kind == "measured" and row.folders]
    if not models or runs.cbis is None:
        return []
    model = models[-1]
    path = model.folders[0] / "predictions.csv"
    if not path.is_file():
        return []
    found, crops = Predictions.read(path), {row["lesion"]: row["crop"] for row in rows}
    target = cbis.CBIS_CLASSES.index(metrics.MALIGNANT)
    missed = missed_cancers(found)
    wrong = np.flatnonzero(found.prob.argmax(1) != found.labels)
    confident = wrong[np.argsort(-found.prob[wrong].max(1), kind="stable")][:SHOWN]
    groups = []
    for title, index in (("Cancers with the lowest malignant probability", missed),
                         ("The most confident errors", confident)):  # fmt: skip
        images = []
        for i in index:
            row = found.rows[i]
            images.append({
                "lesion": row["lesion"], "true": row["pathology"],
                "said": f"{cbis.CBIS_CLASSES[int(found.prob[i].argmax())]} {100 * found.prob[i].max():.0f}%, "
                f"malignant {100 * found.prob[i, target]:.0f}%",
                "data": thumbnail(runs.cbis / crops[row["lesion"]]) if crops.get(row["lesion"]) else None,
            })  # fmt: skip
        groups.append({"title": title, "model": model.name, "source": str(path), "images": images})
    return groups


def missed_cancers(found: Predictions) -> np.ndarray:
    """Numbers of the cancers with the lowest malignant probability."""
    target = cbis.CBIS_CLASSES.index(metrics.MALIGNANT)
    cancers = np.flatnonzero(found.labels == target)
    return cancers[np.argsort(found.prob[cancers, target], kind="stable")][:SHOWN]


def explained(table: ResultTable, rows: Sequence[dict[str, str]], runs: Runs, most: int, images: bool) -> dict | None:
    """Saliency of the table's last probe; what prevents it is told."""
    if not most or runs.cbis is None:
        return None
    models = [row for row in table.rows if row.folders and (row.folders[0] / "settings.json").is_file()]
    models = [row for row in models if (row.folders[0] / "head.safetensors").is_file()]
    if not models:
        return {"why": "no probe kept its head (head.safetensors)"}
    model, folder = models[-1], models[-1].folders[0]
    try:
        own = Predictions.read(folder / "predictions.csv")
        missed = [own.rows[i]["lesion"] for i in missed_cancers(own)]
        settings = read_json(folder / "settings.json", runs)
        found, named = saliency.explain_run(folder, settings, rows, runs.cbis, most, missed)
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
    """The nearest captions and images of ROCO's validation split for the missed cancers; what prevents it is told."""
    if roco is None or runs.cbis is None:
        return None
    missed = misread(table, rows, runs)[:1]
    models = [row for row in table.rows if row.folders and (row.folders[0] / "settings.json").is_file()]
    if not missed or not models:
        return None
    crops = {row["lesion"]: runs.cbis / row["crop"] for row in rows if row["crop"]}
    weights = read_json(models[-1].folders[0] / "settings.json", runs)["args"]["pretrained"]
    try:
        names = [image["lesion"] for image in missed[0]["images"] if image["data"]]
        bank = neighbours.Neighbours(weights, create_reader("roco", str(roco), "", "validation", "all"))
        found = bank.of([read_image(crops[name]) for name in names])
    except (ValueError, FileNotFoundError) as error:
        return {"why": str(error)}
    lines = [
        {"lesion": name, "data": thumbnail(crops[name]),
         "captions": [(bank.captions[i], cosine) for i, cosine in near["captions"]],
         "images": [(bank.captions[i], small(bank.reader.image(i), 110), cosine) for i, cosine in near["images"]]}
        for name, near in zip(names, found, strict=True)
    ]  # fmt: skip
    return {"why": "", "model": weights, "source": str(roco), "lines": lines}


def thumbnail(path: Path, side: int = 160) -> str | None:
    """A small JPEG as a data URI; None for an image that is missing or corrupt."""
    try:
        return small(read_image(path), side)
    except (UnreadableImage, FileNotFoundError):
        return None


def small(img: Image.Image, side: int) -> str:
    img = img.copy()
    img.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    img.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def percent_cell(value: dict[str, float] | None) -> str:
    """Percent with the interval, where there is one; a dash for what a publication does not report."""
    if value is None or value.get("value") is None:
        return "–"
    if "low" not in value:
        return f"{100 * value['value']:.2f}"
    return interval(value).percent()


def table_rows(table: ResultTable) -> list[dict[str, Any]]:
    return [
        {"name": row.name, "kind": row.kind, "source": row.source, "leaves_out": row.leaves_out,
         "never": row.never_predicted, "cells": [percent_cell(row.metrics.get(key)) for key in metrics.METRICS]}
        for row in table.rows
    ]  # fmt: skip


def comparison_rows(table: ResultTable, runs: Runs) -> list[dict[str, str]]:
    found = []
    for entry in table.comparisons:
        value = entry["difference"]["auroc"]
        if entry["primary"] and runs.primary:
            late = "AFTER results were there" if runs.primary["after_results"] else "before any result"
            p = f"{value['p_value']:.4f}, primary, named {late}"
        elif "p_holm" in entry:
            p = f"{entry['p_holm']:.4f} (Holm, {entry['family']})"
        else:
            p = f"{value['p_value']:.4f}, uncorrected"
        line = {"row": entry["row"], "baseline": short(entry["baseline"], table.kind), "p": p}
        found.append(line | {"difference": percent_cell(value), "leaves_out": entry.get("leaves_out", "")})
    return found


def detection_rows(table: ResultTable) -> list[dict[str, Any]]:
    return [
        {"name": row.name, "cells": [
            describe_interval(key, row.detection[key]) if key in row.detection else MISSING for key in metrics.DETECTION
        ]} for row in table.rows if row.kind == "measured"
    ]  # fmt: skip


def unit_rows(table: ResultTable) -> list[dict[str, Any]]:
    found = []
    for row in table.rows:
        for unit, entry in row.units.items():
            values = entry["metrics"] or {}
            cells = [percent_cell(values.get(key)) if values else "too few" for key in metrics.METRICS]
            found.append({"name": row.name, "unit": f"{unit} ({entry['number']})", "cells": cells})
    return found


def subgroup_rows(table: ResultTable) -> list[dict[str, Any]]:
    """Of the last model; the intervals are over patients and, where there are several, seeds."""
    models = [row for row in table.rows if row.subgroups]
    if not models:
        return []
    return [
        {"model": models[-1].name, "group": f"{part['by']}: {part['value']}", "lesions": part["lesions"],
         "patients": part["patients"], "malignant": part["pathologies"][metrics.MALIGNANT],
         "seeds": max(1, len(models[-1].folders)),
         "auroc": percent_cell(part["auroc"]) if part["auroc"] else "not defined",
         "auroc_malignant": percent_cell(part["auroc_malignant"]) if part["auroc_malignant"] else "not defined"}
        for part in models[-1].subgroups
    ]  # fmt: skip


def two_class_rows(table: ResultTable) -> list[tuple[str, str]]:
    return [(row.name, "; ".join(map(percent_cell, row.two_class))) for row in table.rows if row.two_class]


def build_page(
    runs: Runs, title: str, images: bool, saliency_lesions: int = 0, roco: Path | None = None
) -> dict[str, Any]:
    """Everything that the templates show."""
    gallery, sections, lesions = Gallery(), [], lesion_tables(runs)
    for kind, table in runs.tables.items():
        rows = lesions.get(kind)
        sections.append({
            "kind": kind, "title": TABLES.get(kind, kind), "lesion": kind in cbis.CBIS_KINDS,
            "lesions": table.lesions, "patients": table.patients,
            "rows": table_rows(table), "comparisons": comparison_rows(table, runs), "absent": table.absent,
            "two_class": two_class_rows(table),
            "detection": detection_rows(table), "units": unit_rows(table), "subgroups": subgroup_rows(table),
            "figures": table_figures(table, runs, gallery),
            "splits": splits_table(rows) if rows else None,
            "flow": flow_figure(kind, rows, runs, gallery) if rows else None,
            "misread": misread(table, rows, runs) if rows and images else [],
            "nearest": nearest(table, rows, runs, roco) if rows and images else None,
            "saliency": explained(table, rows, runs, saliency_lesions, images) if rows else None,
        })  # fmt: skip
    training, fractions = training_figures(runs, gallery), fraction_figures(runs, gallery)
    return {
        "title": title,
        "synthetic": runs.synthetic,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "columns": list(metrics.METRICS.values()),
        "detection_columns": list(metrics.DETECTION.values()),
        "sections": sections,
        "training": training,
        "fractions": fractions,
        "figures": gallery.found,
        "other": [describe_other(path, result) for path, result in runs.other],
        "zeroshot": [describe_zeroshot(name, result) for name, result in runs.zeroshot],
        "commands": commands_of(runs),
        "steps": runs.steps,
        "versions": versions_of(runs),
        "checklists": checklists.answer(facts_of(runs, sections)),
        "read": sorted({str(path) for path in runs.read}),
        "missing": MISSING,
    }


def describe_other(path: str, result: dict) -> dict[str, str]:
    scores = result.get("logistic") or result.get("knn") or result
    if "score" not in scores:
        return {"dataset": str(result.get("dataset")), "metric": MISSING, "score": MISSING, "source": path}
    return {"dataset": result["dataset"], "metric": scores["metric"], "score": f"{scores['score']:.2f}", "source": path}


def describe_zeroshot(name: str, result: dict) -> dict[str, Any]:
    sets = {**result.get("zero_shot", {}), **result.get("retrieval", {})}
    rows = [
        (key, value["metric"], f"{value['score']:.2f}") if "score" in value else
        (key, "image-to-text recall at 1", f"{value['i2t_r1']:.2f}")
        for key, value in sets.items()
    ]  # fmt: skip
    return {"name": name, "rows": rows}


def commands_of(runs: Runs) -> list[dict[str, str]]:
    """All flags of each run, as settings.json has them, the defaults too."""
    found = []
    for name, settings in runs.settings:
        given = {k: v for k, v in settings.get("args", {}).items() if v not in (None, False, "", [])}
        flags = (f"--{key.replace('_', '-')} {_spelled(value)}".strip() for key, value in given.items())
        found.append({"name": name, "flags": " ".join(flags)})
    return found


def _spelled(value: Any) -> str:
    if value is True:
        return ""
    return shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))


def versions_of(runs: Runs) -> dict[str, str]:
    """Of all runs; where they differ, all that occur."""
    found: dict[str, set[str]] = {}
    for _, settings in runs.settings:
        for name, version in settings.get("versions", {}).items():
            found.setdefault(name, set()).add(str(version))
    return {name: ", ".join(sorted(values)) for name, values in sorted(found.items())}


def facts_of(runs: Runs, sections: list[dict[str, Any]]) -> dict[str, Any]:
    """What the checklists are answered from."""
    models = [row for table in runs.tables.values() for row in table.rows if row.kind == "measured"]
    derived = [settings.get("derived", {}) for _, settings in runs.settings]
    return {
        "tables": {s["title"]: (s["lesions"], s["patients"]) for s in sections},
        "splits": any(s["splits"] for s in sections),
        "flow": any(s["flow"] for s in sections),
        "rows": len(models),
        "seeds": max((len(row.folders) for row in models), default=0),
        "skipped": runs.skipped,
        "comparisons": any(table.comparisons for table in runs.tables.values()),
        "primary": runs.primary,
        "detection": any(row.detection for row in models),
        "subgroups": any(row.subgroups for row in models),
        "pairs": sorted({d["training_pairs"] for d in derived if "training_pairs" in d}),
        "parameters": sorted({d["parameters"] for d in derived if "parameters" in d}),
        "devices": sorted({str(d["device"]) for d in derived if "device" in d}),
        "versions": versions_of(runs),
        "commands": bool(runs.settings),
        "misread": any(s["misread"] for s in sections),
        "saliency": any(s["saliency"] and not s["saliency"]["why"] for s in sections),
        "radiologist": any("Radiologist" in row.name for t in runs.tables.values() for row in t.rows),
        "synthetic": runs.synthetic,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_csv(page: dict[str, Any]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "kind", *page["columns"], "leaves out", "source"])
    for section in page["sections"]:
        for row in section["rows"]:
            line = [section["title"], row["name"], row["kind"], *row["cells"], row["leaves_out"], row["source"]]
            writer.writerow(line)
    return text.getvalue()


def tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"),
                           ("–", "--"), ("−", "$-$"), ("×", r"$\times$")):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


def write_tex(page: dict[str, Any]) -> str:
    """A booktabs table for each results table; the interval stands small below its value."""
    lines = ["% Needs \\usepackage{booktabs}. Percent, with 95\\% intervals."]
    if page["synthetic"]:
        lines.append("% SYNTHETIC data: these numbers say nothing about patients.")
    for section in page["sections"]:
        caption = f"{section['title']}" + (" (SYNTHETIC data)" if page["synthetic"] else "")
        heads, shape = ["Model", *map(tex, page["columns"])], "l" + "c" * len(page["columns"])
        lines += [r"\begin{table}", rf"\caption{{{tex(caption)}}}", rf"\begin{{tabular}}{{{shape}}}"]
        lines += [r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
        for row in section["rows"]:
            name = tex(row["name"]) + (r"$^\dagger$" if row["leaves_out"] else "")
            lines.append(" & ".join([name, *map(tex, row["cells"])]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def write_report(page: dict[str, Any], folder: Path) -> None:
    """report.html, report.md with figures/, tables.csv and tables.tex."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "report_templates"), autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = {f"figures/{f.name}.svg": with_colours(f.svg) for f in page["figures"].values()}
    for name in ("report.html", "report.md"):
        files[name] = environment.get_template(f"{name}.jinja").render(page)
    files |= {"tables.csv": write_csv(page), "tables.tex": write_tex(page)}
    for name, text in files.items():
        utils.atomic_write(folder / name, lambda file, text=text: file.write(text.encode()))


def with_colours(svg: str) -> str:
    """A figure by itself has no page to take its text colour from: one that is read on white and on black."""
    return svg.replace("<svg ", '<svg style="color:#777" ', 1)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Write the report; returns what the page shows."""
    args = get_args_parser().parse_args(argv)
    with utils.start_logging():
        runs = gather(args.runs, args.cbis)
        page = build_page(runs, args.title, not args.no_images, args.saliency, args.roco)
        write_report(page, args.output_dir)
        log.info(f"{len(page['read'])} files read, {len(page['figures'])} figures: {args.output_dir / 'report.html'}")
    return page


if __name__ == "__main__":
    utils.run_script(main)
