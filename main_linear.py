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

import sklearn

import distributed
import models
import utils
from evaluation.catalog import CATALOG, cbis_root
from evaluation.cbis_probe import LesionImages, probe_cbis
from evaluation.cross_validation import probe_cross_validated
from evaluation.features import Backbone, Loading, load_backbone
from evaluation.heads import CLASS_WEIGHTS, MEDSLIP_SIZE, PROTOCOLS
from evaluation.linear_sgd import Recipe, learning_rate, train_sgd
from evaluation.predictions import check_baseline
from evaluation.probe import Fitting, Fractions, Probe
from evaluation.resamples import Bootstrap
from evaluation.run_folder import set_aside_other_results
from evaluation.set_probes import find_set, probe_set
from inputs.cbis import CBIS_IMAGES, CBIS_SETS, read_lesions, select_lesions
from inputs.sizes import ImageSize
from runtime.command_line import (
    HelpFormatter,
    UsageError,
    add_config_argument,
    parse_with_config,
    positive_int,
    run_script,
)
from runtime.logs import start_logging
from runtime.one_run import SETTINGS, one_run, own_folder
from runtime.versions import versions

log = logging.getLogger("medslip")


def get_args_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups; SLIP's names and defaults stay valid."""
    parser = argparse.ArgumentParser("main_linear.py", description=__doc__, formatter_class=HelpFormatter)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_feature_arguments(parser)
    add_sgd_arguments(parser)
    distributed.add_distributed_arguments(parser)
    add_config_argument(parser)
    return parser


# fmt: off
def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which labelled set, and where results go."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="imagenet", type=str, metavar="NAME",
                      help=f"{', '.join(CBIS_SETS)}, or any other set of the catalog")
    data.add_argument("--root", default="", type=str, help="folder of the dataset; by default its path in the catalog")
    data.add_argument("--catalog", default=str(CATALOG), type=str,
                      help="where the datasets are; sets of your own are entries of a copy of dataset_catalog.json")
    data.add_argument("--where", default="", type=str, metavar="EXPRESSION",
                      help="CBIS and sets of type csv: only the rows of all splits for which it holds, a column's name "
                      "before a value: \"side == 'RIGHT' and density in (3, 4)\", \"not 40 <= age < 60\"")
    data.add_argument("--image-kind", "--picture", default="crop", choices=CBIS_IMAGES,
                      help="CBIS: which image of a lesion the tower sees; the results name it")
    data.add_argument("--skip-broken", action="store_true",
                      help="skip test images, and features of training images, that are missing or corrupt, and report "
                      "on fewer; by default an error")
    data.add_argument("-j", "--workers", default=64, type=int,
                      help="loader processes of this node; no more than it has cores are started")
    data.add_argument("--output-dir", default="./", type=str,
                      help="results, features and checkpoints go here; to its subfolder linear where it holds a "
                      "training or a fine-tuning")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tower, and which of its features."""
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
    model.add_argument("--image-size", default=None, action=ImageSize,
                       help="pixels of the images, a side or height and width, where it is not the size that the "
                       "weights were trained with; position embeddings follow")


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Probes on features that are extracted once."""
    cbis = parser.add_argument_group("probes of CBIS-DDSM and, with --cache-features, of other sets")
    cbis.add_argument("--protocol", default="logistic", choices=list(PROTOCOLS),
                      help="logistic: L2-regularised logistic regression on standardised features. medslip: the first "
                      f"MedSLIP's protocol without its faults, projected features at {MEDSLIP_SIZE} pixels and 50 "
                      "epochs of AdamW in batches of 16, to compare with its tables")
    cbis.add_argument("--resamples", default=2000, type=positive_int,
                      help="bootstrap resamples of the patients for the 95%% intervals")
    cbis.add_argument("--baseline", default=[], nargs="+", type=str, metavar="PREDICTIONS.CSV",
                      help="other runs' predictions for the same lesions: adds the paired difference to each")
    cbis.add_argument("--class-weights", default="none", choices=CLASS_WEIGHTS,
                      help="weights of the classes in the loss. balanced: each class weighs the same, which finds more "
                      "of a rare one and is wrong about it more often; validated: what gives the better macro F1 on "
                      "validation")
    cbis.add_argument("--folds", default=0, type=int, metavar="K",
                      help="choose the penalty, and nothing else, on K folds over all training patients in place of "
                      "one validation split; 5 is usual and steadier, and costs K times the fits. The test split stays "
                      "what is reported: --cross-validate is cross-validation")
    cbis.add_argument("--cross-validate", default=0, type=int, metavar="K",
                      help="CBIS and sets of type csv, on cached features: no test split, every row is predicted once "
                      "by a probe that saw nobody of its patient, in K folds of whole patients; the penalty is chosen "
                      "on folds within the training patients of each; 5 is usual")

    other = parser.add_argument_group("other sets, on features extracted once")
    other.add_argument("--cache-features", action="store_true",
                       help="logistic regression in place of SGD, its penalty chosen on a tenth of the training set; "
                       "for sets of up to some 100,000 images")
    other.add_argument("--fraction", default=[], nargs="+", type=float, metavar="FRACTION",
                       help="logistic regression on these fractions of each class, e.g. 0.01 0.1 (at least two each); "
                       "CBIS: of the patients, the penalty chosen on folds among them")
    other.add_argument("--fraction-seeds", default=3, type=positive_int, help="random draws of each fraction")
    other.add_argument("--knn", default=0, type=int, metavar="K", help="k-nearest-neighbour accuracy; 20 is usual")


def add_sgd_arguments(parser: argparse.ArgumentParser) -> None:
    """SGD over random crops."""
    recipe = parser.add_argument_group("other sets, by SGD")
    recipe.add_argument("--epochs", default=90, type=int, help="passes over the training set")
    recipe.add_argument("--start-epoch", default=0, type=int, help="number of the first epoch of a new run")
    recipe.add_argument("-b", "--batch-size", default=128, type=positive_int,
                        help="images for each process, also where features are extracted")
    recipe.add_argument("--lr", "--learning-rate", default=0.1, type=float,
                        help="base learning rate; --lr-scaling says for what batch")
    recipe.add_argument("--lr-scaling", default="linear", choices=("linear", "slip"),
                        help="linear: --lr is for 256 images and scales with the batch of all processes. slip: what "
                        "the published script used, which divides the batch of one process by their number")
    recipe.add_argument("--momentum", default=0.9, type=float, help="of SGD")
    recipe.add_argument("--wd", "--weight-decay", default=0.0, type=float, help="of the linear layer")
    recipe.add_argument("-p", "--print-freq", default=10, type=positive_int, metavar="STEPS",
                        help="steps between log lines")
    recipe.add_argument("--eval-freq", default=10, type=positive_int, metavar="EPOCHS",
                        help="epochs between evaluations")
    recipe.add_argument("--resume", default="", type=str, metavar="CKPT",
                        help="continue from this file; linear_checkpoint.pt in --output-dir is found by itself")
    recipe.add_argument("-e", "--evaluate", action="store_true", help="only evaluate the linear layer of --resume")
    recipe.add_argument("--seed", default=None, type=int,
                        help="of batches, crops, an untrained tower, AdamW and the bootstrap (0 where it is not given)")
# fmt: on


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the evaluation that the flags ask for; returns what results.json holds."""
    given = vars(parse_with_config(get_args_parser(), argv))
    args = argparse.Namespace(**{**given, "seed": given["seed"] or 0})  # published without a number
    processes = distributed.init_distributed(args)
    with start_logging(is_main=processes.is_main):
        own_folder(args, "linear")
        with one_run(args.output_dir, processes), distributed.ending_together(processes):
            return evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: distributed.Processes) -> dict[str, Any]:
    """The command once its processes have met: from flags to what each evaluation needs of them."""
    on_cbis = args.dataset in CBIS_SETS
    if args.cross_validate:
        refuse_beside_cross_validation(args)
    # What is missing ends the run before a model is loaded.
    if args.baseline and not (on_cbis or args.cache_features or args.cross_validate):
        raise UsageError("--baseline compares probes: on other sets than CBIS-DDSM add --cache-features")
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


def refuse_beside_cross_validation(args: argparse.Namespace) -> None:
    """UsageError for flags that do not go with --cross-validate."""
    flags = {"--fraction": args.fraction, "--knn": args.knn, "--evaluate": args.evaluate, "--resume": args.resume}
    if given := [flag for flag, value in flags.items() if value]:
        raise UsageError(f"--cross-validate fits a probe for each fold: no {' and no '.join(given)} with it")


def frozen_tower(args: argparse.Namespace, processes: distributed.Processes) -> Backbone:
    """The tower that the flags name; the first MedSLIP's protocol has a size and features of its own."""
    medslip = args.dataset in CBIS_SETS and args.protocol == "medslip"
    features = args.features or ("projection" if medslip else "backbone")
    return load_backbone(
        args.pretrained, model=args.model, arch=args.arch, untrained=args.untrained, seed=args.seed,
        device=processes.device, features=features, size=args.image_size or (MEDSLIP_SIZE if medslip else None),
    )  # fmt: skip


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
    }
    settings = {
        "args": vars(args), "derived": derived, "versions": {**versions(), "scikit-learn": sklearn.__version__},
    }  # fmt: skip
    utils.write_json(Path(args.output_dir) / SETTINGS, settings)
    log.info(f"{args.dataset}: {backbone.name}, {backbone.features} features")


if __name__ == "__main__":
    run_script(main)
