"""Frozen image towers: their features, extracted once, and the heads that are fitted on them.

The tower stays in eval mode throughout, so nothing in it can move. A head is one linear layer on standardised
features (logistic regression, or the first MedSLIP's AdamW), or no layer at all (k nearest neighbours).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import models
import utils
from transforms import Preprocess, UnreadableImage

# ----------------------------------------------------------------------------------------------------------
# The tower


@dataclass
class Backbone:
    """A frozen image tower: images (B, 3, S, S) prepared by `preprocess` to features (B, d)."""

    encode: Callable[[Tensor], Tensor]
    model: nn.Module  # what holds the weights
    preprocess: Preprocess
    features: str  # backbone or projection
    name: str  # for people

    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of all weights and buffers on the image side."""
        image_side = ("visual.", "image_projection")
        weights = self.model.state_dict()
        return utils.weights_sha256({name: weights[name] for name in weights if name.startswith(image_side)})

    @torch.inference_mode()
    def width(self) -> int:
        """The number of features, d."""
        device = next(self.model.parameters()).device
        size = self.preprocess.size
        return self.encode(torch.zeros(1, 3, size, size, device=device)).shape[1]


def load_backbone(
    args: argparse.Namespace, device: torch.device, features: str = "backbone", size: int | None = None
) -> Backbone:
    """The tower that --pretrained, --model or --arch names, in eval mode.

    `features` projection gives the tower's features in the space shared with captions; `size` is the side of
    the images where it is not the model's own.
    """
    untrained = f"untrained (seed {args.seed})"
    if args.pretrained:
        loaded = models.load_pretrained(args.pretrained, model=args.model)
        model, name = loaded.model, loaded.source
        if args.untrained:
            model, name = rebuilt(model, args.seed), f"{model.name}, {untrained}"
    else:
        utils.seed_everything(args.seed)
        # --arch names a timm tower only; a CLIP model around it has the projection as well.
        of_arch = {} if args.model else {"vision_tower": args.arch}
        model = models.create_model(args.model or "CLIP_VITB16", **of_arch)
        name = f"{args.model or args.arch}, {untrained}"
    if features == "projection" and not model.objective.text:
        raise ValueError(f"{name} has no projection: use --features backbone")
    if size is not None and size != model.preprocess.size:
        model = at_size(model, size)
    model = model.eval().requires_grad_(False).to(device)
    encode = model.encode_image if features == "projection" else model.visual
    return Backbone(encode, model, model.preprocess, features, name)


def rebuilt(model: nn.Module, seed: int, **changes) -> nn.Module:
    """A model of the same settings, but for `changes`, with fresh weights."""
    utils.seed_everything(seed)
    config = {key: value for key, value in model.config.items() if key != "objective"}
    fresh = models.create_model(model.name, **{**config, **changes})
    fresh.preprocess = model.preprocess
    return fresh


def at_size(model: nn.Module, size: int) -> nn.Module:
    """The same weights for images of `size` pixels; a ViT's position embeddings are resampled."""
    resized = rebuilt(model, seed=0, image_size=size)
    weights = models.resize_position_embeddings(model.state_dict(), resized)
    models.load_weights(resized, weights, f"{model.name} at {size} pixels")
    resized.preprocess = replace(model.preprocess, size=size)
    return resized


# ----------------------------------------------------------------------------------------------------------
# Features


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


class Images(Dataset):
    """The images of a dataset by number: (i, tensor), or (i, None) for an unreadable one that may be skipped."""

    def __init__(self, dataset: Dataset, numbers: range, skip_broken: bool):
        self.dataset, self.numbers, self.skip_broken = dataset, numbers, skip_broken

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None]:
        number = self.numbers[i]
        try:
            return number, self.dataset[number][0]
        except (UnreadableImage, FileNotFoundError):
            if not self.skip_broken:
                raise
            return number, None


def collate(samples: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    kept = [(number, image) for number, image in samples if image is not None]
    return [number for number, _ in kept], torch.stack([image for _, image in kept]) if kept else None


@dataclass(frozen=True)
class Loading:
    """How features are extracted and where they are kept."""

    output_dir: Path
    batch_size: int  # images in one pass, a process
    workers: int  # loader processes of the node
    skip_broken: bool = False  # leave out images that cannot be decoded, instead of an error

    def workers_of(self, processes: utils.Distributed) -> int:
        """Loader processes for this one among the node's processes; no more than there are cores."""
        return min(self.workers, utils.cores()) // processes.world_size


@torch.inference_mode()
def extract(
    backbone: Backbone, dataset: Dataset, title: str, loading: Loading, processes: utils.Distributed
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) in float32 and the numbers (n,) of the samples they are of, in order, on every process.

    Each process encodes every world_size-th image. Numbers are missing only where unreadable images are
    skipped; otherwise an unreadable image is an UnreadableImage that names it.
    """
    mine = Images(dataset, range(processes.rank, len(dataset), processes.world_size), loading.skip_broken)
    workers = loading.workers_of(processes)
    loader = DataLoader(mine, loading.batch_size, num_workers=workers, collate_fn=collate)
    numbers, features = [], []
    backbone.model.eval()
    for batch, images in tqdm(loader, desc=title, disable=None if processes.is_main else True, leave=False):
        if images is not None:
            numbers += batch
            features.append(backbone.encode(images.to(processes.device)).float().cpu().numpy())
    parts = utils.gather_objects(processes, (numbers, features))
    numbers = np.array([number for part, _ in parts for number in part], dtype=np.int64)
    if len(numbers) == 0:
        raise ValueError(f"{title}: none of the {len(dataset)} images can be decoded")
    order = np.argsort(numbers)
    return np.concatenate([batch for _, part in parts for batch in part])[order], numbers[order]


def extract_or_reuse(
    backbone: Backbone, dataset: Dataset, title: str, loading: Loading, processes: utils.Distributed
) -> tuple[np.ndarray, np.ndarray]:
    """As `extract`, or from the output directory where the same weights have seen the same images before.

    The file's name carries a hash of the weights, the preparation, the kind of features and the images
    (path, size and time of each, or the bytes of those in memory): another run's features are never taken.
    """
    key = hashlib.sha256()
    # Equal weights compute something else with another number of heads, or under another release.
    architecture = (getattr(backbone.model, "config", None), timm.__version__)
    settings = (
        backbone.fingerprint(),
        architecture,
        backbone.features,
        backbone.preprocess.to_dict(),
        loading.skip_broken,
    )
    key.update(json.dumps(settings).encode())
    for part in identify(dataset):
        key.update(part)
    file = loading.output_dir / "features" / f"{title}_{key.hexdigest()[:32]}.npz"
    if all(utils.gather_objects(processes, file.is_file())):
        with np.load(file, allow_pickle=False) as stored:
            return stored["features"], stored["numbers"]
    features, numbers = extract(backbone, dataset, title, loading, processes)
    if processes.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        utils.atomic_write(file, lambda out: np.savez(out, features=features, numbers=numbers))
    return features, numbers


def identify(dataset: Dataset) -> Iterator[bytes]:
    """What tells this dataset's images, in their order, from any others."""
    if hasattr(dataset, "pixels"):  # downstream.ImageArray
        yield f"{dataset.pixels.shape} {dataset.upsample}".encode()
        yield np.ascontiguousarray(dataset.pixels).tobytes()
        return
    for i in range(len(dataset)):  # CbisLesions has whole paths, downstream.ImageFiles relative ones
        path = Path(getattr(dataset, "root", ""), dataset.paths[i]).absolute()
        status = path.stat() if path.exists() else None  # absent: extraction says so, or leaves it out
        yield f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode()


# ----------------------------------------------------------------------------------------------------------
# Heads

Score = Callable[[np.ndarray, np.ndarray], float]  # labels (n,), probabilities (n, k) -> higher is better

# Penalties of the sweep, strongest first: lambda in mean cross-entropy + lambda / 2 * |weights|^2.
LAMBDAS = tuple(10.0 ** (1 - i / 5) for i in range(30))  # 10 to 1.6e-5, five a decade
# Products in one pass over the samples below which threads cost a fit more time than they save it.
ONE_THREAD = 10**9


@dataclass(frozen=True)
class Head:
    """A fitted head: `probabilities(features (n, d)) -> (n, k)`, and how its setting was chosen."""

    probabilities: Callable[[np.ndarray], np.ndarray]
    chosen: dict[str, float]
    validation: list[dict[str, float]]  # score and loss of each setting on the validation samples


def score_setting(labels: np.ndarray, prob: np.ndarray, score: Score) -> dict[str, float]:
    own = prob[np.arange(len(labels)), labels]
    return {"score": score(labels, prob), "loss": float(-np.log(own.clip(min=1e-12)).mean())}


def best_of(sweep: list[dict[str, float]]) -> dict[str, float]:
    """The setting with the highest score; of those with the same score, the one with the lowest cross-entropy."""
    return max(sweep, key=lambda entry: (entry["score"], -entry["loss"]))


def fit_logistic(train: Samples, val: Samples, num_classes: int, score: Score, seed: int = 0) -> Head:
    """L2-regularised multinomial logistic regression; the penalty that is best on `val` is kept.

    The last fit is on train and val together with the same penalty for each sample, so no labelled sample is
    wasted. The optimum is unique: `seed` has no influence.
    """
    path = logistic_path(train, LAMBDAS, num_classes)
    sweep = [
        {"lambda": penalty, **score_setting(val.labels, predict(val.features), score)}
        for penalty, predict in zip(LAMBDAS, path, strict=True)
    ]
    best = best_of(sweep)["lambda"]
    (predict,) = logistic_path(train + val, [best], num_classes, tolerance=1e-6)
    return Head(predict, {"lambda": best}, sweep)


def logistic_path(
    samples: Samples, penalties: Sequence[float], num_classes: int, tolerance: float = 1e-4
) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Logistic regression at each penalty, in their order: functions from features (n, d) to probabilities (n, k).

    Minimises mean cross-entropy + penalty / 2 * |W|^2 over standardised features in float64 until no component
    of the gradient exceeds `tolerance`. The bias is free; classes without samples get probability zero. Two
    classes have one weight vector, as in scikit-learn, whose C is 1 / (n * penalty).

    One eigendecomposition of the features' covariance serves all penalties: on its axes the curvature of the
    loss at zero is diagonal, variance / k + penalty, and scaling the variables by its root lets L-BFGS make few
    steps even where axes differ by orders of magnitude. Each fit starts where the three before it point (their
    solutions lie on a smooth curve), so a sweep over evenly spaced log penalties costs little more than a fit.
    """
    classes, labels = np.unique(samples.labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"logistic regression needs samples of two classes; all are of class {classes.tolist()}")
    if not np.isfinite(samples.features).all():
        raise ValueError("the features are not finite: the tower's weights, or an image, must be broken")
    scaler = StandardScaler().fit(samples.features.astype(np.float64))
    x, variance, axes = _on_principal_axes(scaler.transform(samples.features.astype(np.float64)))
    shape = (len(variance) + 1, len(classes))  # the last row is the bias
    curve = [np.zeros(shape)]
    with threadpool_limits(1 if x.size * len(classes) < ONE_THREAD else None):
        for penalty in penalties:
            # One vector for the difference of two classes, halved between them, has half the squared length.
            strength = penalty * (2 if len(classes) == 2 else 1)
            scale = 1 / np.sqrt(np.append(variance / len(classes) + strength, 1 / len(classes)))[:, None]  # (r + 1, 1)
            # The parabola through the last three solutions; until there are three, the last one.
            start = 3 * (curve[-1] - curve[-2]) + curve[-3] if len(curve) > 3 else curve[-1]
            result = minimize(
                _scaled_loss, (start / scale).ravel(), args=(x, labels, strength, scale), jac=True,
                method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0.0},
            )  # fmt: skip
            if result.status == 1:
                warnings.warn(f"logistic regression at penalty {penalty:g}: {result.message}", stacklevel=2)
            curve.append(result.x.reshape(shape) * scale)
    return [
        partial(_probabilities, scaler, axes @ solution[:-1], solution[-1], classes, num_classes)
        for solution in curve[1:]
    ]


def _on_principal_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred features (n, d) on their principal axes (n, r), the variances (r,) and the axes (d, r).

    A penalised solution lies in the span of the samples, so directions without variance are skipped. The
    smaller of the two Gram matrices is decomposed.
    """
    n, d = x.shape
    variance, vectors = np.linalg.eigh(x.T @ x / n if d <= n else x @ x.T / n)
    kept = variance > 1e-14 * variance[-1]
    variance, vectors = variance[kept], vectors[:, kept]
    if d > n:
        vectors = x.T @ (vectors / np.sqrt(n * variance))  # (d, r)
    return x @ vectors, variance, vectors


def _scaled_loss(
    scaled: np.ndarray, x: np.ndarray, labels: np.ndarray, strength: float, scale: np.ndarray
) -> tuple[float, np.ndarray]:
    """Penalised mean cross-entropy at the weights scale * scaled, and its gradient by `scaled`."""
    weight = scaled.reshape(len(scale), -1) * scale  # (r + 1, k)
    rows = np.arange(len(x))
    logits = x @ weight[:-1] + weight[-1]  # (n, k)
    logits -= logits.max(1, keepdims=True)
    own = logits[rows, labels]
    np.exp(logits, out=logits)
    total = logits.sum(1, keepdims=True)
    loss = (np.log(total[:, 0]) - own).mean() + strength / 2 * np.square(weight[:-1]).sum()
    logits /= total  # probabilities
    logits[rows, labels] -= 1
    logits /= len(x)
    gradient = np.vstack([x.T @ logits + strength * weight[:-1], logits.sum(0)])
    return loss, (gradient * scale).ravel()


def _probabilities(
    scaler: StandardScaler, weight: np.ndarray, bias: np.ndarray, classes: np.ndarray, num_classes: int,
    features: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Probabilities (n, num_classes) with zeros for classes that the training samples lack."""
    prob = np.zeros((len(features), num_classes))
    prob[:, classes] = softmax(scaler.transform(features.astype(np.float64)) @ weight + bias, axis=1)
    return prob


# The first MedSLIP's published protocol. It has no usable learning rate (restarted every 5 batches), so the
# rate is chosen on the validation samples.
MEDSLIP_SIZE = 384  # pixels
MEDSLIP_EPOCHS = 50
MEDSLIP_BATCH = 16
MEDSLIP_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def fit_medslip(train: Samples, val: Samples, num_classes: int, score: Score, seed: int = 0) -> Head:
    """A linear layer by AdamW as the first MedSLIP trained one; the learning rate that is best on `val` is kept.

    The last fit is on train and val together.
    """
    sweep = []
    for rate in MEDSLIP_RATES:
        predict = train_medslip(train, num_classes, rate, seed)
        sweep.append({"lr": rate, **score_setting(val.labels, predict(val.features), score)})
    best = best_of(sweep)["lr"]
    return Head(train_medslip(train + val, num_classes, best, seed), {"lr": best}, sweep)


def train_medslip(samples: Samples, num_classes: int, rate: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """50 epochs over shuffled batches of 16, one cosine over the whole run; returns features -> probabilities."""
    torch.manual_seed(seed)
    scaler = StandardScaler().fit(samples.features)
    x = torch.as_tensor(scaler.transform(samples.features), dtype=torch.float32)  # (n, d)
    y = torch.as_tensor(samples.labels)
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
            F.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()

    @torch.inference_mode()
    def predict(features: np.ndarray) -> np.ndarray:
        return layer(torch.as_tensor(scaler.transform(features), dtype=torch.float32)).softmax(1).numpy()

    return predict


@torch.inference_mode()
def knn_probabilities(
    train: Samples, features: np.ndarray, k: int, num_classes: int, device: torch.device, chunk: int = 256
) -> np.ndarray:
    """Votes (n, classes) of the k training samples with the highest cosine, each weighing exp(cosine / 0.07).

    Temperature and weights as in Wu et al. 2018, section 3.4. Fewer than k training samples all vote.
    """
    bank = F.normalize(torch.as_tensor(train.features, device=device), dim=1)  # (N, d)
    labels = torch.as_tensor(train.labels, device=device)
    votes = []
    for part in torch.as_tensor(features, device=device).split(chunk):
        cosine, nearest = (F.normalize(part, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)  # (B, k)
        weight = ((cosine - cosine[:, :1]) / 0.07).exp()  # relative to the nearest, so that none overflows
        vote = weight.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weight)
        votes.append((vote / vote.sum(1, keepdim=True)).cpu().numpy())
    return np.concatenate(votes)


def stratified_part(labels: np.ndarray, share: float, least: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers, in order, of about `share` of each class: at least `least` of it, or all where it has fewer."""
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        parts.append(rng.permutation(members)[: max(least, round(share * len(members)))])
    return np.sort(np.concatenate(parts))
