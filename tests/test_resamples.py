"""Intervals and differences over patients, against scikit-learn on repeated lesions, DeLong and the binomial."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation import comparisons, resamples
from evaluation.metrics import (
    METRICS,
    operating_point,
)
from evaluation.resamples import Resamples
from evaluation.weighted import Ranking, weighted_metrics

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


def repeated(labels, prob):
    """The columns of the published tables by scikit-learn."""
    each = sk.precision_recall_fscore_support(labels, prob.argmax(1), zero_division=0)
    auroc = sk.roc_auc_score(labels, prob, multi_class="ovr")
    means = [np.mean(values) for values in (each[2], each[0], each[1])]
    return dict(zip(METRICS, [auroc, *means, each[0][2], each[1][2]], strict=True))


def test_every_resample_equals_scikit_learn_on_the_repeated_lesions():
    labels, prob, patients = three_class_case()
    weights = np.concatenate(list(Resamples(labels, patients, CLASSES, number=25, seed=3).weights()))
    fast = weighted_metrics(labels, prob, 2, range(3))(weights)
    for r in range(len(weights)):
        rows = np.repeat(np.arange(len(labels)), weights[r])
        slow = repeated(labels[rows], prob[rows])
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
    """Point values, and in words why they have no intervals."""
    labels = np.repeat(np.arange(20), 2)
    names = [f"c{i}" for i in range(20)]
    found = intervals(labels, np.eye(20)[labels] * 0.81 + 0.0095, np.arange(40).astype(str), names, positive=None)
    assert {(one.value, one.low, one.high) for one in found.values()} == {(1, None, None)}
    why = found["auroc"].why
    assert why.startswith("40 patients, groups or images") and "most resamples lack a class: 2 with a" in why


def few(right: int, of: int, views: int = 1, others: int = 40):
    """Labels, probabilities and patients of `of` cancers with so many views each, `right` of them called."""
    labels = np.r_[np.ones(of * views, int), np.zeros(others, int)]
    score = np.r_[np.repeat(np.arange(of) < right, views) * 0.6 + 0.2, np.linspace(0.1, 0.45, others)]
    patients = np.r_[np.repeat(np.arange(of), views), 1000 + np.arange(others)].astype(str)
    return labels, np.stack([1 - score, score], 1), patients


@pytest.mark.parametrize("right", [0, 4])
def test_none_and_all_of_a_few_are_no_certainty(right):
    """Of independent samples Clopper and Pearson's interval, by SciPy; views of one patient make it no narrower."""
    exact = stats.binomtest(right, 4).proportion_ci(method="exact")
    for views in (1, 3):
        found = intervals(*few(right, 4, views), PAIR, number=200)["recall_malignant"]
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high)) and not found.why
        assert found.value == right / 4
    some = intervals(*few(2, 4), PAIR, number=200)["recall_malignant"]
    assert (some.low, some.high) == pytest.approx(np.quantile(
        Resamples(few(2, 4)[0], few(2, 4)[2], PAIR, number=200).draw(few(2, 4)[1])["recall_malignant"].draws,
        (0.025, 0.975),
    ))  # fmt: skip
    row = comparisons.draw_rows(Resamples(*few(right, 4)[::2], PAIR, number=200), [few(right, 4)[1]] * 2)
    assert comparisons.interval(row["recall_malignant"]).low == pytest.approx(exact.low)


def test_groups_of_unequal_size_are_worth_what_the_design_effect_says():
    groups = np.array(list("aaabbc"))
    size_of_own = np.array([3, 3, 3, 2, 2, 1])  # each sample's group: their mean is the design effect
    assert resamples.effective_number(groups) == pytest.approx(6 / size_of_own.mean())
    assert resamples.effective_number(np.arange(7)) == 7 and resamples.effective_number(np.array([])) == 0
    low, high = resamples.clopper_pearson(1, 6 / size_of_own.mean())
    assert (low, high) == (pytest.approx(0.025 ** (size_of_own.mean() / 6)), 1)  # p^n = 2.5%


def test_a_constant_area_and_a_single_patient_have_no_interval_but_a_reason():
    point = operating_point([0, 0, 1, 1], np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.4, 0.6]]), 1)
    labels, prob, patients = few(1, 1, views=3)
    found = Resamples(labels, patients, PAIR, number=200)
    for name, one in {**found.intervals(prob), **found.detection(prob, point)}.items():
        lone = "one patient of class MALIGNANT" if name in resamples.MEANS else "one positive patient"
        assert (one.low is None) == (one.why == lone) == (name != "specificity"), name
        assert one.value == pytest.approx(one.value) and (
            one.low is not None or f"no interval: {lone}" in one.percent()
        )
    assert found.difference(prob, prob)["auroc"].plain() == {
        "value": 0, "low": None, "high": None, "p_value": None, "why": "one patient of class MALIGNANT"
    }  # fmt: skip
    swapped = Resamples(1 - labels, patients, PAIR, number=200).detection(prob[:, ::-1], point)
    assert swapped["auroc_malignant"].why == "one negative patient" and not swapped["sensitivity"].why
    apart = intervals(*few(4, 4), PAIR, number=200)["auroc"]
    assert (apart.value, apart.low, apart.why) == (1, None, "the resamples do not vary")


def test_a_class_that_was_never_learnt_is_in_no_mean():
    """As by hand over the others, whose samples it still counts among."""
    labels, prob, patients = three_class_case()
    prob = prob * [1, 0, 1] / (prob * [1, 0, 1]).sum(1, keepdims=True)
    table = Resamples(labels, patients, CLASSES, number=30, unlearnt=CLASSES[1:2])
    found = table.intervals(prob)
    recalls = [(prob[labels == c].argmax(1) == c).mean() for c in (0, 2)]
    assert found["recall"].value == pytest.approx(np.mean(recalls))
    assert found["auroc"].value == pytest.approx(np.mean([roc_auc_score(labels == c, prob[:, c]) for c in (0, 2)]))
    assert found["recall"].low < found["recall"].value < found["recall"].high
    assert intervals(labels, prob, patients, CLASSES)["recall"].value == pytest.approx(sum(recalls) / 3)


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


def test_draws_that_are_too_many_to_keep_are_drawn_again_alike(monkeypatch):
    labels, prob, patients = three_class_case()
    kept = Resamples(labels, patients, CLASSES, number=60, seed=4)
    expected, lacking = kept.draw(prob), few(1, 1)
    monkeypatch.setattr(resamples, "KEPT", 60 * len(set(patients)) - 1)
    monkeypatch.setattr(resamples, "BLOCK", 7 * len(labels))
    again = Resamples(labels, patients, CLASSES, number=60, seed=4)
    for _ in range(2):
        for name, drawn in again.draw(prob).items():
            assert np.array_equal(drawn.draws, expected[name].draws), name
    assert kept._kept is not None and again._kept is None  # the two ways were taken
    twenty, names = np.repeat(np.arange(20), 2), [f"c{i}" for i in range(20)]
    table = Resamples(twenty, np.arange(40), names, None)
    found = table.intervals(np.eye(20)[twenty] * 0.81 + 0.0095)["auroc"]
    assert "most resamples lack a class" in found.why and found.why == table.too_few and not list(table.weights())
    one = Resamples(lacking[0], lacking[2], PAIR, number=500)  # 37% lack the one patient, and are drawn again
    drawn = np.concatenate(list(one.weights()))
    assert len(drawn) == 500 and (drawn @ (lacking[0] == 1) > 0).all()


def test_weighted_areas_are_those_of_all_pairs_to_the_last_digit():
    rng = np.random.default_rng(3)
    positive, score, weights = rng.random(90) < 0.3, rng.integers(0, 12, 90) / 7, rng.integers(0, 4, (20, 90))
    above = (score[positive][:, None] > score[~positive]) + (score[positive][:, None] == score[~positive]) / 2
    own, others = weights[:, positive], weights[:, ~positive]
    expected = np.einsum("ri,ij,rj->r", own, above, others) / (own.sum(1) * others.sum(1))
    for kind in (np.uint8, np.int64, np.float64):
        assert np.array_equal(Ranking(positive, score).auroc(weights.astype(kind)), expected)
    nothing = weights * positive
    assert np.isnan(Ranking(positive, score).auroc(nothing)).all()
    assert np.isnan(Ranking(~positive, score).average_precision(nothing)).all()


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
        interval = found.each[name]["auroc"]
        assert (interval.low, interval.high) == pytest.approx(np.quantile(scores, (0.025, 0.975)))
        assert interval.value == pytest.approx(roc_auc_score(known[seen, i], prob[seen, i]))


@pytest.mark.parametrize("kind", ["classes", "findings"])
def test_a_bootstrap_holds_no_more_than_its_draws_for_a_larger_table(monkeypatch, kind):
    """A byte for each patient and resample while these are few, and the orders of the scores; the rest is bounded."""
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
    kept = 3000 * 2 * 5 * 8 + (1000 * 1500 if kind == "classes" else 0)  # by the last more than by the one before
    assert peaks[2] < 1.2 * peaks[1] + kept and peaks[1] < 20 * 100_000  # of all resamples at once: 32 MB an array


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
    known[:, 1] = np.where(
        np.isin(groups, groups[[0, -1]]), 1, known[:, 1].clip(max=0)
    )  # in two groups: often not drawn
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
        assert 1 < np.isnan(values[:, 1]).sum() < 35
        columns = dict(zip((*names, "macro"), [*values.T, np.nanmean(values, axis=1)], strict=True))
        for name, column in columns.items():
            low, high = np.nanquantile(column[1:], (0.05, 0.95))
            interval = found.macro[key] if name == "macro" else found.each[name][key]
            assert (interval.value, interval.low, interval.high) == pytest.approx((column[0], low, high)), (key, name)


def test_findings_without_a_figure_are_named_with_the_reason_and_no_mean_has_them(recwarn):
    known, scores = np.array([[1, 0, 0], [1, 1, 1], [-1, 0, 0]] * 10), np.tile([[0.5], [0.4], [0.6]], (10, 3))
    groups, names = np.arange(30).astype(str), ("a", "b", "c")
    found = resamples.finding_intervals(known, scores, groups, names, unfitted={"c": "not fitted"})
    assert found.averaged == ["b"] and found.left_out == {"a": "no test image without it", "c": "not fitted"}
    assert found.macro == found.each["b"] and found.each["c"]["auroc"].percent() == "no figure: not fitted"
    for outcome, words in ((1, "positive"), (0, "negative")):
        lone = np.where(np.arange(30) < 2, outcome, 1 - outcome)[:, None]
        own = resamples.finding_intervals(lone, scores[:, :1], np.r_[0, 0, 2:30].astype(str), ("a",))
        assert own.each["a"]["auroc"].why == f"one {words} patient" and own.each["a"]["auroc"].value is not None
        assert own.macro["auroc"].why == f"a has one {words} patient"
    rare = np.isin(np.arange(30), (3, 7)).astype(int)[:, None]  # in an eighth of the resamples no finding has a value
    assert resamples.finding_intervals(rare, scores[:, :1], groups, ("a",)).macro["auroc"].low is not None
    assert not recwarn.list
    with pytest.raises(ValueError, match="no finding has a figure: a, no test image without it"):
        resamples.finding_intervals(known[:, :1], scores[:, :1], groups, ("a",))
    with pytest.raises(ValueError, match="for 30 images and 1 names"):
        resamples.finding_intervals(known, scores, groups, ("a",))
    scores[4, 1] = np.nan
    with pytest.raises(ValueError, match="b: the score of image 4 is no number"):
        resamples.finding_intervals(known, scores, groups, names)
