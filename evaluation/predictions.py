"""Predictions for the samples of a labelled set, the file that holds them, and all that is said of them.

A probe, a fine-tuned model, a zero-shot classifier and a radiologist's assessment all end as one row of probabilities
for each sample; from here on they are treated alike, and any two of them can be compared in pairs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import utils
from evaluation import metrics
from evaluation.metrics import OperatingPoint
from evaluation.resamples import BOOTSTRAP, Bootstrap, Resamples
from evaluation.run_folder import settings_that_differ
from evaluation.weighted import classification_metrics
from inputs.cbis import CBIS_CLASSES
from inputs.metadata import Table
from runtime.logs import aligned

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
    unit: str = "patients"  # what a group is: patients, groups, or images that count by themselves
    unlearnt: tuple[str, ...] = ()  # classes that no training sample had (`without`)
    ordered: bool = False  # the classes stand in an order: metrics.ORDERED_METRICS
    # What several samples are images of, (name, the columns that tell it), and the classes from the one that counts for
    # all of it on: a breast with a malignant lesion is malignant.
    units: tuple[tuple[str, tuple[str, ...]], ...] = ()
    gravest_first: tuple[str, ...] = ()
    subgroups: tuple[str, ...] = ()  # columns whose values have figures of their own

    def without(self, unlearnt: Sequence[int]) -> Scheme:
        """The same for a model that has not seen these classes, by number: means over classes leave them out.

        Their test samples stay, as samples of another class than any that can be called. If the class that is looked
        for is one of them, none is.
        """
        names = tuple(self.classes[c] for c in unlearnt)
        return replace(self, unlearnt=names, positive=None if self.positive in names else self.positive)


def unlearnt_classes(classes: Sequence[str], labels: np.ndarray, dataset: str) -> list[int]:
    """Numbers of the classes that the training labels (n,) lack, which the log names."""
    found = np.setdiff1d(np.arange(len(classes)), labels).tolist()
    if found:
        names = ", ".join(str(classes[c]) for c in found)
        log.warning(
            f"{dataset}: NO TRAINING IMAGE of class {names}: no mean over classes has it, its images count wrong"
        )
    return found


CBIS = Scheme(
    CBIS_CLASSES, "lesion", "pathology", "patient",
    ("lesion", "patient", "side", "view", "abnormality", "pathology"), metrics.MALIGNANT,
    units=(("breast", ("patient", "side")), ("patient", ("patient",))),
    gravest_first=("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK"),
    subgroups=("density", "subtlety", "view", "side", "assessment", "size"),
)  # fmt: skip


OWN_COLUMN = "column "  # how a row of a csv set calls its table's own columns, beside image, label, group and split


def set_scheme(
    classes: Sequence[str], positive: str | None = None, unit: str = "images", ordered: bool = False, **more: Any
) -> Scheme:
    """That of a set whose rows have the columns image, group and label, as all do but CBIS-DDSM.

    Args:
        more: units and subgroups, as Scheme has them.
    """
    gravest = () if positive is None else (positive,)
    if ordered:
        gravest += tuple(name for name in reversed(classes) if name not in gravest)
    columns = ("image", "group", "label")
    scheme = Scheme(tuple(classes), "image", "label", "group", columns, positive, unit)
    return replace(scheme, ordered=ordered, gravest_first=gravest, **more)


def scheme_of(path: str | Path) -> Scheme:
    """That of a predictions.csv of any set but CBIS-DDSM, whose classes its columns name."""
    names = map(utils.csv_value, Table(Path(path)).names)
    return set_scheme([name.removeprefix("prob_") for name in names if name.startswith("prob_")])


@dataclass
class Predictions:
    """Probabilities (n, k) of n samples, which are told by their rows of the table."""

    rows: list[dict[str, str]]
    prob: np.ndarray
    scheme: Scheme = field(default=CBIS)

    def __post_init__(self) -> None:
        if len(bad := np.flatnonzero(~np.isfinite(self.prob).all(1))):
            raise ValueError(
                f"the {self.scheme.sample} {self.rows[bad[0]][self.scheme.sample]} has a score of no number"
            )

    @property
    def labels(self) -> np.ndarray:
        """(n,) indices into the scheme's classes."""
        return np.array([self.scheme.classes.index(row[self.scheme.label]) for row in self.rows])

    @property
    def patients(self) -> list[str]:
        """(n,) who each sample belongs to: the scheme's group."""
        return [row[self.scheme.group] for row in self.rows]

    def resamples(self, bootstrap: Bootstrap = BOOTSTRAP) -> Resamples:
        """Draws of these samples' patients, from which all that is said of them comes."""
        scheme = self.scheme
        return bootstrap.of(self.labels, self.patients, scheme.classes, scheme.positive, scheme.unlearnt)

    def __getitem__(self, index: np.ndarray) -> Predictions:
        return Predictions([self.rows[i] for i in index], self.prob[index], self.scheme)

    def write(self, path: Path) -> None:
        """One line a sample: who it is, its class, the predicted one and the probabilities.

        All of their digits: what `metrics.ranked` ranks by is the sum of the others where one rounds to 1.
        """
        classes, columns = self.scheme.classes, self.scheme.columns
        lines = [[*columns, "predicted", *(f"prob_{name}" for name in classes)]]
        for row, p in zip(self.rows, self.prob.tolist(), strict=True):
            lines.append([*(row[name] for name in columns), classes[int(np.argmax(p))], *p])
        utils.atomic_write(path, lambda file: file.write(utils.csv_text(lines).encode("utf-8", "surrogateescape")))

    @classmethod
    def read(cls, path: str | Path, scheme: Scheme = CBIS) -> Predictions:
        """A predictions.csv of a set; a folder, another table, bad rows or a sample twice is a ValueError."""
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: name the predictions.csv in it")
        probabilities = [f"prob_{name}" for name in scheme.classes]
        wanted = [*scheme.columns, "predicted", *probabilities]
        try:
            table = Table(Path(path))
            places = range(len(wanted))
            if table.header != [name.strip().lower() for name in wanted]:  # by name, which a table has in lower case
                places = [table.column(name.lower()) for name in wanted]
            texts = ([utils.csv_value(fields[i].strip()) for i in places] for _, fields in table)
            rows = [dict(zip(wanted, own, strict=True)) for own in texts]
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
        try:
            return cls(rows, np.array(prob).reshape(-1, len(scheme.classes)), scheme)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
    """One-vs-rest AUROC, the mean over classes: labels (n,), probabilities (n, k)."""
    return _metric("auroc", labels, prob, scheme)


def macro_f1(labels: np.ndarray, prob: np.ndarray, scheme: Scheme = CBIS) -> float:
    """F1 of the most probable class, the mean over classes: labels (n,), probabilities (n, k)."""
    return _metric("f1", labels, prob, scheme)


def _metric(name: str, labels: np.ndarray, prob: np.ndarray, scheme: Scheme) -> float:
    found = classification_metrics(labels, prob, scheme.classes, scheme.positive, scheme.unlearnt)
    return found[name]


def score_predictions(
    predictions: Predictions, resamples: Resamples | None = None, point: OperatingPoint | None = None
) -> dict:
    """What results.json says of a test table: every metric with its interval over the scheme's unit, and the confusion.

    Args:
        resamples: of these samples; drawn here where they are of no further use.
        point: fixed on validation samples, for the positive class against the others (metrics.DETECTION).
    """
    from sklearn.metrics import confusion_matrix

    labels, prob, scheme = predictions.labels, predictions.prob, predictions.scheme
    resamples = resamples or predictions.resamples()
    drawn, each = resamples.draw_with_classes(prob)
    support = np.bincount(labels, minlength=len(scheme.classes)).tolist()
    never = [name for c, name in enumerate(scheme.classes) if not (prob.argmax(1) == c).any()]
    results: dict[str, Any] = {
        f"test_{scheme.unit}": len(set(predictions.patients)),
        "unit": "fraction",
        "interval": {"level": 0.95, "resamples": resamples.number, "over": scheme.unit},
        "metrics": {name: one.interval().plain() for name, one in drawn.items()},
        "classes": list(scheme.classes),
        "per_class": {
            name: {"support": n} | {key: one.interval().plain() for key, one in each.get(name, {}).items()}
            for name, n in zip(scheme.classes, support, strict=True)
        },
        "positive": scheme.positive,
        "confusion": confusion_matrix(labels, prob.argmax(1), labels=range(len(scheme.classes))).tolist(),
        "never_predicted": never,
    }
    if scheme.unlearnt:
        results["unlearnt"] = list(scheme.unlearnt)
    if scheme.ordered:
        results["ordered"] = {name: value.plain() for name, value in resamples.ordered(prob).items()}
    if point is not None and scheme.positive is not None:
        results["operating_point"] = {
            **asdict(point), "specificity_on_validation": metrics.SPECIFICITY, "positive": scheme.positive,
        }  # fmt: skip
        results["detection"] = {name: value.plain() for name, value in resamples.detection(prob, point).items()}
    return results


def score_difference(predictions: Predictions, baseline: Predictions, name: str, resamples: Resamples) -> dict:
    """What results.json says of the paired difference to another run on the same samples."""
    theirs = baseline.in_order_of(predictions.rows, name).prob
    differences = resamples.difference(predictions.prob, theirs)
    return {"baseline": name, "difference": {key: value.plain() for key, value in differences.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# What results.json says
# ---------------------------------------------------------------------------------------------------------------------


def positive_class(results: dict[str, Any]) -> str | None:
    """The class that is looked for, of what results.json says of rows; earlier versions did not always name it."""
    if "positive" in results:
        return results["positive"]
    if metrics.MALIGNANT in results.get("classes", ()):
        return metrics.MALIGNANT
    named = (results.get("operating_point") or {}).get("positive")
    return named or ("positive class" if "precision_malignant" in results.get("metrics", ()) else None)


def without_metrics(error: ValueError) -> dict[str, str]:
    """What results.json says in place of the metrics of rows, which is logged too."""
    log.warning(f"no metrics of the test rows: {error}")
    return {"no_metrics": str(error)}


# Of the settings: other weights are what is compared; the others add results beside those of the rows.
NOT_COMPARED = ("weights_sha256", "cache_features", "fraction", "knn")


def report_rows(
    predictions: Predictions,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    baselines: Sequence[str],
    settings: dict[str, Any],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict:
    """All that results.json says of a labelled set whose rows are known: scores, and differences to baselines.

    Args:
        held_out: labels (n,) and probabilities (n, k) of the validation samples, which fix threshold and temperature.
        baselines: predictions.csv of other runs; the first one's difference stands by itself as well.
        settings: of this run, to be compared with a baseline's.
    """
    scheme, point = predictions.scheme, None
    if scheme.positive is not None and held_out is not None:
        point = metrics.operating_point(*held_out, scheme.classes.index(scheme.positive))
    resamples = predictions.resamples(bootstrap)
    try:
        results = score_predictions(predictions, resamples, point)
    except ValueError as error:  # a class without samples
        if baselines:
            raise
        return without_metrics(error)
    differences = []
    for path in baselines:
        theirs = Predictions.read(path, scheme)
        difference = score_difference(predictions, theirs, path, resamples)
        differ = settings_that_differ(path, settings)
        for name in NOT_COMPARED:
            differ.pop(name, None)
        differences.append(difference | {"settings_differ": differ})
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
    if "metrics" not in results:
        return f"{results['dataset']}: no metrics, {results['no_metrics']}"
    intervals = {name: metrics.Interval.of(value) for name, value in results["metrics"].items()}
    titles = metrics.headings(metrics.METRICS, results["positive"])
    lines = [
        f"{results['dataset']}: {results['lesions']['test']} test lesions of {results['test_patients']} "
        + ("patients" if not skipped else f"patients ({skipped} MORE SKIPPED, image missing or corrupt)")
        + f", {results['image_kind']} images, {how}"
        + (f"; reading {results['test_readings']} of the test table here" if "test_readings" in results else ""),
        f"Percent, with 95% intervals from {results['interval']['resamples']} resamples of the patients.",
        "",
        f"| Model | {' | '.join(titles[name] for name in intervals)} |",
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
    lines += describe_calls(results)
    lines += describe_classes(results)
    lines += describe_detection(results)
    lines += describe_units(results)
    return "\n".join(lines + describe_differences(results))


def describe_measured(results: dict, title: str) -> list[str]:
    """All that `report_rows` and what is beside it say of a set of any kind, as lines; none without metrics."""
    if "metrics" not in results:
        return [f"{title}: no metrics, {results['no_metrics']}"] if "no_metrics" in results else []
    over = results["interval"]["over"]
    images = int(np.sum(results["confusion"]))
    of = f" of {results[f'test_{over}']} {over}" if over != "images" else ""
    whole = "cross_validation" in results
    samples = "samples, each by the fold without it," if whole else "test images"
    lines = [f"{title}: {images} {samples}{of}; percent, with 95% intervals over {over}"]
    titles = metrics.headings(metrics.METRICS, results["positive"])
    for name, value in results["metrics"].items():
        lines.append(f"  {titles[name]:<22} {metrics.Interval.of(value).percent()}")
    lines += describe_calls(results) + describe_classes(results) + describe_detection(results)
    return lines + describe_units(results) + describe_differences(results)


def describe_calls(results: dict[str, Any]) -> list[str]:
    """Lines about classes that are never predicted, or that no training image has."""
    lines = []
    if results.get("never_predicted"):
        lines.append(f"NEVER PREDICTED: {', '.join(results['never_predicted'])}")
    if unlearnt := results.get("unlearnt"):
        lines.append(f"NO TRAINING IMAGE, and in no mean over classes: {', '.join(unlearnt)}")
    return lines


MOST_CLASSES = 30  # that are shown one by one


def class_rows(results: dict[str, Any]) -> list[list[str]]:
    """Each class against the rest: its name, test samples, AUROC and sensitivity, for people.

    None of files of earlier versions, nor where there are more than MOST_CLASSES.
    """
    per_class = results.get("per_class", {})
    if len(per_class) > MOST_CLASSES:
        return []
    shown = ("auroc", "sensitivity")
    return [
        [name, str(found["support"])]
        + [metrics.Interval.of(found[key]).percent() if key in found else "no training image" for key in shown]
        for name, found in per_class.items()
    ]


def describe_classes(results: dict[str, Any]) -> list[str]:
    """Each class against the rest, and what classes in an order have, as lines."""
    lines = []
    if rows := class_rows(results):
        lines += ["", "Each class against the rest:"]
        lines += aligned([["class", "test samples", "AUROC", "sensitivity"], *rows]).splitlines()
    for name, value in results.get("ordered", {}).items():
        lines.append(f"{metrics.ORDERED_METRICS[name]}: {describe_interval(name, value)}")
    return lines


def describe_units(results: dict[str, Any]) -> list[str]:
    """AUROC by what several samples are images of (a breast, a patient), as lines."""
    lines = []
    for unit, found in results.get("units", {}).items():
        for key, how in (("metrics", "mean"), ("metrics_max", "highest")):
            if found.get(key):
                shown = metrics.Interval.of(found[key]["auroc"]).percent()
                lines.append(f"By {unit} ({found['number']}), {how} of its images' scores: AUROC {shown}")
        if found.get("why"):
            lines.append(f"By {unit} ({found['number']}): no figure, {found['why']}")
    return ["", *lines] if lines else []


def describe_settings(comparison: dict[str, Any]) -> list[str]:
    """What else than the weights differs between a run and its baseline, a line for each setting."""
    differ = comparison.get("settings_differ", {})
    return [f"{name} is {there} there and {here} here" for name, (there, here) in differ.items()]


def describe_differences(results: dict[str, Any]) -> list[str]:
    """The paired differences to baselines, as lines."""
    lines, titles = [], metrics.headings(metrics.METRICS, results.get("positive"))
    over = results["interval"]["over"]
    for comparison in results.get("differences", [results] if "difference" in results else []):
        lines += ["", f"Difference to {comparison['baseline']}, percentage points, paired over {over}:"]
        lines += [f"  NOT THE WEIGHTS ALONE: {line}" for line in describe_settings(comparison)]
        for name, value in comparison["difference"].items():
            difference = metrics.Difference.of(value)
            lines.append(f"  {titles[name]:<22} {difference.percent()}, {difference.p_text()}")
    return lines


def describe_detection(results: dict[str, Any]) -> list[str]:
    """The positive class against the rest, as lines; none where no class is that."""
    if "detection" not in results:
        return []
    titles = metrics.headings(metrics.DETECTION, results["positive"])
    lines = [
        "",
        f"{metrics.class_title(results['positive'])} against the rest; threshold and temperature from validation:",
    ]
    width = max(map(len, titles.values()))
    return lines + [
        f"  {titles[name]:<{width}} {describe_interval(name, value)}" for name, value in results["detection"].items()
    ]


def describe_interval(name: str, value: dict[str, Any]) -> str:
    """Percent, but for the calibration, whose ideal slope is 1 and intercept 0, the Brier score and kappa."""
    interval = metrics.Interval.of(value)
    if name in ("brier", "calibration_slope", "calibration_intercept", "quadratic_kappa"):
        return interval.shown(".3f", ".3f", 1)
    return interval.percent()
