"""Zero-shot classification and image-text retrieval.

    python eval_zeroshot.py --resume checkpoint.pt                       all of dataset_catalog.json
    python eval_zeroshot.py --resume checkpoint.pt --retrieval --dataset roco --root /path/to/roco

Prints a row for each set in percent and writes zeroshot.json, fractions. main.py validates with the same functions,
which live in evaluation/: features.py (one pass over each sample), metrics.py (scores), catalog.py (class names,
prompts).
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from flags.zeroshot import check_arguments, get_args_parser
from runtime.command_line import answer_flags, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import distributed
import models
import utils
from datasets import READERS, create_reader
from evaluation import downstream, metrics
from evaluation.catalog import read_catalog
from evaluation.downstream import ZeroShotSet
from evaluation.features import Loading, classify_zeroshot, embed_pairs, zeroshot_probabilities
from evaluation.predictions import Predictions, describe_measured, score_predictions, without_metrics
from evaluation.run_folder import count_reading
from inputs.columns import PairColumns
from inputs.reader import Reader
from inputs.transforms import Preprocess, View
from runtime.logs import start_logging
from runtime.one_run import one_run
from tokenizer import Tokenizer
from towers.onednn import place
from towers.prompts import TextCache

log = logging.getLogger("medslip")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


# fmt: on


# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# The model and the sets
# ---------------------------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace) -> models.Pretrained:
    """The model that the arguments name, with a text side. ValueError where it has none."""
    path = args.resume or os.path.join(args.output_dir, "checkpoint_best.pt")
    loaded = models.load_pretrained(
        path, model=args.model, bert_vocab=args.bert_vocab, text_pooling=args.text_pooling, image_size=args.image_size
    )
    if not hasattr(loaded.model, "encode_text"):
        raise ValueError(f"{loaded.source}: a model without a text side; main_linear.py evaluates it")
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source}: pass --bert-vocab with Bio_ClinicalBERT's vocab.txt to read prompts")
    return loaded


def chosen_sets(args: argparse.Namespace, catalog: dict[str, dict]) -> list[str]:
    """Names of the catalog's sets to evaluate. ValueError for an unknown one, with the choices."""
    if unknown := [name for name in args.datasets if name not in catalog]:
        raise ValueError(f"unknown dataset {', '.join(unknown)}; choose from {', '.join(catalog)}")
    names = args.datasets or list(catalog)
    if not args.retrieval:
        return names
    if not (pairs := [name for name in names if name in READERS]):
        raise ValueError(f"--retrieval: none of {', '.join(names)} has captions")
    return pairs


def open_sets(
    args: argparse.Namespace, preprocess: Preprocess | View
) -> tuple[dict[str, Reader | ZeroShotSet], dict[str, str]]:
    """{set: its pairs or its labelled images} and {absent set: why}.

    All sets are opened, and their classes compared with the class names, before the first is evaluated.
    """
    if args.root:
        named = PairColumns(args.image_column, tuple(args.caption_columns))
        reader = create_reader(args.dataset, args.root, args.metadata, args.split, args.caption_filter, named=named)
        return {args.dataset: reader}, {}
    catalog = read_catalog(args.catalog)
    opened, absent = {}, {}
    for name in chosen_sets(args, catalog):
        try:
            if name in READERS:
                entry = catalog[name]
                opened[name] = create_reader(name, entry["path"], "", entry["test"], args.caption_filter)
            else:
                opened[name] = downstream.load_zeroshot_set(name, preprocess, catalog, args.download)
        except FileNotFoundError as error:
            absent[name] = str(error).removeprefix(f"{name}: ")
            log.info(f"skipped {name}: {absent[name]}")
    if not opened:
        raise FileNotFoundError(f"nothing to evaluate: not there are {', '.join(absent)}; see {args.catalog}")
    return opened, absent


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate, print a table and write zeroshot.json to --output-dir; returns what was written."""
    args = get_args_parser().parse_args(argv)
    check_arguments(args)
    processes = distributed.init_distributed(args)
    with (
        one_run(args.output_dir, processes),
        start_logging(is_main=processes.is_main),
        distributed.ending_together(processes),
    ):
        return evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: distributed.Processes) -> dict:
    """The command once its processes have met."""
    loaded = load_model(args)
    log.info(f"evaluating {loaded.source} on {processes.device}")
    model, tokenizer = place(loaded.model, processes), cast(Tokenizer, loaded.tokenizer)
    opened, absent = open_sets(args, loaded.preprocess)
    loading = Loading(args.batch_size, args.workers, args.skip_broken, processes)
    # Between the epochs of main.py the weights change, so only this command keeps text features.
    cache = TextCache.of(model, processes, Path(args.output_dir) / "features")
    report: dict[str, Any] = {"model": loaded.source, "precision": processes.precision, "unit": "fraction"}
    report |= {"zero_shot": {}, "retrieval": {}, "skipped": absent}
    file = Path(args.output_dir) / "zeroshot.json"
    for name, source in opened.items():
        if isinstance(source, Reader):
            scores = score_pairs(loaded, source, loading)
            report["retrieval"][name], line = scores, retrieval_line(name, scores)
        else:
            own = file.with_name(f"zeroshot_{utils.file_name(name)}.csv")
            scores = score_labelled(model, tokenizer, source, loading, cache, own)
            scores["broken"] = len(source.dataset) - scores["samples"]
            report["zero_shot"][name], line = scores, zeroshot_line(name, scores)
        if processes.is_main:  # after each set: a long walk that is cut short keeps what it has
            log.info(line)
            file.parent.mkdir(parents=True, exist_ok=True)
            utils.write_json(file, report)
    if absent:
        log.info(f"skipped, path not there: {', '.join(absent)}")
    log.info(f"written to {file}")
    return report


def score_labelled(
    model: Any, tokenizer: Tokenizer, source: ZeroShotSet, loading: Loading, cache: TextCache | None, file: Path
) -> metrics.Scores:
    """All metrics; where the rows are known (CBIS-DDSM, type csv) also intervals, and predictions in `file`."""
    scheme = source.dataset.scheme
    if source.dataset.findings is not None:
        raise ValueError("zero-shot takes sets with one class for each image, not several findings")
    if scheme is None:
        return classify_zeroshot(model, tokenizer, source, loading, cache)
    if loading.processes.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        count_reading(file.parent, {"zero_shot": file.stem})
    numbers, prob = zeroshot_probabilities(model, tokenizer, source, loading, cache)
    found = Predictions([source.dataset.rows[i] for i in numbers], prob, scheme)
    scores = metrics.score_outputs(found.labels, metrics.log_prob(prob), source.metric)
    if loading.processes.is_main:
        found.write(file)
    try:
        return scores | {"rows": score_predictions(found)}
    except ValueError as error:  # a class without samples
        return scores | without_metrics(error)


def score_pairs(loaded: models.Pretrained, reader: Reader, loading: Loading) -> metrics.Scores:
    """Retrieval over one reader with its split and the number of images skipped."""
    tokenizer = cast(Tokenizer, loaded.tokenizer)
    images, texts, captions = embed_pairs(loaded.model, reader, loaded.preprocess, tokenizer, loading)
    scores = metrics.retrieval_metrics(images, texts, captions)
    return scores | {"split": reader.split, "broken": len(reader) - len(captions)}


def zeroshot_line(name: str, scores: dict) -> str:
    """A set's scores, in percent, as one line, and below it what its known rows have, with intervals."""
    rows = scores.get("rows", scores)
    more = describe_measured(rows, f"{name}, zero-shot")
    if "metrics" in rows and rows["positive"] is None and rows["interval"]["over"] == "images":  # one of many sets
        more = more[:3]  # AUROC and F1
    scores = metrics.percent(scores)
    top5 = f"  top-5 {scores['top5']:6.2f}" if "top5" in scores else " " * 14
    line = (
        f"{name:<18}  {scores['metric']:<14} {scores['score']:6.2f}  |  "
        f"top-1 {scores['top1']:6.2f}{top5}  |  "
        f"{scores['samples']} images, {scores['classes']} classes{_skipped(scores)}"
    )
    return "\n".join([line, *more])


def retrieval_line(name: str, scores: dict) -> str:
    """A split's recalls, in percent, as one line."""
    scores = metrics.percent(scores)
    ways = [
        f"{words} R@1 {scores[way + '_r1']:6.2f}  R@5 {scores[way + '_r5']:6.2f}  "
        f"R@10 {scores[way + '_r10']:6.2f}  median rank {scores[way + '_median_rank']:g}"
        for way, words in (("i2t", "image-to-text"), ("t2i", "text-to-image"))
    ]
    return (
        f"{name:<18}  {'  |  '.join(ways)}  |  {scores['candidates']} candidates ({scores['split']}){_skipped(scores)}"
    )


def _skipped(scores: dict) -> str:
    return f", {scores['broken']} skipped (missing or corrupt)" if scores["broken"] else ""


if __name__ == "__main__":
    run_script(main)
