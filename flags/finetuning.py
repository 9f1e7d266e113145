"""Flags of beit_finetuning/run_class_finetuning.py."""

from __future__ import annotations

import argparse

from flags.common import add_distributed_arguments, description
from flags.names import BEIT_MODELS, CATALOG, CBIS_IMAGES, CBIS_SETS
from inputs.sizes import ImageSize
from runtime.command_line import HelpFormatter, Parser, UsageError, add_config_argument, positive_int


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups; BEiT's underscores, and dashes where this project's scripts have them."""
    parser = Parser(
        "run_class_finetuning.py", description=description("beit_finetuning/run_class_finetuning.py"),
        formatter_class=HelpFormatter, allow_abbrev=False,
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_optimizer_arguments(parser)
    add_augmentation_arguments(parser)
    add_run_arguments(parser)
    add_distributed_arguments(parser)
    add_config_argument(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, and the weights it starts from."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="tower", type=str, metavar="NAME",
                       help=f"{', '.join(BEIT_MODELS)}: BEiT's architecture as the published commands name it. tower: "
                       "that of --finetune with its own preprocessing. A name of models.MODELS or timm: that tower, "
                       "with the weights of --finetune or fresh ones")
    model.add_argument("--finetune", default="", type=str, metavar="CKPT",
                       help="the weights to start from: a published SLIP file, a checkpoint of ours, BEiT's; with "
                       "--model tower also MedCLIP's folder, zip or pytorch_model.bin")
    model.add_argument("--model_key", default="model|module|state_dict", type=str,
                       help="where a file keeps its weights; with | between several, the first that is there, or its "
                       "moving average (the name with _ema)")
    model.add_argument("--model_prefix", default="", type=str,
                       help="what the tower's names begin with, module.visual. in SLIP's files; extra or missing "
                       "`module.` does not matter")
    model.add_argument("--input_size", default=None, action=ImageSize,
                       help="pixels of the images, a side or height and width (default: the model's, 224); position "
                       "embeddings are interpolated")
    positions = model.add_mutually_exclusive_group()
    positions.add_argument("--rel_pos_bias", dest="rel_pos_bias", action="store_true", default=True,
                           help="a table of relative positions in each block, BEiT's default")
    positions.add_argument("--disable_rel_pos_bias", dest="rel_pos_bias", action="store_false",
                           help="none, as SLIP's towers have none")
    model.add_argument("--abs_pos_emb", action="store_true", help="absolute position embeddings, as SLIP's towers have")
    model.add_argument("--layer_scale_init_value", default=0.1, type=float,
                       help="start of the factor on each block's output; 0 for none, as SLIP's towers have none")
    pooling = model.add_mutually_exclusive_group()
    pooling.add_argument("--use_mean_pooling", dest="use_mean_pooling", action="store_true", default=True,
                         help="read the mean of the patches, BEiT's default")
    pooling.add_argument("--use_cls", dest="use_mean_pooling", action="store_false", help="read the class token")
    model.add_argument("--init_scale", default=0.001, type=float, help="factor on the head's initial weights")
    model.add_argument("--drop", default=0.0, type=float, help="dropout in the blocks; BEiT's architecture only")
    model.add_argument("--attn_drop_rate", default=0.0, type=float, help="of attention; BEiT's architecture only")
    model.add_argument("--drop_path", default=0.1, type=float,
                       help="stochastic depth of the last block, rising from 0 at the first; ResNet-50 takes only 0")
    model.add_argument("--lora", default=0, type=positive_int, metavar="RANK",
                       help="train low-rank adapters in the tower's linear layers, and the head in full, in less "
                       "memory; checkpoints hold plain weights as ever; needs pip install peft")
    model.add_argument("--train_batchnorm", action="store_true",
                       help="let BatchNorm (a ResNet's) gather statistics anew; by default it keeps those of "
                       "pre-training, because fine-tuning's batches are small and mixed")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The labelled set."""
    data = parser.add_argument_group("data")
    data.add_argument("--data_set", default="IMNET", type=str, metavar="NAME",
                      help="IMNET (the catalog's imagenet), CIFAR (its cifar100), image_folder (--data_path and "
                      f"--eval_data_path), {', '.join(CBIS_SETS)}, or any other labelled set of the catalog")
    data.add_argument("--data_path", default="", type=str,
                      help="where the set lies (default: its path in the catalog); of image_folder the training images")
    data.add_argument("--eval_data_path", default="", type=str, help="image_folder: the images to evaluate on")
    data.add_argument("--catalog", default=str(CATALOG), type=str, help="where the sets are")
    data.add_argument("--where", default="", type=str, metavar="EXPRESSION",
                      help="CBIS and sets of type csv: only the rows of all splits for which it holds, such as "
                      "\"side == 'RIGHT' and density in (3, 4)\"")
    data.add_argument("--nb_classes", default=0, type=int,
                      help="number of classes (default: what the set has); another number than the set's is an error")
    data.add_argument("--imagenet_default_mean_and_std", action="store_true",
                      help="normalise by ImageNet's mean and std, as SLIP's towers expect; BEiT's architecture is "
                      "normalised by 0.5 otherwise, other towers always as they were trained")
    data.add_argument("--image_kind", default="crop", choices=CBIS_IMAGES, help="CBIS: which image of a lesion")
    data.add_argument("--skip_broken", "--skip-broken", action="store_true",
                      help="evaluate on the images that can be decoded, and report fewer; by default an error")
    data.add_argument("--num_workers", "--workers", "-j", default=10, type=int,
                      help="loader processes for each process, never more than its cores")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Batch, rates and schedule."""
    train = parser.add_argument_group("optimisation")
    train.add_argument("--batch_size", default=64, type=positive_int, help="images for each process")
    train.add_argument("--epochs", default=30, type=positive_int, help="passes over the training images")
    train.add_argument("--update_freq", default=1, type=positive_int, help="micro-batches for each update")
    train.add_argument("--lr", default=5e-4, type=float,
                       help="peak learning rate of the head, absolute: the published 4e-3 belongs to 8 x 128 images")
    train.add_argument("--lr_for_batch", default=0, type=int, metavar="IMAGES",
                       help="scale --lr linearly from this batch to the batch of all processes, 1024 for the published "
                       "rates; 0 leaves it as it is, as published")
    train.add_argument("--min_lr", default=1e-6, type=float, help="at the last update")
    train.add_argument("--warmup_lr", default=1e-6, type=float, help="unused, as in the published code: it starts at 0")
    train.add_argument("--warmup_epochs", default=5, type=int, help="epochs of linear warm-up")
    train.add_argument("--warmup_steps", default=-1, type=int, help="updates of warm-up in place of --warmup_epochs")
    train.add_argument("--layer_decay", default=0.9, type=float,
                       help="factor on the rate from one layer to the one before it; 0.65 for ViT-S and B, 0.75 for L")
    train.add_argument("--opt", default="adamw", choices=("adamw",), help="the recipe's optimizer")
    train.add_argument("--opt_betas", default=(0.9, 0.999), nargs=2, type=float, help="of AdamW")
    train.add_argument("--opt_eps", default=1e-8, type=float, help="of AdamW")
    train.add_argument("--weight_decay", default=0.05, type=float, help="of what has two dimensions or more")
    train.add_argument("--weight_decay_end", default=None, type=float, help="by half a cosine to this, else constant")
    train.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true",
                       help="spare tables of relative positions")
    train.add_argument("--clip_grad", default=None, type=float, metavar="NORM", help="of the gradient; none by default")
    train.add_argument("--enable_deepspeed", action="store_true",
                       help="half precision (fp16) with a dynamic loss scale on GPUs, as deepspeed did it in the "
                       "published commands; deepspeed itself is not needed. Otherwise bf16 where the GPU has it")
    train.add_argument("--disable-amp", "--disable_amp", action="store_true",
                       help="the published name of --precision fp32")
    train.add_argument("--class_weights", default="none", choices=("none", "balanced"),
                       help="balanced: each class weighs the same in the loss; choose by `validation` in results.json")
    train.add_argument("--model_ema", action="store_true", help="keep a moving average of the weights, evaluated too")
    train.add_argument("--model_ema_decay", default=0.9999, type=float, help="of the moving average")
    train.add_argument("--seed", default=0, type=int, help="of the head, batches, views, dropout and the bootstrap")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """The training views and what happens to labels."""
    views = parser.add_argument_group("training views")
    views.add_argument("--aa", default="rand-m9-mstd0.5-inc1", type=str, help="timm's policy; \"\" for none")
    views.add_argument("--color_jitter", default=0.4, type=float, help="used where --aa is none")
    views.add_argument("--train_interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"),
                       help="of the random crop")
    views.add_argument("--reprob", default=0.25, type=float, help="probability of erasing a part")
    views.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what fills it")
    views.add_argument("--recount", default=1, type=int, help="parts erased")
    views.add_argument("--hflip", default=0.5, type=float,
                       help="probability of mirroring left and right; 0 where sides matter, as in digits")
    views.add_argument("--mixup", default=0.0, type=float, help="alpha of mixup; 0.8 in the published commands")
    views.add_argument("--cutmix", default=0.0, type=float, help="alpha of CutMix; 1 in the published commands")
    views.add_argument("--cutmix_minmax", default=None, nargs=2, type=float, help="side fractions in place of --cutmix")
    views.add_argument("--mixup_prob", default=1.0, type=float, help="of mixing a batch at all")
    views.add_argument("--mixup_switch_prob", default=0.5, type=float, help="of CutMix where both are on")
    views.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what shares a draw")
    views.add_argument("--smoothing", default=0.1, type=float, help="of labels, inside mixed targets too")
    views.add_argument("--crop_pct", default=None, type=float,
                       help="evaluation: the centre's fraction of the short side (default: 224/256, from 384 pixels 1)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Evaluation, checkpoints and logging."""
    run = parser.add_argument_group("evaluation, checkpoints, logging")
    run.add_argument("--output_dir", "--output-dir", default="./", type=str,
                     help="checkpoints, logs and results go here, to the subfolder finetuned where it holds another "
                     "command's run; a run found here is continued")
    run.add_argument("--disable_eval_during_finetuning", action="store_true",
                     help="evaluate after the last epoch alone; a validation split is always evaluated")
    run.add_argument("--eval", "--evaluate", "-e", dest="evaluate", action="store_true",
                     help="only evaluate the run in --output_dir")
    run.add_argument("--print-freq", "--print_freq", default=10, type=positive_int, metavar="UPDATES",
                     help="updates between log lines")
    run.add_argument("--save-every-minutes", "--save_every_minutes", default=30.0, type=float, metavar="MINUTES",
                     help="checkpoint within an epoch this often")
    run.add_argument("--resamples", default=2000, type=positive_int, help="CBIS: of the patients, for intervals")
    run.add_argument("--baseline", default=[], nargs="+", type=str, metavar="PREDICTIONS.CSV",
                     help="CBIS: other runs' predictions: adds the paired difference to each")
# fmt: on


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that exclude each other."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise UsageError(f"mixup and cutmix pair the images of a batch: --batch_size {args.batch_size} is odd")
