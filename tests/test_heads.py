"""Heads on frozen features against second implementations, and what the first MedSLIP's protocol got wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from evaluation import heads


def accuracy(labels: np.ndarray, prob: np.ndarray) -> float:
    return float((prob.argmax(1) == labels).mean())


def macro_auroc(labels: np.ndarray, prob: np.ndarray) -> float:
    return roc_auc_score(labels, prob, multi_class="ovr")


def clusters(n: int, d: int = 10, k: int = 3, seed: int = 0, gap: float = 2) -> heads.Samples:
    """Classes that overlap, far from the origin and of large scale, so that standardisation matters."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    features = 5 + 3 * rng.normal(size=(n, d)) + gap * np.eye(k, d)[labels]
    return heads.Samples(features.astype(np.float32), labels)


def test_logistic_head_is_the_optimum_of_its_stated_objective():
    """Mean cross-entropy + lambda / 2 * |W|^2 on standardised features of train and val, by torch's L-BFGS."""
    train, val = clusters(120, seed=1), clusters(60, seed=2)
    head = heads.fit_logistic(train, val, 3, accuracy)
    both = np.concatenate([train.features, val.features]).astype(np.float64)
    x = torch.from_numpy((both - both.mean(0)) / both.std(0))
    y = torch.from_numpy(np.concatenate([train.labels, val.labels]))
    weight = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
        value = value + head.chosen["lambda"] / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    expected = (x @ weight.T + bias).softmax(1).detach().numpy()
    assert np.abs(head.probabilities(both) - expected).max() < 2e-3


@pytest.mark.parametrize("n,d,k", [(120, 10, 3), (40, 90, 4), (80, 6, 2)])
def test_every_penalty_of_the_path_equals_scikit_learns_solution(n, d, k):
    """More samples than features, fewer, and two classes; the features' scales differ by 10,000."""
    samples = clusters(n, d, k, seed=3)
    stretched = samples.features * np.geomspace(1e-2, 1e2, d).astype(np.float32)
    samples = heads.Samples(stretched @ np.random.default_rng(1).normal(size=(d, d)), samples.labels)
    x = StandardScaler().fit_transform(samples.features.astype(np.float64))
    penalties = heads.LAMBDAS[::4]
    for tolerance, bound in ((1e-7, 1e-4), (1e-4, 2e-2)):
        path = heads.logistic_path(samples, penalties, k, tolerance)
        for penalty, predict in zip(penalties, path, strict=True):
            theirs = LogisticRegression(C=1 / (penalty * n), tol=1e-8, max_iter=10_000).fit(x, samples.labels)
            assert np.abs(predict(samples.features) - theirs.predict_proba(x)).max() < bound, penalty


def test_a_fit_does_not_depend_on_the_penalties_before_it():
    samples = clusters(100, seed=4)
    path = heads.logistic_path(samples, heads.LAMBDAS, 3, tolerance=1e-7)
    for i in (1, 2, 3, 17, 29):
        (alone,) = heads.logistic_path(samples, [heads.LAMBDAS[i]], 3, tolerance=1e-7)
        assert np.abs(alone(samples.features) - path[i](samples.features)).max() < 1e-4


def test_what_cannot_be_fitted_is_named():
    samples = clusters(20)
    with pytest.raises(ValueError, match=r"two classes; all are of class \[0\]"):
        heads.logistic_path(heads.Samples(samples.features, samples.labels * 0), [1.0], 3)
    samples.features[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        heads.logistic_path(samples, [1.0], 3)


def test_settings_are_scored_on_the_validation_samples():
    """With validation labels that contradict training every setting scores below chance."""
    train, val = clusters(200, seed=1, gap=8), clusters(100, seed=2, gap=8)
    head = heads.fit_logistic(train, heads.Samples(val.features, (val.labels + 1) % 3), 3, macro_auroc)
    assert max(entry["score"] for entry in head.validation) < 0.5


def test_the_best_score_wins_and_the_lowest_loss_among_equals():
    train, val = clusters(60), clusters(30, seed=1)
    head = heads.fit_logistic(train, val, 3, lambda labels, prob: 0.5)
    losses = [entry["loss"] for entry in head.validation]
    assert losses.index(min(losses)) not in (0, len(losses) - 1)
    assert head.chosen["lambda"] == heads.LAMBDAS[losses.index(min(losses))]
    head = heads.fit_logistic(train, val, 3, lambda labels, prob: -prob.max())  # the least certain one
    assert head.chosen["lambda"] == max(heads.LAMBDAS)


def test_class_weights_are_scikit_learns_and_their_mean_is_1():
    labels = np.array([4, 0, 0, 0, 2, 2, 0, 0])
    weights = heads.class_weights(labels)
    assert weights == pytest.approx(compute_sample_weight("balanced", labels))
    assert weights.mean() == pytest.approx(1)
    assert [weights[labels == c].sum() for c in (0, 2, 4)] == pytest.approx([8 / 3] * 3)


def test_classes_without_training_samples_get_probability_zero():
    train, val = clusters(60, gap=8), clusters(30, gap=8, seed=1)
    train, val = (heads.Samples(s.features, s.labels * 2) for s in (train, val))  # classes 0, 2, 4 of 6
    prob = heads.fit_logistic(train, val, 6, accuracy).probabilities(val.features)
    assert prob.shape == (30, 6) and (prob[:, [1, 3, 5]] == 0).all() and np.allclose(prob.sum(1), 1)
    assert accuracy(val.labels, prob) > 0.8


def test_adamw_makes_the_published_50_epochs_each_in_a_new_order(monkeypatch):
    """In batches of 16. The first MedSLIP did not shuffle, and restarted its learning rate every 5 batches."""
    batches, rates = [], []
    cross_entropy, adamw = torch.nn.functional.cross_entropy, torch.optim.AdamW

    class Recorded(adamw):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    def recorded_loss(logits, labels, **settings):
        batches.append(labels.tolist())
        return cross_entropy(logits, labels, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded_loss)
    samples = heads.Samples(np.random.default_rng(0).normal(size=(40, 4)), np.arange(40))
    heads.train_medslip(samples, 40, 1e-2, seed=0)
    assert [len(batch) for batch in batches] == [16, 16, 8] * 50
    epochs = [sum(batches[i : i + 3], []) for i in range(0, 150, 3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50
    assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and rates[-1] < 1e-3


def test_adamw_head_separates_what_logistic_regression_separates():
    train, val, test = (clusters(n, seed=i) for i, n in enumerate((200, 100, 200)))
    fitted = [fit(train, val, 3, accuracy) for fit in (heads.fit_logistic, heads.fit_medslip)]
    found = [accuracy(test.labels, head.probabilities(test.features)) for head in fitted]
    assert abs(found[0] - found[1]) < 0.05


@pytest.mark.parametrize("k", [1, 20, 500])
def test_nearest_neighbours_equal_scikit_learns(k):
    train, test = clusters(300, d=8, k=4), clusters(50, d=8, k=4, seed=1)
    train = heads.Samples(train.features - 5, train.labels)
    queries = test.features - 5
    ours = heads.knn_probabilities(train, queries, k, 4, torch.device("cpu"), chunk=16)
    theirs = KNeighborsClassifier(min(k, 300), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    assert np.allclose(ours, theirs.fit(train.features, train.labels).predict_proba(queries), atol=1e-4)


def test_stratified_part_takes_its_share_of_each_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 5, 1])
    part = heads.stratified_part(labels, 0.1, 2, np.random.default_rng(0))
    assert np.bincount(labels[part]).tolist() == [10, 5, 2, 1]
    assert (np.diff(part) > 0).all()
    other = heads.stratified_part(labels, 0.1, 2, np.random.default_rng(1))
    assert part.tolist() != other.tolist()
