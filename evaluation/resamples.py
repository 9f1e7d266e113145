"""Intervals, differences and p-values by a bootstrap over patients, all from the same draws.

Patients are drawn with replacement, not lesions: the lesions and views of one patient resemble each other, so an
interval over lesions would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.metrics import (
    MALIGNANT,
    Difference,
    Interval,
    Labels,
    OperatingPoint,
    checked,
    classification_metrics,
)
from evaluation.weighted import weighted_auroc, weighted_average_precision, weighted_detection, weighted_metrics
from runtime.logs import progress

RESAMPLES = 2000  # of the patients, where nobody asks for another number
BLOCK = 4_000_000  # weights that are held at a time


def blocks(resamples: int, columns: int) -> list[slice]:
    """The resamples in parts of at most BLOCK numbers, `columns` for each resample.

    NumPy draws one after the other, so that blocks give the numbers of one call.
    """
    rows = max(1, BLOCK // max(columns, 1))
    return [slice(start, min(start + rows, resamples)) for start in range(0, resamples, rows)]


@dataclass(frozen=True)
class Drawn:
    """A metric of one set of probabilities, and what it is on each of R resamples."""

    value: float
    draws: np.ndarray  # (R,)

    def interval(self, level: float = 0.95) -> Interval:
        """The value with the percentiles of its draws."""
        return Interval(self.value, *percentiles(self.draws, level))


class Resamples:
    """One test table's patients, resampled: whatever is asked of it is answered from the same draws.

    Rows of a table, units of patients or findings have draws of their own; two objects with equal arguments draw alike.
    A resample in which a class has no sample is drawn again, since no metric is defined on it: intervals are
    conditional on every class being present.

    Args:
        labels: (n,) indices into `classes`.
        patients: (n,) who each sample belongs to.
        positive: the class that has columns of its own, None where there is none.
        number: of resamples, R.

    Raises:
        ValueError: labels out of range, a class without samples, or so few patients that most resamples lack a class.
    """

    def __init__(
        self,
        labels: Labels,
        patients: Sequence[str] | np.ndarray,
        classes: Sequence[str],
        positive: str | None = MALIGNANT,
        number: int = RESAMPLES,
        seed: int = 0,
    ):
        self.labels, self.patients, self.classes = np.asarray(labels), np.asarray(patients), tuple(classes)
        if positive is not None and positive not in self.classes:
            raise ValueError(f"class {positive!r} is not among {', '.join(self.classes)}")
        self.positive, self.number, self.seed = positive, number, seed
        if len(self.patients) != len(self.labels):
            raise ValueError(f"{len(self.patients)} patient names for {len(self.labels)} samples")

    # -----------------------------------------------------------------------------------------------------------------
    # The draws
    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The patients' names (P,), and the number of each sample's (n,)."""
        return np.unique(self.patients, return_inverse=True)

    @cached_property
    def _counts(self) -> np.ndarray:
        """(R, P): how often each patient is drawn when P of them are."""
        names, patient = self._groups
        classes_of = np.zeros((len(names), len(self.classes)))  # (P, k) samples of each class by patient
        np.add.at(classes_of, (patient, self.labels), 1)
        rng = np.random.default_rng(self.seed)
        even = np.full(len(names), 1 / len(names))
        counts = np.empty((self.number, len(names)), np.uint16)
        lacking = np.empty(self.number, bool)
        for part in blocks(self.number, len(names)):
            drawn = rng.multinomial(len(names), even, size=part.stop - part.start)
            counts[part], lacking[part] = drawn, ((drawn @ classes_of) == 0).any(1)
        if lacking.mean() > 0.5:
            raise ValueError(
                f"{len(names)} patients, groups or images that count by themselves are too few for a bootstrap: most "
                f"resamples lack a class (how many have one of each class: {(classes_of > 0).sum(0).tolist()})"
            )
        while len(again := np.flatnonzero(lacking)):
            for part in blocks(len(again), len(names)):
                drawn = rng.multinomial(len(names), even, size=part.stop - part.start)
                counts[again[part]], lacking[again[part]] = drawn, ((drawn @ classes_of) == 0).any(1)
        return counts

    @property
    def _columns(self) -> int:
        """The numbers that a resample takes: a weight for each sample, or a confusion matrix."""
        return max(len(self.labels), len(self.classes) ** 2)

    def weights(self) -> Iterator[np.ndarray]:
        """(r, n) of some of the resamples at a time: how often each sample counts."""
        _, patient = self._groups
        for part in blocks(self.number, self._columns):
            yield self._counts[part][:, patient].astype(np.int64)

    def _over(self, score: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Metrics (R,) from a function of weights (r, n), block by block."""
        total = len(blocks(self.number, self._columns))
        parts = [score(weights) for weights in progress(self.weights(), "resampling", total)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def rarest(self) -> int:
        """Patients with a sample of the class that the fewest have."""
        return min(len(set(self.patients[self.labels == c])) for c in range(len(self.classes)))

    # -----------------------------------------------------------------------------------------------------------------
    # What it answers, of probabilities (n, k) for these samples
    # -----------------------------------------------------------------------------------------------------------------

    def draw(self, prob: np.ndarray) -> dict[str, Drawn]:
        """The columns of the published tables, those of the positive class where there is one."""
        labels, prob = checked(self.labels, prob, self.classes)
        values = classification_metrics(labels, prob, self.classes, self.positive)
        target = None if self.positive is None else self.classes.index(self.positive)
        draws = self._over(lambda weights: weighted_metrics(labels, prob, weights, target))
        return {name: Drawn(value, draws[name]) for name, value in values.items()}

    def intervals(self, prob: np.ndarray, level: float = 0.95) -> dict[str, Interval]:
        """The same with percentile intervals."""
        return {name: drawn.interval(level) for name, drawn in self.draw(prob).items()}

    def difference(self, prob: np.ndarray, baseline: np.ndarray, level: float = 0.95) -> dict[str, Difference]:
        """Probabilities minus a baseline's, for each column, on the same resamples.

        The pairing removes the part of the spread that both share: which patients were drawn.
        """
        first, second = self.draw(prob), self.draw(baseline)
        found = {}
        for name in first:
            draws = first[name].draws - second[name].draws
            value = first[name].value - second[name].value
            found[name] = Difference(value, *percentiles(draws, level), p_value=two_sided(draws))
        return found

    def draw_detection(self, prob: np.ndarray, point: OperatingPoint) -> dict[str, Drawn]:
        """metrics.DETECTION: the positive class against all others, at what validation fixed."""
        labels, prob = checked(self.labels, prob, self.classes)
        if self.positive is None:
            raise ValueError("no class is the positive one")
        target = self.classes.index(self.positive)
        value = weighted_detection(labels, prob, np.ones((1, len(labels))), target, point)
        draws = self._over(lambda weights: weighted_detection(labels, prob, weights, target, point))
        return {name: Drawn(float(value[name][0]), draws[name]) for name in draws}

    def detection(self, prob: np.ndarray, point: OperatingPoint, level: float = 0.95) -> dict[str, Interval]:
        """The same with percentile intervals.

        Balanced accuracy is the mean recall of all classes, the published tables' column "Recall" under its other name.
        The Brier score and the calibration (Cox's logistic recalibration; Van Calster et al. 2019: the slope, and the
        intercept at slope 1) are those of the positive class at the point's temperature; NaN where it has one
        probability for all.
        """
        return {name: drawn.interval(level) for name, drawn in self.draw_detection(prob, point).items()}


@dataclass(frozen=True)
class Bootstrap:
    """How a command resamples, whatever the samples are."""

    number: int = RESAMPLES
    seed: int = 0

    def of(
        self,
        labels: Labels,
        patients: Sequence[str] | np.ndarray,
        classes: Sequence[str],
        positive: str | None = MALIGNANT,
    ) -> Resamples:
        """The draws for some samples; arguments as those of Resamples."""
        return Resamples(labels, patients, classes, positive, self.number, self.seed)


BOOTSTRAP = Bootstrap()


def percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The bounds of a percentile interval over draws (R,)."""
    tail = (1 - level) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def two_sided(draws: np.ndarray) -> float:
    """Twice the smaller fraction of draws on either side of zero, the observed sample being one."""
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(draws))))


def finding_intervals(
    known: np.ndarray,
    prob: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    bootstrap: Bootstrap = BOOTSTRAP,
    level: float = 0.95,
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
    rng = np.random.default_rng(bootstrap.seed)
    one = np.ones((1, len(groups)))
    scores = {"auroc": weighted_auroc, "average_precision": weighted_average_precision}
    value: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, np.ndarray]] = {}
    index: dict[int, np.ndarray] = {}  # of each finding that has both outcomes: the images where it is known
    positive: dict[int, np.ndarray] = {}  # and which of them have it
    for i, name in enumerate(names):
        seen = known[:, i] >= 0
        outcome = known[seen, i] == 1
        if outcome.any() and not outcome.all():
            index[i], positive[i] = seen, outcome
            value[name] = {key: float(score(outcome, prob[seen, i], one[:, seen])[0]) for key, score in scores.items()}
            draws[name] = {key: np.empty(bootstrap.number) for key in scores}
    for part in progress(blocks(bootstrap.number, len(groups)), "resampling"):
        counts = rng.multinomial(len(distinct), even, size=part.stop - part.start)[:, place]  # (r, n)
        for i in index:
            weights = counts[:, index[i]]
            undefined = ((weights @ positive[i]) == 0) | ((weights @ ~positive[i]) == 0)
            weights[undefined] = 1  # any weights with both outcomes; overwritten below
            for key, score in scores.items():
                found = score(positive[i], prob[index[i], i], weights)
                draws[names[i]][key][part] = np.where(undefined, np.nan, found)
    if not value:
        raise ValueError("no finding has both outcomes")
    value["macro"] = {key: float(np.mean([v[key] for v in value.values()])) for key in scores}
    draws["macro"] = {key: np.nanmean([d[key] for d in draws.values()], axis=0) for key in scores}
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: {key: Interval(value[name][key], *map(float, np.nanquantile(draws[name][key], tails))) for key in scores}
        for name in value
    }
