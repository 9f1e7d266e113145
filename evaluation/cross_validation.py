"""Cross-validation over groups: every sample is predicted once, by a probe that saw nobody of its group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold

from evaluation import downstream, metrics
from evaluation.catalog import Catalog, metric_of
from evaluation.cbis_probe import LesionImages, Lesions, choice_of
from evaluation.heads import PROTOCOLS, Choice, Head, Samples, fit_logistic
from evaluation.predictions import CBIS, Predictions, Scheme, check_baseline, describe_measured
from evaluation.probe import Fitting, Probe
from evaluation.run_folder import count_reading
from evaluation.subgroups import report_set
from inputs.cbis import CBIS_SPLITS, read_lesions, select_lesions
from inputs.transforms import linear_eval_view
from runtime.command_line import UsageError

log = logging.getLogger("medslip")
INNER = 5  # folds among the training groups of each fold, which choose the penalty


@dataclass(frozen=True)
class CrossValidated:
    """What the folds have made of n samples."""

    prob: np.ndarray  # (n, k), of each sample by the head that did not see its group
    fold: np.ndarray  # (n,) whose held-out part it was, from 0
    chosen: list[dict[str, Any]]  # the setting of each fold


def cross_validate(
    samples: Samples,
    num_classes: int,
    folds: int,
    choice: Choice,
    fit: Callable[[Samples, Samples, int, Choice], Head] = fit_logistic,
) -> CrossValidated:
    """Whole groups in `folds` parts, classes in proportion; each part is predicted by a head fitted on the others.

    Args:
        choice: of the setting, by folds among the training groups of each part (`choice.folds`, fewer where there are
            not so many groups), so that no held-out sample has a say in it. Its group and seed draw the parts too.
        fit: as heads.fit_logistic.

    Raises:
        ValueError: fewer than two folds, or more than there are groups; training parts of a single class.
    """
    groups = np.array([row[choice.group] for row in samples.rows])
    number = len(np.unique(groups))
    if not 2 <= folds <= number:
        raise ValueError(f"--cross-validate {folds}: choose 2 to {number}, the number of {choice.group}s")
    prob, fold = np.full((len(groups), num_classes), np.nan), np.full(len(groups), -1)
    chosen = []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=choice.seed)
    for k, (kept, held) in enumerate(splitter.split(samples.labels, samples.labels, groups)):
        inner = replace(choice, folds=min(choice.folds, len(np.unique(groups[kept]))))
        head = fit(samples[kept], samples[kept[:0]], num_classes, inner)
        prob[held], fold[held] = head.probabilities(samples.features[held]), k
        chosen.append(head.chosen)
    return CrossValidated(prob, fold, chosen)


@dataclass(frozen=True)
class _Whole:
    """Every row of a set through the tower, and how a setting is chosen on it."""

    samples: Samples
    scheme: Scheme
    choice: Choice
    metric: str  # that a set of type csv reports; "" for CBIS-DDSM
    about: dict[str, Any]  # for results.json


def check_whole(probe: Probe, source: LesionImages | Catalog) -> downstream.Downstream | None:
    """What does not go is said before a model sees an image; the set's images, None for CBIS-DDSM."""
    if isinstance(source, LesionImages):
        table = Path(source.root) / f"{source.kind}.csv"
        rows = select_lesions(read_lesions(table), source.where, table)[0]
        for baseline in probe.baselines:
            check_baseline(baseline, [row for row in rows if row[source.image_kind]])
        return None
    images = downstream.open_every_row(probe.dataset, source, partial(linear_eval_view, probe.backbone.preprocess))
    if images.findings is not None:
        raise UsageError(f"{probe.dataset} has several findings for each image, and --cross-validate takes one class")
    assert images.scheme is not None  # of a table
    for baseline in probe.baselines:
        check_baseline(baseline, images.rows, images.scheme)
    return images


def _whole(probe: Probe, source: LesionImages | Catalog, fitting: Fitting) -> _Whole:
    images, folds = check_whole(probe, source), fitting.folds or INNER
    if images is None:
        assert isinstance(source, LesionImages)
        lesions = Lesions(probe, source)
        readings = count_reading(probe.output_dir, probe.settings) if probe.is_main else 0
        samples = lesions(CBIS_SPLITS[0])
        for split in CBIS_SPLITS[1:]:
            samples = samples + lesions(split)
        about = {"image_kind": source.image_kind, "test_readings": readings, "samples_skipped": lesions.skipped}
        return _Whole(samples, CBIS, choice_of(fitting, CBIS, folds), "", about)
    assert isinstance(source, Catalog) and images.scheme is not None
    features, kept = probe.features(images, f"{probe.dataset}_all")
    samples = Samples(features, images.labels[kept], [images.rows[i] for i in kept])
    metric = metric_of(probe.dataset, source)

    def score(labels: np.ndarray, prob: np.ndarray) -> float:
        return metrics.score_outputs(labels, metrics.log_prob(prob), metric)["score"]

    def decide(labels: np.ndarray, prob: np.ndarray) -> float:
        return float(f1_score(labels, prob.argmax(1), average="macro"))

    group, classes = images.scheme.group, images.classes
    choice = Choice(score, fitting.class_weights, decide, folds, group, fitting.seed, classes)
    return _Whole(samples, images.scheme, choice, metric, {"samples_skipped": {"all": len(images) - len(kept)}})


def probe_cross_validated(
    probe: Probe, source: LesionImages | Catalog, fitting: Fitting, folds: int
) -> dict[str, Any]:  # fmt: skip
    """Cross-validation of a set that a table describes; prints, writes predictions.csv with a column `fold`."""
    whole = _whole(probe, source, fitting)
    samples, scheme = whole.samples, whole.scheme
    name_lone_groups(probe.dataset, samples, scheme)
    found = cross_validate(samples, len(scheme.classes), folds, whole.choice, PROTOCOLS[fitting.protocol])
    rows = [row | {"fold": str(k)} for row, k in zip(samples.rows, found.fold.tolist(), strict=True)]
    predictions = Predictions(rows, found.prob, replace(scheme, columns=(*scheme.columns, "fold")))
    results = {
        **probe.described(),
        "protocol": fitting.protocol,
        "cross_validation": {
            "folds": folds, "chosen": found.chosen, "samples": np.bincount(found.fold, minlength=folds).tolist(),
        },
        "samples": {"all": len(rows)},
        **whole.about,
        "unit": "fraction",
    }  # fmt: skip
    if whole.metric:
        results |= metrics.score_outputs(samples.labels, metrics.log_prob(found.prob), whole.metric)
        results["samples"] = {"all": len(rows)}
    results |= report_set(predictions, None, probe.baselines, probe.settings, probe.bootstrap)
    if probe.is_main:
        predictions.write(probe.output_dir / "predictions.csv")
        title = f"{probe.dataset}, {folds}-fold cross-validation"
        lines = describe_measured(results, title)
        if whole.metric:
            lines.append(f"{title}: {metrics.shown_score(results)}")
        if any(results["samples_skipped"].values()):
            lines.append(f"MISSING OR CORRUPT IMAGES SKIPPED: {results['samples_skipped']}")
        log.info("\n".join(lines))
    return results


def name_lone_groups(dataset: str, samples: Samples, scheme: Scheme) -> None:
    """A warning for a class of a single group: the head that predicts it has not seen the class."""
    groups = np.array([row[scheme.group] for row in samples.rows])
    for c, name in enumerate(scheme.classes):
        own = np.unique(groups[samples.labels == c])
        if len(own) == 1:
            log.warning(
                f"{dataset}: all images of class {name} are of one group ({own[0]}): the probe that predicts them has "
                "seen none of the class"
            )
