"""Evaluation of a frozen image tower: linear classification, and the CBIS-DDSM probe.

    python main_linear.py --dataset cbis_calc --root /path/to/cbis-ddsm --pretrained checkpoint_best.pt
    torchrun --nproc_per_node=8 main_linear.py -a vit_base_patch16_224 --dataset imagenet --pretrained checkpoint.pt

CBIS-DDSM: features are extracted once and kept in --output-dir, one linear layer is fitted on them. Whatever is
chosen is chosen on the validation split of the training table; the test table is read once, at the end. Written
are results.json and predictions.csv, which --baseline takes for the paired comparison of two runs. Each reading of
the test table is a line of test_readings.jsonl. Results of other settings are set aside, never overwritten.

Any other set of dataset_catalog.json: SGD over random crops and flips as SLIP did it (after MoCo v3), or, on
features extracted once, logistic regression (--cache-features), label fractions (--fraction) and k-NN (--knn).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import comparisons
import distributed
import downstream
import loader
import metrics
import models
import utils
from cbis import CBIS_CLASSES, CBIS_IMAGES, CBIS_SETS, CbisLesions, read_lesions
from datasets import GlobalBatchSampler
from features import Backbone, Loading, extract, extract_or_reuse, load_backbone
from predictions import (
    SEVERITY,
    Predictions,
    check_baseline,
    count_reading,
    describe_results,
    macro_auroc,
    macro_f1,
    report_lesions,
    report_rows,
    set_aside_other_results,
)
from probes import (
    CLASS_WEIGHTS,
    MEDSLIP_SIZE,
    Choice,
    Head,
    Linear,
    Samples,
    fit_logistic,
    fit_medslip,
    knn_probabilities,
    save_heads,
    stratified_part,
)
from transforms import Preprocess, linear_eval_view, random_resized_crop

log = logging.getLogger("medslip")

PROTOCOLS = {"logistic": fit_logistic, "medslip": fit_medslip}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_linear.py", description=__doc__, formatter_class=utils.HelpFormatter)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_feature_arguments(parser)
    add_sgd_arguments(parser)
    distributed.add_distributed_arguments(parser)
    utils.add_config_argument(parser)
    return parser


# fmt: off
def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="imagenet", type=str, metavar="NAME",
                      help=f"{', '.join(CBIS_SETS)}, or any other set of the catalog")
    data.add_argument("--root", default="", type=str, help="folder of the dataset; by default its path in the catalog")
    data.add_argument("--catalog", default=str(downstream.CATALOG), type=str,
                      help="where the datasets are; sets of your own are entries of a copy of dataset_catalog.json")
    data.add_argument("--image-kind", "--picture", default="crop", choices=CBIS_IMAGES,
                      help="CBIS: which image of a lesion the tower sees; the results name it")
    data.add_argument("--skip-broken", action="store_true",
                      help="skip test images, and features of training images, that are missing or corrupt, and report "
                      "on fewer; by default an error")
    data.add_argument("-j", "--workers", default=64, type=int,
                      help="loader processes of this node; no more than it has cores are started")
    data.add_argument("--output-dir", default="./", type=str, help="results, features and checkpoints go here")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained", default="", type=str, metavar="PATH",
                       help="a checkpoint of ours, a published SLIP file, or MedCLIP's folder, zip or "
                       "pytorch_model.bin; without it the tower is untrained")
    model.add_argument("-a", "--arch", default="vit_base_patch16_224", type=str, metavar="TIMM_NAME",
                       help="the untrained tower; with --pretrained the file's own tower is used")
    model.add_argument("--model", default=None, choices=list(models.MODELS), metavar="NAME",
                       help="what a published file that does not say was trained as, or an untrained model in place of "
                       "--arch: one of " + ", ".join(models.MODELS))
    model.add_argument("--untrained", action="store_true",
                       help="the model of --pretrained with fresh weights from --seed: what has training added?")
    model.add_argument("--features", default=None, choices=("backbone", "projection"),
                       help="the tower's own features, or those in the space shared with captions (default: backbone; "
                       "with --protocol medslip projection)")
    model.add_argument("--image-size", default=None, action=utils.ImageSize,
                       help="pixels of the images, a side or height and width, where it is not the size that the "
                       "weights were trained with; position embeddings follow")


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    cbis = parser.add_argument_group("probes of CBIS-DDSM and, with --cache-features, of other sets")
    cbis.add_argument("--protocol", default="logistic", choices=list(PROTOCOLS),
                      help="logistic: L2-regularised logistic regression on standardised features. medslip: the first "
                      f"MedSLIP's protocol without its faults, projected features at {MEDSLIP_SIZE} pixels and 50 "
                      "epochs of AdamW in batches of 16, to compare with its tables")
    cbis.add_argument("--resamples", default=2000, type=utils.positive_int,
                      help="bootstrap resamples of the patients for the 95%% intervals")
    cbis.add_argument("--baseline", default=[], nargs="+", type=str, metavar="PREDICTIONS.CSV",
                      help="other runs' predictions for the same lesions: adds the paired difference to each")
    cbis.add_argument("--class-weights", default="none", choices=CLASS_WEIGHTS,
                      help="weights of the classes in the loss. balanced: each class weighs the same, which finds more "
                      "of a rare one and is wrong about it more often; validated: what gives the better macro F1 on "
                      "validation")
    cbis.add_argument("--folds", default=0, type=int, metavar="K",
                      help="choose on K folds over all training patients in place of one validation split; 5 is "
                      "usual and steadier, and costs K times the fits")

    other = parser.add_argument_group("other sets, on features extracted once")
    other.add_argument("--cache-features", action="store_true",
                       help="logistic regression in place of SGD, its penalty chosen on a tenth of the training set; "
                       "for sets of up to some 100,000 images")
    other.add_argument("--fraction", default=[], nargs="+", type=float, metavar="FRACTION",
                       help="logistic regression on these fractions of each class, e.g. 0.01 0.1 (at least two each); "
                       "CBIS: of the patients, the penalty chosen on folds among them")
    other.add_argument("--fraction-seeds", default=3, type=utils.positive_int, help="random draws of each fraction")
    other.add_argument("--knn", default=0, type=int, metavar="K", help="k-nearest-neighbour accuracy; 20 is usual")


def add_sgd_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("other sets, by SGD")
    recipe.add_argument("--epochs", default=90, type=int, help="passes over the training set")
    recipe.add_argument("--start-epoch", default=0, type=int, help="number of the first epoch of a new run")
    recipe.add_argument("-b", "--batch-size", default=128, type=utils.positive_int,
                        help="images for each process, also where features are extracted")
    recipe.add_argument("--lr", "--learning-rate", default=0.1, type=float,
                        help="base learning rate; --lr-scaling says for what batch")
    recipe.add_argument("--lr-scaling", default="linear", choices=("linear", "slip"),
                        help="linear: --lr is for 256 images and scales with the batch of all processes. slip: what "
                        "the published script used, which divides the batch of one process by their number")
    recipe.add_argument("--momentum", default=0.9, type=float, help="of SGD")
    recipe.add_argument("--wd", "--weight-decay", default=0.0, type=float, help="of the linear layer")
    recipe.add_argument("-p", "--print-freq", default=10, type=utils.positive_int, metavar="STEPS",
                        help="steps between log lines")
    recipe.add_argument("--eval-freq", default=10, type=utils.positive_int, metavar="EPOCHS",
                        help="epochs between evaluations")
    recipe.add_argument("--resume", default="", type=str, metavar="CKPT",
                        help="continue from this file; linear_checkpoint.pt in --output-dir is found by itself")
    recipe.add_argument("-e", "--evaluate", action="store_true", help="only evaluate the linear layer of --resume")
    recipe.add_argument("--seed", default=None, type=int,
                        help="of batches, crops, an untrained tower, AdamW and the bootstrap (0 where it is not given)")
# fmt: on


def main(argv: list[str] | None = None) -> dict:
    """Run the evaluation that the flags ask for; returns what results.json holds."""
    args = utils.parse_with_config(get_args_parser(), argv)
    args.seed = args.seed or 0
    processes = distributed.init_distributed(args)
    with utils.start_logging(is_main=processes.is_main), distributed.ending_together(processes):
        return evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: distributed.Processes) -> dict:
    """The command once its processes have met."""
    on_cbis = args.dataset in CBIS_SETS
    # What is missing ends the run before a model is loaded.
    if args.baseline and not on_cbis and not args.cache_features:
        raise utils.UsageError("--baseline compares probes: on other sets than CBIS-DDSM add --cache-features")
    if on_cbis:
        root = Path(downstream.cbis_root(args.dataset, args.root, args.catalog))
        rows = read_lesions(root / f"{CBIS_SETS[args.dataset]}.csv")
        for baseline in args.baseline:  # an hour of features before the comparison
            check_baseline(baseline, [row for row in rows if row["split"] == "test" and row[args.image_kind]])
    else:
        find_set(args)
    medslip = on_cbis and args.protocol == "medslip"
    features = args.features or ("projection" if medslip else "backbone")
    backbone = load_backbone(
        args.pretrained, model=args.model, arch=args.arch, untrained=args.untrained, seed=args.seed,
        device=processes.device, features=features, size=args.image_size or (MEDSLIP_SIZE if medslip else None),
    )  # fmt: skip
    settings = settings_of(args, backbone)
    settings["precision"] = processes.precision
    if processes.is_main:
        set_aside_other_results(args.output_dir, settings, args.baseline)
    record_settings(args, backbone, processes)
    if on_cbis:
        results = probe_cbis(args, backbone, processes, settings)
    elif not on_features(args):
        results = train_sgd(args, backbone, processes)
    else:
        results = probe_features(args, backbone, processes, settings)
    if processes.is_main and "stopped_by" not in results:
        utils.write_json(Path(args.output_dir) / "results.json", results)
    return results


def on_features(args: argparse.Namespace) -> bool:
    """Whether another set than CBIS-DDSM is evaluated on features extracted once, not by SGD."""
    return bool(args.cache_features or args.fraction or args.knn)


def settings_of(args: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """What determines the predictions, as results.json has it; results of others are set aside."""
    settings: dict[str, Any] = {"dataset": args.dataset, "features": backbone.features, "seed": args.seed}
    settings["weights_sha256"] = backbone.fingerprint()
    if args.image_size:
        settings["image_size"] = backbone.preprocess.to_dict()["size"]
    if args.dataset in CBIS_SETS:
        settings |= {name: getattr(args, name) for name in ("image_kind", "protocol", "class_weights", "folds")}
        settings["fraction"] = args.fraction
    elif on_features(args):
        settings |= {"cache_features": args.cache_features, "fraction": args.fraction, "knn": args.knn}
        settings |= {"class_weights": args.class_weights, "folds": args.folds}
    return settings


def weights_of(args: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """What results.json says of the weights: the file, and how far they were trained where it tells."""
    return {"path": args.pretrained, "untrained": args.untrained or not args.pretrained, **backbone.training}


def record_settings(args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes) -> None:
    """Everything that determines the run, written before its first step."""
    if not processes.is_main:
        return
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    derived = {
        "model": backbone.name,
        "features": backbone.features,
        "preprocess": backbone.preprocess.to_dict(),
        "weights_sha256": backbone.fingerprint(),
        "world_size": processes.world_size,
        "global_batch": args.batch_size * processes.world_size,
        "learning_rate": learning_rate(args, processes.world_size),
        "device": str(processes.device),
    }
    versions = {**utils.versions(), "scikit-learn": sklearn.__version__}
    settings = {"args": vars(args), "derived": derived, "versions": versions}
    utils.write_json(Path(args.output_dir) / "settings.json", settings)
    log.info(f"{args.dataset}: {backbone.name}, {backbone.features} features")


def loading_of(args: argparse.Namespace, processes: distributed.Processes) -> Loading:
    """--workers is a node's, to be divided among its processes."""
    workers = args.workers // distributed.processes_of_node(processes)
    return Loading(args.batch_size, workers, args.skip_broken, processes)


def kept_features(
    args: argparse.Namespace, backbone: Backbone, dataset: Dataset, title: str, processes: distributed.Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and the numbers (n,) of their samples, extracted once for all runs in --output-dir."""
    return extract_or_reuse(backbone, dataset, title, loading_of(args, processes), Path(args.output_dir) / "features")


# ---------------------------------------------------------------------------------------------------------------------
# The CBIS-DDSM probe
# ---------------------------------------------------------------------------------------------------------------------


def probe_cbis(
    args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes, settings: dict[str, Any]
) -> dict:
    """Fit one linear layer and evaluate it on the test table; prints, writes predictions, returns the results."""
    root = downstream.cbis_root(args.dataset, args.root, args.catalog)
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


def keep_heads(
    args: argparse.Namespace, backbone: Backbone, heads: Sequence[Linear], results: dict[str, Any],
    features: np.ndarray | None, **about: Any,
) -> None:  # fmt: skip
    """head.safetensors: the layer, of several findings one each, and in its header what using it takes.

    Args:
        features: of the training images (n, d), for the distance of new ones from them; None where there is none.
        about: of other sets than CBIS-DDSM: classes, the name of the view, findings.
    """
    if not heads:  # no finding has two images of either outcome
        return
    first = heads[0] if features is None else heads[0].knowing(features)
    described = {
        "classes": results.get("classes"),
        "features": backbone.features,
        "preprocess": backbone.preprocess.to_dict(),
        "weights_sha256": results["settings"]["weights_sha256"],
        "operating_point": results.get("operating_point"),
        "precision": results["settings"].get("precision", "fp32"),
        **about,
    }
    save_heads(Path(args.output_dir) / "head.safetensors", [first, *heads[1:]], described)


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


# ---------------------------------------------------------------------------------------------------------------------
# Other sets of the catalog
# ---------------------------------------------------------------------------------------------------------------------


def find_set(args: argparse.Namespace) -> downstream.Catalog:
    """The catalog with --root in it; an unknown set, or one without classes, is a ValueError with the choices."""
    catalog = downstream.read_catalog(args.catalog)
    if args.dataset not in catalog:
        raise ValueError(f"unknown dataset {args.dataset!r}; choose from {', '.join([*CBIS_SETS, *catalog])}")
    downstream.entry_of(args.dataset, catalog)
    if args.root:
        catalog[args.dataset] = {**catalog[args.dataset], "path": args.root}
    return catalog


def linear_train_view(preprocess: Preprocess, img: Image.Image, rng: np.random.Generator) -> Tensor:
    """SLIP's view for linear classification: a crop of 0.08 to 1 of the area, flipped half of the time."""
    view = random_resized_crop(preprocess.pixels(img), preprocess.size, (0.08, 1.0), rng)
    return preprocess.normalise(view.flip(-1) if rng.random() < 0.5 else view)


def score_set(labels: np.ndarray, outputs: np.ndarray, metric: str) -> metrics.Scores:
    """All metrics of a set, in percent as its results have always been, from logits or probabilities (n, k)."""
    return metrics.percent(metrics.score_outputs(labels, outputs, metric))


def probe_features(
    args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes, settings: dict[str, Any]
) -> dict:
    """Logistic regression, label fractions and k-NN on features extracted once; prints and returns the results."""
    catalog, view = find_set(args), partial(linear_eval_view, backbone.preprocess)
    metric = downstream.metric_of(args.dataset, catalog)
    sets = {
        split: downstream.create_downstream(args.dataset, split == "train", view, catalog)
        for split in ("train", "test")
    }
    scheme, num_classes = sets["test"].scheme, len(sets["test"].classes)
    if args.folds and not sets["train"].rows:
        raise utils.UsageError(
            f"--folds keeps groups whole: it needs CBIS-DDSM or a set of type csv, not {args.dataset}"
        )
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


# ---------------------------------------------------------------------------------------------------------------------
# SGD over random crops, as SLIP did it
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(args: argparse.Namespace, world_size: int) -> float:
    """The actual learning rate at the start."""
    batch = args.batch_size * world_size if args.lr_scaling == "linear" else args.batch_size // world_size
    return args.lr * batch / 256


@dataclass
class LinearRun:
    """One linear layer in training on a frozen tower."""

    args: argparse.Namespace
    processes: distributed.Processes
    backbone: Backbone
    head: nn.Linear
    called: nn.Module  # the head, or its DistributedDataParallel wrapper
    optimizer: torch.optim.Optimizer
    base_lr: float
    source: DataLoader
    sampler: GlobalBatchSampler
    writer: utils.MetricWriter
    settings: dict  # compared when the run is continued
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -math.inf  # score on the test split

    @property
    def step(self) -> int:
        return self.epoch * len(self.sampler) + self.step_in_epoch


def train_sgd(args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes) -> dict:
    """Train one linear layer for --epochs and evaluate it; returns the metrics of the last epoch and of the best.

    The best is the best on the test split, as published, hence too good; the last epoch's score is the result. Where a
    signal comes first there is a checkpoint within the epoch, and only `stopped_by` in what is returned.
    """
    catalog = find_set(args)
    train = downstream.create_downstream(args.dataset, True, None, catalog)
    test = downstream.create_downstream(args.dataset, False, partial(linear_eval_view, backbone.preprocess), catalog)
    if train.findings is not None:
        raise ValueError(f"{args.dataset} has several findings for each image: add --cache-features")
    metric = downstream.metric_of(args.dataset, catalog)
    run = build_linear_run(args, processes, backbone, train)
    resume_sgd(run)
    evaluate = partial(evaluate_linear, run, test, metric)
    if args.evaluate:
        run.epoch = args.epochs
    log.info(
        f"{len(train):,} training images, {len(train.classes)} classes; {args.batch_size} x "
        f"{processes.world_size} process(es) = batch {run.sampler.global_batch}; learning rate {run.base_lr:g}"
    )
    scores = None
    with closing(run.writer), utils.StopRequest() as stop:
        while run.epoch < args.epochs:
            if not train_epoch(run, stop):
                return {"stopped_by": stop.name}
            is_best = False
            if run.epoch == args.epochs or run.epoch % args.eval_freq == 0:
                scores = evaluate()
                is_best, run.best = scores["score"] > run.best, max(run.best, scores["score"])
                run.writer.row("test", run.step, {k: v for k, v in scores.items() if k != "metric"})
                log.info(f"epoch {run.epoch}: test {scores['metric']} {scores['score']:.2f} (best {run.best:.2f})")
            save_sgd(run, is_best)
    scores = scores or evaluate()
    if test.scheme is not None and test.findings is None:
        scores |= linear_rows(run, test)
    if backbone.fingerprint() != run.settings["weights_sha256"]:
        raise RuntimeError("the frozen tower has changed; its features and this result are not those of --pretrained")
    log.info(f"{args.dataset}: {scores['metric']} {scores['score']:.2f} after {args.epochs} epochs")
    results = {
        "model": backbone.name,
        "dataset": args.dataset,
        "features": backbone.features,
        "protocol": "sgd",
        "unit": "percent",
        "settings": run.settings,
        "weights": weights_of(args, backbone),
        **scores,
        "best_score_on_test": run.best,
    }
    if processes.is_main:
        weight, bias = run.head.weight.detach().cpu().numpy().T, run.head.bias.detach().cpu().numpy()
        layer = Linear(np.zeros(len(weight), np.float32), np.ones(len(weight), np.float32), weight, bias)
        settings = {**run.settings, "precision": processes.precision}
        keep_heads(args, backbone, [layer], {"settings": settings}, None, classes=list(train.classes), view="linear")
    return results


def build_linear_run(
    args: argparse.Namespace, processes: distributed.Processes, backbone: Backbone, train: downstream.Downstream
) -> LinearRun:
    """The run at its first step; the layer starts as published, normal with a std of 0.01."""
    sampler = GlobalBatchSampler(len(train), args.batch_size, processes.rank, processes.world_size, args.seed)
    head = nn.Linear(backbone.width(), len(train.classes)).to(processes.device)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(args.seed)))
        head.bias.zero_()
    base = learning_rate(args, processes.world_size)
    return LinearRun(
        args=args,
        processes=processes,
        backbone=backbone,
        head=head,
        called=distributed.replicate(head, processes),
        optimizer=torch.optim.SGD(head.parameters(), base, momentum=args.momentum, weight_decay=args.wd),
        base_lr=base,
        source=loader.make_loader(
            downstream.Views(train, partial(linear_train_view, backbone.preprocess), args.seed),
            batch_sampler=sampler,
            workers=loading_of(args, processes).loader_processes(),
            device=processes.device,
            persistent=True,
        ),
        sampler=sampler,
        writer=utils.MetricWriter(Path(args.output_dir), processes.is_main),
        settings={
            "dataset": args.dataset,
            "epochs": args.epochs,
            "learning_rate": base,
            "momentum": args.momentum,
            "wd": args.wd,
            "global_batch": sampler.global_batch,
            "seed": args.seed,
            "features": backbone.features,
            "weights_sha256": backbone.fingerprint(),
        },
        epoch=args.start_epoch,
    )


def train_epoch(run: LinearRun, stop: utils.StopRequest) -> bool:
    """The rest of the epoch that `run` stands in; False when a signal ended it early, after a checkpoint."""
    args, processes, steps = run.args, run.processes, len(run.sampler)
    rate = run.base_lr * 0.5 * (1 + math.cos(math.pi * run.epoch / args.epochs))
    run.optimizer.param_groups[0]["lr"] = rate
    run.sampler.set_epoch(run.epoch, start_step=run.step_in_epoch)
    run.backbone.model.eval()
    loss_sum, correct, seen = torch.zeros((), device=processes.device), 0.0, 0
    for images, labels in loader.batches(run.source):
        labels = labels.to(processes.device, non_blocking=True)
        with torch.no_grad():
            features = run.backbone.encode(images.to(processes.device, non_blocking=True)).float()  # (B, d)
        logits = run.called(features)  # (B, C)
        loss = F.cross_entropy(logits, labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.step_in_epoch += 1
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if run.step_in_epoch % args.print_freq and run.step_in_epoch < steps:
            continue
        parts = distributed.gather_objects(processes, (float(loss_sum), float(correct), seen, stop.name))
        mean_loss, top1 = (sum(part[i] for part in parts) / sum(part[2] for part in parts) for i in (0, 1))
        if not math.isfinite(mean_loss):  # the same on every process
            raise ValueError(f"the loss is {mean_loss} in epoch {run.epoch}: lower --lr {args.lr:g}")
        log.info(
            f"epoch {run.epoch + 1}/{args.epochs} step {run.step_in_epoch}/{steps}: loss {mean_loss:.4f}, "
            f"top-1 {100 * top1:.2f}, learning rate {rate:.4g}"
        )
        run.writer.row("train", run.step, {"loss": mean_loss, "top1": 100 * top1, "lr": rate})
        if (names := [part[3] for part in parts if part[3]]) and run.step_in_epoch < steps:
            stop.name = names[0]
            save_sgd(run)
            log.info(f"stopped by {stop.name} in epoch {run.epoch + 1}: the same command continues from the checkpoint")
            return False
    run.epoch, run.step_in_epoch = run.epoch + 1, 0
    return True


def evaluate_linear(run: LinearRun, test: downstream.Downstream, metric: str) -> metrics.Scores:
    """Metrics of the linear layer on the test split, each image once on any number of processes."""
    whole = replace(run.backbone, encode=lambda images: run.head(run.backbone.encode(images).float()))
    logits, kept = extract(whole, test, f"{run.args.dataset} test", loading_of(run.args, run.processes))
    skipped = {"samples_skipped": len(test) - len(kept)} if len(kept) < len(test) else {}
    return {**score_set(test.labels[kept], logits, metric), **skipped}


def linear_rows(run: LinearRun, test: downstream.Downstream) -> dict:
    """What known rows allow: predictions.csv and intervals over groups."""
    assert test.scheme is not None
    whole = replace(run.backbone, encode=lambda images: run.head(run.backbone.encode(images).float()))
    logits, kept = extract(whole, test, f"{run.args.dataset} test", loading_of(run.args, run.processes))
    found = Predictions([test.rows[i] for i in kept], softmax(logits.astype(np.float64), axis=1), test.scheme)
    if run.processes.is_main:
        found.write(Path(run.args.output_dir) / "predictions.csv")
    return report_rows(found, None, [], run.settings, run.args.resamples, run.args.seed)


def resume_sgd(run: LinearRun) -> None:
    """Continue from --resume or this directory's checkpoint, if there is one."""
    args, settings = run.args, run.settings
    path = Path(args.resume or Path(args.output_dir) / "linear_checkpoint.pt")
    if not args.resume and not path.is_file():
        if args.evaluate:
            raise ValueError("--evaluate needs --resume, the linear layer to evaluate")
        return
    state = utils.load_checkpoint(path)
    if "settings" not in state:
        raise ValueError(f"{path} is no checkpoint of main_linear.py: it has no settings")
    compared = ("dataset", "features", "weights_sha256") if args.evaluate else settings
    differ = [
        f"{k} {state['settings'].get(k)} there, {settings[k]} now"
        for k in compared
        if state["settings"].get(k) != settings[k]
    ]
    if differ:
        raise ValueError(f"{path} is of another run ({'; '.join(differ)}): choose another --output-dir")
    run.head.load_state_dict(state["state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.best = state["epoch"], state["best_acc1"]
    run.step_in_epoch = state.get("step_in_epoch", 0)


def save_sgd(run: LinearRun, is_best: bool = False) -> None:
    if not run.processes.is_main:
        return
    state = {
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "steps_per_epoch": len(run.sampler),
        "step": run.step,
        "state_dict": run.head.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best_acc1": run.best,
        "settings": run.settings,
        "args": json.loads(json.dumps(vars(run.args))),
    }
    for name in ["linear_checkpoint.pt"] + ["linear_best.pt"] * is_best:
        utils.save_checkpoint(state, Path(run.args.output_dir) / name)


if __name__ == "__main__":
    utils.run_script(main)
