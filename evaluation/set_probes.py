"""Probes of any labelled set on features extracted once: logistic regression, findings, fractions, k-NN."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold

import utils
from evaluation import downstream, metrics
from evaluation.catalog import Catalog, entry_of, metric_of, read_catalog, with_selection
from evaluation.features import greys_of
from evaluation.heads import Choice, Head, Linear, Samples, fit_logistic, knn_probabilities, stratified_part
from evaluation.predictions import Predictions, check_baseline, describe_measured, report_rows, unlearnt_classes
from evaluation.probe import Fitting, Fractions, Probe
from evaluation.resamples import Findings, finding_intervals
from evaluation.subgroups import report_set
from inputs.cbis import CBIS_SETS
from inputs.transforms import linear_eval_view
from runtime.command_line import UsageError

log = logging.getLogger("medslip")


def find_set(dataset: str, root: str, catalog_file: str, where: str = "") -> Catalog:
    """The catalog with `root` and `where` in the set's entry; ValueError for an unknown set, or one without classes."""
    catalog = read_catalog(catalog_file)
    if dataset not in catalog:
        raise ValueError(f"unknown dataset {dataset!r}; choose from {', '.join(dict.fromkeys([*CBIS_SETS, *catalog]))}")
    entry_of(dataset, catalog)
    if root:
        catalog[dataset] = {**catalog[dataset], "path": root}
    catalog[dataset] = with_selection(dataset, catalog[dataset], where)
    return catalog


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
    unlearnt: list[int]  # classes that no training image has

    def score(self, prob: np.ndarray, metric: str) -> metrics.Scores:
        """All metrics of the test split's probabilities (n, k)."""
        return metrics.score_outputs(self.test.labels, metrics.log_prob(prob), metric, self.unlearnt)

    def predictions(self, labelled: LabelledSet, prob: np.ndarray) -> Predictions | None:
        """The test split's, where its rows are known."""
        scheme = labelled.test.scheme
        return None if scheme is None else Predictions(self.test.rows, prob, scheme.without(self.unlearnt))


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
    unlearnt = [] if findings else unlearnt_classes(labelled.test.classes, parts["train"].labels, probe.dataset)
    return SetFeatures(parts["train"], parts["test"], findings, skipped, unlearnt)


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
        "unit": "fraction",
        "samples": {"train": len(features.train.labels), "test": len(features.test.labels)},
        "samples_skipped": features.skipped,
    }
    if features.unlearnt:
        results["unlearnt"] = [str(labelled.test.classes[c]) for c in features.unlearnt]
    if features.findings:
        return results | {"findings": probe_findings(probe, labelled, features, fitting)}
    if logistic:
        results |= probe_logistic(probe, labelled, features, fitting)
    if fractions.wanted:
        results["fractions"] = [
            label_fraction(probe, labelled, features, fitting, fraction, fractions.draws if fraction < 1 else 1)
            for fraction in fractions.wanted
        ]
    if neighbours:
        results["knn"] = probe_neighbours(probe, labelled, features, neighbours)
    if logistic:  # last, for the rows of its penalty search, so that the figures are read first
        results["logistic"] = results.pop("logistic")
    if probe.is_main:
        log.info(describe_probes(results))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# One function a result
# ---------------------------------------------------------------------------------------------------------------------


def probe_logistic(probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting) -> dict[str, Any]:
    """Logistic regression on all labels; where the test rows are known, predictions.csv and intervals over groups."""
    classes = labelled.test.classes
    head = fit_on(probe.dataset, features.train, classes, labelled.metric, fitting)
    prob = head.probabilities(features.test.features)
    scores = features.score(prob, labelled.metric)
    results: dict[str, Any] = {"logistic": {**scores, "chosen": head.chosen, "validation": head.validation}}
    if (found := features.predictions(labelled, prob)) is not None:
        results |= report_set(found, head.held_out, probe.baselines, probe.settings, probe.bootstrap)
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
    results = {**features.score(prob, labelled.metric), "k": k}
    if (found := features.predictions(labelled, prob)) is not None:
        results |= report_rows(found, None, [], probe.settings, probe.bootstrap)
        if probe.is_main:
            found.write(probe.output_dir / "predictions_knn.csv")
    return results


def probe_findings(probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting) -> dict[str, Any]:
    """Logistic regression for each finding by itself, on the images whose finding is known."""
    assert labelled.test.scheme is not None
    names, (known, wanted) = labelled.test.classes, (features.findings[split] for split in ("train", "test"))
    prob, chosen, heads, unfitted = np.full((*wanted.shape, 2), 0.5), {}, {}, {}
    for i, name in enumerate(names):
        index = np.flatnonzero(known[:, i] >= 0)
        train = replace(features.train[index], labels=known[index, i])
        without, having = np.bincount(train.labels, minlength=2).tolist()
        if min(without, having) < 2:
            unfitted[name] = f"not fitted, of its training images {having} have it and {without} do not: two are needed"
            continue
        head = fit_on(probe.dataset, train, (f"no {name}", name), "roc_auc", fitting)
        prob[:, i], chosen[name] = head.probabilities(features.test.features), head.chosen
        heads[name] = head.probabilities
    groups, unit = [row["group"] for row in features.test.rows], labelled.test.scheme.unit
    scores = np.stack([metrics.ranked(prob[:, i])[:, 1] for i in range(len(names))], axis=1)
    found = finding_intervals(wanted, scores, groups, names, probe.bootstrap, unfitted=unfitted)
    if probe.is_main:
        write_findings(probe.output_dir / "predictions.csv", names, features.test.rows, wanted, prob, unfitted)
        log.info(describe_findings(probe.dataset, found, f"{len(set(groups))} {unit}"))
    keep: list[Linear] = list(heads.values())
    probe.keep_heads(
        keep, features.train.features, None, findings=list(heads), view="linear", greys=greys_of(labelled.train)
    )
    results: dict[str, Any] = {
        name: plain(values) | ({"chosen": chosen[name]} if name in chosen else {})
        for name, values in found.each.items()
    }
    return results | {"macro": plain(found.macro) | {"mean_of": found.averaged, "left_out": found.left_out}}


def plain(values: dict[str, metrics.Interval]) -> dict[str, Any]:
    """Metrics as results.json holds them."""
    return {key: interval.plain() for key, interval in values.items()}


def label_fraction(
    probe: Probe, labelled: LabelledSet, features: SetFeatures, fitting: Fitting, fraction: float, draws: int
) -> dict[str, Any]:
    """Score of logistic regression on a fraction of each class: mean and standard deviation over random draws."""
    found, sizes = [], []
    for draw in range(draws):
        part = part_of(features.train, fraction, np.random.default_rng((fitting.seed, draw)))
        own = features.train[part]
        head = fit_on(probe.dataset, own, labelled.test.classes, labelled.metric, replace(fitting, folds=0))
        found.append(features.score(head.probabilities(features.test.features), labelled.metric)["score"])
        sizes.append(len(part))
    return {
        "fraction": fraction,
        "metric": labelled.metric,
        "samples": sizes[0],
        "scores": found,
        "mean": float(np.mean(found)),
        "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------


def fit_on(name: str, train: Samples, classes: Sequence[str], metric: str, fitting: Fitting) -> Head:
    """Logistic regression on all of `train`, its penalty chosen on a tenth of each class or on folds, groups whole.

    Args:
        name: of the set, for messages.
        metric: of metrics.SET_METRICS, which chooses the penalty.

    Raises:
        ValueError: a class with a single training image, or none outside of the held-out tenth.
    """

    def score(labels: np.ndarray, prob: np.ndarray) -> float:
        return metrics.score_outputs(labels, metrics.log_prob(prob), metric)["score"]

    def decide(labels: np.ndarray, prob: np.ndarray) -> float:
        return float(f1_score(labels, prob.argmax(1), average="macro"))

    choice = Choice(
        score, fitting.class_weights, decide, fitting.folds, group="group", seed=fitting.seed, classes=classes
    )
    if fitting.folds:
        return fit_logistic(train, train[np.arange(0)], len(classes), choice)
    held_out = choosing_part(name, train, classes, fitting.seed)
    fitted = np.setdiff1d(np.arange(len(train.labels)), held_out)
    return fit_logistic(train[fitted], train[held_out], len(classes), choice)


def choosing_part(name: str, train: Samples, classes: Sequence[str], seed: int) -> np.ndarray:
    """Numbers of about a tenth of the samples, to choose the penalty on: whole groups, each class in it and outside.

    A class whose images are all one group's cannot be on both sides of whole groups. Then that group's images are
    divided, and the log says so: a penalty that was chosen on images so like those it was fitted on may be too weak.

    Raises:
        ValueError: a class with a single training image, or classes that no whole groups keep in the rest.
    """
    present, counts = np.unique(train.labels, return_counts=True)
    if lone := [str(classes[c]) for c, n in zip(present, counts, strict=True) if n == 1]:
        raise ValueError(f"{name}: one training image of class {lone[0]}; two are needed to choose a penalty")
    if not train.rows:
        return stratified_part(train.labels, 0.1, 1, np.random.default_rng(seed))
    names, place = np.unique([row["group"] for row in train.rows], return_inverse=True)
    for c, n in zip(present, counts, strict=True):
        if len(own := np.unique(place[train.labels == c])) == 1:
            log.warning(
                f"{name}: all {n} training images of class {classes[c]} are of one group ({names[own[0]]}): to choose "
                "the penalty, its images are divided between what is fitted and what is held out"
            )
            divided = place == own[0]
            place = np.where(divided, len(names) + np.arange(len(place)), place)
    first = max(2, min(10, len(np.unique(place)), min(counts)))
    usable = []
    for number in range(first, 1, -1):
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        for fitted, held_out in splitter.split(train.labels, train.labels, place):
            if len(np.unique(train.labels[fitted])) == len(present):
                if len(np.unique(train.labels[held_out])) == len(present):
                    return held_out
                usable.append(held_out)
    if not usable:
        raise ValueError(
            f"{name}: no tenth of whole groups leaves every class in the rest: classes share too few groups"
        )
    return usable[0]


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
    path: Path,
    names: Sequence[str],
    rows: Sequence[dict[str, str]],
    known: np.ndarray,
    prob: np.ndarray,
    unfitted: Container[str] = (),
) -> None:
    """One line an image: image, group, each finding as it counted (empty where unknown), and what was made of it.

    That is its probability and the logit behind it, which still ranks where probabilities round to 1; both are empty
    for a finding that was not fitted.

    Args:
        prob: (n, findings, 2), without and with it.
    """
    lines = [["image", "group", *names, *(f"prob_{name}" for name in names), *(f"logit_{name}" for name in names)]]
    logs = metrics.log_prob(prob)
    logits = logs[..., 1] - logs[..., 0]  # (n, findings)
    for row, own, *answers in zip(rows, known.tolist(), prob[..., 1].tolist(), logits.tolist(), strict=True):
        cells = ["" if name in unfitted else x for each in answers for name, x in zip(names, each, strict=True)]
        lines.append([row["image"], row["group"], *("" if value < 0 else value for value in own), *cells])
    utils.atomic_write(path, lambda file: file.write(utils.csv_text(lines).encode("utf-8", "surrogateescape")))


def describe_findings(dataset: str, found: Findings, over: str) -> str:
    """A table of all findings and their mean; `over`, such as "12 patients", is what the intervals are over."""
    lines = [f"{dataset}: percent, with 95% intervals over {over}", ""]
    lines += ["| Finding | AUROC | Average precision |", "| --- | --- | --- |"]
    rows = found.each | {mean_title(found.averaged, found.left_out): found.macro}
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(interval.percent() for interval in values.values())} |")
    return "\n".join(lines)


def mean_title(averaged: Sequence[str], left_out: Container[str]) -> str:
    """What the mean over findings is called: over which, where some are left out."""
    return f"mean of {', '.join(averaged)}" if left_out else "macro"


def describe_probes(results: dict[str, Any]) -> str:
    """All results in percent, for people."""
    dataset, neighbours = results["dataset"], results.get("knn", {})
    lines = describe_measured(results, f"{dataset}, logistic regression")
    if neighbours:
        lines += [*[""] * bool(lines), *describe_measured(neighbours, f"{dataset}, {neighbours['k']}-NN")]
    for name in ("logistic", "knn"):
        if name in results:
            title = name if name == "logistic" else f"{neighbours['k']}-NN"
            lines.append(f"{dataset}, {title}: {metrics.shown_score(results[name])}")
    lines += [f"{dataset}, {describe_fraction(part)}" for part in results.get("fractions", ())]
    if (unlearnt := results.get("unlearnt")) and "metrics" not in results:
        lines.append(f"NO TRAINING IMAGE, and in no mean over classes: {', '.join(unlearnt)}")
    if any(results["samples_skipped"].values()):
        lines.append(f"MISSING OR CORRUPT IMAGES SKIPPED: {results['samples_skipped']}")
    return "\n".join(lines)


def describe_fraction(part: dict[str, Any]) -> str:
    """A fraction of the labels: its metric, the mean over draws and how far the draws are apart."""
    unit, form = (1, ".3f") if part["metric"] == "quadratic_kappa" else (100, ".2f")
    title = f"{part['fraction']:.2%} of the labels ({part['samples']} images): {part['metric']} "
    if part["std"] is None:
        return f"{title}{unit * part['mean']:{form}} of a single draw"
    draws = len(part["scores"])
    return (
        f"{title}{unit * part['mean']:{form}}, mean of {draws} draws of the labels, +- {unit * part['std']:{form}} "
        "standard deviation between them"
    )
