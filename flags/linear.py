"""Flags of main_linear.py."""

from __future__ import annotations

import argparse

from flags.common import add_distributed_arguments, description
from flags.names import CATALOG, CBIS_IMAGES, CBIS_SETS, CLASS_WEIGHTS, MODELS, PROTOCOLS
from inputs.sizes import ImageSize
from runtime.command_line import HelpFormatter, Parser, UsageError, add_config_argument, positive_int


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups; SLIP's names and defaults stay valid."""
    parser = Parser("main_linear.py", description=description("main_linear.py"), formatter_class=HelpFormatter)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_feature_arguments(parser)
    add_sgd_arguments(parser)
    add_distributed_arguments(parser)
    add_config_argument(parser)
    return parser


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
    model.add_argument("--model", default=None, choices=list(MODELS), metavar="NAME",
                       help="what a published file that does not say was trained as, or an untrained model in place of "
                       "--arch: one of " + ", ".join(MODELS))
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
    cbis.add_argument("--protocol", default="logistic", choices=PROTOCOLS,
                      help="logistic: L2-regularised logistic regression on standardised features. medslip: the first "
                      "MedSLIP's protocol without its faults, projected features at 384 pixels and 50 "
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


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that exclude each other."""
    if args.cross_validate:
        beside = {"--fraction": args.fraction, "--knn": args.knn, "--evaluate": args.evaluate, "--resume": args.resume}
        if given := [flag for flag, value in beside.items() if value]:
            raise UsageError(f"--cross-validate fits a probe for each fold: no {' and no '.join(given)} with it")
    if args.baseline and args.dataset not in CBIS_SETS and not (args.cache_features or args.cross_validate):
        raise UsageError("--baseline compares probes: on other sets than CBIS-DDSM add --cache-features")
    if args.knn and args.dataset in CBIS_SETS:
        raise UsageError("--knn is for other sets than CBIS-DDSM")
