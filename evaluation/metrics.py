"""Every score of the project, its interval and the paired comparison of models.

Three kinds: the probes' classification metrics with their bootstrap over patients, the metrics of labelled sets
(zero-shot and linear classification) and the recall of image-text retrieval.

All of them are fractions (0 to 1), in results.json and zeroshot.json too. What people read, and log.jsonl, is in
percent: through `percent`, once, where it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, log_softmax, logit, softmax
from torch import Tensor

Scores = dict[str, Any]  # numbers by name, and names (the metric, the split)
Labels = Sequence[int] | np.ndarray
MALIGNANT = "MALIGNANT"
# The columns of the published results tables: key -> heading, {} being the class that is looked for (`headings`).
METRICS = {
    "auroc": "AUROC",
    "f1": "F1-Score",
    "precision": "Precision",
    "recall": "Recall",
    "precision_malignant": "Precision ({})",
    "recall_malignant": "Recall ({})",
}
# What else is said of that class against all others, likewise. The thresholds and the temperature behind them are the
# validation samples' (`operating_point`).
DETECTION = {
    "auroc_malignant": "AUROC ({})",
    "average_precision_malignant": "Average precision ({})",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity ({}) at validation's threshold",
    "specificity": "Specificity reached there",
    "brier": "Brier score ({})",
    "calibration_slope": "Calibration slope ({})",
    "calibration_intercept": "Calibration intercept ({})",
}
# Those that are a fraction of samples, each right or wrong.
PROPORTIONS = ("precision_malignant", "recall_malignant", "sensitivity", "specificity")
SPECIFICITY = 0.9  # on validation, at the threshold of "sensitivity"
# What a labelled set of the catalog can report; CLIP's evaluation uses the first four, ordered classes have two more.
ORDERED_METRICS = {"quadratic_kappa": "Quadratic weighted kappa", "adjacent_accuracy": "Accuracy within one class"}
SET_METRICS = ("top1", "mean_per_class", "mean_top1_top5", "roc_auc", *ORDERED_METRICS)
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
# The values of `classification_scores` and `retrieval_metrics` that are fractions; the others are ranks and counts.
_FRACTIONS = {*SET_METRICS, *RECALLS, "top5", "score"} - {"quadratic_kappa"}


@dataclass(frozen=True)
class Interval:
    """A point value with the bounds of its interval, all fractions; `why` says what None stands for."""

    value: float | None
    low: float | None
    high: float | None
    why: str = field(default="", kw_only=True)  # there is no value, or no interval

    @classmethod
    def of(cls, value: dict[str, Any]) -> Self:
        """From what a results file holds of it, which may say more beside the value and its bounds."""
        return cls(**{name: value[name] for name in (f.name for f in fields(cls)) if name != "why" or name in value})

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: what is not defined is null, and `why` stands only where there is a reason."""
        found = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return found if self.why else {name: value for name, value in found.items() if name != "why"}

    def shown(self, whole: str, bound: str, unit: float) -> str:
        """For people: `unit` times the value and its bounds in these formats, or why there are none."""
        if self.value is None:
            return f"no figure: {self.why}" if self.why else "not defined"
        value = format(unit * self.value, whole)
        if self.low is None or self.high is None:
            return f"{value} (no interval: {self.why})" if self.why else "not defined"
        return f"{value} ({format(unit * self.low, bound)} to {format(unit * self.high, bound)})"

    def percent(self) -> str:
        """The value in percent with its bounds, for people."""
        return self.shown(".2f", ".1f", 100)


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its interval and two-sided bootstrap p-value, which is None where no interval is."""

    p_value: float | None

    def p_text(self) -> str:
        """The p-value for people."""
        return "no p-value" if self.p_value is None else f"p = {self.p_value:.4f}"


def headings(titles: dict[str, str], positive: str | None) -> dict[str, str]:
    """METRICS or DETECTION with the name of the class that is looked for; without its columns where there is none."""
    named = (
        titles.items() if positive is not None else [(key, title) for key, title in titles.items() if "{" not in title]
    )
    return {key: title.format(class_title(positive)) for key, title in named}


def class_title(name: str | None) -> str:
    """A class as headings have it: by its own name, CBIS-DDSM's as the published tables write it."""
    return "Malignant" if name == MALIGNANT else str(name)


# ---------------------------------------------------------------------------------------------------------------------
# What samples are ranked by
# ---------------------------------------------------------------------------------------------------------------------

_TINY = np.nextafter(0.0, 1.0)


def log_prob(prob: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities (n, k), those of 0 finite."""
    return np.log(np.maximum(np.asarray(prob, dtype=np.float64), _TINY))


def ranked(prob: np.ndarray) -> np.ndarray:
    """What each class's samples are ranked by, from softmax probabilities (n, k): in their order, without ties at 1.

    From a difference of 37 between logits on (17 in float32) the larger probability is 1.0 whatever they are. What it
    lacks to 1 is the sum of the others, which are told apart up to a difference of 745: above 1 - 1e-6 a sample stands
    by that sum.
    """
    score = np.array(prob, dtype=np.float64)
    rows, top = np.arange(len(score)), score.argmax(1)
    highest, others = score[rows, top], score.copy()
    others[rows, top] = 0
    score[rows, top] = np.where(highest > 1 - 1e-6, 1 - np.log(np.maximum(others.sum(1), _TINY)), highest)
    return score


# ---------------------------------------------------------------------------------------------------------------------
# Classification by a probe: what it is computed from (weighted.py)
# ---------------------------------------------------------------------------------------------------------------------


def checked(
    y_true: Labels, prob: np.ndarray, classes: Sequence[str], unlearnt: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and probabilities (n, k) as arrays.

    Raises ValueError for logits in place of probabilities, labels out of range, and a class that is not `unlearnt`
    without samples, for which neither recall nor AUROC exists.
    """
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
    empty = [name for c, name in enumerate(classes) if name not in unlearnt and not (labels == c).any()]
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
    # What `ranked` has of the positive class, its probability before the temperature up to 1 - 1e-6, from which on a
    # sample is called.
    threshold: float

    def called(self, prob: np.ndarray, positive: int) -> np.ndarray:
        """Which samples (n,) of probabilities (n, k) are called class `positive`."""
        return ranked(prob)[:, positive] >= self.threshold

    def calibrated(self, prob: np.ndarray) -> np.ndarray:
        """Probabilities (n, k) at the temperature (Guo et al. 2017, section 4.2)."""
        return softmax(_log(prob) / self.temperature, axis=1)


def _log(prob: np.ndarray) -> np.ndarray:
    return np.log(np.asarray(prob, dtype=np.float64).clip(min=1e-12))


def _between(low: float, high: float) -> float:
    """The middle of two numbers of `ranked` by log-odds, in which sure samples of either side lie as far from 1/2."""
    odds = [score - 1 if score > 1 else logit(max(score, _TINY)) for score in (low, high)]
    middle = sum(odds) / 2
    return 1 + middle if expit(middle) > 1 - 1e-6 else float(expit(middle))


def operating_point(
    y_true: Labels, prob: np.ndarray, positive: int, specificity: float = SPECIFICITY
) -> OperatingPoint:
    """Temperature and threshold from validation labels (n,) and probabilities (n, k).

    The temperature minimises cross-entropy. The threshold is the lowest probability of class `positive` at which at
    least `specificity` of the other samples stay below it. Where every sample of the class lies above all others, the
    lowest is a hair above one of these, and would call each new sample that lies as close: there the threshold is the
    middle, by log-odds, between that sample and the next higher, which calls these samples alike.
    """
    from scipy.optimize import minimize_scalar

    labels, prob = np.asarray(y_true), np.asarray(prob, dtype=np.float64)
    rows, logs = np.arange(len(labels)), _log(prob)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logs / np.exp(log_temperature), axis=1)[rows, labels].mean())

    found: Any = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    score = ranked(prob)[:, positive]
    others, own = np.sort(score[labels != positive]), score[labels == positive]
    if not len(others):
        raise ValueError("a threshold needs validation samples of another class than the positive one")
    allowed = int(np.floor((1 - specificity) * len(others) + 1e-9))  # of the others may be called
    last = others[len(others) - 1 - allowed]  # that stays below
    threshold = np.nextafter(last, np.inf)
    if len(own) and own.min() > others[-1]:
        higher = score[score > last].min()
        threshold = np.clip(_between(last, higher), threshold, higher)
    return OperatingPoint(float(np.exp(found.x)), float(threshold))


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
    targets: Tensor,
    ranks: Tensor,
    margins: Tensor,
    n_classes: int,
    metric: str = "top1",
    unlearnt: Sequence[int] = (),
    predicted: Tensor | None = None,
) -> Scores:
    """All metrics of a labelled set, as fractions, from one row a sample.

    Args:
        targets: (N,) labels.
        ranks: (N,) how many classes came before the right one, as `target_ranks` counts them.
        margins: (N,) score of class 1 minus score of class 0; only ROC-AUC reads it.
        metric: one of SET_METRICS, the one that the set reports.
        unlearnt: classes without training samples, which the mean over classes leaves out; elsewhere their samples
            count as they come, which is wrong.
        predicted: (N,) the class that came first; only the metrics of ordered classes read it.

    Returns:
        top1, mean_per_class (over the classes that have samples), top5 where there are more than five classes, and
        mean_top1_top5, roc_auc (class 1 against class 0) or one of ORDERED_METRICS where `metric` asks for it; "score"
        repeats the value that `metric` names; "samples" and "classes" are counts.

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
    counted = seen > 0
    counted[list(unlearnt)] = False
    scores: Scores = {
        "top1": correct.double().mean().item(),
        "mean_per_class": (hits / seen)[counted].mean().item(),
    }
    if n_classes > 5:
        scores["top5"] = (ranks < 5).double().mean().item()
    if metric == "mean_top1_top5":
        scores["mean_top1_top5"] = (scores["top1"] + scores.get("top5", 1.0)) / 2
    if metric == "roc_auc":
        if n_classes != 2 or len(targets.unique()) != 2:
            raise ValueError("ROC-AUC needs two classes, and samples of both")
        from sklearn.metrics import roc_auc_score

        scores["roc_auc"] = float(roc_auc_score(targets.numpy(), margins.numpy()))
    if metric in ORDERED_METRICS:
        if predicted is None:
            raise ValueError(f"{metric} needs the predicted classes")
        from sklearn.metrics import confusion_matrix

        confusion = confusion_matrix(targets.numpy(), predicted.numpy(), labels=range(n_classes))
        scores[metric] = float(ordered_metrics(confusion)[metric])
    counts = {"samples": len(targets), "classes": n_classes}
    return {"metric": metric, "score": scores[metric], **scores, **counts}


def score_outputs(
    labels: np.ndarray, outputs: np.ndarray, metric: str = "top1", unlearnt: Sequence[int] = ()
) -> Scores:
    """`classification_scores` of labels (n,) and logits or log-probabilities (n, k)."""
    targets, values = torch.as_tensor(labels), torch.as_tensor(outputs)
    ranks, margins = target_ranks(values, targets), binary_margins(values)
    return classification_scores(targets, ranks, margins, values.shape[1], metric, unlearnt, values.argmax(1))


def ordered_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """ORDERED_METRICS of confusion matrices (..., k, k), a row for each true class, the classes in their order.

    Kappa weighs an error by the square of the steps between the classes (Cohen 1968), from -1 to 1; 0 where truth and
    predictions are one class, which it is not defined for. Adjacent accuracy is the fraction at most one step off.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    place = np.arange(confusion.shape[-1])
    steps = np.abs(place[:, None] - place)  # (k, k)
    total = confusion.sum((-2, -1))
    observed = (confusion * steps**2).sum((-2, -1))
    chance = confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :]  # (..., k, k), times the total
    expected = (chance * steps**2).sum((-2, -1)) / np.maximum(total, 1)
    kappa = np.where(expected > 0, 1 - observed / np.where(expected > 0, expected, 1), 0.0)
    return {"quadratic_kappa": kappa, "adjacent_accuracy": (confusion * (steps <= 1)).sum((-2, -1)) / total}


def percent(scores: Scores) -> Scores:
    """Scores with their fractions in percent and everything else (kappa, ranks, counts, names) as it is.

    For people and for log.jsonl, where they have always been in percent.
    """
    kappa = scores.get("metric") == "quadratic_kappa"
    kept = {"score"} if kappa else set()
    return {k: 100.0 * v if k in _FRACTIONS - kept and isinstance(v, float) else v for k, v in scores.items()}


def fractions(scores: Scores, unit: str) -> Scores:
    """Scores of a results file as fractions: what earlier versions wrote was in percent, and said so ("unit")."""
    if unit != "percent":
        return scores
    return {k: v / 100.0 if k in _FRACTIONS and isinstance(v, float) else v for k, v in scores.items()}


def shown_score(scores: Scores) -> str:
    """The metric that a set reports and its value for people: percent, but for kappa."""
    value = percent(scores)["score"]
    return f"{scores['metric']} " + (f"{value:.3f}" if scores["metric"] == "quadratic_kappa" else f"{value:.2f}%")


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
