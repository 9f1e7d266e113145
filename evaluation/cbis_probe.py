"""The CBIS-DDSM probe: what is chosen is chosen on validation patients, the test table is read once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import comparisons, metrics, weighted
from evaluation.features import greys_of
from evaluation.heads import PROTOCOLS, Choice, Samples, stratified_part
from evaluation.predictions import CBIS, Predictions, Scheme, describe_results, macro_auroc, macro_f1, unlearnt_classes
from evaluation.probe import Fitting, Fractions, Probe
from evaluation.run_folder import count_reading
from evaluation.subgroups import report_set
from inputs.cbis import CBIS_CLASSES, CbisLesions

log = logging.getLogger("medslip")


@dataclass(frozen=True)
class LesionImages:
    """Which table of lesions is read, and which image of a lesion the tower sees."""

    root: str | Path
    kind: str  # calc, mass or both
    image_kind: str = "crop"  # of inputs.cbis.CBIS_IMAGES
    skip_broken: bool = False
    where: str = ""  # an inputs.selection


class Lesions:
    """The splits of a table seen through a tower, each read when it is first asked for."""

    def __init__(self, probe: Probe, images: LesionImages):
        self.probe, self.images = probe, images
        self.skipped: dict[str, int] = {}  # by split: image missing or corrupt
        self.greys: dict[str, int] = {}  # of training images, see `features.greys_of`

    def __call__(self, split: str) -> Samples:
        """A split's features, labels and rows."""
        images, backbone = self.images, self.probe.backbone
        lesions = CbisLesions(
            images.root, images.kind, split, images.image_kind, backbone.preprocess, images.skip_broken,
            images.where,
        )  # fmt: skip
        features, kept = self.probe.features(lesions, f"{self.probe.dataset}_{images.image_kind}_{split}")
        if split == "train":
            self.greys = greys_of(lesions)
        self.skipped[split] = lesions.dropped + len(lesions) - len(kept)
        return Samples(features, np.array(lesions.labels)[kept], [lesions.rows[i] for i in kept])


def probe_cbis(probe: Probe, images: LesionImages, fitting: Fitting, fractions: Fractions) -> dict[str, Any]:
    """Fit one linear layer and evaluate it on the test table; prints, writes predictions, returns the results."""
    lesions = Lesions(probe, images)
    train, val = lesions("train"), lesions("val")
    scheme = CBIS.without(unlearnt_classes(CBIS_CLASSES, (train + val).labels, probe.dataset))
    if not fitting.folds:
        refuse_lacking(probe.dataset, train, val)
    choice = choice_of(fitting, scheme, fitting.folds)
    head = PROTOCOLS[fitting.protocol](train, val, len(CBIS_CLASSES), choice)
    score_two_classes = fit_without_callback(probe, fitting, train, val)
    # The test table is read here for the first time, after everything is chosen.
    readings = count_reading(probe.output_dir, probe.settings) if probe.is_main else 0
    test = lesions("test")
    predictions = Predictions(test.rows, head.probabilities(test.features), scheme)
    results = {
        **probe.described(),
        "image_kind": images.image_kind,
        "feature_dim": test.features.shape[1],
        "protocol": fitting.protocol,
        "test_readings": readings,
        "chosen": head.chosen,
        "lesions": {"train": len(train.rows), "val": len(val.rows), "test": len(test.rows)},
        "lesions_skipped": lesions.skipped,
    }
    results |= report_set(predictions, head.held_out, probe.baselines, probe.settings, probe.bootstrap)
    results["two_class"] = score_two_classes(test)
    if fractions.wanted and "metrics" in results:
        results["fractions"] = [
            lesion_fraction(probe, fitting, scheme, train + val, test, fraction, fractions.draws if fraction < 1 else 1)
            for fraction in fractions.wanted
        ]
    results |= {"validation_score": "auroc", "validation": head.validation}  # long: after all that is read
    if probe.is_main:
        predictions.write(probe.output_dir / "predictions.csv")
        how = f"{probe.backbone.features} features, {fitting.protocol} protocol"
        log.info("\n".join([describe_results(results, how), *describe_lesion_fractions(results)]))
    point = results.get("operating_point")
    probe.keep_heads(
        [head.probabilities], (train + val).features, results.get("classes"), operating_point=point, greys=lesions.greys
    )
    return results


def choice_of(fitting: Fitting, scheme: Scheme, folds: int) -> Choice:
    """The setting with the best macro AUROC, and the class weights with the best macro F1, on held-out lesions."""
    score, decide = partial(macro_auroc, scheme=scheme), partial(macro_f1, scheme=scheme)
    return Choice(score, fitting.class_weights, decide, folds, seed=fitting.seed, classes=CBIS_CLASSES)


def refuse_lacking(dataset: str, train: Samples, val: Samples) -> None:
    """ValueError where only one of the two splits has lesions of a class: a setting cannot be chosen between them."""
    for own, other, name in ((train, val, "validation"), (val, train, "training")):
        if len(lacking := np.setdiff1d(own.labels, other.labels)):
            pathology = CBIS_CLASSES[lacking[0]]
            patients = len(
                {row["patient"] for row, label in zip(own.rows, own.labels, strict=True) if label == lacking[0]}
            )
            raise ValueError(
                f"{dataset}: the {name} split has no lesion of {pathology}, of which {patients} patient(s) have one in "
                "the other: --folds 5 chooses on all of them"
            )


def fit_without_callback(
    probe: Probe, fitting: Fitting, train: Samples, val: Samples
) -> Callable[[Samples], dict | None]:
    """Benign or malignant, without the lesions that needed neither biopsy nor further films: test samples -> scores.

    None where the test samples are of one class.

    The radiologist dismissed these at a glance, so telling them from the others is another question than the biopsy's.
    """
    classes = ("BENIGN", metrics.MALIGNANT)
    benign, dismissed = (CBIS_CLASSES.index(name) for name in ("BENIGN", "BENIGN_WITHOUT_CALLBACK"))

    def two_classes(samples: Samples) -> Samples:
        kept = samples[np.flatnonzero(samples.labels != dismissed)]
        return replace(kept, labels=(kept.labels != benign).astype(int))

    choice = Choice(partial(two_class_auroc, classes), fitting.class_weights, None, fitting.folds, seed=fitting.seed)
    head = PROTOCOLS[fitting.protocol](two_classes(train), two_classes(val), 2, choice)

    def score(test: Samples) -> dict | None:
        test = two_classes(test)
        if len(np.unique(test.labels)) < 2:  # said with the other metrics
            return None
        resamples = probe.bootstrap.of(test.labels, [row["patient"] for row in test.rows], classes)
        intervals = resamples.intervals(head.probabilities(test.features))
        values = {name: interval.plain() for name, interval in intervals.items()}
        return {"classes": list(classes), "lesions": len(test.rows), "chosen": head.chosen, "metrics": values}

    return score


def two_class_auroc(classes: tuple[str, str], labels: np.ndarray, prob: np.ndarray) -> float:
    """The AUROC that chooses a setting: labels (n,), probabilities (n, 2)."""
    return weighted.classification_metrics(labels, prob, classes)["auroc"]


def lesion_fraction(
    probe: Probe, fitting: Fitting, scheme: Scheme, known: Samples, test: Samples, fraction: float, draws: int
) -> dict[str, Any]:
    """The probe on a fraction of the training patients: each metric over draws of them and over the test patients.

    Patients are drawn within their gravest pathology, at least two of each, and the setting is chosen on folds among
    them: the usual validation split has more labels than a small fraction.
    """
    patients = np.array([row["patient"] for row in known.rows])
    names, gravest = np.unique(patients), []
    for name in names:
        own = known.labels[patients == name]
        gravest.append(min(own, key=lambda label: CBIS.gravest_first.index(CBIS_CLASSES[label])))
    probabilities, sizes, drawn = [], [], []
    for draw in range(draws):
        part = names[stratified_part(np.array(gravest), fraction, 2, np.random.default_rng((fitting.seed, draw)))]
        samples = known[np.flatnonzero(np.isin(patients, part))]
        choice = choice_of(fitting, scheme, min(5, len(part)))
        head = PROTOCOLS[fitting.protocol](samples, samples[np.arange(0)], len(CBIS_CLASSES), choice)
        probabilities.append(head.probabilities(test.features))
        sizes.append(len(samples.rows))
        drawn.append(len(part))
    patients_of_test = [row["patient"] for row in test.rows]
    resamples = probe.bootstrap.of(test.labels, patients_of_test, CBIS_CLASSES, scheme.positive, scheme.unlearnt)
    found = comparisons.draw_rows(resamples, probabilities, trained=fraction < 1)
    return {
        "fraction": fraction,
        "patients": drawn,
        "lesions": sizes,
        "values": {name: row.values.tolist() for name, row in found.items()},
        "metrics": {name: comparisons.interval(row).plain() for name, row in found.items()},
    }


def describe_lesion_fractions(results: dict[str, Any]) -> list[str]:
    """A line for each fraction, for people."""
    return [
        f"{part['fraction']:.2%} of the training patients ({part['patients'][0]}, {part['lesions'][0]} lesions): AUROC "
        f"{metrics.Interval.of(part['metrics']['auroc']).percent()} over {len(part['lesions'])} draws and the patients"
        for part in results.get("fractions", ())
    ]
