"""Every score of the project, its interval and the paired comparison of models.

Three kinds: the probes' classification metrics with their bootstrap over patients, the metrics of labelled sets
(zero-shot and linear classification) and the recall of image-text retrieval.

All of them are fractions (0 to 1). Files and tables that are in percent get them through `percent`, once, where they
are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from torch import Tensor

Scores = dict[str, Any]  # numbers by name, and names (the metric, the split)
Labels = Sequence[int] | np.ndarray
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
# What else is said of one class, the positive one, against all others: key -> heading. The thresholds and the
# temperature behind them are the validation samples' (`operating_point`).
DETECTION = {
    "auroc_malignant": "AUROC (malignant)",
    "average_precision_malignant": "Average precision (malignant)",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity (malignant) at validation's threshold",
    "specificity": "Specificity reached there",
    "brier": "Brier score (malignant)",
    "calibration_slope": "Calibration slope (malignant)",
    "calibration_intercept": "Calibration intercept (malignant)",
}
SPECIFICITY = 0.9  # on validation, at the threshold of "sensitivity"
# What a labelled set of the catalog can report; CLIP's evaluation uses these four.
SET_METRICS = ("top1", "mean_per_class", "mean_top1_top5", "roc_auc")
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
# The values of `classification_scores` and `retrieval_metrics` that are fractions; the others are ranks and counts.
_FRACTIONS = {*SET_METRICS, *RECALLS, "top5", "score"}


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


# ---------------------------------------------------------------------------------------------------------------------
# Classification by a probe: point values
# ---------------------------------------------------------------------------------------------------------------------


def classification_metrics(
    y_true: Labels, prob: np.ndarray, classes: Sequence[str], malignant: str | None = MALIGNANT
) -> dict[str, float]:
    """The six columns of the published tables, through scikit-learn.

    y_true (n,) holds indices into `classes`, prob (n, k) softmax probabilities. AUROC is one-vs-rest;
    it, F1, precision and recall are plain means over classes. The prediction is the most probable class; the
    precision of a class that is never predicted counts as 0. The last two columns are missing where no class is
    `malignant` (None).

    Raises ValueError for logits in place of probabilities, labels out of range, and a class without samples,
    for which neither recall nor AUROC exists.
    """
    labels, prob = _checked(y_true, prob, classes)
    auroc = [roc_auc_score(labels == c, prob[:, c]) for c in range(len(classes))]
    averaging: dict[str, Any] = dict(average=None, zero_division=0)  # scikit-learn's annotations know only "macro"
    per_class = precision_recall_fscore_support(labels, prob.argmax(1), labels=range(len(classes)), **averaging)
    precision, recall, f1 = map(np.asarray, per_class[:3])  # (k,) each
    target = _class_index(malignant, classes)
    values = [np.mean(auroc), f1.mean(), precision.mean(), recall.mean()]
    values += [precision[target], recall[target]] if target is not None else []
    return {name: float(value) for name, value in zip(METRICS, values, strict=False)}


def _class_index(name: str | None, classes: Sequence[str]) -> int | None:
    if name is None:
        return None
    if name not in classes:
        raise ValueError(f"class {name!r} is not among {', '.join(classes)}")
    return list(classes).index(name)


def _checked(y_true: Labels, prob: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
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


# ---------------------------------------------------------------------------------------------------------------------
# One class against the others
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatingPoint:
    """What the validation samples fixed before the test table was read."""

    temperature: float  # probabilities become softmax(log(p) / temperature)
    threshold: float  # probability of the positive class, before the temperature, from which on a sample is called

    def calibrated(self, prob: np.ndarray) -> np.ndarray:
        """Probabilities (n, k) at the temperature (Guo et al. 2017, section 4.2)."""
        return softmax(_log(prob) / self.temperature, axis=1)


def _log(prob: np.ndarray) -> np.ndarray:
    return np.log(np.asarray(prob, dtype=np.float64).clip(min=1e-12))


def operating_point(
    y_true: Labels, prob: np.ndarray, positive: int, specificity: float = SPECIFICITY
) -> OperatingPoint:
    """Temperature and threshold from validation labels (n,) and probabilities (n, k).

    The temperature minimises cross-entropy. The threshold is the lowest probability of class `positive` at which at
    least `specificity` of the other samples stay below it.
    """
    labels, prob = np.asarray(y_true), np.asarray(prob, dtype=np.float64)
    rows, logs = np.arange(len(labels)), _log(prob)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logs / np.exp(log_temperature), axis=1)[rows, labels].mean())

    found: Any = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    others = np.sort(prob[labels != positive, positive])
    if not len(others):
        raise ValueError("a threshold needs validation samples of another class than the positive one")
    allowed = int(np.floor((1 - specificity) * len(others) + 1e-9))  # of the others may be called
    return OperatingPoint(float(np.exp(found.x)), float(np.nextafter(others[len(others) - 1 - allowed], np.inf)))


def detection_bootstrap(
    y_true: Labels,
    prob: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    point: OperatingPoint,
    *,
    malignant: str = MALIGNANT,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """DETECTION with percentile intervals over resampled patients, as `patient_bootstrap` has them.

    Balanced accuracy is the mean recall of all classes, the published tables' column "Recall" under its other name.
    The Brier score and the calibration (Cox's logistic recalibration; Van Calster et al. 2019: the slope, and the
    intercept at slope 1) are those of the positive class at the point's temperature; NaN where it has one
    probability for all.
    """
    drawn = resampled_detection(y_true, prob, patients, classes, point, malignant, resamples, seed)
    bounds = _bounds({name: draws for name, (_, draws) in drawn.items()}, level)
    return {name: Interval(value, *bounds[name]) for name, (value, _) in drawn.items()}


def resampled_detection(
    y_true: Labels,
    prob: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    point: OperatingPoint,
    malignant: str = MALIGNANT,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, np.ndarray]]:
    """`resampled_metrics` for DETECTION, on the same resamples."""
    labels, prob = _checked(y_true, prob, classes)
    target = list(classes).index(malignant)
    value = _weighted_detection(labels, prob, np.ones((1, len(labels))), target, point)
    weights = resample_weights(labels, patients, len(classes), resamples, seed)
    draws = _weighted_detection(labels, prob, weights, target, point)
    return {name: (float(value[name][0]), draws[name]) for name in DETECTION}


def _weighted_detection(
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, target: int, point: OperatingPoint
) -> dict[str, np.ndarray]:
    """DETECTION for each row of weights (R, n) -> (R,)."""
    positive, score = labels == target, prob[:, target]
    called, calibrated = score >= point.threshold, point.calibrated(prob)[:, target]
    of_class = np.stack([labels == c for c in range(prob.shape[1])])  # (k, n)
    recalls = (weights @ (of_class & (prob.argmax(1) == labels)).T) / (weights @ of_class.T)  # (R, k)
    slope, intercept = _recalibration(positive, logit(calibrated.clip(1e-12, 1 - 1e-12)), weights)
    values = (
        _weighted_auroc(positive, score, weights),
        _weighted_average_precision(positive, score, weights),
        recalls.mean(1),
        weights @ (positive & called) / (weights @ positive),
        weights @ (~positive & ~called) / (weights @ ~positive),
        weights @ np.square(calibrated - positive) / weights.sum(1),
        slope,
        intercept,
    )
    return dict(zip(DETECTION, values, strict=True))


def _weighted_average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
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


# ---------------------------------------------------------------------------------------------------------------------
# Classification by a probe: bootstrap over patients
# ---------------------------------------------------------------------------------------------------------------------


def patient_bootstrap(
    y_true: Labels,
    prob: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    malignant: str | None = MALIGNANT,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of all metrics, resampling patients with replacement.

    Patients are drawn, not lesions: the lesions and views of one patient resemble each other, so an interval over
    lesions would be too narrow. All resamples are evaluated at once as lesion weights (how often the lesion's patient
    was drawn), which equals evaluating each resample on its own.

    patients (n,) names the patient of each lesion. Resamples in which a class has no lesion are drawn again,
    since no metric is defined on them: the interval is conditional on every class being present. Where that
    concerns most resamples the patients are too few for an interval, a ValueError.
    """
    drawn = resampled_metrics(y_true, prob, patients, classes, malignant, resamples, seed)
    bounds = _bounds({name: draws for name, (_, draws) in drawn.items()}, level)
    return {name: Interval(value, *bounds[name]) for name, (value, _) in drawn.items()}


def resampled_metrics(
    y_true: Labels,
    prob: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    malignant: str | None = MALIGNANT,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, np.ndarray]]:
    """What `patient_bootstrap` summarises: each metric's value and its values (resamples,) on resampled patients.

    The same labels, patients, resamples and seed give the same resamples whatever the probabilities are.
    """
    labels, prob = _checked(y_true, prob, classes)
    point = classification_metrics(labels, prob, classes, malignant)
    weights = resample_weights(labels, patients, len(classes), resamples, seed)
    draws = _weighted_metrics(labels, prob, weights, _class_index(malignant, classes))
    return {name: (value, draws[name]) for name, value in point.items()}


def paired_patient_bootstrap(
    y_true: Labels,
    prob: np.ndarray,
    prob_baseline: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    malignant: str | None = MALIGNANT,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Interval of (model minus baseline) for each metric, both evaluated on the same resamples of patients.

    The pairing removes the part of the spread that both share: which patients were drawn. The p-value is
    two-sided: twice the smaller fraction of resamples on either side of zero, the observed sample being one.
    """
    first, second = (
        resampled_metrics(y_true, p, patients, classes, malignant, resamples, seed) for p in (prob, prob_baseline)
    )
    draws = {name: first[name][1] - second[name][1] for name in first}
    bounds = _bounds(draws, level)
    return {
        name: Difference(first[name][0] - second[name][0], *bounds[name], p_value=two_sided(draws[name]))
        for name in first
    }


def two_sided(draws: np.ndarray) -> float:
    """Twice the smaller fraction of draws on either side of zero, the observed sample being one."""
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(draws))))


def _bounds(draws: dict[str, np.ndarray], level: float) -> dict[str, tuple[float, float]]:
    tail = (1 - level) / 2
    return {name: (float(np.quantile(v, tail)), float(np.quantile(v, 1 - tail))) for name, v in draws.items()}


def resample_weights(
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
    labels: np.ndarray, prob: np.ndarray, weights: np.ndarray, malignant: int | None
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
    values = [m.mean(1) for m in (auroc, f1, precision, recall)]
    values += [precision[:, malignant], recall[:, malignant]] if malignant is not None else []
    return dict(zip(METRICS, values, strict=False))


def _weighted_auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights (R, n): weighted Mann-Whitney statistic, ties half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # first place of each distinct score
    weights = weights[:, order].astype(np.float64)
    pos = np.add.reduceat(weights * positive[order], starts, axis=1)  # (R, distinct scores)
    neg = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg / 2
    return (pos * below).sum(1) / (pos.sum(1) * neg.sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# Several findings for each image
# ---------------------------------------------------------------------------------------------------------------------


def findings_bootstrap(
    known: np.ndarray,
    prob: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """AUROC and average precision of each finding, and their means over findings under "macro", over resampled groups.

    Args:
        known: (n, k) 0 or 1; -1 where nothing is known, which leaves the image out of that finding alone.
        prob: (n, k) probability of each finding.
        groups: (n,) what is drawn as a whole, the patient.

    A finding without both outcomes is left out. A resample in which a finding lacks one has no value of it, and its
    mean is over the others.
    """
    if known.shape != prob.shape or known.shape != (len(groups), len(names)):
        shapes = f"findings {known.shape}, probabilities {prob.shape}"
        raise ValueError(f"{shapes} for {len(groups)} images and {len(names)} names")
    distinct, place = np.unique(np.asarray(groups), return_inverse=True)
    even = np.full(len(distinct), 1 / len(distinct))
    counts = np.random.default_rng(seed).multinomial(len(distinct), even, size=resamples)[:, place]  # (R, n)
    one = np.ones((1, len(groups)))
    scores = {"auroc": _weighted_auroc, "average_precision": _weighted_average_precision}
    value: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, np.ndarray]] = {}
    for i, name in enumerate(names):
        index = known[:, i] >= 0
        positive = known[index, i] == 1
        if not positive.any() or positive.all():
            continue
        weights = counts[:, index]
        undefined = ((weights @ positive) == 0) | ((weights @ ~positive) == 0)
        weights[undefined] = 1  # any weights with both outcomes; overwritten below
        value[name] = {key: float(score(positive, prob[index, i], one[:, index])[0]) for key, score in scores.items()}
        draws[name] = {
            key: np.where(undefined, np.nan, score(positive, prob[index, i], weights)) for key, score in scores.items()
        }
    if not value:
        raise ValueError("no finding has both outcomes")
    value["macro"] = {key: float(np.mean([v[key] for v in value.values()])) for key in scores}
    draws["macro"] = {key: np.nanmean([d[key] for d in draws.values()], axis=0) for key in scores}
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: {key: Interval(value[name][key], *map(float, np.nanquantile(draws[name][key], tails))) for key in scores}
        for name in value
    }


# ---------------------------------------------------------------------------------------------------------------------
# Classification on a labelled set, zero-shot or by a linear layer
# ---------------------------------------------------------------------------------------------------------------------


def target_ranks(logits: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the right one: (B, C), (B,) -> (B,), 0 for a correct top-1.

    Equal scores stand in class order, as argmax takes them; a NaN counts against the model.
    """
    own = logits.gather(1, target[:, None])  # (B, 1)
    earlier = torch.arange(logits.shape[1]) < target[:, None]  # (B, C)
    before = ~(logits <= own) | ((logits == own) & earlier)
    return before.sum(dim=1)


def binary_margins(logits: Tensor) -> Tensor:
    """Score of class 1 minus score of class 0, what ROC-AUC ranks by: (B, C) -> (B,); 0 for a single class."""
    return logits[:, min(1, logits.shape[1] - 1)] - logits[:, 0]


def classification_scores(
    targets: Tensor, ranks: Tensor, margins: Tensor, n_classes: int, metric: str = "top1"
) -> Scores:
    """All metrics of a labelled set, as fractions, from one row a sample.

    Args:
        targets: (N,) labels.
        ranks: (N,) how many classes came before the right one, as `target_ranks` counts them.
        margins: (N,) score of class 1 minus score of class 0; only ROC-AUC reads it.
        metric: one of SET_METRICS, the one that the set reports.

    Returns:
        top1, mean_per_class (over the classes that have samples), top5 where there are more than five classes, and
        mean_top1_top5 or roc_auc (class 1 against class 0) where `metric` asks for it; "score" repeats the value that
        `metric` names; "samples" and "classes" are counts.

    Raises:
        ValueError: unknown metric, no samples, or ROC-AUC of other than two classes with samples of both.
    """
    if metric not in SET_METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose from {', '.join(SET_METRICS)}")
    if len(targets) == 0:
        raise ValueError("the dataset has no samples")
    correct = ranks == 0
    seen = targets.bincount(minlength=n_classes)  # (C,)
    hits = targets[correct].bincount(minlength=n_classes).double()
    scores: Scores = {
        "top1": correct.double().mean().item(),
        "mean_per_class": (hits / seen)[seen > 0].mean().item(),
    }
    if n_classes > 5:
        scores["top5"] = (ranks < 5).double().mean().item()
    if metric == "mean_top1_top5":
        scores["mean_top1_top5"] = (scores["top1"] + scores.get("top5", 1.0)) / 2
    if metric == "roc_auc":
        if n_classes != 2 or len(targets.unique()) != 2:
            raise ValueError("ROC-AUC needs two classes, and samples of both")
        scores["roc_auc"] = float(roc_auc_score(targets.numpy(), margins.numpy()))
    counts = {"samples": len(targets), "classes": n_classes}
    return {"metric": metric, "score": scores[metric], **scores, **counts}


def score_outputs(labels: np.ndarray, outputs: np.ndarray, metric: str = "top1") -> Scores:
    """`classification_scores` of labels (n,) and logits or probabilities (n, k)."""
    targets, values = torch.as_tensor(labels), torch.as_tensor(outputs)
    ranks, margins = target_ranks(values, targets), binary_margins(values)
    return classification_scores(targets, ranks, margins, values.shape[1], metric)


def percent(scores: Scores) -> Scores:
    """Scores with their fractions in percent and everything else (ranks, counts, names) as it is.

    The edge of the library: zeroshot.json, the rows of main.py's log and the results on other sets than CBIS-DDSM have
    always been in percent.
    """
    return {k: 100.0 * v if k in _FRACTIONS and isinstance(v, float) else v for k, v in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------------


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, captions: Sequence[str], chunk: int = 1024
) -> Scores:
    """Recall at 1, 5 and 10 and the median rank of the first hit, image-to-text and text-to-image, over all candidates.

    Pairs with equal captions are hits for one another: the same sentence written twice costs nothing. The rank of a
    query is 1 + the number of wrong candidates that score at least as high as its best hit, so a tie with a wrong one
    counts against the model, and one embedding for everything scores 0. At most chunk x N similarities are held at
    once.

    Args:
        image_features, text_features: (N, d), row i of both being one pair; they need not be normalised.
        captions: the N texts.

    Returns:
        fractions i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10; i2t_median_rank and t2i_median_rank (1 is best);
        candidates = N.

    Raises:
        ValueError: no pairs, or numbers of images, texts and captions that differ.
    """
    n = len(captions)
    if n == 0 or len(image_features) != n or len(text_features) != n:
        raise ValueError(
            f"retrieval needs one image and one text for each caption, and at least one pair: "
            f"got {len(image_features)}, {len(text_features)} and {n}"
        )
    first_seen: dict[str, int] = {}
    group = torch.tensor([first_seen.setdefault(c, len(first_seen)) for c in captions])  # (N,)
    group = group.to(image_features.device)
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)

    result: Scores = {}
    for way, queries, candidates in (("i2t", images, texts), ("t2i", texts, images)):
        chunks = zip(queries.split(chunk), group.split(chunk), strict=True)
        ranks = torch.cat([_first_hit_ranks(q, candidates, g, group) for q, g in chunks]).double()  # (N,)
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = (ranks <= k).double().mean().item()
        result[f"{way}_median_rank"] = ranks.quantile(0.5).item()
    result["candidates"] = n
    return result


def _first_hit_ranks(queries: Tensor, candidates: Tensor, query_group: Tensor, group: Tensor) -> Tensor:
    """Rank from 1 of the best hit of each query: (Q, d), (N, d), (Q,), (N,) -> (Q,)."""
    scores = queries @ candidates.T  # (Q, N)
    row, column = (query_group[:, None] == group).nonzero(as_tuple=True)  # the hits
    best = scores.new_full((len(scores),), -torch.inf)  # (Q,)
    best = best.scatter_reduce(0, row, scores[row, column], "amax")
    scores[row, column] = -torch.inf
    # What is not lower, rather than what is as high: a NaN anywhere then counts against the model.
    ahead = len(candidates) - (scores < best[:, None]).sum(dim=1)
    return (1 + ahead).clamp(max=len(candidates))
