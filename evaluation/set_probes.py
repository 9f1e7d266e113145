"""Probes of any labelled set on features extracted once: logistic regression, findings, fractions, k-NN."""

from __future__ import annotations

import argparse
import csv
import io
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold

import distributed
import utils
from evaluation import downstream, metrics
from evaluation.catalog import Catalog, entry_of, metric_of, read_catalog
from evaluation.features import Backbone
from evaluation.predictions import Predictions, check_baseline, report_rows
from evaluation.probes import Choice, Head, Linear, Samples, fit_logistic, knn_probabilities, stratified_part
from evaluation.probing import keep_heads, kept_features, weights_of
from inputs.cbis import CBIS_SETS
from inputs.transforms import linear_eval_view
from runtime.command_line import UsageError

log = logging.getLogger("medslip")


def find_set(args: argparse.Namespace) -> Catalog:
    """The catalog with --root in it; an unknown set, or one without classes, is a ValueError with the choices."""
    catalog = read_catalog(args.catalog)
    if args.dataset not in catalog:
        raise ValueError(f"unknown dataset {args.dataset!r}; choose from {', '.join([*CBIS_SETS, *catalog])}")
    entry_of(args.dataset, catalog)
    if args.root:
        catalog[args.dataset] = {**catalog[args.dataset], "path": args.root}
    return catalog


def score_set(labels: np.ndarray, outputs: np.ndarray, metric: str) -> metrics.Scores:
    """All metrics of a set, in percent as its results have always been, from logits or probabilities (n, k)."""
    return metrics.percent(metrics.score_outputs(labels, outputs, metric))


def probe_features(
    args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes, settings: dict[str, Any]
) -> dict:
    """Logistic regression, label fractions and k-NN on features extracted once; prints and returns the results."""
    catalog, view = find_set(args), partial(linear_eval_view, backbone.preprocess)
    metric = metric_of(args.dataset, catalog)
    sets = {
        split: downstream.create_downstream(args.dataset, split == "train", view, catalog)
        for split in ("train", "test")
    }
    scheme, num_classes = sets["test"].scheme, len(sets["test"].classes)
    if args.folds and not sets["train"].rows:
        raise UsageError(f"--folds keeps groups whole: it needs CBIS-DDSM or a set of type csv, not {args.dataset}")
    for baseline in args.baseline:
        if scheme is None:
            raise ValueError(f"--baseline: the test split of {args.dataset} is too large to keep its predictions")
        check_baseline(baseline, sets["test"].rows, scheme)
    skipped, findings = {}, {}

    def samples(split: str) -> Samples:
        dataset = sets[split]
        features, kept = kept_features(args, backbone, dataset, f"{args.dataset}_{split}", processes)
        skipped[split] = len(dataset) - len(kept)
        if dataset.findings is not None:
            findings[split] = dataset.findings[kept]
        return Samples(features, dataset.labels[kept], [dataset.rows[i] for i in kept] if dataset.rows else [])

    train, test = samples("train"), samples("test")
    evaluate = partial(score_set, test.labels, metric=metric)
    results: dict[str, Any] = {
        "model": backbone.name,
        "dataset": args.dataset,
        "features": backbone.features,
        "settings": settings,
        "weights": weights_of(args, backbone),
        "unit": "percent",
        "samples": {"train": len(train.labels), "test": len(test.labels)},
        "samples_skipped": skipped,
    }
    if findings:
        if args.knn or args.fraction:
            raise ValueError(f"{args.dataset} has several findings for each image: no --knn and no --fraction")
        names = sets["test"].classes
        results["findings"], heads = probe_findings(args, names, train, test, findings, processes)
        if processes.is_main:
            keep_heads(
                args, backbone, list(heads.values()), results, train.features, findings=list(heads), view="linear"
            )
        return results
    if args.cache_features:
        head = fit_on(args.dataset, train, num_classes, args.seed, metric, args.class_weights, args.folds)
        prob = head.probabilities(test.features)
        results["logistic"] = {**evaluate(prob), "chosen": head.chosen, "validation": head.validation}
        if scheme is not None:
            found = Predictions(test.rows, prob, scheme)
            results |= report_rows(found, head.held_out, args.baseline, settings, args.resamples, args.seed)
            if processes.is_main:
                found.write(Path(args.output_dir) / "predictions.csv")
        if processes.is_main:
            classes = list(sets["test"].classes)
            keep_heads(args, backbone, [head.probabilities], results, train.features, classes=classes, view="linear")
    if args.fraction:
        draw = partial(label_fraction, args, train, num_classes, test=test, evaluate=evaluate, metric=metric)
        results["fractions"] = [draw(fraction) for fraction in args.fraction]
    if args.knn:
        prob = knn_probabilities(train, test.features, args.knn, num_classes, processes.device)
        results["knn"] = {**evaluate(prob), "k": args.knn}
        if scheme is not None:
            found = Predictions(test.rows, prob, scheme)
            results["knn"] |= report_rows(found, None, [], settings, args.resamples, args.seed)
            if processes.is_main:
                found.write(Path(args.output_dir) / "predictions_knn.csv")
    if processes.is_main:
        log.info(describe_probes(results))
    return results


def probe_findings(
    args: argparse.Namespace, names: list[str], train: Samples, test: Samples, findings: dict[str, np.ndarray],
    processes: distributed.Processes,
) -> tuple[dict, dict[str, Linear]]:  # fmt: skip
    """Logistic regression for each finding by itself, on the images whose finding is known: scores and heads."""
    prob, chosen, heads = np.full(findings["test"].shape, 0.5), {}, {}
    for i, name in enumerate(names):
        index = np.flatnonzero(findings["train"][:, i] >= 0)
        known = replace(train[index], labels=findings["train"][index, i])
        if min(np.bincount(known.labels, minlength=2)) < 2:
            log.warning(f"{args.dataset}: {name} is left out, it has fewer than two images of an outcome")
            continue
        title = f"{args.dataset}, {name}"
        head = fit_on(title, known, 2, args.seed, "roc_auc", args.class_weights, args.folds)
        prob[:, i], chosen[name] = head.probabilities(test.features)[:, 1], head.chosen
        heads[name] = head.probabilities
    groups = [row["group"] for row in test.rows]
    found = metrics.findings_bootstrap(
        findings["test"], prob, groups, names, resamples=args.resamples, seed=args.seed
    )  # fmt: skip
    if processes.is_main:
        write_findings(Path(args.output_dir) / "predictions.csv", names, test.rows, findings["test"], prob)
        lines = [f"{args.dataset}: percent, with 95% intervals over {len(set(groups))} groups", "",
                 "| Finding | AUROC | Average precision |", "| --- | --- | --- |"]  # fmt: skip
        cells = {name: " | ".join(interval.percent() for interval in values.values()) for name, values in found.items()}
        log.info("\n".join([*lines, *(f"| {name} | {text} |" for name, text in cells.items())]))
    scores = {
        name: {key: asdict(interval) for key, interval in values.items()}
        | ({"chosen": chosen[name]} if name in chosen else {})
        for name, values in found.items()
    }
    return scores, heads


def write_findings(
    path: Path, names: list[str], rows: list[dict[str, str]], known: np.ndarray, prob: np.ndarray
) -> None:
    """One line an image: image, group, each finding as it counted (empty where unknown), each probability."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "group", *names, *(f"prob_{name}" for name in names)])
    for row, own, p in zip(rows, known.tolist(), prob.tolist(), strict=True):
        writer.writerow([row["image"], row["group"], *("" if value < 0 else value for value in own), *p])
    utils.atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def fit_on(
    name: str, train: Samples, num_classes: int, seed: int, metric: str, class_weights: str = "none", folds: int = 0
) -> Head:
    """Logistic regression on all of `train`, its penalty chosen on a tenth of each class or on folds, groups whole."""

    def score(labels: np.ndarray, prob: np.ndarray) -> float:
        return score_set(labels, prob, metric)["score"]

    def decide(labels: np.ndarray, prob: np.ndarray) -> float:
        return float(f1_score(labels, prob.argmax(1), average="macro"))

    choice = Choice(score, class_weights, decide, folds, group="group", seed=seed)
    if folds:
        return fit_logistic(train, train[np.arange(0)], num_classes, choice)
    held_out = stratified_part(train.labels, 0.1, 1, np.random.default_rng(seed))
    if train.rows:
        groups = [row["group"] for row in train.rows]
        rarest = min(np.bincount(train.labels)[np.unique(train.labels)])
        number = max(2, min(10, len(set(groups)), rarest))
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        _, held_out = next(iter(splitter.split(train.labels, train.labels, groups)))
    fitted = np.setdiff1d(np.arange(len(train.labels)), held_out)
    missing = np.setdiff1d(train.labels, train.labels[fitted])
    if len(missing):
        raise ValueError(f"{name}: class {missing[0]} has one training image; two are needed to choose a penalty")
    return fit_logistic(train[fitted], train[held_out], num_classes, choice)


def label_fraction(
    args: argparse.Namespace,
    train: Samples,
    num_classes: int,
    fraction: float,
    test: Samples,
    evaluate: Callable[[np.ndarray], dict],
    metric: str,
) -> dict:
    """Score of logistic regression on a fraction of each class: mean and std over random draws."""
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: a fraction of the training set is above 0 and at most 1")
    found, sizes = [], []
    for draw in range(args.fraction_seeds):
        part = part_of(train, fraction, np.random.default_rng((args.seed, draw)))
        head = fit_on(args.dataset, train[part], num_classes, args.seed, metric, args.class_weights)
        found.append(evaluate(head.probabilities(test.features))["score"])
        sizes.append(len(part))
    return {
        "fraction": fraction,
        "samples": sizes[0],
        "scores": found,
        "mean": float(np.mean(found)),
        "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
    }


def part_of(train: Samples, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of about `fraction` of the samples of each class, at least two; whole groups where there are any."""
    if not train.rows:
        return stratified_part(train.labels, fraction, 2, rng)
    groups, place = np.unique([row["group"] for row in train.rows], return_inverse=True)
    label_of = np.zeros(len(groups), dtype=int)
    np.maximum.at(label_of, place, train.labels)
    return np.flatnonzero(np.isin(place, stratified_part(label_of, fraction, 2, rng)))


def describe_probes(results: dict) -> str:
    lines = []
    if "metrics" in results:
        lines.append(f"{results['dataset']}, logistic: percent, with 95% intervals over groups")
        lines += [
            f"  {metrics.METRICS[name]:<22} {metrics.Interval(**value).percent()}"
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
