"""Metrics of many resamples at once: each row of weights (R, n) says how often each of n samples counts.

That equals evaluating each resample by itself, copies and all. What does not hang on the weights, such as the order of
the scores, is worked out once; the functions that come of it take the weights, whole numbers of any type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import expit, logit

from evaluation.metrics import DETECTION, MALIGNANT, METRICS, Labels, OperatingPoint, checked, ranked

OfWeights = Callable[[np.ndarray], dict[str, np.ndarray]]  # weights (R, n) -> metrics (R,), or (R, classes), by name


def weighted_confusion(labels: np.ndarray, prob: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """(R, k, k), a row for each true class, as a function of weights (R, n)."""
    k = prob.shape[1]
    cell = labels * k + prob.argmax(1)  # (n,) cell of the confusion matrix
    of_cell = csr_array((np.ones(len(cell)), (np.arange(len(cell)), cell)), shape=(len(cell), k * k))
    return lambda weights: (weights @ of_cell).reshape(-1, k, k)


def weighted_classes(labels: np.ndarray, prob: np.ndarray, over: Sequence[int]) -> OfWeights:
    """AUROC, F1, precision and recall (R, classes) of the classes `over`, each against the rest, of weights."""
    confusion_of, score = weighted_confusion(labels, prob), ranked(prob)
    rankings = [Ranking(labels == c, score[:, c]) for c in over]

    def of(weights: np.ndarray) -> dict[str, np.ndarray]:
        confusion = confusion_of(weights)
        hits = np.diagonal(confusion, axis1=1, axis2=2)[:, over]  # (R, classes)
        actual, predicted = confusion.sum(2)[:, over], confusion.sum(1)[:, over]
        recall = hits / actual
        precision = hits / np.maximum(predicted, 1)  # never predicted: no hits either, hence 0
        f1 = 2 * hits / (actual + predicted)
        auroc = np.stack([ranking.auroc(weights) for ranking in rankings], axis=1)
        return {"auroc": auroc, "f1": f1, "precision": precision, "recall": recall}

    return of


def over_classes(each: dict[str, np.ndarray], malignant: int | None, over: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of classification_metrics (R,) from `weighted_classes`."""
    values = [each[name].mean(1) for name in ("auroc", "f1", "precision", "recall")]
    if malignant is not None:
        values += [each[name][:, list(over).index(malignant)] for name in ("precision", "recall")]
    return dict(zip(METRICS, values, strict=False))


def weighted_metrics(labels: np.ndarray, prob: np.ndarray, malignant: int | None, over: Sequence[int]) -> OfWeights:
    """Every metric of classification_metrics, means over the classes `over`, as a function of weights."""
    each = weighted_classes(labels, prob, over)
    return lambda weights: over_classes(each(weights), malignant, over)


def weighted_detection(
    labels: np.ndarray, prob: np.ndarray, target: int, point: OperatingPoint, over: Sequence[int]
) -> OfWeights:
    """DETECTION, balanced accuracy over the classes `over`, as a function of weights."""
    positive = labels == target
    ranking = Ranking(positive, ranked(prob)[:, target])
    called, calibrated = point.called(prob, target), point.calibrated(prob)[:, target]
    of_class = np.stack([labels == c for c in over])  # (k, n)
    right = of_class & (prob.argmax(1) == labels)
    logits = logit(calibrated.clip(1e-12, 1 - 1e-12))

    def of(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights.astype(np.float64)
        slope, intercept = _recalibration(positive, logits, weights)
        values = (
            ranking.auroc(weights),
            ranking.average_precision(weights),
            ((weights @ right.T) / (weights @ of_class.T)).mean(1),
            weights @ (positive & called) / (weights @ positive),
            weights @ (~positive & ~called) / (weights @ ~positive),
            weights @ np.square(calibrated - positive) / weights.sum(1),
            slope,
            intercept,
        )
        return dict(zip(DETECTION, values, strict=True))

    return of


def classification_metrics(
    y_true: Labels,
    prob: np.ndarray,
    classes: Sequence[str],
    malignant: str | None = MALIGNANT,
    unlearnt: Sequence[str] = (),
) -> dict[str, float]:
    """The six columns of the published tables, each sample counting once.

    y_true (n,) holds indices into `classes`, prob (n, k) softmax probabilities. AUROC is one-vs-rest, its samples
    as `ranked`; it, F1, precision and recall are plain means over classes but those that are `unlearnt`, whose
    samples count among the others. The prediction is the most probable class; the precision of a class that is never
    predicted counts as 0. The last two columns are missing where no class is `malignant` (None).

    Raises ValueError as `checked`, and for a `malignant` that is no class.
    """
    labels, prob = checked(y_true, prob, classes, unlearnt)
    if malignant is not None and malignant not in classes:
        raise ValueError(f"class {malignant!r} is not among {', '.join(classes)}")
    target = None if malignant is None else list(classes).index(malignant)
    over = [c for c, name in enumerate(classes) if name not in unlearnt]
    once = np.ones((1, len(labels)), dtype=np.uint8)
    return {name: float(value[0]) for name, value in weighted_metrics(labels, prob, target, over)(once).items()}


class Ranking:
    """Samples of two kinds in the order of their scores (n,); what rows of weights (R, n) make of it.

    Negatives are summed up once from the lowest score to the highest. A positive then reads off, at its place among
    them, how many lie below it: nothing but whole numbers, so that no order of the sums changes a digit.
    """

    def __init__(self, positive: np.ndarray, score: np.ndarray):
        order = np.argsort(score, kind="stable")
        self.positives, self.negatives = order[positive[order]], order[~positive[order]]
        own, others = score[self.positives], score[self.negatives]
        self.below, self.not_above = np.searchsorted(others, own), np.searchsorted(others, own, "right")
        self.first = np.searchsorted(own, own)  # of the positives with the same score, the first

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Area under the ROC curve (R,): Mann-Whitney statistic, ties half; NaN where a side weighs nothing."""
        positive, negative = _columns(weights, self.positives), _running(weights, self.negatives)
        twice = _columns(negative, self.below) + _columns(negative, self.not_above)  # (R, positives)
        pairs = positive.sum(1, dtype=np.float64) * negative[:, -1]
        with np.errstate(invalid="ignore"):
            return np.einsum("ij,ij->i", positive, twice, dtype=np.float64) / 2 / pairs

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Mean precision (R,) over the steps of recall; equal scores are one step. NaN where no positive weighs."""
        positive, negative = _running(weights, self.positives), _running(weights, self.negatives)
        hits = positive[:, -1:] - _columns(positive, self.first)  # at a positive's score and above
        called = hits + negative[:, -1:] - _columns(negative, self.below)
        precision = hits / np.maximum(called, 1)
        with np.errstate(invalid="ignore"):
            return np.einsum("ij,ij->i", _columns(weights, self.positives), precision) / positive[:, -1]


def _columns(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(R, m) of values (R, n); `take` is half as long at it as an index."""
    return values.take(places, axis=1)


def _running(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(R, m + 1): sums of the weights of the first 0 to m places. torch takes a seventh of NumPy's time."""
    total = torch.zeros(len(weights), len(places) + 1, dtype=torch.int32)
    torch.cumsum(torch.from_numpy(_columns(weights, places)), 1, dtype=torch.int32, out=total[:, 1:])
    return total.numpy()


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
