"""Metrics of many resamples at once: each row of weights (R, n) says how often each of n samples counts.

That equals evaluating each resample by itself, copies and all, and takes one pass over sorted scores for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit, logit

from evaluation.metrics import DETECTION, METRICS, OperatingPoint, ranked


def weighted_confusion(labels: np.ndarray, prob: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, k, k), a row for each true class, for each row of weights (R, n)."""
    k = prob.shape[1]
    cell = labels * k + prob.argmax(1)  # (n,) cell of the confusion matrix
    of_cell = csr_array((np.ones(len(cell)), (np.arange(len(cell)), cell)), shape=(len(cell), k * k))
    return (weights @ of_cell).reshape(-1, k, k)


def weighted_classes(
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, over: Sequence[int]
) -> dict[str, np.ndarray]:
    """AUROC, F1, precision and recall of each class of `over` against the rest: (R, n) weights -> (R, classes)."""
    confusion = weighted_confusion(labels, prob, weights)
    hits = np.diagonal(confusion, axis1=1, axis2=2)[:, over]  # (R, classes)
    actual, predicted = confusion.sum(2)[:, over], confusion.sum(1)[:, over]
    recall = hits / actual
    precision = hits / np.maximum(predicted, 1)  # never predicted: no hits either, hence 0
    f1 = 2 * hits / (actual + predicted)
    score = ranked(prob)
    auroc = np.stack([weighted_auroc(labels == c, score[:, c], weights) for c in over], axis=1)
    return {"auroc": auroc, "f1": f1, "precision": precision, "recall": recall}


def over_classes(each: dict[str, np.ndarray], malignant: int | None, over: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of classification_metrics (R,) from `weighted_classes`."""
    values = [each[name].mean(1) for name in ("auroc", "f1", "precision", "recall")]
    if malignant is not None:
        values += [each[name][:, list(over).index(malignant)] for name in ("precision", "recall")]
    return dict(zip(METRICS, values, strict=False))


def weighted_metrics(
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, malignant: int | None, over: Sequence[int]
) -> dict[str, np.ndarray]:
    """Every metric of classification_metrics for each row of weights (R, n) -> (R,), means over the classes `over`."""
    return over_classes(weighted_classes(labels, prob, weights, over), malignant, over)


def weighted_detection(
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, target: int, point: OperatingPoint, over: Sequence[int]
) -> dict[str, np.ndarray]:
    """DETECTION for each row of weights (R, n) -> (R,), balanced accuracy over the classes `over`."""
    positive, score = labels == target, ranked(prob)[:, target]
    called, calibrated = point.called(prob, target), point.calibrated(prob)[:, target]
    of_class = np.stack([labels == c for c in over])  # (k, n)
    recalls = (weights @ (of_class & (prob.argmax(1) == labels)).T) / (weights @ of_class.T)  # (R, k)
    slope, intercept = _recalibration(positive, logit(calibrated.clip(1e-12, 1 - 1e-12)), weights)
    values = (
        weighted_auroc(positive, score, weights),
        weighted_average_precision(positive, score, weights),
        recalls.mean(1),
        weights @ (positive & called) / (weights @ positive),
        weights @ (~positive & ~called) / (weights @ ~positive),
        weights @ np.square(calibrated - positive) / weights.sum(1),
        slope,
        intercept,
    )
    return dict(zip(DETECTION, values, strict=True))


def weighted_auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights (R, n): weighted Mann-Whitney statistic, ties half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # first place of each distinct score
    weights = weights[:, order].astype(np.float64)
    pos = np.add.reduceat(weights * positive[order], starts, axis=1)  # (R, distinct scores)
    neg = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg / 2
    return (pos * below).sum(1) / (pos.sum(1) * neg.sum(1))


def weighted_average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean precision over the steps of recall, for each row of weights (R, n) -> (R,); equal scores are one step."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) < 0])
    weights = weights[:, order].astype(np.float64)
    hits = np.add.reduceat(weights * positive[order], starts, axis=1)  # (R, distinct scores)
    called = np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1)
    precision = np.cumsum(hits, axis=1) / np.maximum(called, 1e-12)
    return (hits * precision).sum(1) / hits.sum(1)


def _recalibration(positive: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept (R,) of outcome ~ logit for each row of weights: Newton's method on all rows at once.

    The slope has an intercept of its own; the intercept returned is that of slope 1. A slope above 100 (outcomes that
    the logits separate) is cut there.
    """
    rows = len(weights)
    if np.ptp(logits) < 1e-9:
        return np.full(rows, np.nan), _offset(positive, logits, weights)
    a, b = np.zeros(rows), np.ones(rows)
    for _ in range(30):
        p = expit(a[:, None] + b[:, None] * logits)  # (R, n)
        error, curvature = weights * (positive - p), weights * p * (1 - p)
        h00, h01, h11 = curvature.sum(1), curvature @ logits, curvature @ np.square(logits)
        g0, g1 = error.sum(1), error @ logits
        det = np.maximum(h00 * h11 - h01**2, 1e-12)
        step_a, step_b = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        a, b = a + step_a.clip(-5, 5), (b + step_b.clip(-5, 5)).clip(-100, 100)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-8:
            break
    return b, _offset(positive, logits, weights)


def _offset(positive: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The intercept (R,) of outcome ~ logit at slope 1."""
    a = np.zeros(len(weights))
    for _ in range(30):
        p = expit(a[:, None] + logits)
        step = (weights * (positive - p)).sum(1) / np.maximum((weights * p * (1 - p)).sum(1), 1e-12)
        a += step.clip(-5, 5)
        if np.abs(step).max() < 1e-8:
            break
    return a
