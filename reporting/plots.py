"""The page's figures, each from what the runs hold."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from evaluation import metrics
from evaluation.predictions import Predictions
from evaluation.resamples import Resamples
from inputs import cbis
from reporting import figures
from reporting.runs import MISSING, ResultRow, ResultTable, Runs, read_predictions, row_name
from reporting.table_sets import TABLES
from runtime.logs import read_rows

log = logging.getLogger("medslip")
MOST_CLASSES = 30  # of a confusion matrix that can be read
BANDS = 200  # resamples of the patients behind a curve's band


@dataclass(frozen=True)
class Figure:
    """A figure, and the file that its numbers come from."""

    name: str  # file name
    title: str
    svg: str
    source: str
    png: bytes


class Gallery:
    """The report's figures in order, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Figure] = {}
        self.ids: set[str] = set()

    def add(self, name: str, title: str, drawing: figures.Drawing, source: str) -> str:
        """Keep a figure under its name, which is returned; ids within it are made unique on the page."""
        ids = re.sub(r"[^a-z0-9]+", "_", title.lower())
        if ids in self.ids:  # of a title that differs in a sign which the ids cannot hold
            ids = f"{ids}~{len(self.found)}"
        self.ids.add(ids)
        self.found[name] = Figure(name, title, figures.with_ids(drawing.svg, ids), source, drawing.png)
        return name


def table_figures(table: ResultTable, runs: Runs, gallery: Gallery) -> dict[str, list[str]]:
    """Forest plots, curves and confusion matrices of a results table; returns the names by section."""
    title, file, synthetic = TABLES.get(table.kind, table.kind), utils.file_name(table.kind), runs.synthetic
    models = [row for row in table.rows if row.kind == "measured"]
    found: dict[str, list[str]] = {"overview": [], "curves": [], "confusion": []}
    with_interval = [row for row in table.rows if "low" in row.metrics.get("auroc", {})]
    if with_interval:
        name = f"{title}: AUROC of each row"
        drawing = figures.forest([(r.name, metrics.Interval.of(r.metrics["auroc"])) for r in with_interval], name,
                                 "macro AUROC, percent, 95% interval (50: chance)", synthetic)  # fmt: skip
        found["overview"].append(gallery.add(f"{file}_auroc", name, drawing, sources(with_interval)))
    if table.comparisons:
        name = f"{title}: AUROC, differences"
        pairs = []
        for found_difference in table.comparisons:
            pair = f"{short(found_difference['row'])} − {short(found_difference['baseline'], table.kind)}"
            pairs.append((pair, metrics.Interval.of(found_difference["difference"]["auroc"])))
        axis = f"points, paired over {table.unit}, 95% interval"
        drawing = figures.forest(pairs, name, axis, synthetic, zero=0.0)
        compared = [row for row in models if row.name in {c["row"] for c in table.comparisons}]
        found["overview"].append(gallery.add(f"{file}_differences", name, drawing, sources(compared)))
    each = [(row, read_predictions(table, row, runs)) for row in models] if table.positive is not None else []
    each = [(row, group) for row, group in each if group]
    if each:
        found["curves"] = list(curve_figures(file, title, str(table.positive), each, runs, gallery))
    for row in models:
        if row.confusion is not None and len(table.classes) <= MOST_CLASSES:
            name = f"{title}, {short(row.name)}: confusion" + (" (mean over seeds)" if len(row.folders) > 1 else "")
            drawing = figures.confusion(np.array(row.confusion, dtype=float), table.classes, name, synthetic)
            key = f"{file}_confusion_{len(found['confusion'])}"
            found["confusion"].append(gallery.add(key, name, drawing, row.source))
    return found


def sources(rows: Sequence[ResultRow]) -> str:
    """The file of all rows, or that each has its own."""
    files = {row.source for row in rows}
    return files.pop() if len(files) == 1 else "each row's own file"


def short(name: str, kind: str = "") -> str:
    """A path's telling part: the folder of a predictions.csv, without its table."""
    if not name.endswith("predictions.csv"):
        return name
    folder = Path(name).parent
    above = [folder, *folder.parents][:3]  # fewer where the path is short
    return row_name(folder, above[-1], kind) if kind else folder.name


def curve_figures(
    file: str, title: str, positive_class: str, each: list[tuple[ResultRow, list[Predictions]]], runs: Runs,
    gallery: Gallery,
) -> Iterator[str]:  # fmt: skip
    """ROC, precision-recall and calibration of a class against the rest; bands over patients (and seeds' mean)."""
    roc, precision, calibration, banded = [], [], [], False
    target = each[0][1][0].scheme.classes.index(positive_class)
    called = "malignant" if positive_class == metrics.MALIGNANT else positive_class
    for row, group in each:
        first = group[0]
        positive = first.labels == target
        scores = [metrics.ranked(p.in_order_of(first.rows, row.name).prob)[:, target] for p in group]
        resamples = Resamples(positive.astype(int), first.patients, ("others", "own"), "own", BANDS)
        one = np.ones((1, len(positive)))
        banded = resamples.rarest > 1 and not resamples.too_few
        for rows, on_grid in ((roc, figures.roc_on_grid), (precision, figures.precision_on_grid)):
            line = np.mean([on_grid(positive, s, one)[0] for s in scores], axis=0)
            band = (np.array([]), np.array([]))
            if banded:
                parts = (np.mean([on_grid(positive, s, w) for s in scores], axis=0) for w in resamples.weights())
                band = np.quantile(np.concatenate(list(parts)), (0.025, 0.975), axis=0)
            rows.append((row.name, figures.GRID, line, *band))
        if row.point is not None:
            x, y = figures.reliability(positive, row.point.calibrated(first.prob)[:, target])
            calibration.append((row.name, x, y, np.array([]), np.array([])))
    source = "predictions.csv of each row"
    unit = each[0][1][0].scheme.unit
    band = f"95% bands over {unit}" if banded else f"no bands: too few {unit}"
    name = f"{title}: ROC, {called} against the rest ({band})"
    yield gallery.add(f"{file}_roc", name, figures.curves(
        roc, name, ("1 − specificity", "sensitivity"), runs.synthetic, diagonal=True), source)  # fmt: skip
    name = f"{title}: precision and recall, {called} against the rest ({band})"
    yield gallery.add(f"{file}_precision", name, figures.curves(
        precision, name, ("recall", "precision"), runs.synthetic, level=prevalence(positive)), source)  # fmt: skip
    if calibration:
        name = f"{title}: calibration of the class {called}, after the temperature from validation (first seed)"
        yield gallery.add(f"{file}_calibration", name, figures.curves(
            calibration, name, ("mean probability", "observed fraction"), runs.synthetic, diagonal=True),
            source)  # fmt: skip


def prevalence(positive: np.ndarray) -> tuple[str, float]:
    """The line of a precision-recall figure that a model without knowledge gives, and what it is called."""
    fraction = float(positive.mean())
    return f"prevalence, {100 * fraction:.0f}%: precision by chance", fraction


def training_figures(runs: Runs, gallery: Gallery) -> list[str]:
    """Loss and validation recall over epochs; the seeds of a row are a band from the lowest to the highest."""
    curves: dict[str, list] = {"loss": [], "recall": []}
    for name, folders in runs.trainings.items():
        logs = [{row["epoch"]: row for row in read_rows(folder / "log.jsonl", "epoch")} for folder in folders]
        epochs = sorted(set.intersection(*map(set, logs)))  # that every seed has done
        if not epochs:
            continue
        for key, pick in (("loss", epoch_loss), ("recall", epoch_recall)):
            values = np.array([[pick(log[epoch]) for epoch in epochs] for log in logs], dtype=float)  # (seeds, epochs)
            kept = ~np.isnan(values).any(0)
            if kept.any():
                x, values = np.array(epochs)[kept] + 1, values[:, kept]
                band = (values.min(0), values.max(0)) if len(values) > 1 else (np.array([]), np.array([]))
                curves[key].append((name, x, values.mean(0), *band))
    found = []
    for key, axis in (("loss", "training loss"), ("recall", "validation recall, mean of six, percent")):
        if curves[key]:
            several = any(len(folders) > 1 for folders in runs.trainings.values())
            title = f"Training: {axis}" + (", mean and range of the seeds" if several else "")
            drawing = figures.curves(curves[key], title, ("epoch", axis), runs.synthetic, unit=False, epochs=True)
            found.append(gallery.add(f"training_{key}", title, drawing, "log.jsonl of each training"))
    return found


def epoch_loss(row: dict) -> float:
    """The training loss of an epoch's row; NaN where there is none."""
    value = row.get("loss")
    return np.nan if value is None else float(value)


def epoch_recall(row: dict) -> float:
    """The mean of an epoch's six recalls in percent; NaN where nothing was validated."""
    values = [value for key, value in row.items() if key.startswith(("val_i2t_r", "val_t2i_r"))]
    return float(np.mean(values)) if values else np.nan


def fraction_figures(runs: Runs, gallery: Gallery) -> list[str]:
    """Score by fraction of the labels, a figure for each set; returns their names."""
    by_set: dict[str, list] = {}
    by_chance: dict[str, float] = {}  # the lowest end of the axis
    for row, dataset, parts in runs.fractions:
        x = np.array([part["fraction"] for part in parts])
        if all("metrics" in part for part in parts):
            values = [part["metrics"]["auroc"] for part in parts]
            columns = [np.array([100 * number(v[key]) for v in values]) for key in ("value", "low", "high")]
        else:  # of a set without intervals: mean and range of the draws
            each = [part["scores"] for part in parts]
            columns = [np.array([100 * of(scores) for scores in each]) for of in (np.mean, np.min, np.max)]
        by_set.setdefault(dataset, []).append((row, x, *columns))
        by_chance[dataset] = 50.0 if all("metrics" in part for part in parts) else 0.0
    found = []
    for dataset, rows in by_set.items():
        title = f"{dataset}: score by fraction of the labels"
        axes = ("fraction of the training patients or images", "macro AUROC or the set's metric, percent")
        drawing = figures.curves(rows, title, axes, runs.synthetic, unit=False, least=by_chance[dataset])
        found.append(gallery.add(f"fractions_{len(found)}", title, drawing, "results.json, fractions"))
    return found


def number(value: float | None) -> float:
    """NaN, which no line is drawn to, for what is not defined."""
    return np.nan if value is None else value


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
        (", ".join(f"{split} {counts[split]}" for split in cbis.CBIS_SPLITS), "whole patients in a split"),
        (f"test lesions evaluated: {counts['test'] - int(skipped.get('test', 0))}",
         f"skipped, missing or corrupt: train {skipped.get('train', MISSING)}, val {skipped.get('val', MISSING)}, "
         f"test {skipped.get('test', MISSING)}"),
    ]  # fmt: skip
    return gallery.add(f"{kind}_flow", title, figures.flow(steps, title, runs.synthetic), f"{kind}.csv, results.json")
