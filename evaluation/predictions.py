"""Predictions for the samples of a labelled set, the file that holds them, and all that is said of them.

A probe, a fine-tuned model, a zero-shot classifier and a radiologist's assessment all end as one row of probabilities
for each sample; from here on they are treated alike, and any two of them can be compared in pairs.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from evaluation import comparisons, metrics
from evaluation.metrics import OperatingPoint
from evaluation.run_folder import settings_that_differ
from inputs.cbis import CBIS_CLASSES
from inputs.metadata import Table
from utils import atomic_write

log = logging.getLogger("medslip")

# ---------------------------------------------------------------------------------------------------------------------
# What a set's rows are, and its predictions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """What the rows of a labelled set say: the classes, and the columns for who a sample is."""

    classes: tuple[str, ...]
    sample: str  # column that names a sample; no two samples have the same
    label: str  # column of the class
    group: str  # column of what is kept whole in a split and a resample: the patient
    columns: tuple[str, ...]  # all that a predictions.csv repeats of a row
    positive: str | None = None  # the class that is looked for


CBIS = Scheme(
    CBIS_CLASSES, "lesion", "pathology", "patient",
    ("lesion", "patient", "side", "view", "abnormality", "pathology"), metrics.MALIGNANT,
)  # fmt: skip


@dataclass
class Predictions:
    """Probabilities (n, k) of n samples, which are told by their rows of the table."""

    rows: list[dict[str, str]]
    prob: np.ndarray
    scheme: Scheme = field(default=CBIS)

    @property
    def labels(self) -> np.ndarray:
        return np.array([self.scheme.classes.index(row[self.scheme.label]) for row in self.rows])

    @property
    def patients(self) -> list[str]:
        return [row[self.scheme.group] for row in self.rows]

    def __getitem__(self, index: np.ndarray) -> Predictions:
        return Predictions([self.rows[i] for i in index], self.prob[index], self.scheme)

    def write(self, path: Path) -> None:
        """One line a sample: who it is, its class, the predicted one and the probabilities."""
        classes, text = self.scheme.classes, io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.scheme.columns, "predicted", *(f"prob_{name}" for name in classes)])
        for row, p in zip(self.rows, self.prob.tolist(), strict=True):
            writer.writerow([*(row[name] for name in self.scheme.columns), classes[int(np.argmax(p))], *p])
        atomic_write(path, lambda file: file.write(text.getvalue().encode()))

    @classmethod
    def read(cls, path: str | Path, scheme: Scheme = CBIS) -> Predictions:
        """A predictions.csv of a set; another table, a bad row or a sample twice is a ValueError naming the file."""
        probabilities = [f"prob_{name}" for name in scheme.classes]
        wanted = [*scheme.columns, "predicted", *probabilities]
        try:
            table = Table(Path(path))
            places = [table.column(name.lower()) for name in wanted]
            rows = [dict(zip(wanted, (fields[i].strip() for i in places), strict=True)) for _, fields in table]
        except ValueError as error:
            raise ValueError(f"{path} is no predictions.csv of this set: {error}") from error
        prob = []
        for number, row in enumerate(rows, 1):
            try:
                prob.append([float(row[name]) for name in probabilities])
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
            if row[scheme.label] not in scheme.classes:
                raise ValueError(f"{path}, row {number}: {scheme.label} {row[scheme.label]!r} is no class of this set")
        if twice := [name for name, n in Counter(row[scheme.sample] for row in rows).items() if n > 1]:
            raise ValueError(f"{path}: the {scheme.sample} {twice[0]} is there twice")
        return cls(rows, np.array(prob).reshape(-1, len(scheme.classes)), scheme)

    def in_order_of(self, rows: Sequence[dict[str, str]], name: str | Path) -> Predictions:
        """The same predictions in the order of a table's rows; ValueError where they are not of these samples."""
        key, label = self.scheme.sample, self.scheme.label
        place = {row[key]: i for i, row in enumerate(self.rows)}
        if set(place) != {row[key] for row in rows}:
            raise ValueError(
                f"{name} holds {len(place)} {key}s that are not the {len(rows)} of this test table: a paired "
                "comparison needs the same ones"
            )
        ordered = self[np.array([place[row[key]] for row in rows], dtype=int)]
        for mine, theirs in zip(ordered.rows, rows, strict=True):
            if mine[label] != theirs[label]:
                raise ValueError(
                    f"{name} gives {key} {mine[key]} the {label} {mine[label]}, the test table {theirs[label]}"
                )
        return ordered


def check_baseline(path: str | Path, rows: Sequence[dict[str, str]], scheme: Scheme = CBIS) -> Predictions:
    """Another run's predictions in the order of `rows`, before any time goes into a comparison with them."""
    return Predictions.read(path, scheme).in_order_of(rows, path)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def macro_auroc(labels: np.ndarray, prob: np.ndarray, scheme: Scheme = CBIS) -> float:
    return metrics.classification_metrics(labels, prob, scheme.classes, scheme.positive)["auroc"]


def macro_f1(labels: np.ndarray, prob: np.ndarray, scheme: Scheme = CBIS) -> float:
    return metrics.classification_metrics(labels, prob, scheme.classes, scheme.positive)["f1"]


def intervals_of(predictions: Predictions, resamples: int, seed: int) -> dict[str, metrics.Interval]:
    scheme = predictions.scheme
    return metrics.patient_bootstrap(
        predictions.labels, predictions.prob, predictions.patients, scheme.classes, malignant=scheme.positive,
        resamples=resamples, seed=seed,
    )  # fmt: skip


def score_predictions(
    predictions: Predictions, resamples: int = 2000, seed: int = 0, point: OperatingPoint | None = None
) -> dict:
    """What results.json says of a test table: every metric with its interval over patients, and the confusion.

    With `point`, fixed on validation samples, also the positive class against the others (metrics.DETECTION).
    """
    labels, prob, scheme = predictions.labels, predictions.prob, predictions.scheme
    intervals = intervals_of(predictions, resamples, seed)
    never = [name for c, name in enumerate(scheme.classes) if not (prob.argmax(1) == c).any()]
    results: dict[str, Any] = {
        "test_patients": len(set(predictions.patients)),
        "unit": "fraction",
        "interval": {"level": 0.95, "resamples": resamples, "over": "patients"},
        "metrics": {name: asdict(interval) for name, interval in intervals.items()},
        "classes": list(scheme.classes),
        "confusion": confusion_matrix(labels, prob.argmax(1), labels=range(len(scheme.classes))).tolist(),
        "never_predicted": never,
    }
    if point is not None and scheme.positive is not None:
        detection = metrics.detection_bootstrap(
            labels, prob, predictions.patients, scheme.classes, point, malignant=scheme.positive, resamples=resamples,
            seed=seed,
        )  # fmt: skip
        results["operating_point"] = {
            **asdict(point), "specificity_on_validation": metrics.SPECIFICITY, "positive": scheme.positive,
        }  # fmt: skip
        results["detection"] = {name: plain(interval) for name, interval in detection.items()}
    return results


def plain(interval: metrics.Interval) -> dict[str, float | None]:
    """As JSON holds it: what is not defined is null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}


def score_difference(
    predictions: Predictions, baseline: Predictions, name: str, resamples: int = 2000, seed: int = 0
) -> dict:
    """What results.json says of the paired difference to another run on the same lesions."""
    scheme = predictions.scheme
    theirs = baseline.in_order_of(predictions.rows, name).prob
    differences = metrics.paired_patient_bootstrap(
        predictions.labels, predictions.prob, theirs, predictions.patients, scheme.classes, malignant=scheme.positive,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    return {"baseline": name, "difference": {key: asdict(value) for key, value in differences.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# The same lesions otherwise: by breast and patient, and in parts
# ---------------------------------------------------------------------------------------------------------------------

UNITS = {"breast": ("patient", "side"), "patient": ("patient",)}
# The label of a breast with several lesions is the first of these that one of them has.
SEVERITY = ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")
SUBGROUPS = ("density", "subtlety", "view", "side", "assessment", "size")
LEAST = 10  # lesions of a subgroup with figures


def by_unit(predictions: Predictions, unit: str) -> Predictions:
    """CBIS-DDSM's lesions and views of a breast or a patient as one: mean probabilities, the gravest pathology."""
    members: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(predictions.rows):
        members.setdefault(tuple(row[name] for name in UNITS[unit]), []).append(i)
    rows = []
    for index in members.values():
        gravest = min((predictions.rows[i]["pathology"] for i in index), key=SEVERITY.index)
        rows.append({**predictions.rows[index[0]], "pathology": gravest})
    return Predictions(rows, np.stack([predictions.prob[index].mean(0) for index in members.values()]))


def score_units(predictions: Predictions, resamples: int = 2000, seed: int = 0) -> dict[str, dict]:
    """The six columns by breast and by patient, with their intervals over patients."""
    results = {}
    for unit in UNITS:
        merged = by_unit(predictions, unit)
        found = _or_none(lambda merged=merged: intervals_of(merged, resamples, seed))
        results[unit] = {
            "number": len(merged.rows),
            "metrics": found and {name: asdict(interval) for name, interval in found.items()},
        }
    return results


def subgroup_of(row: dict[str, str], name: str, bounds: Sequence[float]) -> str:
    """The subgroup's value for a lesion, "" where the table does not say it; `bounds` cut the crop's area in thirds."""
    if name != "size":
        return row.get(name, "")
    area = crop_area(row)
    return "" if area is None else ("small", "medium", "large")[int(np.searchsorted(bounds, area, side="right"))]


def crop_area(row: dict[str, str]) -> float | None:
    """Pixels of a lesion's crop; None where the table does not say."""
    width, height = row.get("crop_width", ""), row.get("crop_height", "")
    return float(width) * float(height) if width and height else None


def score_subgroups(
    predictions: Predictions, resamples: int = 2000, seed: int = 0, others: Sequence[Predictions] = ()
) -> list[dict]:
    """AUROC, macro and malignant against the rest, for each value of SUBGROUPS; null where it is not defined.

    Sizes are thirds of the test table's crops by area, where these differ. What the table leaves empty is no subgroup.
    With the predictions of `others`, the same lesions by other seeds, means over seeds and intervals that cover both.
    """
    areas = [area for row in predictions.rows if (area := crop_area(row)) is not None]
    bounds = np.quantile(areas, (1 / 3, 2 / 3)).tolist() if areas else []
    results = []
    for name in SUBGROUPS:
        if name == "size" and len(set(bounds)) < 2:
            continue
        values = [subgroup_of(row, name, bounds) for row in predictions.rows]
        order = ("small", "medium", "large") if name == "size" else sorted(set(values))
        for value in order:
            index = np.flatnonzero(np.array(values) == value)
            if not value or not len(index):
                continue
            part = predictions[index]
            parts = [part, *(other[index] for other in others)]
            counts = np.bincount(part.labels, minlength=len(CBIS_CLASSES)).tolist()
            enough = len(index) >= LEAST
            macro = _or_none(lambda parts=parts: _over_seeds(parts, resamples, seed)) if enough else None
            malignant = _or_none(lambda parts=parts: _malignant(parts, resamples, seed)) if enough else None
            results.append({
                "by": name, "value": value, "lesions": len(index), "patients": len(set(part.patients)),
                "pathologies": dict(zip(CBIS_CLASSES, counts, strict=True)),
                "auroc": macro and asdict(macro), "auroc_malignant": malignant and asdict(malignant),
            })  # fmt: skip
    return results


def _over_seeds(seeds: Sequence[Predictions], resamples: int, seed: int) -> metrics.Interval:
    """Macro AUROC of the same lesions by one or several seeds."""
    if len(seeds) == 1:
        return intervals_of(seeds[0], resamples, seed)["auroc"]
    first, classes = seeds[0], seeds[0].scheme.classes
    found = comparisons.draw_metrics(
        first.labels, [p.prob for p in seeds], first.patients, classes, malignant=first.scheme.positive,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    return comparisons.interval(found["auroc"])


def _malignant(seeds: Sequence[Predictions], resamples: int, seed: int) -> metrics.Interval:
    """AUROC of the malignant lesions against the others."""
    target, label = CBIS_CLASSES.index(metrics.MALIGNANT), CBIS.label
    rows = [{**row, label: "others" if row[label] != metrics.MALIGNANT else row[label]} for row in seeds[0].rows]
    scheme = replace(CBIS, classes=("others", metrics.MALIGNANT))
    two = [Predictions(rows, np.stack([1 - (p := found.prob[:, target]), p], 1).clip(0, 1), scheme) for found in seeds]
    return _over_seeds(two, resamples, seed)


def _or_none(score: Callable[[], Any]) -> Any:
    """None where a class is missing or the patients are too few for a bootstrap."""
    try:
        return score()
    except ValueError:
        return None


def report_lesions(
    predictions: Predictions,
    held_out: tuple[np.ndarray, np.ndarray],
    baselines: Sequence[str],
    settings: dict[str, Any],
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """All that results.json says of CBIS-DDSM's test lesions, for a probe and for a fine-tuned model.

    Args:
        held_out: labels (n,) and probabilities (n, k) of the validation lesions, which fix threshold and temperature.
        baselines: predictions.csv of other runs; the first one's difference stands by itself as well.
        settings: of this run, to be compared with a baseline's.
    """
    results = report_rows(predictions, held_out, baselines, settings, resamples, seed)
    results["units"] = score_units(predictions, resamples, seed)
    results["subgroups"] = score_subgroups(predictions, resamples, seed)
    return results


def beside_percent(scores: dict[str, Any]) -> dict[str, Any]:
    """`score_predictions` beside scores in percent: that its own are fractions is said under another name."""
    return {"metrics_unit" if name == "unit" else name: value for name, value in scores.items()}


def report_rows(
    predictions: Predictions,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    baselines: Sequence[str],
    settings: dict[str, Any],
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """What `report_lesions` says of any labelled set whose rows are known: scores and differences."""
    scheme, point = predictions.scheme, None
    if scheme.positive is not None and held_out is not None:
        point = metrics.operating_point(*held_out, scheme.classes.index(scheme.positive))
    try:
        results = beside_percent(score_predictions(predictions, resamples, seed, point))
    except ValueError as error:  # a class without samples, or too few groups
        if baselines:
            raise
        log.info(f"no intervals: {error}")
        return {}
    differences = []
    for path in baselines:
        theirs = Predictions.read(path, scheme)
        difference = score_difference(predictions, theirs, path, resamples, seed)
        differences.append(difference | {"settings_differ": settings_that_differ(path, settings)})
    if differences:
        results |= {name: differences[0][name] for name in ("baseline", "difference")} | {"differences": differences}
    return results


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def describe_results(results: dict, how: str) -> str:
    """The row of the published tables in percent, as Markdown, the confusion matrix, and the difference to a baseline.

    Args:
        how: what was done with the lesions, in words.
    """
    skipped = results["lesions_skipped"]["test"]
    intervals = {name: metrics.Interval(**value) for name, value in results["metrics"].items()}
    lines = [
        f"{results['dataset']}: {results['lesions']['test']} test lesions of {results['test_patients']} "
        + ("patients" if not skipped else f"patients ({skipped} MORE SKIPPED, image missing or corrupt)")
        + f", {results['image_kind']} images, {how}"
        + (f"; reading {results['test_readings']} of the test table here" if "test_readings" in results else ""),
        f"Percent, with 95% intervals from {results['interval']['resamples']} resamples of the patients.",
        "",
        f"| Model | {' | '.join(metrics.METRICS[name] for name in intervals)} |",
        "| --- |" + " --- |" * len(intervals),
        f"| {results['model']} | {' | '.join(interval.percent() for interval in intervals.values())} |",
        "",
        "Confusion matrix, a row for each true class:",
    ]
    width = max(map(len, results["classes"]))
    lines.append(" " * width + "  " + "  ".join(results["classes"]))
    for name, counts in zip(results["classes"], results["confusion"], strict=True):
        cells = (str(n).rjust(len(title)) for n, title in zip(counts, results["classes"], strict=True))
        lines.append(f"{name.rjust(width)}  " + "  ".join(cells))
    if results.get("never_predicted"):
        lines.append(f"NEVER PREDICTED: {', '.join(results['never_predicted'])}")
    if "detection" in results:
        lines += ["", "Malignant against the rest; threshold and temperature from validation:"]
        for name, value in results["detection"].items():
            lines.append(f"  {metrics.DETECTION[name]:<48} {describe_interval(name, value)}")
    for comparison in results.get("differences", [results] if "difference" in results else []):
        lines += ["", f"Difference to {comparison['baseline']}, percentage points, paired over patients:"]
        for name, there_and_here in comparison.get("settings_differ", {}).items():
            lines.append(f"  NOT THE WEIGHTS ALONE: {name} is {there_and_here[0]} there and {there_and_here[1]} here")
        for name, value in comparison["difference"].items():
            difference = metrics.Difference(**value)
            lines.append(f"  {metrics.METRICS[name]:<22} {difference.percent()}, p = {difference.p_value:.4f}")
    return "\n".join(lines)


def describe_interval(name: str, value: dict[str, float | None]) -> str:
    """Percent, but for the calibration, whose ideal slope is 1 and intercept 0, and the Brier score."""
    numbers = [value[key] for key in ("value", "low", "high")]
    if any(number is None for number in numbers):
        return "not defined"
    if name in ("brier", "calibration_slope", "calibration_intercept"):
        return "{:.3f} ({:.3f} to {:.3f})".format(*numbers)
    return metrics.Interval(**value).percent()  # type: ignore[arg-type]
