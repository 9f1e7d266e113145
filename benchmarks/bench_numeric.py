"""The numeric hot paths beside what else one would call, each measurement in a process of its own.

    python benchmarks/bench_numeric.py intervals    AUROC over resampled patients: scikit-learn, NumPy all at once
    python benchmarks/bench_numeric.py search       nearest vectors: faiss, NumPy's argpartition
    python benchmarks/bench_numeric.py table        a CSV of captions: the csv module, each file asked for
    python benchmarks/bench_numeric.py logistic     a path of penalties: scikit-learn's lbfgs, each from the one before

Printed are CPU seconds and the memory that the work takes beyond its data, medians of --runs; runs of the methods
alternate. Each method's answer is compared with ours.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.special import log_softmax

# Returns the answer, a list of numbers on which methods agree, or what works it out after the time is taken.
Work = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One hot path: sizes, and for each method the sizes it does and what prepares its data."""

    sizes: tuple[str, ...]
    methods: dict[str, Callable[[str], Work]]  # the first is ours
    tolerance: float = 0.0  # between answers
    skipped: tuple[tuple[str, str], ...] = ()  # (method, size) that would not fit


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------

CLASSES, RESAMPLES, SOME = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT"), 2000, 40


def table(size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (n,), probabilities (n, 3) with ties, and patients with two rows or so."""
    n, rng = int(size), np.random.default_rng(0)
    labels, patients = rng.integers(0, 3, n), rng.integers(0, n // 2, n).astype(str)
    prob = 0.7 * rng.dirichlet(np.ones(3), n)
    prob[np.arange(n), labels] += 0.3
    prob = prob.round(3)
    return labels, prob / prob.sum(1, keepdims=True), patients


def bounds_ours(size: str) -> Work:
    import scipy.stats  # noqa: F401  (what the first call would load is not what is timed)
    import sklearn.metrics  # noqa: F401

    from evaluation.resamples import Resamples

    labels, prob, patients = table(size)

    def work() -> list[float]:
        found = Resamples(labels, patients, CLASSES, number=RESAMPLES).intervals(prob)["auroc"]
        return [float(found.low or 0), float(found.high or 0)]

    return work


def bounds_numpy(size: str) -> Work:
    """The weighted statistic of all resamples at once, as one writes it down."""
    labels, prob, patients = table(size)

    def work() -> list[float]:
        names, patient = np.unique(patients, return_inverse=True)
        even = np.full(len(names), 1 / len(names))
        weights = np.random.default_rng(0).multinomial(len(names), even, size=RESAMPLES)[:, patient]
        areas = []
        for c in range(3):
            order = np.argsort(prob[:, c], kind="stable")
            starts = np.flatnonzero(np.r_[True, np.diff(prob[order, c]) > 0])
            own, sorted_weights = (labels == c)[order], weights[:, order].astype(np.float64)
            positive = np.add.reduceat(sorted_weights * own, starts, axis=1)
            negative = np.add.reduceat(sorted_weights * ~own, starts, axis=1)
            below = np.cumsum(negative, axis=1) - negative / 2
            areas.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
        return np.quantile(np.mean(areas, axis=0), (0.025, 0.975)).tolist()

    return work


def bounds_sklearn(size: str) -> Work:
    """A call for each resample; SOME of them, and the time counted as often as that goes into RESAMPLES."""
    from sklearn.metrics import roc_auc_score

    labels, prob, patients = table(size)

    def work() -> list[float]:
        names, patient = np.unique(patients, return_inverse=True)
        even, rng = np.full(len(names), 1 / len(names)), np.random.default_rng(0)
        for _ in range(SOME):
            weights = rng.multinomial(len(names), even)[patient]
            roc_auc_score(labels, prob, multi_class="ovr", sample_weight=weights)
        return []

    return work


# ---------------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------------

NEAREST = 10


def vectors_of(size: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (Q, d) and (n, d) of a size QxNxD."""
    q, n, d = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((q + n, d), np.float32)
    for start in range(0, len(vectors), 65536):  # a norm takes a copy
        vectors[start : start + 65536] /= np.linalg.norm(vectors[start : start + 65536], axis=1, keepdims=True)
    return vectors[:q], vectors[q:]


def search_ours(size: str) -> Work:
    from evaluation.nearest import nearest

    queries, bank = vectors_of(size)
    return lambda: nearest(queries, bank, NEAREST)[0].ravel().tolist()


def search_numpy(size: str) -> Work:
    """All products, argpartition, and the few sorted; a hundred queries at a time, as memory would have it."""
    queries, bank = vectors_of(size)

    def work() -> list[int]:
        found = []
        for part in np.split(queries, range(100, len(queries), 100)):
            products = part @ bank.T
            few = np.argpartition(products, -NEAREST, axis=1)[:, -NEAREST:]
            order = np.argsort(-np.take_along_axis(products, few, 1), axis=1)
            found.append(np.take_along_axis(few, order, 1))
        return np.concatenate(found).ravel().tolist()

    return work


def search_faiss(size: str) -> Work:
    """faiss' function for exact search in an array, which needs no copy of it."""
    import faiss  # pyright: ignore[reportMissingImports]

    queries, bank = vectors_of(size)
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return lambda: faiss.knn(queries, bank, NEAREST, metric=faiss.METRIC_INNER_PRODUCT)[1].ravel().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# A table of captions
# ---------------------------------------------------------------------------------------------------------------------


def captions_of(size: str) -> tuple[tempfile.TemporaryDirectory, Path]:
    """A folder with train.csv for a size ROWSxIMAGES, and its path; the images are empty files."""
    rows, images = map(int, size.split("x"))
    kept = tempfile.TemporaryDirectory()
    root = Path(kept.name)
    (root / "images").mkdir()
    for i in range(images):
        (root / f"images/{i:07d}.jpg").touch()
    with open(root / "train.csv", "w") as file:
        file.write("image,caption\n")
        for i in range(rows):
            file.write(f'images/{i % images:07d}.jpg,"radiograph number {i} of the chest, in a frontal view"\n')
    return kept, root


def table_ours(size: str) -> Work:
    from inputs.sources import Csv

    kept, root = captions_of(size)

    def work() -> list[int]:
        assert kept.name == str(root)  # which goes with `kept`
        reader = Csv(root)
        return [len(reader), len(reader.texts)]

    return work


def table_csv(size: str) -> Work:
    """The rows of the csv module whose file exists, by image: a list of texts in memory that no process shares."""
    kept, root = captions_of(size)

    def work() -> list[int]:
        captions: dict[str, list[str]] = {}
        assert kept.name == str(root)
        with open(root / "train.csv", newline="") as file:
            for row in csv.DictReader(file):
                if os.path.exists(root / row["image"]):
                    captions.setdefault(row["image"], []).append(row["caption"].strip())
        return [len(captions), sum(map(len, captions.values()))]

    return work


# ---------------------------------------------------------------------------------------------------------------------
# Logistic regression
# ---------------------------------------------------------------------------------------------------------------------


def features_of(size: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Features (n, d) whose axes differ by orders of magnitude, labels, penalties of a size NxDxCLASSESxPENALTIES."""
    from evaluation.heads import LAMBDAS

    n, d, k, penalties = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    labels, means = rng.integers(0, k, n), 0.15 * rng.standard_normal((k, d), np.float32)
    spread = np.float32(np.sqrt(d / 5)) / np.sqrt(np.arange(1, d + 1, dtype=np.float32))
    features = rng.standard_normal((n, d), np.float32) * spread + means[labels]
    return features, labels, LAMBDAS[:: len(LAMBDAS) // penalties][:penalties]


def objectives(
    features: np.ndarray, labels: np.ndarray, penalties: tuple[float, ...], solutions: list[tuple[Any, Any]]
) -> list[float]:
    """What is minimised, in float64, of weights (d, k) on standardised features and biases (k,)."""
    x = features.astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    found = []
    for penalty, (weight, bias) in zip(penalties, solutions, strict=True):
        logs = log_softmax(x @ weight + bias, axis=1)[np.arange(len(x)), labels]
        found.append(float(-logs.mean() + penalty / 2 * np.square(weight).sum()))
    return found


def path_ours(size: str) -> Work:
    import scipy.optimize  # noqa: F401 (both, which the path takes when it is called, are no part of its time)
    import sklearn.preprocessing  # noqa: F401

    from evaluation.heads import Samples, logistic_path

    features, labels, penalties = features_of(size)

    def work() -> Work:
        path = logistic_path(Samples(features, labels), penalties, int(labels.max()) + 1)
        return lambda: objectives(features, labels, penalties, [(head.weight, head.bias) for head in path])

    return work


def path_sklearn(size: str) -> Work:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels, penalties = features_of(size)

    def work() -> Work:
        x, path = StandardScaler().fit_transform(features), []
        model = LogisticRegression(warm_start=True, max_iter=5000)
        for penalty in penalties:
            model.set_params(C=1 / (len(x) * penalty)).fit(x, labels)
            path.append((np.array(model.coef_).T, np.array(model.intercept_)))
        return lambda: objectives(features, labels, penalties, path)

    return work


PARTS = {
    "logistic": Part(
        ("1500x768x3x30", "6000x384x20x10", "20000x768x100x3"),
        {"ours": path_ours, "scikit-learn": path_sklearn},
        tolerance=5e-3,  # between minima: at the smallest penalties scikit-learn stops above ours
    ),
    "table": Part(("100000x100000", "100000x100", "1000000x100"), {"ours": table_ours, "csv": table_csv}),
    "search": Part(
        ("20x1000000x256", "64x400000x256", "2000x50000x512"),
        {"ours": search_ours, "NumPy": search_numpy, "faiss": search_faiss},
    ),
    "intervals": Part(
        ("378", "10000", "100000"),
        {"ours": bounds_ours, "NumPy": bounds_numpy, "scikit-learn": bounds_sklearn},
        skipped=(("NumPy", "100000"),),
    ),
}
SCALED = {"scikit-learn of intervals": RESAMPLES / SOME}

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def one(part: str, method: str, size: str) -> dict[str, Any]:
    """Seconds, bytes and answer, in this process."""
    work = PARTS[part].methods[method](size)
    before, start = common.memory_now(torch.device("cpu")), (time.process_time(), time.perf_counter())
    answer = work()
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    peak = common.peak_memory(torch.device("cpu")) - before
    answer = answer() if callable(answer) else answer
    scale = SCALED.get(f"{method} of {part}", 1)
    return {"seconds": scale * cpu, "wall": scale * wall, "bytes": peak, "answer": answer}


def elsewhere(part: str, method: str, size: str, threads: int) -> dict[str, Any]:
    """`one` in a process of its own, with so many threads."""
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))}
    command = [sys.executable, str(Path(__file__).resolve()), part, "--one", method, size]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, sizes: list[str], runs: int, threads: int) -> list[dict[str, Any]]:
    """A row for each size and method, printed as it comes; ValueError where an answer differs from ours."""
    part, rows = PARTS[name], []
    for size in sizes or part.sizes:
        methods = [method for method in part.methods if (method, size) not in part.skipped]
        if "faiss" in methods and importlib.util.find_spec("faiss") is None:
            print("faiss is left out: pip install -r benchmarks/requirements.txt")
            methods.remove("faiss")
        found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(runs):
            for method in methods:
                found[method].append(elsewhere(name, method, size, threads))
        ours = np.array(found[methods[0]][0]["answer"])
        for method in methods:
            answer = np.array(found[method][0]["answer"])
            gap = np.abs(answer - ours).max() if len(answer) else 0.0
            if not gap <= part.tolerance:
                raise ValueError(f"{name} of {size}: {method} answers {answer}, ours {ours}")
            row = {"size": size, "method": method, "gap": float(gap)}
            row |= {key: common.median([run[key] for run in found[method]]) for key in ("seconds", "wall", "bytes")}
            rows.append(row)
            print(f"{size:>16} | {method:24} | {row['seconds']:9.3f} CPU s | {row['wall']:9.3f} s | "
                  f"{row['bytes'] / 2**20:7.0f} MiB | differs by {gap:.1e}", flush=True)  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--sizes", nargs="+", default=[], help="as the table names them; all of the part's")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.part, *args.one)))
        return []
    print(common.describe(torch.device("cpu"), args.runs, "faiss-cpu", "scikit-learn"))
    return compare(args.part, args.sizes, args.runs, args.threads)


if __name__ == "__main__":
    main()
