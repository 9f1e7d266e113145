"""Heads that are fitted on the features of a frozen tower.

A head is one linear layer on standardised features (logistic regression, or the first MedSLIP's AdamW), or no layer at
all (k nearest neighbours).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from scipy.special import softmax
from threadpoolctl import threadpool_limits
from torch import nn

import utils
from evaluation.nearest import nearest
from evaluation.products import product, product_of_columns
from runtime.integrity import SEAL, UNSEALED, check_seal, seal

# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Features (n, d) with labels (n,) and, where a table describes them, its rows (n)."""

    features: np.ndarray
    labels: np.ndarray
    rows: list[dict[str, str]] = field(default_factory=list)

    def __add__(self, other: Samples) -> Samples:
        features = np.concatenate([self.features, other.features])
        return Samples(features, np.concatenate([self.labels, other.labels]), self.rows + other.rows)

    def __getitem__(self, index: np.ndarray) -> Samples:
        rows = [self.rows[i] for i in index] if self.rows else []
        return Samples(self.features[index], self.labels[index], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------

Score = Callable[[np.ndarray, np.ndarray], float]  # labels (n,), probabilities (n, k) -> higher is better

# Penalties of the sweep, strongest first: lambda in mean cross-entropy + lambda / 2 * |weights|^2.
LAMBDAS = tuple(10.0 ** (1 - i / 5) for i in range(30))  # 10 to 1.6e-5, five a decade
# Products in one pass over the samples below which threads cost a fit more time than they save it.
ONE_THREAD = 10**9
COARSE = 1e-4  # tolerance from which a fit multiplies in float32, which takes half the time; its sums are in float64


Predict = Callable[[np.ndarray], np.ndarray]  # features (n, d) -> probabilities (n, k)
CLASS_WEIGHTS = ("none", "balanced", "validated")


@dataclass(frozen=True)
class Head:
    """A fitted head: `probabilities(features (n, d)) -> (n, k)`, and how its setting was chosen."""

    probabilities: Linear
    chosen: dict[str, Any]
    validation: list[dict[str, Any]]  # score and loss of each setting on the validation samples
    # The validation samples' labels (n,) and probabilities (n, k) by the chosen setting, fitted without them.
    held_out: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Linear:
    """Features (n, d) to probabilities (n, k): softmax((features - mean) / scale @ weight + bias)."""

    mean: np.ndarray  # (d,)
    scale: np.ndarray  # (d,)
    weight: np.ndarray  # (d, k)
    bias: np.ndarray  # (k,); minus infinity for a class that the training samples lack
    # How far standardised features may lie from the training samples: axes (d, r), the spread on each of them and of
    # what they leave (r + 1,), and the distance (1,) that 99.9% of the training samples do not exceed.
    axes: np.ndarray | None = None
    spread: np.ndarray | None = None
    limit: np.ndarray | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (n, d) to probabilities (n, k)."""
        standard = (features.astype(self.mean.dtype) - self.mean) / self.scale
        return softmax((standard @ self.weight + self.bias).astype(np.float64), axis=1)

    def knowing(self, features: np.ndarray) -> Linear:
        """The same head with what `distance` takes from the training features (n, d)."""
        standard = (features - self.mean) / self.scale
        centred, variance, vectors = _on_principal_axes(standard)
        rank = max(1, min(64, len(standard) // 4, int((variance > 1e-6 * variance[-1]).sum())))
        axes = vectors[:, -rank:]  # eigh sorts them from small to large
        rest = np.square(standard - standard @ axes @ axes.T).sum(1).mean()
        spread = np.sqrt(np.append(variance[-rank:], max(rest, 1e-12)))
        head = replace(self, axes=axes.astype(np.float32), spread=spread.astype(np.float32), limit=np.ones(1))
        found = head.distance(features)
        assert found is not None and len(centred) == len(features)
        return replace(head, limit=np.array([np.quantile(found, 0.999)]))

    def distance(self, features: np.ndarray) -> np.ndarray | None:
        """Mahalanobis distance (n,) from the training samples in units of their 99.9th percentile; None if not known.

        On their principal axes, with what these leave as one more; above 1 an image is unlike those of the training.
        """
        if self.axes is None or self.spread is None or self.limit is None:
            return None
        standard = (features.astype(np.float64) - self.mean) / self.scale
        on_axes = standard @ self.axes  # (n, r)
        rest = np.linalg.norm(standard - on_axes @ self.axes.T, axis=1)
        return np.linalg.norm(np.column_stack([on_axes, rest]) / self.spread, axis=1) / self.limit


def save_heads(path: Path, heads: Sequence[Linear], about: dict[str, Any]) -> None:
    """As safetensors, `about` (JSON) in the header: one head, or one for each of several findings."""
    tensors = {
        f"{i}.{name}" if len(heads) > 1 else name: np.ascontiguousarray(value)
        for i, head in enumerate(heads)
        for name, value in vars(head).items()
        if value is not None
    }
    described = {"about": json.dumps({**about, "heads": len(heads)}), SEAL: UNSEALED}
    data = bytearray(safetensors.numpy.save(tensors, described))
    seal(data)
    utils.atomic_write(path, lambda file: file.write(data))


def load_heads(path: Path) -> tuple[list[Linear], dict[str, Any]]:
    """(heads, about) of a file that `save_heads` wrote; ValueError for another or a damaged one."""
    utils.refuse_lfs_pointer(path)
    check_seal(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if spoilt := [name for name, value in tensors.items() if np.isnan(value).any()]:
            raise ValueError(f"{spoilt[0]} holds NaN")
        if about.get("heads", 1) == 1:
            return [Linear(**tensors)], about
        parts: list[dict[str, np.ndarray]] = [{} for _ in range(about["heads"])]
        for name, tensor in tensors.items():
            number, _, part = name.partition(".")
            parts[int(number)][part] = tensor
        return [Linear(**part) for part in parts], about
    except (IndexError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} holds no fitted head of this project: {error}") from error


@dataclass(frozen=True)
class Choice:
    """How a probe's setting is chosen."""

    score: Score  # of the validation samples; the highest is taken
    # none, balanced (each class weighs as much as any other in the loss) or validated: of the two the one whose
    # predictions `decide` better. Weights move the decision and hardly the ranking, so `decide` is no AUROC.
    class_weights: str = "none"
    decide: Score | None = None
    # 0: on the validation samples. Else each fold over the groups of training and validation samples in turn.
    folds: int = 0
    group: str = "patient"  # column of a sample's row
    seed: int = 0
    classes: Sequence[str] = ()  # their names, for messages


def score_setting(labels: np.ndarray, prob: np.ndarray, score: Score) -> dict[str, float]:
    """`score` and cross-entropy of probabilities (n, k) for labels (n,)."""
    own = prob[np.arange(len(labels)), labels]
    return {"score": score(labels, prob), "loss": float(-np.log(own.clip(min=1e-12)).mean())}


def best_of(sweep: list[dict[str, float]]) -> dict[str, float]:
    """The setting with the highest score; of those with the same score, the one with the lowest cross-entropy."""
    return max(sweep, key=lambda entry: (entry["score"], -entry["loss"]))


def folds_of(samples: Samples, choice: Choice) -> list[tuple[Samples, Samples]]:
    """(training, held-out) samples of each fold: whole groups, classes in proportion."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = [row[choice.group] for row in samples.rows]
    if choice.folds < 2 or len(set(groups)) < choice.folds:
        raise ValueError(f"{choice.folds} folds: choose 2 to {len(set(groups))}, the number of {choice.group}s")
    splitter = StratifiedGroupKFold(choice.folds, shuffle=True, random_state=choice.seed)
    parts = list(splitter.split(samples.labels, samples.labels, groups))
    for fitted, _ in parts:
        if len(left := np.unique(samples.labels[fitted])) < 2:
            only = choice.classes[left[0]] if choice.classes else left[0]
            raise ValueError(
                f"{choice.folds} folds of whole {choice.group}s: without one of them class {only} alone is left, "
                f"for a single {choice.group} has the others"
            )
    return [(samples[fitted], samples[held_out]) for fitted, held_out in parts]


def fit_chosen(
    train: Samples,
    val: Samples,
    name: str,
    settings: Sequence[float],
    fit: Callable[[Samples, Sequence[float], bool], Sequence[Predict]],
    refit: Callable[[Samples, float, bool], Linear],
    choice: Choice,
) -> Head:
    """The head whose setting is best on held-out samples, fitted again on all of train and val.

    Args:
        name: of the setting, such as lambda.
        fit: samples, settings and whether classes are balanced -> a predictor for each setting.
        refit: the same for the last fit.
    """
    if choice.class_weights not in CLASS_WEIGHTS:
        raise ValueError(f"unknown class weights {choice.class_weights!r}; choose from {', '.join(CLASS_WEIGHTS)}")
    parts = folds_of(train + val, choice) if choice.folds else [(train, val)]
    labels = np.concatenate([held_out.labels for _, held_out in parts])
    validation, candidates = [], []
    for balanced in {"none": [False], "balanced": [True], "validated": [False, True]}[choice.class_weights]:
        predictors = [fit(fitted, settings, balanced) for fitted, _ in parts]
        weighting = {} if choice.class_weights == "none" else {"balanced": balanced}

        def held_out_by(i: int, predictors: list[Sequence[Predict]] = predictors) -> np.ndarray:
            """Probabilities of all held-out samples by setting i, one setting in memory at a time."""
            return np.concatenate([fold[i](out.features) for fold, (_, out) in zip(predictors, parts, strict=True)])

        sweep = [
            {name: setting, **weighting, **score_setting(labels, held_out_by(i), choice.score)}
            for i, setting in enumerate(settings)
        ]
        best = best_of(sweep)
        prob = held_out_by(sweep.index(best))
        if choice.class_weights == "validated":
            best["decision"] = (choice.decide or choice.score)(labels, prob)
        validation += sweep
        candidates.append((best, prob))
    best, prob = max(candidates, key=lambda candidate: candidate[0].get("decision", 0.0))  # the first of equals
    chosen = {key: best[key] for key in (name, "balanced") if key in best}
    return Head(refit(train + val, best[name], best.get("balanced", False)), chosen, validation, (labels, prob))


def fit_logistic(train: Samples, val: Samples, num_classes: int, choice: Choice | Score) -> Head:
    """L2-regularised multinomial logistic regression; the penalty that is best on `val` is kept.

    The last fit is on train and val together with the same penalty for each sample, so no labelled sample is
    wasted.
    """
    return fit_chosen(
        train, val, "lambda", LAMBDAS,
        lambda samples, penalties, balanced: logistic_path(samples, penalties, num_classes, balanced=balanced),
        lambda samples, best, balanced: logistic_path(samples, [best], num_classes, 1e-6, balanced)[0],
        choice if isinstance(choice, Choice) else Choice(choice),
    )  # fmt: skip


def class_weights(labels: np.ndarray) -> np.ndarray:
    """A weight for each sample (n,), their mean being 1, with which each class weighs the same."""
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(classes) * counts))[place]


def logistic_path(
    samples: Samples,
    penalties: Sequence[float],
    num_classes: int,
    tolerance: float = 1e-4,
    balanced: bool = False,
) -> list[Linear]:
    """Logistic regression at each penalty, in their order: functions from features (n, d) to probabilities (n, k).

    Minimises mean cross-entropy + penalty / 2 * |W|^2 over standardised features until no component of the gradient
    exceeds `tolerance`. The bias is free; classes without samples get probability zero. Two
    classes have one weight vector, as in scikit-learn, whose C is 1 / (n * penalty). With `balanced` the mean is
    weighted by `class_weights`.

    One eigendecomposition of the features' covariance serves all penalties: on its axes the curvature of the
    loss at zero is diagonal, variance / k + penalty, and scaling the variables by its root lets L-BFGS make few
    steps even where axes differ by orders of magnitude. Each fit starts where the three before it point (their
    solutions lie on a smooth curve), so a sweep over evenly spaced log penalties costs little more than a fit.
    """
    from scipy.optimize import minimize
    from sklearn.preprocessing import StandardScaler

    classes, labels = np.unique(samples.labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"logistic regression needs samples of two classes; all are of class {classes.tolist()}")
    if not np.isfinite(samples.features).all():
        raise ValueError("the features are not finite: the tower's weights, or an image, must be corrupt")
    x = samples.features.astype(np.float64)  # a copy, standardised in place
    scaler = StandardScaler(copy=False).fit(x)
    # A sweep's tolerance lies far above what float32 leaves of a gradient, a last fit's may not.
    working = np.float32 if tolerance >= COARSE else np.float64
    x, variance, axes = _on_principal_axes(np.asarray(scaler.transform(x)), working)
    shape = (len(variance) + 1, len(classes))  # the last row is the bias
    curve = [np.zeros(shape)]
    weights = (class_weights(labels) if balanced else np.ones(len(labels))) / len(labels)
    with threadpool_limits(1 if x.size * len(classes) < ONE_THREAD else None):
        for penalty in penalties:
            # One vector for the difference of two classes, halved between them, has half the squared length.
            strength = penalty * (2 if len(classes) == 2 else 1)
            scale = 1 / np.sqrt(np.append(variance / len(classes) + strength, 1 / len(classes)))[:, None]  # (r + 1, 1)
            # The parabola through the last three solutions; until there are three, the last one.
            start = 3 * (curve[-1] - curve[-2]) + curve[-3] if len(curve) > 3 else curve[-1]
            result = minimize(
                _scaled_loss, (start / scale).ravel(), args=(x, labels, weights, strength, scale), jac=True,
                method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0.0},
            )  # fmt: skip
            if result.status == 1:
                warnings.warn(f"logistic regression at penalty {penalty:g}: {result.message}", stacklevel=2)
            curve.append(result.x.reshape(shape) * scale)
    return [_linear(scaler, axes @ solution[:-1], solution[-1], classes, num_classes) for solution in curve[1:]]


def _on_principal_axes(x: np.ndarray, working: type = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred features (n, d) on their principal axes (n, r) of type `working`, the variances (r,) and the axes (d, r).

    A penalised solution lies in the span of the samples, so directions without variance are skipped. The
    smaller of the two Gram matrices is decomposed.
    """
    n, d = x.shape
    variance, vectors = np.linalg.eigh(x.T @ x / n if d <= n else x @ x.T / n)
    kept = variance > 1e-14 * variance[-1]
    variance, vectors = variance[kept], vectors[:, kept]
    if d > n:
        vectors = x.T @ (vectors / np.sqrt(n * variance))  # (d, r)
    return product(x.astype(working, copy=False), vectors.astype(working, copy=False)), variance, vectors


def _scaled_loss(
    scaled: np.ndarray, x: np.ndarray, labels: np.ndarray, of_sample: np.ndarray, strength: float, scale: np.ndarray
) -> tuple[float, np.ndarray]:
    """Penalised cross-entropy, weighed by `of_sample` (n,), at the weights scale * scaled; its gradient by `scaled`."""
    weight = scaled.reshape(len(scale), -1) * scale  # (r + 1, k)
    rows = np.arange(len(x))
    logits = product(x, weight[:-1].astype(x.dtype)) + weight[-1].astype(x.dtype)  # (n, k)
    logits -= logits.max(1, keepdims=True)
    own = logits[rows, labels].astype(np.float64)  # (n,), at most 0
    np.exp(logits, out=logits)
    likely = logits[rows, labels]
    logits[rows, labels] = 0
    others = logits.sum(1)
    total = likely + others
    # 1 + others less 1 would leave nothing of what is small, which on separated classes is all there is.
    logs = np.where(own == 0, np.log1p(others.astype(np.float64)), np.log(total.astype(np.float64)) - own)
    loss = logs @ of_sample + strength / 2 * np.square(weight[:-1]).sum()
    logits[rows, labels] = -others
    logits /= total[:, None]  # probabilities, less 1 at the sample's own class
    logits *= of_sample[:, None].astype(x.dtype)
    gradient = np.vstack([product_of_columns(logits, x).T + strength * weight[:-1], logits.sum(0, dtype=np.float64)])
    return loss, (gradient * scale).ravel()


def _linear(scaler: Any, weight: np.ndarray, bias: np.ndarray, classes: np.ndarray, num_classes: int) -> Linear:
    """The head with a column for each of num_classes classes; those that the training samples lack are never called."""
    every = np.zeros((len(weight), num_classes)), np.full(num_classes, -np.inf)
    every[0][:, classes], every[1][classes] = weight, bias
    return Linear(np.asarray(scaler.mean_), np.asarray(scaler.scale_), *every)


# The first MedSLIP's published protocol. It has no usable learning rate (restarted every 5 batches), so the
# rate is chosen on the validation samples.
MEDSLIP_SIZE = 384  # pixels
MEDSLIP_EPOCHS = 50
MEDSLIP_BATCH = 16
MEDSLIP_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def fit_medslip(train: Samples, val: Samples, num_classes: int, choice: Choice | Score) -> Head:
    """A linear layer by AdamW as the first MedSLIP trained one; the learning rate that is best on `val` is kept.

    The last fit is on train and val together.
    """
    choice = choice if isinstance(choice, Choice) else Choice(choice)

    def fit(samples: Samples, rates: Sequence[float], balanced: bool) -> list[Linear]:
        return [train_medslip(samples, num_classes, rate, choice.seed, balanced) for rate in rates]

    return fit_chosen(
        train, val, "lr", MEDSLIP_RATES, fit, lambda samples, rate, balanced: fit(samples, [rate], balanced)[0], choice
    )


def train_medslip(samples: Samples, num_classes: int, rate: float, seed: int, balanced: bool = False) -> Linear:
    """50 epochs over shuffled batches of 16, one cosine over the whole run; returns features -> probabilities."""
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(seed)
    scaler = StandardScaler().fit(samples.features)
    x = torch.as_tensor(scaler.transform(samples.features), dtype=torch.float32)  # (n, d)
    y = torch.as_tensor(samples.labels)
    weight = None
    if balanced:
        weight = torch.ones(num_classes)
        weight[y] = torch.as_tensor(class_weights(samples.labels), dtype=torch.float32)
    layer = nn.Linear(x.shape[1], num_classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate)
    starts = range(0, len(x), MEDSLIP_BATCH)
    total = MEDSLIP_EPOCHS * len(starts)
    for epoch in range(MEDSLIP_EPOCHS):
        order = torch.randperm(len(x))
        for step, start in enumerate(starts, epoch * len(starts)):
            batch = order[start : start + MEDSLIP_BATCH]
            for group in optimizer.param_groups:
                group["lr"] = utils.cosine_lr(step, total, rate, 0.0)
            optimizer.zero_grad()
            F.cross_entropy(layer(x[batch]), y[batch], weight=weight).backward()
            optimizer.step()

    weight, bias = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    standard = np.asarray(scaler.mean_), np.asarray(scaler.scale_)
    return Linear(*(part.astype(np.float32) for part in (*standard, weight, bias)))


PROTOCOLS = {"logistic": fit_logistic, "medslip": fit_medslip}


@torch.inference_mode()
def knn_probabilities(
    train: Samples, features: np.ndarray, k: int, num_classes: int, device: torch.device, chunk: int = 1024
) -> np.ndarray:
    """Votes (n, classes) of the k training samples with the highest cosine, each weighing exp(cosine / 0.07).

    Temperature and weights as in Wu et al. 2018, section 3.4. Fewer than k training samples all vote.
    """
    bank = None  # (N, d), where `nearest` does not read the features as they are
    if device.type != "cpu":
        bank = F.normalize(torch.as_tensor(train.features, device=device), dim=1)
    labels = torch.as_tensor(train.labels, device=device)
    votes = []
    for part in np.split(features, range(chunk, len(features), chunk)):
        if bank is None:
            number, product = nearest(part, train.features, k, cosines=True)
            neighbour, cosine = torch.from_numpy(number), torch.from_numpy(product)  # (B, k)
        else:
            of_bank = F.normalize(torch.as_tensor(part, device=device), dim=1) @ bank.T
            cosine, neighbour = of_bank.topk(min(k, len(bank)), dim=1)
        weight = ((cosine - cosine[:, :1]) / 0.07).exp()  # relative to the nearest, so that none overflows
        vote = weight.new_zeros(len(part), num_classes).scatter_add_(1, labels[neighbour], weight)
        votes.append((vote / vote.sum(1, keepdim=True)).cpu().numpy())
    return np.concatenate(votes)


def stratified_part(labels: np.ndarray, fraction: float, least: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers, in order, of about `fraction` of each class: at least `least` of it, or all where it has fewer."""
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        parts.append(rng.permutation(members)[: max(least, round(fraction * len(members)))])
    return np.sort(np.concatenate(parts))
