"""Intervals and differences over patients, against scikit-learn on repeated lesions, DeLong and the binomial."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation import resamples
from evaluation.metrics import (
    METRICS,
    classification_metrics,
    operating_point,
)
from evaluation.resamples import Resamples
from evaluation.weighted import weighted_metrics

CLASSES = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT")
PAIR = ("BENIGN", "MALIGNANT")


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def three_class_case(n: int = 120, seed: int = 0, decimals: int = 1):
    """Labels, probabilities with ties (few decimals of the logits) and patients with one to four lesions."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=(0.4, 0.2, 0.4))
    logits = (rng.normal(size=(n, 3)) + 1.2 * np.eye(3)[labels]).round(decimals)
    patients = np.sort(rng.integers(0, n // 2, n)).astype(str)
    return labels, softmax(logits), patients


def intervals(labels, prob, patients, classes, **how):
    return Resamples(labels, patients, classes, **how).intervals(prob)


def test_every_resample_equals_scikit_learn_on_the_repeated_lesions():
    labels, prob, patients = three_class_case()
    weights = np.concatenate(list(Resamples(labels, patients, CLASSES, number=25, seed=3).weights()))
    fast = weighted_metrics(labels, prob, weights, 2)
    for r in range(len(weights)):
        rows = np.repeat(np.arange(len(labels)), weights[r])
        slow = classification_metrics(labels[rows], prob[rows], CLASSES)
        for name in METRICS:
            assert fast[name][r] == pytest.approx(slow[name], abs=1e-12), (name, r)


def test_whole_patients_are_drawn():
    labels, _, patients = three_class_case()
    weights = np.concatenate(list(Resamples(labels, patients, CLASSES, number=200).weights()))
    for name in set(patients):
        assert (np.ptp(weights[:, patients == name], axis=1) == 0).all()
    first = [np.flatnonzero(patients == name)[0] for name in sorted(set(patients))]
    assert (weights[:, first].sum(1) == len(first)).all()


def test_recall_interval_is_the_binomial_one_for_one_lesion_a_patient():
    n, p = 2000, 0.7
    labels = np.r_[np.ones(n, int), np.zeros(n, int)]
    called = np.r_[np.arange(n) < p * n, np.arange(n) < 0.1 * n].astype(float)
    prob = np.stack([0.9 - 0.8 * called, 0.1 + 0.8 * called], axis=1)
    got = intervals(labels, prob, np.arange(2 * n), PAIR, number=4000)["recall_malignant"]
    half = 1.96 * np.sqrt(p * (1 - p) / n)  # normal approximation, 0.0201
    assert got.value == pytest.approx(p)
    assert got.low == pytest.approx(p - half, abs=0.1 * half)
    assert got.high == pytest.approx(p + half, abs=0.1 * half)


def delong_std(pos: np.ndarray, neg: np.ndarray) -> float:
    """Standard error of the AUROC (DeLong, DeLong & Clarke-Pearson 1988, equations 4 to 6)."""
    wins = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    return np.sqrt(wins.mean(1).var(ddof=1) / len(pos) + wins.mean(0).var(ddof=1) / len(neg))


def test_auroc_interval_agrees_with_delong():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 400)
    score = 1 / (1 + np.exp(-(rng.normal(size=800) + labels)))
    got = intervals(labels, np.stack([1 - score, score], 1), np.arange(800), PAIR)["auroc"]
    std = delong_std(score[labels == 1], score[labels == 0])
    assert (got.high - got.low) / (2 * 1.96) == pytest.approx(std, rel=0.1)


def test_copies_of_a_lesion_within_the_patient_add_no_certainty():
    labels, prob, _ = three_class_case(90)
    once = intervals(labels, prob, np.arange(90), CLASSES)
    copies = np.repeat(labels, 4), np.repeat(prob, 4, axis=0)
    copied = intervals(*copies, np.repeat(np.arange(90), 4), CLASSES)
    lesions = intervals(*copies, np.arange(360), CLASSES)
    for name in METRICS:
        assert copied[name].low == pytest.approx(once[name].low)
        assert copied[name].high == pytest.approx(once[name].high)
        assert lesions[name].high - lesions[name].low < 0.7 * (once[name].high - once[name].low)


def test_same_seed_same_interval():
    case = three_class_case()
    assert intervals(*case, CLASSES, seed=5) == intervals(*case, CLASSES, seed=5)
    assert intervals(*case, CLASSES, seed=5) != intervals(*case, CLASSES, seed=6)


def test_too_few_patients_for_a_bootstrap():
    with pytest.raises(ValueError, match=r"3 patients, .* are too few.*\[1, 1, 1\]"):
        intervals([0, 1, 2], np.eye(3), ["a", "b", "c"], CLASSES)


def test_paired_difference_is_tighter_than_two_intervals():
    labels, prob, patients = three_class_case(300, decimals=3)
    noise = np.random.default_rng(9).normal(size=prob.shape)
    worse = softmax(np.log(prob) + 0.6 * noise)
    got = Resamples(labels, patients, CLASSES).difference(prob, worse)["auroc"]
    apart = [intervals(labels, p, patients, CLASSES)["auroc"] for p in (prob, worse)]
    assert got.value == pytest.approx(apart[0].value - apart[1].value)
    assert got.low > 0 and got.p_value < 0.05
    spread = np.hypot(*[a.high - a.low for a in apart])  # width of the difference, were the two independent
    assert got.high - got.low < 0.8 * spread


def test_a_model_against_itself_differs_by_nothing():
    labels, prob, patients = three_class_case()
    for got in Resamples(labels, patients, CLASSES).difference(prob, prob).values():
        assert (got.value, got.low, got.high, got.p_value) == (0, 0, 0, 1)


def test_the_observed_sample_counts_as_one_draw():
    """(b + 1) / (R + 1), Davison and Hinkley 1997, equation 4.11: no p-value is 0."""
    assert resamples.two_sided(np.full(99, 0.3)) == pytest.approx(2 * 1 / 100)
    assert resamples.two_sided(np.r_[np.full(90, -0.3), np.full(9, 0.3)]) == pytest.approx(2 * 10 / 100)
    assert resamples.two_sided(np.r_[np.full(49, -0.3), 0.0, np.full(49, 0.3)]) == 1.0


def test_paired_p_value_under_no_difference_is_rarely_small():
    """Two equally good models: about 5% of comparisons may fall below 0.05."""
    small = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 60)
        scores = [1 / (1 + np.exp(-(rng.normal(size=120) + labels))) for _ in range(2)]
        a, b = (np.stack([1 - s, s], 1) for s in scores)
        got = Resamples(labels, np.arange(120), PAIR, number=400).difference(a, b)["auroc"]
        assert (got.p_value < 0.05) == (got.low > 0 or got.high < 0) or abs(got.p_value - 0.05) < 0.02
        small += got.p_value < 0.05
    assert small <= 9  # P(more than 9 of 60 at 5%) is below 0.1%


def test_blocks_of_resamples_are_the_draws_of_one_call(monkeypatch):
    labels, prob, patients = three_class_case()
    whole = Resamples(labels, patients, CLASSES, number=60, seed=4)
    distinct, place = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(4)
    counts = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=60)
    weights = np.concatenate(list(whole.weights()))
    lacking = [r for r in range(60) if len(set(labels[counts[r][place] > 0])) < 3]
    assert [r for r in range(60) if (weights[r] != counts[r][place]).any()] == lacking
    expected = whole.intervals(prob)
    monkeypatch.setattr(resamples, "BLOCK", 7 * len(distinct))
    assert Resamples(labels, patients, CLASSES, number=60, seed=4).intervals(prob) == expected


def test_one_object_answers_everything_from_the_same_draws():
    labels, prob, patients = three_class_case(300, decimals=3)
    drawn = Resamples(labels, patients, CLASSES, number=200)
    point = operating_point(labels, prob, 2)
    detection, columns = drawn.draw_detection(prob, point), drawn.draw(prob)
    assert np.array_equal(detection["balanced_accuracy"].draws, columns["recall"].draws)
    with pytest.raises(ValueError, match="no class is the positive one"):
        Resamples(labels, patients, CLASSES, positive=None).detection(prob, point)
    with pytest.raises(ValueError, match="'benign' is not among"):
        Resamples(labels, patients, CLASSES, positive="benign")


def findings(n):
    rng = np.random.default_rng(n)
    known, prob = rng.integers(-1, 2, (n, 2)), rng.random((n, 2)).round(2)
    return known, prob, [f"P{i // 2}" for i in range(n)], ["nodule", "effusion"]


def test_findings_over_blocks_of_resamples_equal_scikit_learn_on_the_repeated_images(monkeypatch):
    known, prob, groups, names = findings(60)
    monkeypatch.setattr(resamples, "BLOCK", 7 * 60)
    found = resamples.finding_intervals(known, prob, groups, names, resamples.Bootstrap(number=40, seed=3))
    place = np.unique(groups, return_inverse=True)[1]
    drawn = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=40)[:, place]
    for i, name in enumerate(names):
        seen = known[:, i] >= 0
        scores = []
        for weight in drawn:
            again = np.repeat(np.flatnonzero(seen), weight[seen])
            scores.append(roc_auc_score(known[again, i], prob[again, i]))
        interval = found[name]["auroc"]
        assert (interval.low, interval.high) == pytest.approx(np.quantile(scores, (0.025, 0.975)))
        assert interval.value == pytest.approx(roc_auc_score(known[seen, i], prob[seen, i]))


@pytest.mark.parametrize("kind", ["classes", "findings"])
def test_a_bootstrap_holds_no_more_than_its_draws_for_a_larger_table(monkeypatch, kind):
    """Patients: two bytes for each and each resample. What is computed of them is bounded."""
    monkeypatch.setattr(resamples, "BLOCK", 100_000)
    peaks = []
    for n in (1000, 1000, 4000):  # the first loads what SciPy loads late
        known, prob, groups, names = findings(n)
        labels, two = np.arange(n) % 2, np.stack([prob[:, 0], 1 - prob[:, 0]], 1)
        tracemalloc.start()
        if kind == "classes":
            Resamples(labels, groups, names, None, 1000).intervals(two)
        else:
            resamples.finding_intervals(known, prob, groups, names, resamples.Bootstrap(number=1000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    kept = 1000 * 1500 * 2 if kind == "classes" else 0  # by the last more than by the one before
    assert peaks[2] < 1.2 * peaks[1] + kept and peaks[1] < 12 * 8 * 100_000  # of all resamples at once: 32 MB an array


def test_many_classes_take_no_matrix_of_all_their_pairs_for_each_sample():
    rng = np.random.default_rng(0)
    peaks = []
    for k in (20, 80):
        labels = rng.permutation(np.arange(1600) % k)
        table = Resamples(labels, np.arange(1600).astype(str), [f"c{i}" for i in range(k)], None, 4)
        tracemalloc.start()
        table.intervals(rng.dirichlet(np.ones(k), 1600))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 20e6  # 1600 samples with 6400 cells each are 82 MB


def test_findings_equal_scikit_learn_on_the_repeated_images():
    rng = np.random.default_rng(2)
    names, groups = ("mass", "calcification", "scar"), np.sort(rng.integers(0, 15, 40)).astype(str)
    known = rng.integers(0, 2, (40, 3))
    known[rng.random((40, 3)) < 0.3] = -1  # not known
    known[:, 1] = np.where(groups == groups[0], 1, known[:, 1].clip(max=0))  # positive in one group: often not drawn
    prob = (0.5 * known.clip(0) + rng.random((40, 3))).round(1) / 2
    found = resamples.finding_intervals(known, prob, groups, names, resamples.Bootstrap(40, seed=7), level=0.9)

    distinct, place = np.unique(groups, return_inverse=True)
    counts = np.random.default_rng(7).multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=40)
    drawn = [np.arange(40), *(np.repeat(np.arange(40), times[place]) for times in counts)]
    for key, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        values = np.full((41, 3), np.nan)  # as they are, then resample by resample
        for r, rows in enumerate(drawn):
            for c in range(3):
                usable = rows[known[rows, c] >= 0]
                if len(set(known[usable, c])) == 2:
                    values[r, c] = score(known[usable, c], prob[usable, c])
        assert 5 < np.isnan(values[:, 1]).sum() < 35
        columns = dict(zip((*names, "macro"), [*values.T, np.nanmean(values, axis=1)], strict=True))
        for name, column in columns.items():
            low, high = np.nanquantile(column[1:], (0.05, 0.95))
            interval = found[name][key]
            assert (interval.value, interval.low, interval.high) == pytest.approx((column[0], low, high)), (key, name)


def test_findings_without_both_outcomes_are_left_out():
    known, prob = np.array([[1, 0], [1, 1], [-1, 0]] * 10), np.full((30, 2), 0.5)
    groups = np.arange(30).astype(str)
    assert set(resamples.finding_intervals(known, prob, groups, ("a", "b"))) == {"b", "macro"}
    with pytest.raises(ValueError, match="no finding has both outcomes"):
        resamples.finding_intervals(known[:, :1], prob[:, :1], groups, ("a",))
    with pytest.raises(ValueError, match="for 30 images and 1 names"):
        resamples.finding_intervals(known, prob, groups, ("a",))
