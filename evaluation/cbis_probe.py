"""The CBIS-DDSM probe: what is chosen is chosen on validation patients, the test table is read once."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import distributed
from evaluation import comparisons, metrics
from evaluation.catalog import cbis_root
from evaluation.features import Backbone
from evaluation.predictions import SEVERITY, Predictions, describe_results, macro_auroc, macro_f1, report_lesions
from evaluation.probes import Choice, Samples, fit_logistic, fit_medslip, stratified_part
from evaluation.probing import keep_heads, kept_features, weights_of
from evaluation.run_folder import count_reading
from inputs.cbis import CBIS_CLASSES, CBIS_SETS, CbisLesions

log = logging.getLogger("medslip")
PROTOCOLS = {"logistic": fit_logistic, "medslip": fit_medslip}


def probe_cbis(
    args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes, settings: dict[str, Any]
) -> dict:
    """Fit one linear layer and evaluate it on the test table; prints, writes predictions, returns the results."""
    root = cbis_root(args.dataset, args.root, args.catalog)
    skipped = {}

    def samples(split: str) -> Samples:
        lesions = CbisLesions(
            root, CBIS_SETS[args.dataset], split, args.image_kind, backbone.preprocess, args.skip_broken
        )
        title = f"{args.dataset}_{args.image_kind}_{split}"
        features, kept = kept_features(args, backbone, lesions, title, processes)
        skipped[split] = lesions.dropped + len(lesions) - len(kept)
        return Samples(features, np.array(lesions.labels)[kept], [lesions.rows[i] for i in kept])

    train, val = samples("train"), samples("val")
    choice = Choice(macro_auroc, args.class_weights, macro_f1, args.folds, seed=args.seed)
    head = PROTOCOLS[args.protocol](train, val, len(CBIS_CLASSES), choice)
    two_class = fit_without_callback(args, train, val)
    # The test table is read here for the first time, after everything is chosen.
    readings = count_reading(args.output_dir, settings) if processes.is_main else 0
    test = samples("test")
    predictions = Predictions(test.rows, head.probabilities(test.features))
    results = {
        "model": backbone.name,
        "dataset": args.dataset,
        "image_kind": args.image_kind,
        "features": backbone.features,
        "feature_dim": test.features.shape[1],
        "protocol": args.protocol,
        "settings": settings,
        "weights": weights_of(args, backbone),
        "test_readings": readings,
        "chosen": head.chosen,
        "validation": head.validation,
        "validation_score": "auroc",
        "lesions": {"train": len(train.rows), "val": len(val.rows), "test": len(test.rows)},
        "lesions_skipped": skipped,
    }
    results |= report_lesions(predictions, head.held_out, args.baseline, settings, args.resamples, args.seed)
    results["two_class"] = two_class(test)
    if args.fraction:
        results["fractions"] = [lesion_fraction(args, train + val, test, fraction) for fraction in args.fraction]
    if processes.is_main:
        predictions.write(Path(args.output_dir) / "predictions.csv")
        keep_heads(args, backbone, [head.probabilities], results, (train + val).features)
        how = f"{results['features']} features, {results['protocol']} protocol"
        log.info("\n".join([describe_results(results, how), *describe_lesion_fractions(results)]))
    return results


def fit_without_callback(args: argparse.Namespace, train: Samples, val: Samples) -> Callable[[Samples], dict]:
    """Benign or malignant, without the lesions that needed neither biopsy nor further films: test samples -> scores.

    The radiologist dismissed these at a glance, so telling them from the others is another question than the biopsy's.
    """
    classes = ("BENIGN", metrics.MALIGNANT)
    benign, dismissed = (CBIS_CLASSES.index(name) for name in ("BENIGN", "BENIGN_WITHOUT_CALLBACK"))

    def two_classes(samples: Samples) -> Samples:
        kept = samples[np.flatnonzero(samples.labels != dismissed)]
        return replace(kept, labels=(kept.labels != benign).astype(int))

    choice = Choice(partial(two_class_auroc, classes), args.class_weights, None, args.folds, seed=args.seed)
    head = PROTOCOLS[args.protocol](two_classes(train), two_classes(val), 2, choice)

    def score(test: Samples) -> dict:
        test = two_classes(test)
        intervals = metrics.patient_bootstrap(
            test.labels, head.probabilities(test.features), [row["patient"] for row in test.rows], classes,
            resamples=args.resamples, seed=args.seed,
        )  # fmt: skip
        values = {name: asdict(interval) for name, interval in intervals.items()}
        return {"classes": list(classes), "lesions": len(test.rows), "chosen": head.chosen, "metrics": values}

    return score


def two_class_auroc(classes: tuple[str, str], labels: np.ndarray, prob: np.ndarray) -> float:
    return metrics.classification_metrics(labels, prob, classes)["auroc"]


def lesion_fraction(args: argparse.Namespace, known: Samples, test: Samples, fraction: float) -> dict:
    """The probe on a fraction of the training patients: each metric over --fraction-seeds draws and the test patients.

    Patients are drawn within their gravest pathology, at least two of each, and the setting is chosen on folds among
    them: the usual validation split has more labels than a small fraction.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: a fraction of the training set is above 0 and at most 1")
    patients = np.array([row["patient"] for row in known.rows])
    names, gravest = np.unique(patients), []
    for name in names:
        own = known.labels[patients == name]
        gravest.append(min(own, key=lambda label: SEVERITY.index(CBIS_CLASSES[label])))
    probabilities, sizes, drawn = [], [], []
    for draw in range(args.fraction_seeds if fraction < 1 else 1):
        part = names[stratified_part(np.array(gravest), fraction, 2, np.random.default_rng((args.seed, draw)))]
        samples = known[np.flatnonzero(np.isin(patients, part))]
        choice = Choice(macro_auroc, args.class_weights, macro_f1, min(5, len(part)), seed=args.seed)
        head = PROTOCOLS[args.protocol](samples, samples[np.arange(0)], len(CBIS_CLASSES), choice)
        probabilities.append(head.probabilities(test.features))
        sizes.append(len(samples.rows))
        drawn.append(len(part))
    found = comparisons.draw_metrics(
        test.labels, probabilities, [row["patient"] for row in test.rows], CBIS_CLASSES, resamples=args.resamples,
        seed=args.seed, trained=fraction < 1,
    )  # fmt: skip
    return {
        "fraction": fraction,
        "patients": drawn,
        "lesions": sizes,
        "values": {name: row.values.tolist() for name, row in found.items()},
        "metrics": {name: asdict(comparisons.interval(row)) for name, row in found.items()},
    }


def describe_lesion_fractions(results: dict) -> list[str]:
    return [
        f"{part['fraction']:.2%} of the training patients ({part['patients'][0]}, {part['lesions'][0]} lesions): AUROC "
        f"{metrics.Interval(**part['metrics']['auroc']).percent()} over {len(part['lesions'])} draws and the patients"
        for part in results.get("fractions", ())
    ]
