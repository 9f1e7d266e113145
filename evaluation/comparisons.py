"""Rows of a table that were trained several times: their intervals, their differences, and all of them together.

A trained row has two kinds of chance in it: which patients the test table holds, and how the training went (its
seed). One run's bootstrap over patients knows nothing of the second. Here a row is the mean over its seeds, with the
variance of the patient bootstrap plus the variance between seeds; a bootstrap over three seeds would cover too little.

A bootstrap over n patients is too narrow by about sqrt((n - 1) / n) and a normal quantile by what separates it from t's
(Hesterberg 2015, section 3.1), n being the patients of the rarest class. A run's own results.json has the plain
percentiles; the intervals here are widened by both, so that they cover what they say (benchmarks/coverage.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from evaluation.metrics import Difference, Interval
from evaluation.resamples import Drawn, Resamples, interval_of, two_sided

# Said beside every interval and p-value of a trained row with one seed.
ONE_SEED = "trained once; the interval covers other patients, not another training"
# Said where rows of few seeds have intervals of very different widths.
FEW_SEEDS = (
    "Of two or three seeds the spread between trainings is hardly known: t's quantile of one degree of freedom is "
    "12.7, of two 4.3, where that of many is 2.0, so seeds that happen to differ give an interval many times as wide "
    "as seeds that happen to agree"
)


def few_seeds_matter(rows: Sequence[tuple[int, float | None]]) -> bool:
    """Whether FEW_SEEDS is to be said of rows, each a number of seeds and the width of an interval.

    One of two or three seeds is more than twice as wide as the narrowest of the table, or wider than 40 points.
    """
    widths = [width for _, width in rows if width]
    return any(2 <= seeds <= 3 and width and width > min(2 * min(widths), 0.4) for seeds, width in rows)


def width(value: dict[str, Any]) -> float | None:
    """Of the interval that a results file holds of a metric; None where there is none."""
    low, high = value.get("low"), value.get("high")
    return None if low is None or high is None else high - low


@dataclass(frozen=True)
class Draws:
    """One metric of one row: its value for each seed (S,), and for each seed and resample of the patients (S, R)."""

    values: np.ndarray
    resampled: np.ndarray
    patients: int  # that have a sample of the rarest class
    trained: bool = True  # whether a seed had a part in it; a published model as it is has none
    of: float = 0.0  # as a Drawn's: of a proportion, its effective number of samples
    why: str = ""  # no interval can be given

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(self.values.mean())

    @property
    def variance_of_seeds(self) -> float:
        """Of the mean over seeds; 0 where there is one."""
        return float(self.values.var(ddof=1) / len(self.values)) if len(self.values) > 1 else 0.0

    @property
    def lacks_seeds(self) -> bool:
        """Whether a single training stands for all that could have been."""
        return self.trained and len(self.values) == 1


def draw_rows(resamples: Resamples, probs: Sequence[np.ndarray], trained: bool = True) -> dict[str, Draws]:
    """The columns of a row with S seeds, `probs` being their probabilities (n, k) for the same samples.

    Rows drawn from one Resamples, or from equal ones, can be compared in pairs.

    Raises:
        ValueError: as Resamples.
    """
    return together([resamples.draw(prob) for prob in probs], resamples, trained)


def together(seeds: Sequence[dict[str, Drawn]], resamples: Resamples, trained: bool = True) -> dict[str, Draws]:
    """What was drawn of each seed, as the row of all of them; no interval where a class has a single patient."""
    lone = "a class has a single patient" if resamples.rarest < 2 else ""
    return {
        name: Draws(
            np.array([drawn[name].value for drawn in seeds]),
            np.stack([drawn[name].draws for drawn in seeds]),
            resamples.rarest,
            trained,
            min(drawn[name].of for drawn in seeds),
            seeds[0][name].why or lone,
        )
        for name in seeds[0]
    }


def interval(row: Draws, level: float = 0.95, bounded: bool = True) -> Interval:
    """The mean over seeds. One seed: percentiles of the patient bootstrap. Several: a t interval of both variances.

    `bounded`: the metric lies between 0 and 1, and so does its interval. Where neither patients nor seeds vary it is
    that of `interval_of`.
    """
    if row.why:
        return Interval(row.mean, None, None, why=row.why)
    if len(row.values) == 1:
        return interval_of(row.mean, _percentiles(row.resampled[0], row.patients, level), row.of, level)
    half = _half_width(_parts(row.resampled.mean(0), [row]), level)
    low, high = row.mean - half, row.mean + half
    return interval_of(row.mean, (max(0.0, low), min(1.0, high)) if bounded else (low, high), row.of, level)


def difference(row: Draws, baseline: Draws, level: float = 0.95) -> Difference:
    """Row minus baseline, paired over patients; the seeds of the two are independent trainings."""
    value = row.mean - baseline.mean
    if why := row.why or baseline.why:
        return Difference(value, None, None, None, why=why)
    draws = row.resampled.mean(0) - baseline.resampled.mean(0)
    if len(row.values) == len(baseline.values) == 1:
        z = stats.norm.isf(two_sided(draws) / 2)
        p = 2 * stats.t.sf(z / _widening(row.patients), row.patients - 1)
        return Difference(value, *_percentiles(draws, row.patients, level), p_value=float(p))
    parts = _parts(draws, [row, baseline])
    half = _half_width(parts, level)
    return Difference(value, value - half, value + half, p_value=_p_value(abs(value), parts))


def _widening(patients: int) -> float:
    return float(np.sqrt(patients / (patients - 1)))


def _percentiles(draws: np.ndarray, patients: int, level: float) -> tuple[float, float]:
    tail = stats.norm.sf(_widening(patients) * stats.t.ppf(1 - (1 - level) / 2, patients - 1))
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def _parts(draws: np.ndarray, rows: Sequence[Draws]) -> list[tuple[float, int]]:
    """(variance, degrees of freedom) of the patients and of each row's seeds."""
    patients = rows[0].patients
    parts = [(float(draws.var(ddof=1)) * _widening(patients) ** 2, patients - 1)]
    return parts + [(row.variance_of_seeds, len(row.values) - 1) for row in rows if len(row.values) > 1]


def _half_width(parts: Sequence[tuple[float, int]], level: float) -> float:
    """Standard error times the mean of the parts' t quantiles, weighted by variance (Cochran and Cox 1957, 4.14).

    Satterthwaite's degrees of freedom, which three seeds estimate too high as often as not, covered 90 to 95%.
    """
    total = sum(variance for variance, _ in parts)
    if total <= 0:
        return 0.0
    quantile = sum(v * stats.t.ppf(1 - (1 - level) / 2, freedom) for v, freedom in parts) / total
    return float(quantile * np.sqrt(total))


def _p_value(distance: float, parts: Sequence[tuple[float, int]]) -> float:
    """The level at which the interval just reaches zero."""
    lowest = 1e-9
    if distance <= 0:
        return 1.0
    if distance >= _half_width(parts, 1 - lowest):
        return lowest
    found: Any = brentq(lambda p: _half_width(parts, 1 - p) - distance, lowest, 1.0)
    return float(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the family is tested at the level at which each is read."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = np.empty(len(p_values)), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected.tolist()
