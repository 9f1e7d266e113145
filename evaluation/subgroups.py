"""A set's samples otherwise: by breast and patient, and in parts that the table tells apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluation import comparisons, metrics
from evaluation.predictions import CBIS, OWN_COLUMN, Predictions, Scheme, report_rows
from evaluation.resamples import BOOTSTRAP, Bootstrap

LEAST = 10  # samples of a subgroup with figures
MOST_VALUES = 10  # of a column of numbers, above which its thirds are the subgroups


def by_unit(predictions: Predictions, unit: str, how: str = "mean") -> Predictions:
    """The samples of a unit of the scheme (a breast, a patient) as one, with the label that is its gravest.

    Args:
        how: mean: the mean of their probabilities. max: those of the sample that has most of the positive class.
    """
    scheme = predictions.scheme
    columns = dict(scheme.units)[unit]
    members: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(predictions.rows):
        members.setdefault(tuple(row[name] for name in columns), []).append(i)
    rows, prob = [], []
    score = None if how == "mean" else metrics.ranked(predictions.prob)[:, scheme.classes.index(str(scheme.positive))]
    for index in members.values():
        gravest = min((predictions.rows[i][scheme.label] for i in index), key=severity(scheme).index)
        rows.append({**predictions.rows[index[0]], scheme.label: gravest})
        own = predictions.prob[index]
        prob.append(own.mean(0) if score is None else own[score[index].argmax()])
    return Predictions(rows, np.stack(prob), scheme)


def severity(scheme: Scheme) -> tuple[str, ...]:
    """All classes, from the one that counts for a whole unit on."""
    return scheme.gravest_first + tuple(name for name in scheme.classes if name not in scheme.gravest_first)


def score_units(predictions: Predictions, bootstrap: Bootstrap = BOOTSTRAP) -> dict[str, dict]:
    """The columns of the tables by each unit of the scheme, by mean and by maximum, with intervals over patients."""
    results = {}
    ways = {"metrics": "mean"} | ({} if predictions.scheme.positive is None else {"metrics_max": "max"})
    for unit, _ in predictions.scheme.units:
        results[unit] = {}
        for key, how in ways.items():
            merged = by_unit(predictions, unit, how)
            results[unit]["number"] = len(merged.rows)
            try:
                found = merged.resamples(bootstrap).intervals(merged.prob)
                results[unit][key] = {name: interval.plain() for name, interval in found.items()}
            except ValueError as error:  # a class is missing
                results[unit] |= {key: None, "why": str(error)}
    return results


def subgroup_of(row: dict[str, str], name: str, bounds: Sequence[float]) -> str:
    """A sample's subgroup, "" where the table does not say it; `bounds` cut what is a number in thirds."""
    value = quantity(row, name) if len(bounds) else None
    if value is not None:
        return ("small", "medium", "large")[int(np.searchsorted(bounds, value, side="right"))]
    return "" if len(bounds) else row.get(name, "")


def quantity(row: dict[str, str], name: str) -> float | None:
    """The number of a row's column, a lesion's size being its crop's area; None for none."""
    if name == "size":
        return crop_area(row)
    try:
        return float(row.get(name, ""))
    except ValueError:
        return None


def thirds(rows: Sequence[dict[str, str]], name: str, scheme: Scheme) -> list[float] | None:
    """Bounds that cut a column of numbers in thirds; [] for one of few values, and None where it has no thirds."""
    if scheme.sample == CBIS.sample and name != "size":  # its numbers are codes
        return []
    values = {row.get(name, "") for row in rows} - {""}
    found = [value for row in rows if (value := quantity(row, name)) is not None]
    if name != "size" and (len(values) <= MOST_VALUES or len(found) < len(rows) / 2):
        return []
    bounds = np.quantile(found, (1 / 3, 2 / 3)).tolist() if found else []
    return bounds if len(set(bounds)) == 2 else None


def crop_area(row: dict[str, str]) -> float | None:
    """Pixels of a lesion's crop; None where the table does not say."""
    width, height = row.get("crop_width", ""), row.get("crop_height", "")
    return float(width) * float(height) if width and height else None


def score_subgroups(
    predictions: Predictions, bootstrap: Bootstrap = BOOTSTRAP, others: Sequence[Predictions] = ()
) -> list[dict]:
    """AUROC, macro and of the positive class against the rest, for each value of the scheme's subgroups.

    Null where it is not defined. Sizes are thirds of the test table's crops by area, where these differ, and so are
    another set's columns of more than MOST_VALUES numbers. What the table leaves empty is no subgroup. With the
    predictions of `others`, the same samples by other seeds, means over seeds and intervals that cover both.
    """
    scheme, results = predictions.scheme, []
    for name in scheme.subgroups:
        bounds = thirds(predictions.rows, name, scheme)
        if bounds is None:
            continue
        values = [subgroup_of(row, name, bounds) for row in predictions.rows]
        for value in ("small", "medium", "large") if bounds else sorted(set(values)):
            index = np.flatnonzero(np.array(values) == value)
            if not value or not len(index):
                continue
            part = predictions[index]
            parts = [part, *(other[index] for other in others)]
            counts = np.bincount(part.labels, minlength=len(scheme.classes)).tolist()
            enough = len(index) >= LEAST
            macro = _or_none(lambda parts=parts: _over_seeds(parts, bootstrap)) if enough else None
            positive = None
            if enough and scheme.positive is not None:
                two = [against_the_rest(seed, scheme.positive) for seed in parts]
                positive = _or_none(lambda two=two: _over_seeds(two, bootstrap))
            results.append({
                "by": name.removeprefix(OWN_COLUMN), "value": value, "lesions": len(index),
                "patients": len(set(part.patients)), "pathologies": dict(zip(scheme.classes, counts, strict=True)),
                "auroc": macro and macro.plain(), "auroc_malignant": positive and positive.plain(),
            })  # fmt: skip
    return results


def _over_seeds(seeds: Sequence[Predictions], bootstrap: Bootstrap) -> metrics.Interval:
    """Macro AUROC of the same samples by one or several seeds."""
    resamples = seeds[0].resamples(bootstrap)
    if len(seeds) == 1:
        return resamples.intervals(seeds[0].prob)["auroc"]
    found = comparisons.draw_rows(resamples, [predictions.prob for predictions in seeds])
    return comparisons.interval(found["auroc"])


def against_the_rest(predictions: Predictions, name: str = metrics.MALIGNANT) -> Predictions:
    """The same samples in two classes: `name`, and all others."""
    scheme = predictions.scheme
    rows = [{**row, scheme.label: row[scheme.label] if row[scheme.label] == name else "others"}
            for row in predictions.rows]  # fmt: skip
    p = predictions.prob[:, scheme.classes.index(name)]  # (n,)
    prob = np.stack([1 - p, p], axis=1).clip(0, 1)  # (n, 2)
    return Predictions(rows, prob, replace(scheme, classes=("others", name)))


def _or_none(score: Callable[[], Any]) -> Any:
    """None where a class is missing."""
    try:
        return score()
    except ValueError:
        return None


def report_set(
    predictions: Predictions,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    baselines: Sequence[str],
    settings: dict[str, Any],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict:
    """All that results.json says of test rows, for a probe and for a fine-tuned model.

    Arguments as those of predictions.report_rows.
    """
    results = report_rows(predictions, held_out, baselines, settings, bootstrap)
    if predictions.scheme.units:
        results["units"] = score_units(predictions, bootstrap)
    if predictions.scheme.subgroups:
        results["subgroups"] = score_subgroups(predictions, bootstrap)
    return results
