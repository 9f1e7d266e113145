"""Metrics against scikit-learn and brute force, intervals against the binomial and DeLong's formula, the pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from evaluation.metrics import (
    binary_margins,
    classification_scores,
    log_prob,
    operating_point,
    percent,
    ranked,
    retrieval_metrics,
    score_outputs,
    target_ranks,
)
from evaluation.weighted import classification_metrics, weighted_detection

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


def test_point_values_equal_scikit_learn_report():
    labels, prob, _ = three_class_case()
    got = classification_metrics(labels, prob, CLASSES)
    report = sk.classification_report(labels, prob.argmax(1), target_names=CLASSES, output_dict=True)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(labels, prob, multi_class="ovr", average="macro"))
    assert got["f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert got["precision"] == pytest.approx(report["macro avg"]["precision"])
    assert got["recall"] == pytest.approx(report["macro avg"]["recall"])
    assert got["precision_malignant"] == pytest.approx(report["MALIGNANT"]["precision"])
    assert got["recall_malignant"] == pytest.approx(report["MALIGNANT"]["recall"])


@pytest.mark.parametrize(("dtype", "scale"), [(np.float64, 1), (np.float64, 20), (np.float32, 20), (np.float64, 150)])
def test_logits_far_apart_are_ranked_as_they_stand(dtype, scale):
    """The larger probability rounds to 1 from a difference of 37 on, of 17 in float32; scikit-learn on the logits."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    margin = (scale * (rng.normal(3, 1, 400) + labels)).astype(dtype)  # up to 900: beyond 745 they do tie
    prob = softmax(np.stack([np.zeros_like(margin), margin.clip(max=700)], axis=1))
    expected = roc_auc_score(labels, margin.clip(max=700))
    found = classification_metrics(labels, prob, PAIR)["auroc"]
    assert found == pytest.approx(expected, abs=1e-9 if dtype is np.float64 else 1e-3)
    assert scale == 1 or roc_auc_score(labels, prob[:, 1]) < expected - 0.02
    point = operating_point(labels, prob.astype(np.float64), 1)
    called = point.called(prob.astype(np.float64), 1)
    assert 0.9 <= (~called[labels == 0]).mean() < 0.92 and called[labels == 1].mean() > 0.2
    fast = weighted_detection(labels, prob, 1, point, range(2))(np.ones((1, 400)))
    assert fast["auroc_malignant"][0] == pytest.approx(found)
    assert fast["average_precision_malignant"][0] == pytest.approx(
        sk.average_precision_score(labels, ranked(prob)[:, 1])
    )
    assert score_outputs(labels, log_prob(prob), "roc_auc")["score"] == pytest.approx(found, abs=1e-3)


def test_only_what_rounds_to_1_is_ranked_by_another_number_than_its_probability():
    _, prob, _ = three_class_case(decimals=3)
    assert np.array_equal(ranked(prob), prob)
    certain = np.array([[1 - 1e-7, 1e-7, 0], [1, 1e-20, 0], [1, 0, 0], [0.9, 0.1, 0]])
    assert np.argsort(ranked(certain)[:, 0]).tolist() == [3, 0, 1, 2] and np.isfinite(ranked(certain)).all()


def test_a_class_never_predicted_has_precision_zero_without_warning(recwarn):
    prob = np.array([[0.8, 0.1, 0.1], [0.6, 0.1, 0.3], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    got = classification_metrics([0, 0, 1, 2], prob, CLASSES)
    assert got["precision"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("labels", "prob", "message"),
    [
        ([0, 0, 2], np.full((3, 3), 1 / 3), "BENIGN_WITHOUT_CALLBACK"),
        ([0, 1, 2], np.array([[2.0, -1, 0]] * 3), "softmax"),
        ([0, 1, 2], np.full((3, 3), np.nan), "softmax"),
        ([0, 1, 3], np.full((3, 3), 1 / 3), "0..2"),
        ([0, 1], np.full((3, 3), 1 / 3), "shape"),
        ([], np.zeros((0, 3)), "no samples"),
    ],
)
def test_undefined_input_is_refused(labels, prob, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, prob, CLASSES)


@pytest.mark.parametrize("n_classes", [2, 7, 30])
def test_metrics_of_a_set_equal_scikit_learns(n_classes):
    rng = np.random.default_rng(n_classes)
    logits = rng.normal(size=(200, n_classes)).astype(np.float32)
    target = rng.integers(n_classes, size=200)
    logits[np.arange(200), target] += 1
    ranks = target_ranks(torch.tensor(logits), torch.tensor(target))
    margins = binary_margins(torch.tensor(logits))

    def scores(metric):
        return classification_scores(torch.tensor(target), ranks, margins, n_classes, metric)

    predicted = logits.argmax(axis=1)
    top1 = accuracy_score(target, predicted)
    assert scores("top1")["score"] == pytest.approx(top1)
    assert scores("mean_per_class")["score"] == pytest.approx(balanced_accuracy_score(target, predicted))
    if n_classes > 5:
        top5 = top_k_accuracy_score(target, logits, k=5, labels=range(n_classes))
        assert scores("top1")["top5"] == pytest.approx(top5)
        assert scores("mean_top1_top5")["score"] == pytest.approx((top1 + top5) / 2)
    if n_classes == 2:
        positive = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
        assert scores("roc_auc")["score"] == pytest.approx(roc_auc_score(target, positive))
    assert (scores("top1")["samples"], scores("top1")["classes"]) == (200, n_classes)


def test_a_class_that_is_predicted_but_absent_does_not_divide_by_zero():
    logits = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])  # predicts 0, 2, 1
    target = torch.tensor([0, 0, 1])  # class 2 has no samples
    ranks = target_ranks(logits, target)
    scores = classification_scores(target, ranks, logits[:, 1] - logits[:, 0], 3, "mean_per_class")
    assert scores["score"] == pytest.approx((0.5 + 1) / 2)


def test_a_class_without_training_images_is_left_out_of_the_mean_over_classes():
    logits = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])  # class 2 cannot be called
    target = torch.tensor([0, 1, 2])
    got = score_outputs(target.numpy(), logits.numpy(), "mean_per_class", unlearnt=[2])
    assert (got["mean_per_class"], got["top1"]) == (1, pytest.approx(2 / 3))


def test_equal_scores_stand_in_class_order_and_nan_never_wins():
    logits = torch.zeros(4, 4)
    target = torch.arange(4)
    assert target_ranks(logits, target).tolist() == [0, 1, 2, 3]
    assert (logits.argmax(dim=1) == target).tolist() == (target_ranks(logits, target) == 0).tolist()
    assert target_ranks(torch.full((4, 4), math.nan), target).tolist() == [4] * 4
    assert target_ranks(torch.tensor([[1.0, math.nan]]), torch.tensor([0])).tolist() == [1]


def test_impossible_metrics_are_errors():
    one_class = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="choose from top1, mean_per_class"):
        classification_scores(one_class, one_class, torch.zeros(3), 2, "top3")
    with pytest.raises(ValueError, match="samples of both"):
        classification_scores(one_class, one_class, torch.zeros(3), 2, "roc_auc")
    with pytest.raises(ValueError, match="no samples"):
        classification_scores(one_class[:0], one_class[:0], torch.zeros(0), 2)


def test_outputs_are_scored_as_their_rows_are():
    rng = np.random.default_rng(3)
    labels, outputs = rng.integers(0, 7, 50), rng.normal(size=(50, 7))
    got = score_outputs(labels, outputs, "mean_top1_top5")
    assert got["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, outputs, k=5, labels=range(7)))
    assert got["score"] == pytest.approx((got["top5"] + sk.accuracy_score(labels, outputs.argmax(1))) / 2)


@pytest.mark.parametrize("n_classes", [5, 6])
def test_five_classes_have_no_top5(n_classes):
    """All would be right: the mean of both counts 1 for it."""
    rng = np.random.default_rng(0)
    labels, outputs = rng.integers(0, n_classes, 60), rng.normal(size=(60, n_classes))
    got = score_outputs(labels, outputs, "mean_top1_top5")
    top5 = sk.top_k_accuracy_score(labels, outputs, k=5, labels=range(n_classes)) if n_classes > 5 else 1
    assert ("top5" in got) == (n_classes > 5) and got.get("top5", 1) == pytest.approx(top5)
    assert got["score"] == pytest.approx((top5 + sk.accuracy_score(labels, outputs.argmax(1))) / 2)


def test_the_margin_is_that_of_class_1_over_class_0():
    assert binary_margins(torch.tensor([[1.0, 4.0, 9.0], [2.0, 1.0, 9.0]])).tolist() == [3, -1]
    assert binary_margins(torch.tensor([[1.0], [2.0]])).tolist() == [0, 0]


def test_the_temperature_has_bounds_where_the_samples_have_none():
    labels = np.arange(60) % 3
    right, wrong = softmax(0.005 * np.eye(3)[labels]), softmax(8.0 * np.eye(3)[(labels + 1) % 3])
    assert operating_point(labels, right, 2).temperature == pytest.approx(math.exp(-4), rel=1e-3)
    assert operating_point(labels, wrong, 2).temperature == pytest.approx(math.exp(4), rel=1e-3)


def test_one_of_ten_others_may_be_called_at_a_specificity_of_nine_tenths():
    """1 - 0.9 is less than a tenth to a computer. The default is 0.9."""
    score = np.r_[np.arange(1, 11) / 20, 0.9, 0.8]
    labels, prob = np.r_[np.zeros(10, int), 1, 1], np.stack([1 - score, score], axis=1)
    point = operating_point(labels, prob, 1)
    assert np.flatnonzero(score >= point.threshold).tolist() == [9, 10, 11]
    assert score[8] < point.threshold <= score[9]
    score[11] = 0.3  # below others: the lowest threshold that keeps the specificity
    prob = np.stack([1 - score, score], axis=1)
    assert operating_point(labels, prob, 1).threshold == np.nextafter(prob[8, 1], 1)
    assert operating_point(labels, prob, 1, specificity=0.8).threshold == np.nextafter(prob[7, 1], 1)
    score[11] = 0.8
    prob = np.stack([1 - score, score], axis=1)
    assert (score >= operating_point(labels, prob, 1, specificity=1.0).threshold).sum() == 2
    with pytest.raises(ValueError, match="samples of another class"):
        operating_point(labels[10:], prob[10:], 1)


def test_where_validation_separates_the_threshold_is_as_far_from_either_side():
    labels, score = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.7, 0.9])
    point = operating_point(labels, np.stack([1 - score, score], axis=1), 1)
    assert point.threshold == pytest.approx(0.5)
    sure = np.array([[1.0, 1e-9], [1.0, 1e-7], [1e-7, 1.0], [1e-9, 1.0]])  # of a classifier whose ranks pass 1
    point = operating_point([0, 0, 1, 1], sure, 1)
    assert point.threshold == pytest.approx(0.5)
    score[3] = np.nextafter(0.3, 1)  # no number lies between: the others still stay below
    point = operating_point(labels, np.stack([1 - score, score], axis=1), 1)
    assert point.threshold == score[3]


def test_probabilities_may_be_rounded_and_zero():
    prob = np.array([[1.0, 0.0], [0.00005, 1.0]])
    assert classification_metrics([0, 1], prob, ("no", "yes"), None)["auroc"] == 1
    for wrong in ([[1.0, 0.0], [0.0002, 1.0]], [[1.0, 0.0], [0.0, 0.9998]], [[1.00001, -0.00001], [0.0, 1.0]]):
        with pytest.raises(ValueError, match="softmax"):
            classification_metrics([0, 1], np.array(wrong), ("no", "yes"), None)


def test_percent_changes_fractions_and_nothing_else():
    """Ranks, counts and names stay: a median rank of 1 is not 100."""
    labels, outputs = np.array([0, 1, 1]), np.eye(2)[[0, 1, 0]]
    scores = score_outputs(labels, outputs, "roc_auc")
    assert percent(scores) == {
        "metric": "roc_auc", "score": 75.0, "top1": pytest.approx(200 / 3), "mean_per_class": 75.0, "roc_auc": 75.0,
        "samples": 3, "classes": 2,
    }  # fmt: skip
    retrieval = percent(retrieval_metrics(torch.eye(4), torch.eye(4), list("abcd")))
    assert {v for k, v in retrieval.items() if k[4:] in ("r1", "r5", "r10")} == {100.0}
    assert (retrieval["i2t_median_rank"], retrieval["t2i_median_rank"], retrieval["candidates"]) == (1, 1, 4)


def brute_force(images, texts, captions):
    """Ranks by sorting in plain Python: wrong entries first among equal scores."""
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    scores = {"candidates": len(captions)}
    for way, queries, candidates in (("i2t", images, texts), ("t2i", texts, images)):
        ranks = []
        for i, query in enumerate(queries):
            entries = sorted((-float(query @ other), captions[j] == captions[i]) for j, other in enumerate(candidates))
            wrong = 0
            for _, is_hit in entries:
                if is_hit:
                    break
                wrong += 1
            ranks.append(1 + wrong)
        for k in (1, 5, 10):
            scores[f"{way}_r{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        scores[f"{way}_median_rank"] = float(np.median(ranks))
    return scores


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_retrieval_equals_a_second_implementation_with_duplicate_captions(n, chunk):
    rng = np.random.default_rng(n)
    images = rng.normal(size=(n, 5)).astype(np.float32)
    texts = (images + rng.normal(size=(n, 5))).astype(np.float32)
    captions = [f"caption {i // 2 if i < 20 else i}" for i in range(n)]  # pairs of twins, then single ones
    scores = retrieval_metrics(torch.tensor(images), torch.tensor(texts), captions, chunk=chunk)
    assert scores == pytest.approx(brute_force(images, texts, captions))


def test_equal_captions_all_count_as_hits():
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]  # images 0 and 1 find each other's caption
    assert retrieval_metrics(images, texts, ["a", "b", "c"])["i2t_r1"] == pytest.approx(1 / 3)
    assert retrieval_metrics(images, texts, ["a", "a", "c"])["i2t_r1"] == 1
    assert retrieval_metrics(images, texts, ["a", "a", "c"])["t2i_r1"] == 1


def test_scale_of_the_features_does_not_matter():
    images, texts = torch.randn(30, 4), torch.randn(30, 4)
    captions = [str(i) for i in range(30)]
    scaled = retrieval_metrics(images * torch.rand(30, 1).add(0.1), texts * 7, captions)
    assert scaled == retrieval_metrics(images, texts, captions)


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_model_that_tells_nothing_apart_scores_nothing(value):
    features = torch.full((20, 4), value)
    scores = retrieval_metrics(features, features, [str(i) for i in range(20)])
    assert [scores[k] for k in scores if "_r" in k and "median" not in k] == [0] * 6
    assert scores["i2t_median_rank"] == scores["t2i_median_rank"] == 20


def test_retrieval_refuses_what_does_not_pair_up():
    with pytest.raises(ValueError, match="got 3, 2 and 3"):
        retrieval_metrics(torch.ones(3, 2), torch.ones(2, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least one pair"):
        retrieval_metrics(torch.ones(0, 2), torch.ones(0, 2), [])
