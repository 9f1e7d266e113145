"""Classification metrics of the probes, their intervals over patients, and the paired comparison of models.

Point values come from scikit-learn. The bootstrap draws patients, not lesions: the lesions and views of one
patient are alike, so an interval over lesions would be too narrow. All resamples are evaluated at once as
lesion weights (how often the lesion's patient was drawn), which equals evaluating each resample on its own.

All values are fractions (0 to 1); tables print them in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

MALIGNANT = "MALIGNANT"
# The columns of the published results tables: key -> heading.
METRICS = {
    "auroc": "AUROC",
    "f1": "F1-Score",
    "precision": "Precision",
    "recall": "Recall",
    "precision_malignant": "Precision (Malignant)",
    "recall_malignant": "Recall (Malignant)",
}


@dataclass(frozen=True)
class Interval:
    """A point value with the bounds of its bootstrap interval, all fractions."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{100 * self.value:.2f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its interval and two-sided bootstrap p-value."""

    p_value: float


# ------------------------------------------------------------------------------------------------------------
# Point values
# ------------------------------------------------------------------------------------------------------------


def classification_metrics(
    y_true: Sequence[int], prob: np.ndarray, classes: Sequence[str], malignant: str = MALIGNANT
) -> dict[str, float]:
    """The six columns of the published tables, through scikit-learn.

    y_true (n,) holds indices into `classes`, prob (n, k) softmax probabilities. AUROC is one-vs-rest;
    it, F1, precision and recall are plain means over classes. The prediction is the most probable class; the
    precision of a class that is never predicted counts as 0.

    Raises ValueError for logits in place of probabilities, labels out of range, and a class without samples,
    for which neither recall nor AUROC exists.
    """
    labels, prob = _checked(y_true, prob, classes)
    auroc = [roc_auc_score(labels == c, prob[:, c]) for c in range(len(classes))]
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, prob.argmax(1), labels=range(len(classes)), average=None, zero_division=0
    )
    target = _class_index(malignant, classes)
    values = (np.mean(auroc), f1.mean(), precision.mean(), recall.mean(), precision[target], recall[target])
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def _class_index(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise ValueError(f"class {name!r} is not among {', '.join(classes)}")
    return list(classes).index(name)


def _checked(y_true: Sequence[int], prob: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    labels, prob = np.asarray(y_true), np.asarray(prob, dtype=np.float64)
    if prob.shape != (len(labels), len(classes)):
        raise ValueError(
            f"probabilities have shape {prob.shape}; {len(labels)} labels and {len(classes)} classes need "
            f"({len(labels)}, {len(classes)})"
        )
    if len(labels) == 0:
        raise ValueError("no samples to evaluate")
    if not np.isin(labels, range(len(classes))).all():
        raise ValueError(f"labels must lie in 0..{len(classes) - 1}; found {sorted(set(labels.tolist()))}")
    if not (np.isfinite(prob).all() and (prob >= 0).all() and np.allclose(prob.sum(1), 1, atol=1e-4)):
        raise ValueError("probabilities must be finite, not negative and sum to 1: pass softmax outputs")
    empty = [name for c, name in enumerate(classes) if not (labels == c).any()]
    if empty:
        raise ValueError(f"no sample of class {', '.join(empty)}: its recall and AUROC are undefined")
    return labels, prob


# ------------------------------------------------------------------------------------------------------------
# Bootstrap over patients
# ------------------------------------------------------------------------------------------------------------


def patient_bootstrap(
    y_true: Sequence[int],
    prob: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    malignant: str = MALIGNANT,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of all metrics, resampling patients with replacement.

    patients (n,) names the patient of each lesion. Resamples in which a class has no lesion are drawn again,
    since no metric is defined on them: the interval is conditional on every class being present. Where that
    concerns most resamples the patients are too few for an interval, a ValueError.
    """
    labels, prob = _checked(y_true, prob, classes)
    point = classification_metrics(labels, prob, classes, malignant)
    weights = _resample_weights(labels, patients, len(classes), resamples, seed)
    draws = _weighted_metrics(labels, prob, weights, _class_index(malignant, classes))
    bounds = _bounds(draws, level)
    return {name: Interval(point[name], *bounds[name]) for name in METRICS}


def paired_patient_bootstrap(
    y_true: Sequence[int],
    prob: np.ndarray,
    prob_baseline: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    malignant: str = MALIGNANT,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Interval of (model minus baseline) for each metric, both evaluated on the same resamples of patients.

    The pairing removes the part of the spread that both share: which patients were drawn. The p-value is
    two-sided: twice the smaller share of resamples on either side of zero, the observed sample being one.
    """
    labels, prob = _checked(y_true, prob, classes)
    _, prob_baseline = _checked(y_true, prob_baseline, classes)
    target = _class_index(malignant, classes)
    first = classification_metrics(labels, prob, classes, malignant)
    second = classification_metrics(labels, prob_baseline, classes, malignant)
    weights = _resample_weights(labels, patients, len(classes), resamples, seed)
    draws = _weighted_metrics(labels, prob, weights, target)
    baseline = _weighted_metrics(labels, prob_baseline, weights, target)
    draws = {name: draws[name] - baseline[name] for name in METRICS}
    bounds = _bounds(draws, level)
    return {
        name: Difference(first[name] - second[name], *bounds[name], p_value=_two_sided(draws[name])) for name in METRICS
    }


def _two_sided(draws: np.ndarray) -> float:
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(draws))))


def _bounds(draws: dict[str, np.ndarray], level: float) -> dict[str, tuple[float, float]]:
    tail = (1 - level) / 2
    return {name: tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for name, values in draws.items()}


def _resample_weights(
    labels: np.ndarray, patients: Sequence[str], num_classes: int, resamples: int, seed: int
) -> np.ndarray:
    """(resamples, n) times each lesion counts when P of the P patients are drawn with replacement."""
    if len(patients) != len(labels):
        raise ValueError(f"{len(patients)} patient names for {len(labels)} lesions")
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    classes_of = np.zeros((len(names), num_classes))  # (P, k) lesions of each class by patient
    np.add.at(classes_of, (patient, labels), 1)
    rng = np.random.default_rng(seed)
    even = np.full(len(names), 1 / len(names))
    counts = rng.multinomial(len(names), even, size=resamples)  # (R, P)
    lacking = ((counts @ classes_of) == 0).any(1)
    if lacking.mean() > 0.5:
        raise ValueError(
            f"{len(names)} patients are too few for a bootstrap: most resamples lack a class "
            f"(patients with a lesion of each class: {(classes_of > 0).sum(0).tolist()})"
        )
    while lacking.any():
        counts[lacking] = rng.multinomial(len(names), even, size=int(lacking.sum()))
        lacking = ((counts @ classes_of) == 0).any(1)
    return counts[:, patient]  # (R, n)


def _weighted_metrics(
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, malignant: int
) -> dict[str, np.ndarray]:
    """Every metric of classification_metrics for each row of weights (R, n) -> (R,)."""
    k = prob.shape[1]
    cell = labels * k + prob.argmax(1)  # (n,) cell of the confusion matrix
    confusion = (weights @ np.eye(k * k)[cell]).reshape(-1, k, k)  # (R, true, predicted)
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # (R, k)
    actual, predicted = confusion.sum(2), confusion.sum(1)
    recall = hits / actual
    precision = hits / np.maximum(predicted, 1)  # never predicted: no hits either, hence 0
    f1 = 2 * hits / (actual + predicted)
    auroc = np.stack([_weighted_auroc(labels == c, prob[:, c], weights) for c in range(k)], axis=1)
    macro = (m.mean(1) for m in (auroc, f1, precision, recall))
    return dict(zip(METRICS, (*macro, precision[:, malignant], recall[:, malignant]), strict=True))


def _weighted_auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights (R, n): weighted Mann-Whitney statistic, ties half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # first place of each distinct score
    weights = weights[:, order].astype(np.float64)
    pos = np.add.reduceat(weights * positive[order], starts, axis=1)  # (R, distinct scores)
    neg = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg / 2
    return (pos * below).sum(1) / (pos.sum(1) * neg.sum(1))
