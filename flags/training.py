"""Flags of main.py."""

from __future__ import annotations

import argparse

from flags.common import add_column_arguments, add_distributed_arguments, description
from flags.names import CATALOG, MODELS, READERS, SIGMOID
from inputs.sizes import ImageSize
from runtime.command_line import HelpFormatter, Parser, UsageError, add_config_argument, positive_int


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups; SLIP's names and defaults stay valid."""
    parser = Parser("main.py", description=description("main.py"), formatter_class=HelpFormatter)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_run_arguments(parser)
    add_distributed_arguments(parser)
    add_config_argument(parser)
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pairs, and where outputs go."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="yfcc15m", choices=READERS,
                      help="which reader; the README shows the layout each expects")
    data.add_argument("--root", default="", type=str,
                      help="folder of the dataset; for roco the one that holds train/, validation/ and test/")
    data.add_argument("--metadata", default="yfcc15m.pkl", type=str,
                      help="file of captions where the layout does not fix it; for csv the table of pairs, with a "
                      "column `split` or {split} in its name where there is a validation split")
    add_column_arguments(data)
    data.add_argument("--val-fraction", default=0.1, type=float, metavar="FRACTION",
                      help="csv: of a table that names no splits, hold out this fraction for validation, of the "
                      "patients where a column tells them, else of the images, the same ones in every run; 0 trains on "
                      "all and does not validate")
    data.add_argument("--caption-filter", default="all", type=str, metavar="FILTER",
                      help="keep pairs whose caption matches: all, mammo-xray, mammo (word lists in "
                      "inputs/caption_filters.py), or a regular expression, matched without regard to case; validation "
                      "is filtered too")
    data.add_argument("--sentences", action="store_true",
                      help="of a caption that is longer than the context, read whole sentences drawn anew in each "
                      "epoch, in its order; validation reads its beginning")
    data.add_argument("--cache-dir", default="", type=str,
                      help="where the index of a large dataset is kept; by default beside its metadata")
    data.add_argument("--max-bad-fraction", "--max-bad-share", default=0.01, type=float, metavar="FRACTION",
                      help="end the run when more than this fraction of the images cannot be decoded; those that "
                      "cannot are named in bad_samples.txt and replaced")
    data.add_argument("-j", "--workers", default=10, type=int,
                      help="loader processes for each training process; never more than the cores it may use")
    data.add_argument("--output-dir", default="./", type=str,
                      help="checkpoints, logs and settings go here, to the subfolder training where it holds another "
                      "command's run; a run found here is continued")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the weights it starts from."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="SLIP_VITB16", choices=list(MODELS), metavar="NAME",
                       help="one of " + ", ".join(MODELS))
    model.add_argument("--ssl-mlp-dim", default=4096, type=int, help="hidden width of the SimCLR projection head")
    model.add_argument("--ssl-emb-dim", default=256, type=int, help="output width of the SimCLR projection head")
    model.add_argument("--image-size", default=None, action=ImageSize,
                       help="pixels of the training images, the side of a square or height and width, as 1520 912 for "
                       "whole mammograms (default: the model's, 224); position embeddings follow")
    model.add_argument("--vision-tower", default=None, type=str, metavar="TIMM_NAME",
                       help="replace the image tower by any timm image model, e.g. convnext_atto")
    model.add_argument("--override", default=[], nargs="+", metavar="KEY=VALUE",
                       help="other settings of the model (fields of models.ModelConfig), e.g. text_layers=4; "
                       "vision.KEY=VALUE reaches the image tower's constructor, e.g. vision.depth=4")
    model.add_argument("--context-length", default=None, type=int, metavar="TOKENS",
                       help="longest caption (default 77, or what another library's tokenizer says; up to the "
                       "positions of the text tower, 512 of a BERT's); longer ones are cut")
    model.add_argument("--bert-vocab", default="", type=str, metavar="VOCAB.TXT",
                       help="vocabulary of Bio_ClinicalBERT, needed with MedCLIP's weights; without it a BERT tower "
                       "starts afresh on CLIP's vocabulary")
    model.add_argument("--text-pooling", default=None, choices=("masked", "medclip"),
                       help="BERT towers: average over a caption's own tokens (masked, the default), or also over "
                       "padding as MedCLIP does, so that an embedding depends on the captions beside it; --evaluate "
                       "takes what the checkpoint was trained with")

    start = parser.add_argument_group("where to start from")
    start.add_argument("--resume", default="", type=str, metavar="CKPT",
                       help="continue this run: weights, optimizer, schedule, position in the data")
    start.add_argument("--init", default="", type=str, metavar="CKPT",
                       help="start a new run from these weights alone; position embeddings are resized")
    start.add_argument("--medclip-weights", default="", type=str, metavar="PATH",
                       help="MedCLIP's folder, zip or pytorch_model.bin, for the MEDCLIP_* and MEDSLIP_* models")
    start.add_argument("--vision-weights", default="", type=str, metavar="PATH",
                       help="start the image tower, one of timm's, from this file or folder (state dict, safetensors), "
                       "or from `timm`'s own cache; images then get the mean, deviation and size of these weights")
    start.add_argument("--text-weights", default="", type=str, metavar="FOLDER",
                       help="start the text tower from a BERT, RoBERTa or ModernBERT of transformers (PubMedBERT, "
                       "RadBERT, Bio_ClinicalBERT: config.json, tokenizer, weights); it brings vocabulary and sizes")
    start.add_argument("--freeze", default="", choices=("", "image", "text"),
                       help="hold one tower fixed and in eval mode; its projection keeps learning")
    start.add_argument("--lora", default=0, type=positive_int, metavar="RANK",
                       help="train low-rank adapters in the linear layers of the towers that are not frozen, and the "
                       "projections and heads in full, in less memory; checkpoints hold plain weights as ever; needs "
                       "pip install peft")
    start.add_argument("--hold-batchnorm", action="store_true",
                       help="BatchNorm of the image tower keeps the statistics of the weights it starts from: what a "
                       "pre-trained convolutional tower forgets first is not in its weights")
    start.add_argument("--start-epoch", default=0, type=int, help="number of the first epoch of a new run")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Batch, rates, losses and memory."""
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", default=25, type=positive_int, help="passes over the training pairs")
    train.add_argument("--warmup-epochs", default=1, type=int, help="epochs of linear warm-up from --lr-start")
    train.add_argument("--batch-size", default=64, type=positive_int,
                       help="pairs for each process and micro-batch")
    train.add_argument("--update-freq", default=1, type=positive_int,
                       help="micro-batches for each optimizer step (gradient accumulation)")
    train.add_argument("--accum-negatives", default="micro", choices=("micro", "full"),
                       help="with --update-freq: contrast within each micro-batch, as published, or over the whole "
                       "step, which gives the gradient of the one big batch for a second pass through the towers "
                       "(exact but for BatchNorm inside an image tower, a ResNet's, which sees micro-batches)")
    train.add_argument("--compile", default=None, action=argparse.BooleanOptionalAction,
                       help="compile the towers with torch.compile at the first step, a minute or so, for faster "
                       "ones; validation runs without (default: on a GPU with Triton and a C compiler, unless "
                       "--shard)")
    train.add_argument("--grad-checkpointing", action="store_true",
                       help="keep only the blocks' inputs of both towers for the backward pass and compute the rest "
                       "again: less memory, about a third more time; not for ResNet-50")
    train.add_argument("--lr", default=3e-3, type=float,
                       help="peak learning rate; 3e-3 is SLIP's for training from scratch at batch 4096 and would "
                       "wreck pre-trained towers: fine-tune MedCLIP with about 5e-5")
    train.add_argument("--lr-start", default=1e-6, type=float, help="learning rate at the first step")
    train.add_argument("--lr-end", default=1e-5, type=float, help="learning rate at the last step")
    train.add_argument("--wd", default=0.1, type=float, help="weight decay; SLIP used 0.1, CLIP 0.5")
    train.add_argument("--betas", default=(0.9, 0.98), nargs=2, type=float, help="of AdamW")
    train.add_argument("--eps", default=1e-8, type=float, help="of AdamW")
    train.add_argument("--ssl-scale", default=1.0, type=float, help="weight of the SimCLR loss beside another")
    train.add_argument("--ssl-temp", default=0.1, type=float, help="softmax temperature of the SimCLR loss")
    train.add_argument("--gather-with-grad", default=True, action=argparse.BooleanOptionalAction,
                       help="let the CLIP loss's gradient reach the other processes' features, so that N processes "
                       "equal one at the same global batch; --no-gather-with-grad reproduces the published multi-GPU "
                       "runs, where about half of that gradient is missing")
    train.add_argument("--mask-duplicates", action="store_true",
                       help="pairs of a batch with the same image or the same caption are not each other's negatives "
                       "in the image-text loss; the published ones take them for negatives")
    train.add_argument("--study-views", action="store_true",
                       help="csv: the second view of the SimCLR loss is of another image of the same study (the column "
                       "study), and images of a study are not each other's negatives in that loss")
    train.add_argument("--shared-view", action="store_true",
                       help="SLIP: the view that is compared with the caption is also the first of the two that are "
                       "compared with each other, two views an image in place of three")
    train.add_argument("--patch-dropout", default=0.0, type=float, metavar="SHARE",
                       help="of a timm ViT's patches, left out at random in each training view (0.5: half)")
    train.add_argument("--shard", action="store_true",
                       help="split parameters, gradients and optimizer state over the processes (PyTorch's FSDP2), "
                       "for models that do not fit one GPU; same losses and weights, more communication")
    train.add_argument("--disable-amp", action="store_true", help="the published name of --precision fp32")
    train.add_argument("--seed", default=0, type=int, help="of weights, data order, views and dropout")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Validation, checkpoints and logging."""
    run = parser.add_argument_group("validation, checkpoints, logging")
    run.add_argument("--eval-freq", default=1, type=positive_int,
                     help="validate every so many epochs, and after the last")
    run.add_argument("-e", "--evaluate", action="store_true", help="only validate the weights of --resume or --init")
    run.add_argument("--skip-broken", action="store_true",
                     help="validate on the images that can be decoded, and report the smaller number; by default an "
                     "unreadable or missing validation image is an error that names it")
    run.add_argument("--zeroshot-set", default="imagenet", type=str, metavar="NAME",
                     help="dataset of dataset_catalog.json for zero-shot validation; skipped where its path is absent")
    run.add_argument("--catalog", default=str(CATALOG), type=str,
                     help="where the downstream datasets are")
    run.add_argument("--print-freq", default=10, type=positive_int, metavar="STEPS",
                     help="steps between log lines; one comes after 30 seconds anyway")
    run.add_argument("--keep-last", default=2, type=positive_int, metavar="K",
                     help="checkpoints to keep beside the best")
    run.add_argument("--save-every-minutes", default=30.0, type=float, metavar="MINUTES",
                     help="checkpoint within an epoch this often, beside the one after every epoch")
    run.add_argument("--estimate", action="store_true",
                     help="before a run: take a few steps with these flags on this device, say what it will take "
                     "(memory, samples a second, hours, disk), and write nothing")
    run.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that exclude each other."""
    starts = [f"--{n.replace('_', '-')}" for n in ("resume", "init", "medclip_weights") if getattr(args, n)]
    if len(starts) > 1:
        raise UsageError(f"{' and '.join(starts)} cannot both say where the weights come from: choose one")
    towers = [f"--{n}-weights" for n in ("vision", "text") if getattr(args, f"{n}_weights")]
    others = [name for name in starts if name != "--resume"] + ["--bert-vocab"] * bool(args.bert_vocab)
    if towers and others:
        raise UsageError(f"{towers[0]} says where a tower comes from: leave out {' '.join(others)}")
    if args.evaluate and args.estimate:
        raise UsageError("--evaluate validates weights and --estimate looks at a training: choose one")
    if args.compile and args.precision == "fp32-onednn":
        raise UsageError("--compile has products of its own, not oneDNN's: --precision fp32")
    if args.start_epoch >= args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} to do")
    if args.warmup_epochs > args.epochs:
        raise UsageError(
            f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}: the run would end before it "
            f"reaches --lr {args.lr:g}"
        )
    if args.shared_view and MODELS[args.model] not in ("slip", "sigslip"):
        raise UsageError(f"--shared-view is for models that compare images with captions and views, not {args.model}")
    if not 0 <= args.patch_dropout < 1:
        raise UsageError(f"--patch-dropout {args.patch_dropout:g}: a share from 0 to below 1")
    if args.val_fraction != 0.1 and args.dataset != "csv":
        raise UsageError(f"--val-fraction is for --dataset csv; {args.dataset} has its publisher's splits")
    if args.shard and args.accum_negatives == "full":
        raise UsageError("--shard keeps no whole tower to run twice: use it with --accum-negatives micro")
    if not args.gather_with_grad and MODELS[args.model] in SIGMOID:
        raise UsageError(
            f"--no-gather-with-grad is how CLIP's loss ran in SLIP's code; the sigmoid loss of {args.model} compares "
            "images with gathered captions, and the text tower would not learn"
        )
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction}: a fraction from 0 to below 1")
# fmt: on
