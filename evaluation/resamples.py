"""Intervals, differences and p-values by a bootstrap over patients, all from the same draws.

Patients are drawn with replacement, not lesions: the lesions and views of one patient resemble each other, so an
interval over lesions would be too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from evaluation.metrics import (
    MALIGNANT,
    PROPORTIONS,
    Difference,
    Interval,
    Labels,
    OperatingPoint,
    checked,
    ordered_metrics,
)
from evaluation.weighted import (
    OfWeights,
    Ranking,
    classification_metrics,
    over_classes,
    weighted_classes,
    weighted_confusion,
    weighted_detection,
    weighted_metrics,
)
from runtime.logs import progress

RESAMPLES = 2000  # of the patients, where nobody asks for another number
BLOCK = 1_000_000  # weights that are held at a time: a byte each, and what is computed of them 4 or 8
KEPT = 2**25  # bytes of draws that are kept for the next question; more are drawn again, from the same seed


def even_draws(rng: np.random.Generator, units: int, resamples: int) -> np.ndarray:
    """(resamples, units) uint8: how often each unit comes up when as many are drawn as there are.

    More than 255 times one does in one of 10^500 resamples.
    """
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.uint8)


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
    draws: np.ndarray  # (R,); empty where none can be drawn
    of: float = 0.0  # a proportion's effective number of samples (`effective_number`); 0 for what is none
    why: str = ""  # no interval can be given

    def interval(self, level: float = 0.95) -> Interval:
        """The value with the percentiles of its draws; see `interval_of`."""
        if self.why:
            return Interval(self.value, None, None, why=self.why)
        return interval_of(self.value, percentiles(self.draws, level), self.of, level)


MEANS = ("auroc", "f1", "precision", "recall", "balanced_accuracy")  # over classes
ALIKE = "the resamples do not vary"


def interval_of(value: float, bounds: tuple[float, float], of: float, level: float) -> Interval:
    """The bounds; where resamples do not vary, which is no certainty, those of a proportion by its number, or none."""
    if bounds[1] - bounds[0] > 1e-12 or np.isnan(bounds).any():
        return Interval(value, *bounds)
    if of:
        return Interval(value, *clopper_pearson(value, of, level))
    return Interval(value, None, None, why=ALIKE)


def clopper_pearson(value: float, of: float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion of `of` samples (Clopper and Pearson 1934), which may be no whole number."""
    tail, hits = (1 - level) / 2, value * of
    from scipy.stats import beta

    low = beta.ppf(tail, hits, of - hits + 1) if hits > 0 else 0.0
    return float(low), float(beta.ppf(1 - tail, hits + 1, of - hits) if hits < of else 1.0)


def effective_number(groups: np.ndarray) -> float:
    """How many independent samples those of some groups (n,) are worth at least: n over the design effect (Kish 1965).

    A group's samples count as wholly alike: where all are right or all are wrong, nothing tells how alike they are.
    """
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum() ** 2 / np.square(sizes).sum()) if len(sizes) else 0.0


class Resamples:
    """One test table's patients, resampled: whatever is asked of it is answered from the same draws.

    Rows of a table, units of patients or findings have draws of their own; two objects with equal arguments draw alike.
    A resample in which a class has no sample is drawn again, since no metric is defined on it: intervals are
    conditional on every class being present. A metric that hangs on a single patient of a class has no interval, and
    none has one where most resamples lack a class.

    Args:
        labels: (n,) indices into `classes`.
        patients: (n,) who each sample belongs to.
        positive: the class that has columns of its own, None where there is none.
        number: of resamples, R.
        unlearnt: classes without training samples, which means over classes leave out.

    Raises:
        ValueError: labels out of range, or a class without samples.
    """

    def __init__(
        self,
        labels: Labels,
        patients: Sequence[str] | np.ndarray,
        classes: Sequence[str],
        positive: str | None = MALIGNANT,
        number: int = RESAMPLES,
        seed: int = 0,
        unlearnt: Sequence[str] = (),
    ):
        self.labels, self.patients, self.classes = np.asarray(labels), np.asarray(patients), tuple(classes)
        if positive is not None and positive not in self.classes:
            raise ValueError(f"class {positive!r} is not among {', '.join(self.classes)}")
        self.positive, self.number, self.seed, self.unlearnt = positive, number, seed, tuple(unlearnt)
        self.over = [c for c, name in enumerate(self.classes) if name not in self.unlearnt]
        if len(self.patients) != len(self.labels):
            raise ValueError(f"{len(self.patients)} patient names for {len(self.labels)} samples")
        self._kept: np.ndarray | None = None  # (R, P) draws
        self._refusal: str | None = None  # why there are none; None before the first

    # -----------------------------------------------------------------------------------------------------------------
    # The draws
    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The patients' names (P,), and the number of each sample's (n,)."""
        return np.unique(self.patients, return_inverse=True)

    def _draws(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places (r,), counts (r, P)): which of the resamples, and how often each patient is drawn in them.

        Resamples without a sample of some class are drawn again after all others. Nothing more comes once it shows
        that most are such, which `_refusal` then says.
        """
        if self._kept is not None:
            for part in blocks(self.number, self._columns):
                yield np.arange(self.number)[part], self._kept[part]
        if self._kept is not None or self._refusal:
            return
        names, patient = self._groups
        kept = np.empty((self.number, len(names)), np.uint8) if self.number * len(names) <= KEPT else None
        rng, left, lacking = np.random.default_rng(self.seed), np.arange(self.number), []
        while len(left):
            lacking = []
            for part in blocks(len(left), self._columns):
                counts = even_draws(rng, len(names), part.stop - part.start)
                whole = ((counts @ self._classes_of) > 0).all(1)
                places, counts = left[part][whole], counts if whole.all() else counts[whole]
                lacking.append(left[part][~whole])
                if kept is not None:
                    kept[places] = counts
                if len(places):
                    yield places, counts
            again = np.concatenate(lacking)
            if self._refusal is None:
                self._refusal = self._too_few(len(again) / self.number)
                if self._refusal:
                    return
            left = again
        self._kept = kept

    @cached_property
    def _classes_of(self) -> csr_array:
        """(P, classes that count): each patient's samples of a class."""
        names, patient = self._groups
        column = np.full(len(self.classes), -1)
        column[self.over] = np.arange(len(self.over))
        of = column[self.labels]
        cells = np.ones((of >= 0).sum()), (patient[of >= 0], of[of >= 0])
        return csr_array(cells, shape=(len(names), len(self.over)))

    def _too_few(self, lacking: float) -> str:
        """Why there are no resamples where this share of them lacks a class; "" where it is not most."""
        if lacking <= 0.5:
            return ""
        patients = np.bincount(self._classes_of.tocoo().coords[1], minlength=len(self.over))  # one cell for each
        rarest = int(patients.argmin())
        return (
            f"{len(self._groups[0])} patients, groups or images that count by themselves are too few for a bootstrap, "
            f"most resamples lack a class: {patients[rarest]} with a sample of {self.classes[self.over[rarest]]}"
        )

    @property
    def _columns(self) -> int:
        """The numbers that a resample takes: a weight for each sample, or a confusion matrix."""
        return max(len(self.labels), len(self.classes) ** 2)

    def weights(self) -> Iterator[np.ndarray]:
        """(r, n) of some of the resamples at a time: how often each sample counts; none where there are `too_few`."""
        if not self.too_few:
            for _, counts in self._draws():
                yield counts.take(self._groups[1], axis=1)

    def _over(self, score: OfWeights) -> dict[str, np.ndarray]:
        """Metrics (R,) from a function of weights (r, n), block by block; {} where there are `too_few` to draw."""
        found: dict[str, np.ndarray] = {}
        total = len(blocks(self.number, self._columns))
        for places, counts in progress(self._draws(), "resampling", total):
            for name, values in score(counts.take(self._groups[1], axis=1)).items():
                found.setdefault(name, np.empty((self.number, *values.shape[1:])))[places] = values
        return {} if self._refusal else found

    @property
    def rarest(self) -> int:
        """Patients with a sample of the class that the fewest have."""
        return min(self._patients(self.labels == c) for c in self.over)

    def _patients(self, own: np.ndarray) -> int:
        """The patients of some samples (n,)."""
        return len(np.unique(self._groups[1][own]))

    # -----------------------------------------------------------------------------------------------------------------
    # Where there are no draws, or they say nothing
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def too_few(self) -> str:
        """Why there are no resamples; "" where there are."""
        if self._refusal is None:
            for _ in self._draws():
                pass
        return self._refusal or ""

    def _why(self, name: str) -> str:
        """Why a metric has no interval: another patient of a class with one could change it to anything."""
        if self.positive is None or name in MEANS:
            sides = [(f"one patient of class {self.classes[c]}", self.labels == c) for c in self.over]
        else:
            target = self.labels == self.classes.index(self.positive)
            sides = [("one positive patient", target), ("one negative patient", ~target)]
            sides = {"specificity": sides[1:], "sensitivity": sides[:1], "recall_malignant": sides[:1]}.get(name, sides)
        return next((words for words, own in sides if self._patients(own) == 1), self.too_few)

    def _of(self, name: str, prob: np.ndarray) -> float:
        """The effective number of samples that a proportion is of; 0 where the metric is none, or there are none."""
        if name not in PROPORTIONS or self.positive is None:
            return 0.0
        target = self.classes.index(self.positive)
        own = {
            "precision_malignant": prob.argmax(1) == target,
            "specificity": self.labels != target,
        }.get(name, self.labels == target)
        return effective_number(self.patients[own])

    def _drawn(self, values: dict[str, float], prob: np.ndarray, score: OfWeights) -> dict[str, Drawn]:
        """Values with what `score` makes of the resamples' weights (r, n)."""
        draws = self._over(score)
        return {
            name: Drawn(value, draws.get(name, np.empty(0)), self._of(name, prob), self._why(name))
            for name, value in values.items()
        }

    # -----------------------------------------------------------------------------------------------------------------
    # What it answers, of probabilities (n, k) for these samples
    # -----------------------------------------------------------------------------------------------------------------

    def draw(self, prob: np.ndarray) -> dict[str, Drawn]:
        """The columns of the published tables, those of the positive class where there is one."""
        labels, prob = checked(self.labels, prob, self.classes, self.unlearnt)
        values = classification_metrics(labels, prob, self.classes, self.positive, self.unlearnt)
        target = None if self.positive is None else self.classes.index(self.positive)
        return self._drawn(values, prob, weighted_metrics(labels, prob, target, self.over))

    def draw_with_classes(self, prob: np.ndarray) -> tuple[dict[str, Drawn], dict[str, dict[str, Drawn]]]:
        """The same, and of each class that was learnt its AUROC against the rest and its sensitivity."""
        labels, prob = checked(self.labels, prob, self.classes, self.unlearnt)
        values = classification_metrics(labels, prob, self.classes, self.positive, self.unlearnt)
        target = None if self.positive is None else self.classes.index(self.positive)
        shown = {"auroc": "auroc", "sensitivity": "recall"}
        of_each = weighted_classes(labels, prob, self.over)

        def score(weights: np.ndarray) -> dict[str, np.ndarray]:
            each = of_each(weights)
            return over_classes(each, target, self.over) | {f"each {name}": each[key] for name, key in shown.items()}

        draws = self._over(score)
        found = {
            name: Drawn(value, draws.get(name, np.empty(0)), self._of(name, prob), self._why(name))
            for name, value in values.items()
        }
        whole = of_each(np.ones((1, len(labels)), dtype=np.int64))
        classes: dict[str, dict[str, Drawn]] = {}
        for place, c in enumerate(self.over):
            own = self.labels == c
            for name, key in shown.items():
                drawn = draws[f"each {name}"][:, place] if draws else np.empty(0)
                of = effective_number(self.patients[own]) if name == "sensitivity" else 0.0
                sides = (own,) if name == "sensitivity" else (own, ~own)
                lone = next((words for words, side in zip(("it", "the others"), sides, strict=False)
                             if self._patients(side) == 1), "")  # fmt: skip
                why = f"one patient of {lone}" if lone else self.too_few
                value = float(whole[key][0, place])
                classes.setdefault(self.classes[c], {})[name] = Drawn(value, drawn, of, why)
        return found, classes

    def ordered(self, prob: np.ndarray, level: float = 0.95) -> dict[str, Interval]:
        """metrics.ORDERED_METRICS with percentile intervals, of classes that stand in an order."""
        labels, prob = checked(self.labels, prob, self.classes, self.unlearnt)
        confusion_of = weighted_confusion(labels, prob)

        def score(weights: np.ndarray) -> dict[str, np.ndarray]:
            return ordered_metrics(confusion_of(weights))

        values = {name: float(value[0]) for name, value in score(np.ones((1, len(labels)), dtype=np.int64)).items()}
        lone = "a class has a single patient" if self.rarest < 2 else self.too_few
        draws = self._over(score)
        of = {"adjacent_accuracy": effective_number(self.patients)}
        return {
            name: Drawn(value, draws.get(name, np.empty(0)), of.get(name, 0.0), lone).interval(level)
            for name, value in values.items()
        }

    def intervals(self, prob: np.ndarray, level: float = 0.95) -> dict[str, Interval]:
        """The same with percentile intervals."""
        return {name: drawn.interval(level) for name, drawn in self.draw(prob).items()}

    def difference(self, prob: np.ndarray, baseline: np.ndarray, level: float = 0.95) -> dict[str, Difference]:
        """Probabilities minus a baseline's, for each column, on the same resamples.

        The pairing removes the part of the spread that both share: which patients were drawn.
        """
        first, second = self.draw(prob), self.draw(baseline)
        same, found = np.array_equal(prob, baseline), {}
        for name in first:
            value, why = first[name].value - second[name].value, first[name].why
            if why:
                found[name] = Difference(value, None, None, None, why=why)
                continue
            draws = first[name].draws - second[name].draws
            low, high = percentiles(draws, level)
            if np.ptp(draws) > 1e-12 or same:  # of equal probabilities it is certain
                found[name] = Difference(value, low, high, two_sided(draws))
            else:
                found[name] = Difference(value, None, None, None, why=ALIKE)
        return found

    def draw_detection(self, prob: np.ndarray, point: OperatingPoint) -> dict[str, Drawn]:
        """metrics.DETECTION: the positive class against all others, at what validation fixed."""
        labels, prob = checked(self.labels, prob, self.classes, self.unlearnt)
        if self.positive is None:
            raise ValueError("no class is the positive one")
        target = self.classes.index(self.positive)
        score = weighted_detection(labels, prob, target, point, self.over)
        values = {name: float(value[0]) for name, value in score(np.ones((1, len(labels)))).items()}
        return self._drawn(values, prob, score)

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
        unlearnt: Sequence[str] = (),
    ) -> Resamples:
        """The draws for some samples; arguments as those of Resamples."""
        return Resamples(labels, patients, classes, positive, self.number, self.seed, unlearnt)


BOOTSTRAP = Bootstrap()


def percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The bounds of a percentile interval over draws (R,)."""
    tail = (1 - level) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def two_sided(draws: np.ndarray) -> float:
    """Twice the smaller fraction of draws on either side of zero, the observed sample being one."""
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(draws))))


@dataclass(frozen=True)
class Findings:
    """What is said of a set with several findings."""

    each: dict[str, dict[str, Interval]]  # by finding: AUROC and average precision; no value where it is left out
    macro: dict[str, Interval]  # their means over `averaged`
    averaged: list[str]

    @property
    def left_out(self) -> dict[str, str]:
        """The findings that no mean has, and why."""
        return {name: found["auroc"].why for name, found in self.each.items() if name not in self.averaged}


def finding_intervals(
    known: np.ndarray,
    scores: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    bootstrap: Bootstrap = BOOTSTRAP,
    level: float = 0.95,
    unfitted: dict[str, str] | None = None,
) -> Findings:
    """AUROC and average precision of each finding, and their means over findings, over resampled groups.

    Args:
        known: (n, k) 0 or 1; -1 where nothing is known, which leaves the image out of that finding alone.
        scores: (n, k) what each finding's images are ranked by.
        groups: (n,) what is drawn as a whole, the patient.
        unfitted: findings without a score, and why.

    A finding that is unfitted or has one outcome has no value, and the means are over the others. One that a single
    group has, or lacks, has no interval, and the means have none. A resample in which a finding lacks an outcome has no
    value of it, and its mean is over the others.

    Raises:
        ValueError: shapes that do not fit, a score that is no number, or no finding with a value; which, and why.
    """
    if known.shape != scores.shape or known.shape != (len(groups), len(names)):
        shapes = f"findings {known.shape}, scores {scores.shape}"
        raise ValueError(f"{shapes} for {len(groups)} images and {len(names)} names")
    distinct, place = np.unique(np.asarray(groups), return_inverse=True)
    missing, lone = dict(unfitted or {}), {}
    for i, name in enumerate(names):
        if name in missing:
            continue
        if np.isnan(scores[:, i]).any():
            raise ValueError(f"{name}: the score of image {int(np.isnan(scores[:, i]).argmax())} is no number")
        patients = [len(set(place[known[:, i] == outcome])) for outcome in (0, 1)]
        if 0 in patients:
            missing[name] = "no test image " + ("with it" if patients[0] else "without it")
        elif 1 in patients:
            lone[name] = f"one {'negative' if patients[0] == 1 else 'positive'} patient"
    index = [i for i, name in enumerate(names) if name not in missing]
    if not index:
        raise ValueError(f"no finding has a figure: {'; '.join(f'{name}, {why}' for name, why in missing.items())}")
    values, draws = _draw_findings(known[:, index], scores[:, index], place, bootstrap)
    tails = ((1 - level) / 2, (1 + level) / 2)

    def over(value: float, drawn: np.ndarray, why: str) -> Interval:
        if why:
            return Interval(value, None, None, why=why)
        low, high = np.nanquantile(drawn, tails)
        return interval_of(value, (float(low), float(high)), 0, level)

    each = {name: dict.fromkeys(values, Interval(None, None, None, why=missing.get(name, ""))) for name in names}
    for place_of, i in enumerate(index):
        name = names[i]
        each[name] = {k: over(float(values[k][place_of]), draws[k][place_of], lone.get(name, "")) for k in values}
    why = "; ".join(f"{name} has {reason}" for name, reason in lone.items())
    macro = {key: over(float(values[key].mean()), _mean_of_known(draws[key]), why) for key in values}
    return Findings(each, macro, [names[i] for i in index])


def _mean_of_known(draws: np.ndarray) -> np.ndarray:
    """Means (R,) over findings (k, R), each of those that have a value; NaN where none has."""
    known = ~np.isnan(draws)
    return np.where(known.any(0), np.where(known, draws, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _draw_findings(
    known: np.ndarray, scores: np.ndarray, place: np.ndarray, bootstrap: Bootstrap
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values (k,) and draws (k, R) by metric, of findings (n, k) with both outcomes; `place` (n,) numbers groups."""
    n, k = known.shape
    seen = [np.flatnonzero(known[:, i] >= 0) for i in range(k)]
    rankings = [Ranking(known[rows, i] == 1, scores[rows, i]) for i, rows in enumerate(seen)]
    measures = {"auroc": Ranking.auroc, "average_precision": Ranking.average_precision}
    values = {
        key: np.array([of(ranking, np.ones((1, len(rows))))[0] for ranking, rows in zip(rankings, seen, strict=True)])
        for key, of in measures.items()
    }
    draws = {key: np.empty((k, bootstrap.number)) for key in measures}
    groups, rng = int(place.max()) + 1, np.random.default_rng(bootstrap.seed)
    for part in progress(blocks(bootstrap.number, n), "resampling"):
        counts = even_draws(rng, groups, part.stop - part.start)  # (r, groups)
        for i, ranking in enumerate(rankings):
            weights = counts.take(place[seen[i]], axis=1)
            for key, of in measures.items():
                draws[key][i, part] = of(ranking, weights)
    return values, draws
