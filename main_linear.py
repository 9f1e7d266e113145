"""Evaluation of a frozen image tower: linear classification, and the CBIS-DDSM probe.

    python main_linear.py --dataset cbis_calc --root /path/to/cbis-ddsm --pretrained checkpoint_best.pt
    torchrun --nproc_per_node=8 main_linear.py -a vit_base_patch16_224 --dataset imagenet --pretrained checkpoint.pt

CBIS-DDSM: features are extracted once and kept in --output-dir, one linear layer is fitted on them. Whatever is
chosen is chosen on the validation split of the training table; the test table is read once, at the end. Written
are results.json and predictions.csv, which --baseline takes for the paired comparison of two runs. Each reading of
the test table is a line of test_readings.jsonl. Results of other settings are set aside, never overwritten.

--cross-validate 5 predicts every row of CBIS-DDSM's tables or of a table of your own once, by a probe that saw nobody
of its patient; such a table needs no splits. --where "side == 'RIGHT'" keeps some rows of a table.

Any other set of dataset_catalog.json: SGD over random crops and flips as SLIP did it (after MoCo v3), or, on
features extracted once, logistic regression (--cache-features), label fractions (--fraction) and k-NN (--knn).
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from flags.linear import check_arguments, get_args_parser
from runtime.command_line import answer_flags, parse_with_config, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import sklearn

import distributed
import utils
from evaluation.catalog import cbis_root
from evaluation.cbis_probe import LesionImages, probe_cbis
from evaluation.cross_validation import probe_cross_validated
from evaluation.features import Backbone, Loading, load_backbone
from evaluation.heads import MEDSLIP_SIZE
from evaluation.linear_sgd import Recipe, learning_rate, train_sgd
from evaluation.predictions import check_baseline
from evaluation.probe import Fitting, Fractions, Probe
from evaluation.resamples import Bootstrap
from evaluation.run_folder import set_aside_other_results
from evaluation.set_probes import find_set, probe_set
from inputs.cbis import CBIS_SETS, read_lesions, select_lesions
from runtime.logs import start_logging
from runtime.one_run import SETTINGS, one_run, own_folder, stored_args
from runtime.versions import versions
from towers.onednn import place

log = logging.getLogger("medslip")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluation that the flags ask for; returns what results.json holds."""
    given = vars(parse_with_config(get_args_parser(), argv))
    args = argparse.Namespace(**{**given, "seed": given["seed"] or 0})  # published without a number
    check_arguments(args)
    processes = distributed.init_distributed(args)
    with start_logging(is_main=processes.is_main):
        own_folder(args, "linear")
        with one_run(args.output_dir, processes), distributed.ending_together(processes):
            return evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: distributed.Processes) -> dict[str, Any]:
    """The command once its processes have met: from flags to what each evaluation needs of them."""
    on_cbis = args.dataset in CBIS_SETS
    # What is missing ends the run before a model is loaded.
    fitting = Fitting(args.protocol, args.class_weights, args.folds, args.seed)
    fractions = Fractions(args.fraction, args.fraction_seeds)
    source = lesion_images(args) if on_cbis else find_set(args.dataset, args.root, args.catalog, args.where)
    backbone = frozen_tower(args, processes)
    settings = settings_of(args, backbone) | {"precision": processes.precision}
    if processes.is_main:
        set_aside_other_results(args.output_dir, settings, args.baseline)
        record_settings(args, backbone, processes)
    probe = Probe(
        args.dataset,
        backbone,
        Loading(args.batch_size, args.workers // distributed.processes_of_node(processes), args.skip_broken, processes),
        Path(args.output_dir),
        settings,
        {"path": args.pretrained, "untrained": args.untrained or not args.pretrained, **backbone.training},
        args.baseline,
        Bootstrap(args.resamples, args.seed),
    )
    if args.cross_validate:
        results = probe_cross_validated(probe, source, fitting, args.cross_validate)
    elif isinstance(source, LesionImages):
        results = probe_cbis(probe, source, fitting, fractions)
    elif on_features(args):
        results = probe_set(probe, source, fitting, fractions, logistic=args.cache_features, neighbours=args.knn)
    else:
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
        results = train_sgd(probe, source, recipe)
    if processes.is_main and "stopped_by" not in results:
        utils.write_json(Path(args.output_dir) / "results.json", results)
    return results


def lesion_images(args: argparse.Namespace) -> LesionImages:
    """The table of lesions, which must be there, and the baselines, which must be of its test lesions."""
    root = Path(cbis_root(args.dataset, args.root, args.catalog))
    table = root / f"{CBIS_SETS[args.dataset]}.csv"
    rows, lines = select_lesions(read_lesions(table), args.where, table)
    for line in lines:
        log.info(line)
    tested = [row for row in rows if row["split"] == "test" or args.cross_validate]
    for baseline in args.baseline:  # an hour of features before the comparison
        check_baseline(baseline, [row for row in tested if row[args.image_kind]])
    return LesionImages(root, CBIS_SETS[args.dataset], args.image_kind, args.skip_broken, args.where)


def frozen_tower(args: argparse.Namespace, processes: distributed.Processes) -> Backbone:
    """The tower that the flags name; the first MedSLIP's protocol has a size and features of its own."""
    medslip = args.dataset in CBIS_SETS and args.protocol == "medslip"
    features = args.features or ("projection" if medslip else "backbone")
    backbone = load_backbone(
        args.pretrained, model=args.model, arch=args.arch, untrained=args.untrained, seed=args.seed,
        features=features, size=args.image_size or (MEDSLIP_SIZE if medslip else None),
    )  # fmt: skip
    place(backbone.model, processes)
    return backbone


def on_features(args: argparse.Namespace) -> bool:
    """Whether another set than CBIS-DDSM is evaluated on features extracted once, not by SGD."""
    return bool(args.cache_features or args.fraction or args.knn or args.cross_validate)


def settings_of(args: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """What determines the predictions, as results.json has it; results of others are set aside."""
    settings: dict[str, Any] = {"dataset": args.dataset, "features": backbone.features, "seed": args.seed}
    settings["weights_sha256"] = backbone.fingerprint()
    if args.image_size:
        settings["image_size"] = backbone.preprocess.to_dict()["size"]
    if args.dataset in CBIS_SETS:
        settings |= {name: getattr(args, name) for name in ("image_kind", "protocol", "class_weights", "folds")}
        settings |= {"fraction": args.fraction, "where": args.where, "cross_validate": args.cross_validate}
    elif on_features(args):
        settings |= {"cache_features": args.cache_features, "fraction": args.fraction, "knn": args.knn}
        settings |= {"class_weights": args.class_weights, "folds": args.folds}
        settings |= {"where": args.where, "cross_validate": args.cross_validate}
    else:
        settings["where"] = args.where
    return settings


def record_settings(args: argparse.Namespace, backbone: Backbone, processes: distributed.Processes) -> None:
    """Everything that determines the run, written before its first step."""
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
        "precision": processes.precision,
    }
    settings = {
        "args": stored_args(args), "derived": derived, "versions": {**versions(), "scikit-learn": sklearn.__version__},
    }  # fmt: skip
    utils.write_json(Path(args.output_dir) / SETTINGS, settings)
    log.info(f"{args.dataset}: {backbone.name}, {backbone.features} features")


if __name__ == "__main__":
    run_script(main)
