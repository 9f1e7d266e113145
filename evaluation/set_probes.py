"""Probes of any labelled set on features extracted once: logistic regression, findings, fractions, k-NN."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold

import utils
from evaluation import downstream, metrics
from evaluation.catalog import Catalog, entry_of, metric_of, read_catalog
from evaluation.features import greys_of
from evaluation.heads import Choice, Head, Linear, Samples, fit_logistic, knn_probabilities, stratified_part
from evaluation.predictions import Predictions, check_baseline, report_rows
from evaluation.probe import Fitting, Fractions, Probe
from evaluation.resamples import finding_intervals
from inputs.cbis import CBIS_SETS
from inputs.transforms import linear_eval_view
from runtime.command_line import UsageError

log = logging.getLogger("medslip")


def find_set(dataset: str, root: str, catalog_file: str) -> Catalog:
    """The catalog with `root` in the set's entry; an unknown set, or one without classes, is a ValueError."""
    catalog = read_catalog(catalog_file)
    if dataset not in catalog:
        raise ValueError(f"unknown dataset {dataset!r}; choose from {', '.join([*CBIS_SETS, *catalog])}")
    entry_of(dataset, catalog)
    if root:
        catalog[dataset] = {**catalog[dataset], "path": root}
    return catalog


def score_set(labels: np.ndarray, outputs: np.ndarray, metric: str) -> metrics.Scores:
    """All metrics of a set, in percent as its results have always been, from logits or probabilities (n, k)."""
    return metrics.percent(metrics.score_outputs(labels, outputs, metric))


# ---------------------------------------------------------------------------------------------------------------------
# The set's features
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSet:
    """Both splits of a set through the view of linear evaluation."""

    train: downstream.Downstream
    test: downstream.Downstream
    metric: str  # of metrics.SET_METRICS


@dataclass(frozen=True)
class SetFeatures:
    """The same seen through a tower: what probes are fitted on and tested with."""

    train: Samples
    test: Samples
    findings: dict[str, np.ndarray]  # (n, k) of each split, 0, 1 or -1; {} where an image has one class
    skipped: dict[str, int]  # images by split, missing or corrupt


def open_set(probe: Probe, catalog: Catalog, fitting: Fitting, fractions: Fractions, neighbours: int) -> LabelledSet:
    """The set, refused before an hour of features where it cannot answer what is asked of it."""
    view = partial(linear_eval_view, probe.backbone.preprocess)
    train, test = downstream.open_splits(probe.dataset, catalog, view, view)
    if fitting.folds and not train.rows:
        raise UsageError(f"--folds keeps groups whole: it needs CBIS-DDSM or a set of type csv, not {probe.dataset}")
    for baseline in probe.baselines:
        if test.scheme is None:
            raise ValueError(f"--baseline: the test split of {probe.dataset} is too large to keep its predictions")
        check_baseline(baseline, test.rows, test.scheme)
    if test.findings is not None and (neighbours or fractions.wanted):
        raise ValueError(f"{probe.dataset} has several findings for each image: no --knn and no --fraction")
    return LabelledSet(train, test, metric_of(probe.dataset, catalog))


def read_features(probe: Probe, labelled: LabelledSet) -> SetFeatures:
    """One pass of each split through the tower, or what an earlier run has kept of it."""
    parts, findings, skipped = {}, {}, {}
    for split, images in (("train", labelled.train), ("test", labelled.test)):
        features, kept = probe.features(images, f"{probe.dataset}_{split}")
        skipped[split] = len(images) - len(kept)
        if images.findings is not None:
            findings[split] = images.findings[kept]
        parts[split] = Samples(features, images.labels[kept], [images.rows[i] for i in kept] if images.rows else [])
    return SetFeatures(parts["train"], parts["test"], findings, skipped)


def probe_set(
    probe: Probe, catalog: Catalog, fitting: Fitting, fractions: Fractions, *, logistic: bool, neighbours: int
) -> dict[str, Any]:
    """Each result that is asked for, by one pass through the tower; prints and returns them.

    Args:
        logistic: fit logistic regression on all labels.
        neighbours: k of k-NN; 0 for none.
    """
    labelled = open_set(probe, catalog, fitting, fractions, neighbours)
    features = read_features(probe, labelled)
    results: dict[str, Any] = {
        **probe.described(),
        "unit": "percent",
        "samples": {"train": len(features.train.labels), "test": len(features.test.labels)},
        "samples_skipped": features.skipped,
    }
    if features.findings:
        return results | {"findings": probe_findings(probe, labelled, features, fitting)}
    if logistic:
        results |= probe_logistic(probe, labelled, features, fitting)
    if fractions.wanted:
        results["fractions"] = [
            label_fraction(probe, labelled, features, fitting, fraction, fractions.draws)
            for fraction in fractions.wanted
        ]
    if neighbours:
        results["knn"] = probe_neighbours(probe, labelled, features, neighbours)
    if probe.is_main:
        log.info(describe_probes(results))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# One function a result
# ---------------------------------------------------------------------------------------------------------------------


def probe_logistic(
    probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting
) -> dict[str, Any]:  # fmt: skip
    """Logistic regression on all labels; where the test rows are known, predictions.csv and intervals over groups."""
    classes = labelled.test.classes
    head = fit_on(probe.dataset, features.train, len(classes), labelled.metric, fitting)
    prob = head.probabilities(features.test.features)
    scores = score_set(features.test.labels, prob, labelled.metric)
    results: dict[str, Any] = {"logistic": {**scores, "chosen": head.chosen, "validation": head.validation}}
    if labelled.test.scheme is not None:
        found = Predictions(features.test.rows, prob, labelled.test.scheme)
        results |= report_rows(found, head.held_out, probe.baselines, probe.settings, probe.bootstrap)
        if probe.is_main:
            found.write(probe.output_dir / "predictions.csv")
    point = results.get("operating_point")
    probe.keep_heads(
        [head.probabilities],
        features.train.features,
        classes,
        view="linear",
        operating_point=point,
        greys=greys_of(labelled.train),
    )
    return results


def probe_neighbours(probe: Probe, labelled: LabelledSet, features: SetFeatures, k: int) -> dict[str, Any]:
    """k-NN, with predictions_knn.csv and intervals where the test rows are known."""
    processes = probe.loading.processes
    prob = knn_probabilities(
        features.train, features.test.features, k, len(labelled.test.classes), processes.device
    )  # fmt: skip
    results = {**score_set(features.test.labels, prob, labelled.metric), "k": k}
    if labelled.test.scheme is not None:
        found = Predictions(features.test.rows, prob, labelled.test.scheme)
        results |= report_rows(found, None, [], probe.settings, probe.bootstrap)
        if probe.is_main:
            found.write(probe.output_dir / "predictions_knn.csv")
    return results


def probe_findings(probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting) -> dict[str, Any]:
    """Logistic regression for each finding by itself, on the images whose finding is known."""
    assert labelled.test.scheme is not None
    names, (known, wanted) = labelled.test.classes, (features.findings[split] for split in ("train", "test"))
    prob, chosen, heads = np.full(wanted.shape, 0.5), {}, {}
    for i, name in enumerate(names):
        index = np.flatnonzero(known[:, i] >= 0)
        train = replace(features.train[index], labels=known[index, i])
        if min(np.bincount(train.labels, minlength=2)) < 2:
            log.warning(f"{probe.dataset}: {name} is left out, it has fewer than two images of an outcome")
            continue
        head = fit_on(f"{probe.dataset}, {name}", train, 2, "roc_auc", fitting)
        prob[:, i], chosen[name] = head.probabilities(features.test.features)[:, 1], head.chosen
        heads[name] = head.probabilities
    groups, unit = [row["group"] for row in features.test.rows], labelled.test.scheme.unit
    found = finding_intervals(wanted, prob, groups, names, probe.bootstrap)
    if probe.is_main:
        write_findings(probe.output_dir / "predictions.csv", names, features.test.rows, wanted, prob)
        log.info(describe_findings(probe.dataset, found, f"{len(set(groups))} {unit}"))
    keep: list[Linear] = list(heads.values())
    probe.keep_heads(
        keep, features.train.features, None, findings=list(heads), view="linear", greys=greys_of(labelled.train)
    )
    return {
        name: {key: asdict(interval) for key, interval in values.items()}
        | ({"chosen": chosen[name]} if name in chosen else {})
        for name, values in found.items()
    }


def label_fraction(
    probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting, fraction: float, draws: int
) -> dict[str, Any]:
    """Score of logistic regression on a fraction of each class: mean and deviation over random draws."""
    found, sizes, classes = [], [], len(labelled.test.classes)
    for draw in range(draws):
        part = part_of(features.train, fraction, np.random.default_rng((fitting.seed, draw)))
        head = fit_on(probe.dataset, features.train[part], classes, labelled.metric, replace(fitting, folds=0))
        prob = head.probabilities(features.test.features)
        found.append(score_set(features.test.labels, prob, labelled.metric)["score"])
        sizes.append(len(part))
    return {
        "fraction": fraction,
        "samples": sizes[0],
        "scores": found,
        "mean": float(np.mean(found)),
        "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------


def fit_on(name: str, train: Samples, num_classes: int, metric: str, fitting: Fitting) -> Head:
    """Logistic regression on all of `train`, its penalty chosen on a tenth of each class or on folds, groups whole.

    Args:
        name: of what is fitted, for messages.
        metric: of metrics.SET_METRICS, which chooses the penalty.

    Raises:
        ValueError: a class with a single training image, or none outside of the held-out tenth.
    """

    def score(labels: np.ndarray, prob: np.ndarray) -> float:
        return score_set(labels, prob, metric)["score"]

    def decide(labels: np.ndarray, prob: np.ndarray) -> float:
        return float(f1_score(labels, prob.argmax(1), average="macro"))

    choice = Choice(score, fitting.class_weights, decide, fitting.folds, group="group", seed=fitting.seed)
    if fitting.folds:
        return fit_logistic(train, train[np.arange(0)], num_classes, choice)
    held_out = stratified_part(train.labels, 0.1, 1, np.random.default_rng(fitting.seed))
    if train.rows:
        groups = [row["group"] for row in train.rows]
        rarest = min(np.bincount(train.labels)[np.unique(train.labels)])
        number = max(2, min(10, len(set(groups)), rarest))
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=fitting.seed)
        _, held_out = next(iter(splitter.split(train.labels, train.labels, groups)))
    fitted = np.setdiff1d(np.arange(len(train.labels)), held_out)
    missing = np.setdiff1d(train.labels, train.labels[fitted])
    if len(missing):
        raise ValueError(f"{name}: class {missing[0]} has one training image; two are needed to choose a penalty")
    return fit_logistic(train[fitted], train[held_out], num_classes, choice)


def part_of(train: Samples, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of about `fraction` of the samples of each class, at least two; whole groups where there are any."""
    if not train.rows:
        return stratified_part(train.labels, fraction, 2, rng)
    groups, place = np.unique([row["group"] for row in train.rows], return_inverse=True)
    label_of = np.zeros(len(groups), dtype=int)
    np.maximum.at(label_of, place, train.labels)
    return np.flatnonzero(np.isin(place, stratified_part(label_of, fraction, 2, rng)))


# ---------------------------------------------------------------------------------------------------------------------
# For people and files
# ---------------------------------------------------------------------------------------------------------------------


def write_findings(
    path: Path, names: Sequence[str], rows: Sequence[dict[str, str]], known: np.ndarray, prob: np.ndarray
) -> None:
    """One line an image: image, group, each finding as it counted (empty where unknown), each probability."""
    lines = [["image", "group", *names, *(f"prob_{name}" for name in names)]]
    for row, own, p in zip(rows, known.tolist(), prob.tolist(), strict=True):
        lines.append([row["image"], row["group"], *("" if value < 0 else value for value in own), *p])
    utils.atomic_write(path, lambda file: file.write(utils.csv_text(lines).encode("utf-8", "surrogateescape")))


def describe_findings(dataset: str, found: dict[str, dict[str, metrics.Interval]], over: str) -> str:
    """A table of all findings and their mean; `over`, such as "12 patients", is what the intervals are over."""
    lines = [f"{dataset}: percent, with 95% intervals over {over}", ""]
    lines += ["| Finding | AUROC | Average precision |", "| --- | --- | --- |"]
    for name, values in found.items():
        lines.append(f"| {name} | {' | '.join(interval.percent() for interval in values.values())} |")
    return "\n".join(lines)


def describe_probes(results: dict[str, Any]) -> str:
    """A line for each result."""
    lines = []
    if "metrics" in results:
        lines.append(f"{results['dataset']}, logistic: percent, with 95% intervals over {results['interval']['over']}")
        lines += [
            f"  {metrics.METRICS[name]:<22} {metrics.Interval.of(value).percent()}"
            for name, value in results["metrics"].items()
        ]
    for name in ("logistic", "knn"):
        if name in results:
            title = name if name == "logistic" else f"{results[name]['k']}-NN"
            lines.append(f"{results['dataset']}, {title}: {results[name]['metric']} {results[name]['score']:.2f}")
    for part in results.get("fractions", ()):
        spread = "" if part["std"] is None else f" +- {part['std']:.2f}"
        draws = len(part["scores"])
        lines.append(
            f"{results['dataset']}, {part['fraction']:.2%} of the labels ({part['samples']} images): "
            f"{part['mean']:.2f}{spread} over {draws} draws"
        )
    if any(results["samples_skipped"].values()):
        lines.append(f"MISSING OR CORRUPT IMAGES SKIPPED: {results['samples_skipped']}")
    return "\n".join(lines)
