"""Heads on frozen features against second implementations, and what the first MedSLIP's protocol got wrong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
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


@pytest.mark.parametrize("n,d,k", [(400, 30, 5), (60, 90, 3), (300, 12, 2)])
def test_a_sweep_in_float32_ends_at_the_minimum_in_float64(n, d, k):
    samples = clusters(n, d, k, seed=6)
    assert heads.COARSE == 1e-4  # of a sweep; below it all is float64
    x = samples.features.astype(np.float64)
    x, one_hot = (x - x.mean(0)) / x.std(0), np.eye(k)[samples.labels]
    for penalty, head in zip(heads.LAMBDAS[::5], heads.logistic_path(samples, heads.LAMBDAS[::5], k), strict=True):
        model = LogisticRegression(C=1 / (n * penalty), tol=1e-10, max_iter=10_000).fit(x, samples.labels)
        theirs = model.coef_.T, model.intercept_
        if k == 2:  # one vector, which stands for the difference of two: half of it each
            theirs = np.hstack([-theirs[0], theirs[0]]) / 2, np.r_[-theirs[1], theirs[1]] / 2
        values = []
        for weight, bias in ((head.weight, head.bias), theirs):
            prob = torch.from_numpy(x @ weight + bias).softmax(1).numpy()
            gradient = x.T @ (prob - one_hot) / n + penalty * (2 if k == 2 else 1) * weight
            length = penalty / 2 * (2 if k == 2 else 1) * np.square(weight).sum()
            values.append((log_loss(samples.labels, prob) + length, np.abs(gradient).max()))
        # The gradient ends a fit: on separated classes, whose objective goes to zero with the penalty, that is an
        # absolute bound. Asking for a part of the objective made fits of nearly constant features take minutes.
        assert values[0][0] == pytest.approx(values[1][0], rel=1e-4, abs=1e-5) and values[0][1] < 2e-3, penalty


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


@pytest.mark.parametrize("n,d,rank", [(400, 5, 5), (48, 30, 12), (600, 80, 64), (3, 4, 1)])
def test_the_distance_is_mahalanobis_on_the_leading_axes_and_on_what_they_leave(n, d, rank):
    """A quarter as many axes as samples, at most 64; the rest counts as one more axis."""
    rng = np.random.default_rng(n)
    features = (5 + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))).astype(np.float32)
    mean, scale = features.mean(0).astype(np.float64), features.std(0).astype(np.float64)
    head = heads.Linear(mean, scale, np.zeros((d, 2)), np.zeros(2))
    assert head.distance(features) is None
    head = head.knowing(features)
    axes, spread, of_axes = np.linalg.svd((features - mean) / scale, full_matrices=False)
    expected = np.square(np.sqrt(n) * axes[:, :rank]).sum(1)  # in units of the spread
    rest = np.square((axes * spread) @ of_axes - (axes * spread)[:, :rank] @ of_axes[:rank]).sum(1)
    expected = np.sqrt(expected + (rest / rest.mean() if rank < d else 0))
    found = head.distance(features)
    assert head.axes.shape == (d, rank)
    assert found == pytest.approx(expected / np.quantile(expected, 0.999), rel=2e-2)
    if n > 100:
        assert (found > 1).sum() == 1  # of 99.9% of them


def test_constant_features_have_one_axis_and_no_zero_to_divide_by():
    features = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    features[:, 1:] = features[:, :1]  # all of it on one axis
    head = heads.Linear(features.mean(0), features.std(0), np.zeros((3, 2)), np.zeros(2)).knowing(features)
    assert head.axes.shape == (3, 1) and np.isfinite(head.distance(features)).all()
    assert head.distance(features + np.float32([0, 0, 1])).min() > 1000  # off the line on which all were


def test_axes_of_less_than_a_millionth_of_the_largest_variance_are_none():
    noise = np.random.default_rng(0).normal(size=(200, 4))
    directions, _ = np.linalg.qr(noise - noise.mean(0))
    for smallest, rank in ((5e-7, 3), (2e-6, 4)):
        features = directions * np.sqrt(200 * 3 * np.array([1, 1e-2, 1e-4, smallest]))
        head = heads.Linear(features.mean(0), np.ones(4), np.zeros((4, 2)), np.zeros(2)).knowing(features)
        assert head.axes.shape == (4, rank)


def test_a_fit_that_ran_out_of_steps_says_so(monkeypatch, recwarn):
    samples, minimize = clusters(40, d=2), scipy.optimize.minimize
    heads.logistic_path(samples, [0.1, 0.01], 3)
    assert not recwarn.list

    def cut_short(*args, options, **more):
        return minimize(*args, options={**options, "maxiter": 1}, **more)

    monkeypatch.setattr(scipy.optimize, "minimize", cut_short)
    with pytest.warns(UserWarning, match="logistic regression at penalty 0.01: STOP: TOTAL NO. OF ITERATIONS"):
        heads.logistic_path(samples, [0.01], 3)


def test_balanced_weights_are_scikit_learns():
    samples = clusters(90, seed=5)
    samples = heads.Samples(samples.features, np.where(samples.labels == 2, np.arange(90) % 3, samples.labels))
    x = StandardScaler().fit_transform(samples.features.astype(np.float64))
    for penalty in (1.0, 0.01):
        (ours,) = heads.logistic_path(samples, [penalty], 3, 1e-7, balanced=True)
        theirs = LogisticRegression(C=1 / (penalty * 90), tol=1e-8, max_iter=10_000, class_weight="balanced")
        expected = theirs.fit(x, samples.labels).predict_proba(x)
        assert np.abs(ours(samples.features) - expected).max() < 1e-4


def test_adamw_weighs_classes_where_it_is_asked_to(monkeypatch):
    seen, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda logits, labels, weight: seen.append(weight) or cross_entropy(logits, labels, weight=weight),
    )
    samples = heads.Samples(np.random.default_rng(0).normal(size=(8, 2)), np.array([0, 0, 0, 0, 0, 0, 2, 2]))
    heads.train_medslip(samples, 4, 1e-2, seed=0)
    heads.train_medslip(samples, 4, 1e-2, seed=0, balanced=True)
    assert seen[:50] == [None] * 50 and len(seen) == 100
    assert seen[50].tolist() == pytest.approx([8 / (2 * 6), 1, 8 / (2 * 2), 1])


def test_the_penalties_are_five_a_decade_from_10():
    assert len(heads.LAMBDAS) == 30
    assert heads.LAMBDAS[::5] == pytest.approx([10, 1, 0.1, 1e-2, 1e-3, 1e-4])
    assert np.diff(np.log10(heads.LAMBDAS)) == pytest.approx(-0.2)


def test_the_first_medslips_protocol():
    assert (heads.MEDSLIP_SIZE, heads.MEDSLIP_EPOCHS, heads.MEDSLIP_BATCH) == (384, 50, 16)
    assert heads.MEDSLIP_RATES == pytest.approx(np.geomspace(1e-4, 1e-2, 5), rel=0.06)  # two a decade


def test_a_setting_is_scored_with_its_cross_entropy():
    labels, prob = np.array([0, 2, 1]), np.array([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.5, 0.25, 0.25]])
    found = heads.score_setting(labels, prob, accuracy)
    assert found == {"score": pytest.approx(2 / 3), "loss": pytest.approx(log_loss(labels, prob))}
    certain = heads.score_setting(np.array([0]), np.array([[0.0, 1.0]]), accuracy)
    assert certain["loss"] == pytest.approx(-np.log(1e-12))  # finite


def test_folds_hold_whole_groups_out_once_each():
    samples = clusters(60)
    samples = heads.Samples(samples.features, samples.labels, [{"patient": str(i // 10)} for i in range(60)])
    for folds in (2, 3, 6):
        parts = heads.folds_of(samples, heads.Choice(accuracy, folds=folds))
        assert len(parts) == folds
        held_out = [sorted({row["patient"] for row in out.rows}) for _, out in parts]
        assert sorted(sum(held_out, [])) == list("012345")
        for (fitted, _), names in zip(parts, held_out, strict=True):
            assert {row["patient"] for row in fitted.rows} == set("012345") - set(names)
    for folds in (1, 7):
        with pytest.raises(ValueError, match=f"{folds} folds: choose 2 to 6, the number of patients"):
            heads.folds_of(samples, heads.Choice(accuracy, folds=folds))


def test_over_folds_every_sample_is_held_out_once(monkeypatch):
    monkeypatch.setattr(heads, "LAMBDAS", (1.0, 0.03))
    train, val = clusters(60, d=4, seed=1), clusters(30, d=4, seed=2)
    train, val = (
        heads.Samples(s.features, s.labels, [{"patient": f"{name}{i // 3}"} for i in range(len(s.labels))])
        for name, s in (("a", train), ("b", val))
    )
    choice = heads.Choice(accuracy, folds=4, seed=3)
    head = heads.fit_logistic(train, val, 3, choice)
    labels, prob = head.held_out
    start, best = 0, head.chosen["lambda"]
    for fitted, out in heads.folds_of(train + val, choice):
        scaler = StandardScaler().fit(fitted.features.astype(np.float64))
        theirs = LogisticRegression(C=1 / (best * len(fitted.labels)), tol=1e-8, max_iter=10_000)
        theirs.fit(scaler.transform(fitted.features), fitted.labels)
        part = slice(start, start := start + len(out.labels))
        assert labels[part].tolist() == out.labels.tolist()
        assert np.abs(prob[part] - theirs.predict_proba(scaler.transform(out.features))).max() < 2e-2
    assert start == 90 and max(entry["score"] for entry in head.validation) == accuracy(labels, prob)


def test_weights_are_chosen_by_what_the_predictions_decide(monkeypatch):
    """And none of both where nothing decides between them."""
    monkeypatch.setattr(heads, "LAMBDAS", (1.0, 0.1, 0.01))
    train, val = clusters(120, d=3, k=2, seed=6), clusters(60, d=3, k=2, seed=7)
    rare = np.flatnonzero((train.labels == 0) | (np.arange(120) % 6 == 0))
    train = train[rare]  # 1 of class 1 for each 6

    def recall(labels, prob):
        return float((prob.argmax(1) == labels)[labels == 1].mean())

    for decide, balanced in ((recall, True), (lambda *found: 1 - recall(*found), False), (lambda *_: 0.5, False)):
        head = heads.fit_logistic(train, val, 2, heads.Choice(macro_auroc_of_two, "validated", decide))
        assert head.chosen["balanced"] is balanced
        decisions = [entry["decision"] for entry in head.validation if "decision" in entry]
        assert len(head.validation) == 6 and len(decisions) == 2
        assert decide(*head.held_out) == max(decisions)
    with pytest.raises(ValueError, match="unknown class weights 'some'; choose from none, balanced, validated"):
        heads.fit_logistic(train, val, 2, heads.Choice(macro_auroc_of_two, "some"))


def macro_auroc_of_two(labels: np.ndarray, prob: np.ndarray) -> float:
    return float(roc_auc_score(labels, prob[:, 1]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_heads_come_back_from_their_file(tmp_path, number):
    rng = np.random.default_rng(number)
    kept = [heads.Linear(*(rng.normal(size=size) for size in (4, 4, (4, 2), 2))) for _ in range(number)]
    kept[0] = kept[0].knowing(rng.normal(size=(30, 4)))
    heads.save_heads(tmp_path / "head.safetensors", kept, {"classes": ["a", "b"]})
    found, about = heads.load_heads(tmp_path / "head.safetensors")
    assert about == {"classes": ["a", "b"], "heads": number} and len(found) == number
    for one, other in zip(kept, found, strict=True):
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(other, name)) if value is not None else getattr(other, name) is None
