"""CBIS-DDSM's lesions otherwise: by breast and patient, and in parts that the table tells apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluation import comparisons, metrics
from evaluation.predictions import Predictions, report_rows
from evaluation.resamples import BOOTSTRAP, Bootstrap
from inputs.cbis import CBIS_CLASSES

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
    return Predictions(
        rows, np.stack([predictions.prob[index].mean(0) for index in members.values()]), predictions.scheme
    )


def score_units(predictions: Predictions, bootstrap: Bootstrap = BOOTSTRAP) -> dict[str, dict]:
    """The six columns by breast and by patient, with their intervals over patients."""
    results = {}
    for unit in UNITS:
        merged = by_unit(predictions, unit)
        found = _or_none(lambda merged=merged: merged.resamples(bootstrap).intervals(merged.prob))
        results[unit] = {
            "number": len(merged.rows),
            "metrics": found and {name: interval.plain() for name, interval in found.items()},
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
    predictions: Predictions, bootstrap: Bootstrap = BOOTSTRAP, others: Sequence[Predictions] = ()
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
            two = [against_the_rest(seed) for seed in parts]
            macro = _or_none(lambda parts=parts: _over_seeds(parts, bootstrap)) if enough else None
            malignant = _or_none(lambda two=two: _over_seeds(two, bootstrap)) if enough else None
            results.append({
                "by": name, "value": value, "lesions": len(index), "patients": len(set(part.patients)),
                "pathologies": dict(zip(CBIS_CLASSES, counts, strict=True)),
                "auroc": macro and macro.plain(), "auroc_malignant": malignant and malignant.plain(),
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


def report_lesions(
    predictions: Predictions,
    held_out: tuple[np.ndarray, np.ndarray],
    baselines: Sequence[str],
    settings: dict[str, Any],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict:
    """All that results.json says of CBIS-DDSM's test lesions, for a probe and for a fine-tuned model.

    Arguments as those of predictions.report_rows.
    """
    results = report_rows(predictions, held_out, baselines, settings, bootstrap)
    results["units"] = score_units(predictions, bootstrap)
    results["subgroups"] = score_subgroups(predictions, bootstrap)
    return results
