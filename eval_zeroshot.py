"""Zero-shot classification and image-text retrieval.

    python eval_zeroshot.py --resume checkpoint.pt                       all of dataset_catalog.json
    python eval_zeroshot.py --resume checkpoint.pt --retrieval --dataset roco --root /path/to/roco

Owns the zero-shot classifier, the metric of each dataset and the retrieval metrics; main.py validates with
the same functions between epochs. Each sample is counted once on any number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import downstream
import models
import utils
from datasets import READERS, EvalPairs, Reader, create_reader
from transforms import Preprocess, UnreadableImage, View, eval_view

HERE = Path(__file__).parent
METRICS = ("top1", "mean_per_class", "mean_top1_top5", "roc_auc")
# What a dataset is judged by, as CLIP was; top-1 where it is not named.
METRIC_OF = {
    "aircraft": "mean_per_class",
    "pets": "mean_per_class",
    "caltech101": "mean_per_class",
    "flowers": "mean_per_class",
    "kinetics700_frames": "mean_top1_top5",
    "hateful_memes": "roc_auc",
}
# Sets whose folder names decide which class is which, though no class name repeats them.
FOLDERS_OF = {"hateful_memes": ["0", "1"]}


# ----------------------------------------------------------------------------------------------------------
# Retrieval


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, captions: Sequence[str], chunk: int = 1024
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank of the first hit, in both directions, over the whole pool.

    Row i of image_features and of text_features, both (N, d), is one pair and captions[i] its text;
    features need not be normalised. Pairs with equal captions are hits for one another: the same sentence
    written twice costs nothing. The rank of a query is 1 + the number of wrong entries that score at least
    as high as its best hit, so a tie with a wrong entry counts against the model, and one embedding for
    everything scores 0.

    Returns percentages i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10, then i2t_median_rank and
    t2i_median_rank (1 is best), and pool = N. At most chunk x N similarities are held at once.
    """
    n = len(captions)
    if n == 0 or len(image_features) != n or len(text_features) != n:
        raise ValueError(
            f"retrieval needs one image and one text for each caption, and at least one pair: "
            f"got {len(image_features)}, {len(text_features)} and {n}"
        )
    first_seen: dict[str, int] = {}
    group = torch.tensor([first_seen.setdefault(c, len(first_seen)) for c in captions])  # (N,)
    group = group.to(image_features.device)
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)

    result: dict[str, float] = {}
    for way, queries, pool in (("i2t", images, texts), ("t2i", texts, images)):
        chunks = zip(queries.split(chunk), group.split(chunk), strict=True)
        ranks = torch.cat([_first_hit_ranks(q, pool, g, group) for q, g in chunks]).double()  # (N,)
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = 100.0 * (ranks <= k).double().mean().item()
        result[f"{way}_median_rank"] = ranks.quantile(0.5).item()
    result["pool"] = n
    return result


def _first_hit_ranks(queries: Tensor, pool: Tensor, query_group: Tensor, pool_group: Tensor) -> Tensor:
    """Rank from 1 of the best hit of each query: (Q, d), (N, d), (Q,), (N,) -> (Q,)."""
    scores = queries @ pool.T  # (Q, N)
    row, column = (query_group[:, None] == pool_group).nonzero(as_tuple=True)  # the hits
    best = scores.new_full((len(scores),), -torch.inf)  # (Q,)
    best = best.scatter_reduce(0, row, scores[row, column], "amax")
    scores[row, column] = -torch.inf
    # what is not lower, rather than what is as high: a NaN anywhere then counts against the model
    ahead = len(pool) - (scores < best[:, None]).sum(dim=1)
    return (1 + ahead).clamp(max=len(pool))


def embed_pairs(
    model: nn.Module,
    reader: Reader,
    preprocess: Preprocess | View,
    tokenizer: Callable,
    device: torch.device | str,
    batch_size: int = 256,
    workers: int = 0,
    dist: utils.Distributed | None = None,
    skip_broken: bool = False,
) -> tuple[Tensor, Tensor, list[str]]:
    """Embed every pair of a reader once.

    Returns image features (N, d) and text features (N, d), both on the CPU, and the N captions. Of a
    image with several captions the first is taken. On several processes, rank r embeds pairs r, r +
    world_size, ... (no padding) and every rank gets all of them back in the reader's order. `model` is the
    bare module, not its DistributedDataParallel wrapper: ranks may differ by one batch. An unreadable image is
    an error; with skip_broken its pair is skipped.
    """
    captions = [reader.captions(i)[0] for i in range(len(reader))]
    if not captions:
        raise ValueError("the retrieval pool is empty")
    # (N, L), all at once: a text tower that averages over padding then sees the same padding in every batch
    tokens = tokenizer(captions)
    pairs = EvalPairs(reader, preprocess if isinstance(preprocess, Preprocess) else Preprocess())
    pairs.view = as_view(preprocess)
    columns = ([], [], [])
    with evaluating(model):
        for index, batch, _ in _batches(pairs, batch_size, workers, device, dist, skip_broken):
            columns[0].append(index)
            columns[1].append(model.encode_image(batch.to(device, non_blocking=True)).float().cpu())
            columns[2].append(model.encode_text(tokens[index].to(device)).float().cpu())
    index, images, texts = _gather_rows(columns, dist)
    return images, texts, [captions[i] for i in index.tolist()]


# ----------------------------------------------------------------------------------------------------------
# Zero-shot classification


def zeroshot_classifier(
    model: nn.Module,
    tokenizer: Callable,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str],
    device: torch.device | str,
    batch_size: int = 256,
    cache: TextCache | None = None,
) -> Tensor:
    """One unit vector for each class: (d, C). CLIP, section 3.1.4: prompt ensembling in embedding space.

    Every template is filled ("{}") with the class's name, or with each of its synonyms where the name is a
    list; the text embeddings are normalised, averaged over the class and normalised again. Each distinct
    prompt is encoded once, batch_size at a time; with a cache once for all runs.
    """
    if not classnames or not templates:
        raise ValueError("zero-shot classification needs at least one class name and one template")
    names = [[name] if isinstance(name, str) else list(name) for name in classnames]
    prompts = [[t.replace("{}", synonym) for t in templates for synonym in synonyms] for synonyms in names]
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(p for of_class in prompts for p in of_class))}
    rows = [[row[p] for p in of_class] for of_class in prompts]  # of each class, among the distinct prompts
    tokens = tokenizer(list(row))  # (P, L)
    if cache and (kept := cache.read(tokens, rows)) is not None:
        return kept.to(device)
    with evaluating(model):
        features = torch.cat([model.encode_text(part.to(device)).float() for part in tokens.split(batch_size)])
    features = F.normalize(features, dim=-1)  # (P, d)
    means = [features[of_class].mean(dim=0) for of_class in rows]
    classifier = F.normalize(torch.stack(means), dim=-1).T  # (d, C)
    if cache:
        cache.write(tokens, rows, classifier)
    return classifier


@dataclass(frozen=True)
class TextCache:
    """Classifiers of earlier runs, each in a file whose name is a hash of all that it depends on.

    That is the text side's weights and settings, the token ids of the prompts (hence the tokenizer, too), which
    of them make up each class, the kind of device and the libraries: a stale one is never taken.
    """

    folder: Path
    model: str
    writes: bool

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, folder: Path, writes: bool) -> TextCache | None:
        """The cache for a model of models.py; None for another library's, whose settings are not known."""
        if not hasattr(model, "config"):
            return None
        text_side = {k: v for k, v in model.state_dict().items() if not k.startswith(("visual.", "image_"))}
        settings = (model.config, device.type, torch.__version__, transformers.__version__)
        key = f"{utils.weights_sha256(text_side)} {json.dumps(settings, sort_keys=True)}"
        return cls(folder, key, writes)

    def file(self, tokens: Tensor, rows: list[list[int]]) -> Path:
        key = hashlib.sha256(f"{self.model} {tuple(tokens.shape)} {rows}".encode())
        key.update(tokens.contiguous().numpy().tobytes())
        return self.folder / f"text_{key.hexdigest()[:32]}.npy"

    def read(self, tokens: Tensor, rows: list[list[int]]) -> Tensor | None:
        file = self.file(tokens, rows)
        return torch.from_numpy(np.load(file, allow_pickle=False)) if file.is_file() else None

    def write(self, tokens: Tensor, rows: list[list[int]], classifier: Tensor) -> None:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            utils.atomic_write(self.file(tokens, rows), lambda out: np.save(out, classifier.cpu().numpy()))


def evaluate_zeroshot(
    model: nn.Module,
    tokenizer: Callable,
    dataset: Dataset,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str],
    device: torch.device | str,
    *,
    metric: str = "top1",
    batch_size: int = 256,
    workers: int = 0,
    dist: utils.Distributed | None = None,
    skip_broken: bool = False,
    cache: TextCache | None = None,
) -> dict[str, float | str]:
    """Zero-shot metrics of a dataset whose items are (image tensor (3, S, S), label).

    Returns the dict of `classification_scores`, with "score" the figure that `metric` names. Every sample is
    counted once on any number of processes. A label outside classnames is a ValueError; so is a broken
    image, unless skip_broken leaves it out ("samples" tells).
    """
    classifier = zeroshot_classifier(model, tokenizer, classnames, templates, device, batch_size, cache)  # (d, C)
    columns = ([], [], [], [])
    with evaluating(model):
        for index, images, target in _batches(dataset, batch_size, workers, device, dist, skip_broken):
            out_of_range = target[(target < 0) | (target >= len(classnames))].tolist()
            if out_of_range:
                raise ValueError(f"label {out_of_range[0]} in the data, but {len(classnames)} class names")
            features = model.encode_image(images.to(device, non_blocking=True))  # (B, d)
            logits = (F.normalize(features.float(), dim=-1) @ classifier).cpu()  # (B, C)
            margin = logits[:, min(1, len(classnames) - 1)] - logits[:, 0]  # (B,)
            for column, values in zip(columns, (index, target, target_ranks(logits, target), margin), strict=True):
                column.append(values)
    _, targets, ranks, margins = _gather_rows(columns, dist)
    return classification_scores(targets, ranks, margins, len(classnames), metric)


def target_ranks(logits: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the right one: (B, C), (B,) -> (B,), 0 for a correct top-1.

    Equal scores stand in class order, as argmax takes them; a NaN counts against the model.
    """
    own = logits.gather(1, target[:, None])  # (B, 1)
    earlier = torch.arange(logits.shape[1]) < target[:, None]  # (B, C)
    before = ~(logits <= own) | ((logits == own) & earlier)
    return before.sum(dim=1)


def classification_scores(
    targets: Tensor, ranks: Tensor, margins: Tensor, n_classes: int, metric: str = "top1"
) -> dict[str, float | str]:
    """All metrics of a dataset, in percent, from one row a sample.

    targets (N,): labels. ranks (N,): how many classes came before the right one. margins (N,): score
    of class 1 minus score of class 0. Gives top1, mean_per_class (over the classes that have samples), top5
    where there are more than five classes, and mean_top1_top5 or roc_auc (class 1 against class 0) where
    `metric` asks for it; "score" repeats the figure that `metric` names; "samples" and "classes" are
    counts.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
    if len(targets) == 0:
        raise ValueError("the dataset has no samples")
    correct = ranks == 0
    seen = targets.bincount(minlength=n_classes)  # (C,)
    hits = targets[correct].bincount(minlength=n_classes).double()
    scores = {
        "top1": 100.0 * correct.double().mean().item(),
        "mean_per_class": 100.0 * (hits / seen)[seen > 0].mean().item(),
    }
    if n_classes > 5:
        scores["top5"] = 100.0 * (ranks < 5).double().mean().item()
    if metric == "mean_top1_top5":
        scores["mean_top1_top5"] = (scores["top1"] + scores.get("top5", 100.0)) / 2
    if metric == "roc_auc":
        if n_classes != 2 or len(targets.unique()) != 2:
            raise ValueError("ROC-AUC needs two classes, and samples of both")
        scores["roc_auc"] = 100.0 * float(roc_auc_score(targets.numpy(), margins.numpy()))
    counts = {"samples": len(targets), "classes": n_classes}
    return {"metric": metric, "score": scores[metric], **scores, **counts}


# ----------------------------------------------------------------------------------------------------------
# Datasets, class names and prompts


@functools.cache
def read_prompts(file: str) -> dict[str, list]:
    """labels.json or templates.json as {set: strings}; labels in class order, an inner list for synonyms."""
    prompts = json.loads((HERE / file).read_text(encoding="utf-8"))
    return {name: strings for name, strings in prompts.items() if name != "_"}  # "_" is a note


def load_zeroshot_set(
    name: str,
    preprocess: Preprocess | View,
    catalog: str | Path | dict[str, dict] = downstream.CATALOG,
    download: bool = False,
) -> tuple[downstream.Downstream, list, list[str], str]:
    """A set of the catalog for zero-shot evaluation: (test split, class names, templates, metric).

    Raises ValueError for an unknown set, and where the classes found do not fit the class names;
    FileNotFoundError where the catalog's path does not exist.
    """
    catalog = catalog if isinstance(catalog, dict) else downstream.read_catalog(catalog)
    labels, templates = read_prompts("labels.json"), read_prompts("templates.json")
    if name in catalog and name not in labels:
        known = [n for n in catalog if n in labels]
        raise ValueError(f"labels.json has no class names for {name!r}; choose from {', '.join(known)}")
    dataset = downstream.create_downstream(name, False, as_view(preprocess), catalog, download)
    check_class_order(name, dataset.classes, labels[name])
    return dataset, labels[name], templates[name], METRIC_OF.get(name, "top1")


def as_view(preprocess: Preprocess | View) -> View:
    return eval_view(preprocess) if isinstance(preprocess, Preprocess) else preprocess


def check_class_order(name: str, classes: Sequence[str], labels: Sequence[str | Sequence[str]]) -> None:
    """Raise ValueError where the classes found on disk cannot be those of the class names, in their order.

    Their number must agree. Folder names need not equal class names (ImageNet's are WordNet ids), but a
    folder that bears the name of another class shows that the order is wrong.
    """
    if len(classes) != len(labels):
        raise ValueError(
            f"{name}: {len(classes)} classes found, {len(labels)} class names in labels.json; "
            f"found {', '.join(classes[:3])}, ... {classes[-1]}"
        )
    if name in FOLDERS_OF and list(classes) != FOLDERS_OF[name]:
        raise ValueError(f"{name}: class folders {', '.join(classes)}; must be {', '.join(FOLDERS_OF[name])}")
    keys = [{_key(s) for s in ([label] if isinstance(label, str) else label)} for label in labels]
    for i, folder in enumerate(classes):
        key = _key(folder)
        others = [j for j, names in enumerate(keys) if key in names]
        if others and i not in others:
            raise ValueError(
                f"{name}: class {i} is {folder!r} on disk and {labels[i]!r} in labels.json, where {folder!r} "
                f"is class {others[0]}: the folders are not in the published order"
            )


def _key(name: str) -> str:
    """Letters and digits of a class name or folder name, without the number that some folders start with."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^\d+[._]", "", name).lower())


# ----------------------------------------------------------------------------------------------------------
# Running a model over each sample once, on any number of processes


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; the model's own mode again after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class _Numbered(Dataset):
    """(i, image, target) of a dataset; with skip_broken the image is None where it cannot be decoded."""

    def __init__(self, dataset: Dataset, skip_broken: bool):
        self.dataset, self.skip_broken = dataset, skip_broken

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, int]:
        try:
            return i, *self.dataset[i]
        except UnreadableImage:
            if not self.skip_broken:
                raise
            return i, None, -1


def _stack(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor] | None:
    samples = [sample for sample in samples if sample[1] is not None]
    if not samples:
        return None
    index, images, targets = zip(*samples, strict=True)
    return torch.tensor(index), torch.stack(images), torch.tensor(targets)


def _batches(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    device: torch.device | str,
    dist: utils.Distributed | None,
    skip_broken: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share, every world_size-th sample: index (B,), images (B, 3, S, S), target (B,)."""
    indices = range(len(dataset)) if dist is None else range(dist.rank, len(dataset), dist.world_size)
    loader = DataLoader(
        Subset(_Numbered(dataset, skip_broken), indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=torch.device(device).type == "cuda",
    )
    return (batch for batch in loader if batch is not None)


def _gather_rows(columns: Sequence[list[Tensor]], dist: utils.Distributed | None) -> list[Tensor]:
    """Batches of all ranks as one tensor for each column, sorted by the first column, the index."""
    own = [torch.cat(batches) for batches in columns] if columns[0] else None  # a rank may have no samples
    parts = [own] if dist is None else utils.gather_objects(dist, own)
    parts = [part for part in parts if part is not None]
    if not parts:
        raise ValueError("there is no image to evaluate")
    order = torch.cat([part[0] for part in parts]).argsort()
    return [torch.cat(column)[order] for column in zip(*parts, strict=True)]


# ----------------------------------------------------------------------------------------------------------
# The command


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Zero-shot classification and image-text retrieval")
    add_model_arguments(parser)
    add_data_arguments(parser)
    run = parser.add_argument_group("running")
    run.add_argument(
        "--output-dir",
        default="./",
        type=str,
        help="zeroshot.json is written here, and features/ with the prompts' embeddings for the next run",
    )
    run.add_argument(
        "--batch-size",
        default=256,
        type=int,
        help="images, or prompts, for each process at a time; memory and speed only",
    )
    run.add_argument(
        "-j",
        "--workers",
        default=10,
        type=int,
        help="loader processes for each process, no more than there are cores; 0 for none",
    )
    utils.add_distributed_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--resume",
        default="",
        type=str,
        metavar="CKPT",
        help="checkpoint of this project, published SLIP file, or MedCLIP's folder, zip or "
        "pytorch_model.bin (default: checkpoint_best.pt in --output-dir)",
    )
    model.add_argument(
        "--model",
        default=None,
        choices=list(models.MODELS),
        metavar="NAME",
        help="model that a published file holds, where the file itself does not say",
    )
    model.add_argument(
        "--bert-vocab",
        default=None,
        type=str,
        metavar="VOCAB.TXT",
        help="vocabulary of Bio_ClinicalBERT; only MedCLIP's own weights need it",
    )
    model.add_argument(
        "--text-pooling",
        default=None,
        choices=("masked", "medclip"),
        help="BERT towers: leave padding out or average over it (default: as trained)",
    )
    model.add_argument(
        "--open-clip",
        default="",
        type=str,
        metavar="NAME",
        help="compare with a model of the open_clip library instead, e.g. ViT-B-32; needs open_clip_torch",
    )
    model.add_argument(
        "--open-clip-weights",
        default="",
        type=str,
        metavar="TAG",
        help="its weights: a tag of open_clip, which fetches them, or a file",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--datasets",
        default=[],
        nargs="+",
        type=str,
        metavar="NAME",
        help="sets of the catalog to evaluate (default: all of them, in its order)",
    )
    data.add_argument(
        "--catalog",
        default=str(downstream.CATALOG),
        type=str,
        metavar="JSON",
        help="where each set lies; edit the paths in dataset_catalog.json or name a copy of it",
    )
    data.add_argument(
        "--download",
        action="store_true",
        help="let torchvision fetch cifar10, cifar100, stl10 and mnist into their catalog path",
    )
    data.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be decoded and report the reduced number; else an error",
    )

    pairs = parser.add_argument_group("retrieval")
    pairs.add_argument(
        "--retrieval",
        action="store_true",
        help="image-text retrieval only: over --root, or over the catalog's sets of pairs",
    )
    pairs.add_argument(
        "--dataset",
        default="roco",
        choices=list(READERS),
        metavar="READER",
        help=f"what lies at --root: {', '.join(READERS)}",
    )
    pairs.add_argument("--root", default="", type=str, help="folder of the image-text pairs")
    pairs.add_argument("--metadata", default="", type=str, help="caption file (default: the publisher's place)")
    pairs.add_argument("--split", default="test", type=str, help="split of the pairs: train, validation or test")
    pairs.add_argument(
        "--caption-filter",
        default="all",
        type=str,
        help="all, mammo-xray, mammo or a regular expression: which pairs form the pool",
    )


def load_model(args: argparse.Namespace) -> models.Pretrained:
    """The model that the arguments name, with a text side. ValueError where it has none."""
    if args.open_clip:
        return load_open_clip(args.open_clip, args.open_clip_weights)
    path = args.resume or os.path.join(args.output_dir, "checkpoint_best.pt")
    loaded = models.load_pretrained(path, model=args.model, bert_vocab=args.bert_vocab, text_pooling=args.text_pooling)
    if not hasattr(loaded.model, "encode_text"):
        raise ValueError(f"{loaded.source}: a model without a text side; main_linear.py evaluates it")
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source}: pass --bert-vocab with Bio_ClinicalBERT's vocab.txt to read prompts")
    return loaded


def load_open_clip(name: str, weights: str) -> models.Pretrained:
    """A model of open_clip with its own tokenizer and preparation (`preprocess` is a View)."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("--open-clip needs the package open_clip_torch") from error
    if name not in open_clip.list_models():
        raise ValueError(f"unknown open_clip model {name!r}; choose from {', '.join(open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags and not os.path.isfile(weights):
        raise ValueError(f"--open-clip-weights {weights!r} is no file and no weights of {name}: {', '.join(tags)}")
    model, _, view = open_clip.create_model_and_transforms(name, pretrained=weights)
    source = f"open_clip {name} {weights}"
    return models.Pretrained(model.eval(), view, open_clip.get_tokenizer(name), source)


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


def open_sets(args: argparse.Namespace, preprocess: Preprocess | View, say: Callable) -> tuple[dict, dict[str, str]]:
    """{set: Reader or the result of load_zeroshot_set} and {absent set: why}.

    All sets are opened, and their classes compared with the class names, before the first is evaluated.
    """
    if args.root and not args.retrieval:
        raise ValueError("--root is where --retrieval reads its pairs; add --retrieval, or edit the catalog")
    if args.root:
        reader = create_reader(args.dataset, args.root, args.metadata, args.split, args.caption_filter)
        return {args.dataset: reader}, {}
    catalog = downstream.read_catalog(args.catalog)
    opened, absent = {}, {}
    for name in chosen_sets(args, catalog):
        try:
            if name in READERS:
                entry = catalog[name]
                opened[name] = create_reader(name, entry["path"], "", entry["test"], args.caption_filter)
            else:
                opened[name] = load_zeroshot_set(name, preprocess, catalog, args.download)
        except FileNotFoundError as error:
            absent[name] = str(error).removeprefix(f"{name}: ")
            say(f"skipped {name}: {absent[name]}")
    if not opened:
        raise FileNotFoundError(f"nothing to evaluate: not there are {', '.join(absent)}; see {args.catalog}")
    return opened, absent


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate, print a table and write zeroshot.json to --output-dir; returns what was written."""
    args = get_args_parser().parse_args(argv)
    processes = utils.init_distributed(args)
    with utils.ending_together(processes):
        return evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: utils.Distributed) -> dict:
    """The command once its processes have met."""
    say = print if processes.is_main else lambda *_: None
    loaded = load_model(args)
    say(f"evaluating {loaded.source} on {processes.device}")
    model = loaded.model.to(processes.device)
    opened, absent = open_sets(args, loaded.preprocess, say)
    workers = min(args.workers, utils.cores())
    common = dict(batch_size=args.batch_size, workers=workers, dist=processes, skip_broken=args.skip_broken)
    # Between the epochs of main.py the weights change, so only this command keeps text features.
    cache = TextCache.of(model, processes.device, Path(args.output_dir) / "features", processes.is_main)
    report = {"model": loaded.source, "zero_shot": {}, "retrieval": {}, "skipped": absent}
    for name, source in opened.items():
        if isinstance(source, Reader):
            pairs = embed_pairs(model, source, loaded.preprocess, loaded.tokenizer, processes.device, **common)
            scores = retrieval_metrics(*pairs) | {"split": source.split, "broken": len(source) - len(pairs[2])}
            report["retrieval"][name] = scores
            say(retrieval_line(name, scores))
        else:
            dataset, classnames, templates, metric = source
            scores = evaluate_zeroshot(
                model, loaded.tokenizer, dataset, classnames, templates, processes.device,
                metric=metric, cache=cache, **common,
            )  # fmt: skip
            scores["broken"] = len(dataset) - scores["samples"]
            report["zero_shot"][name] = scores
            say(zeroshot_line(name, scores))
        if processes.is_main:  # after each set: a long walk that is cut short keeps what it has
            os.makedirs(args.output_dir, exist_ok=True)
            utils.write_json(Path(args.output_dir) / "zeroshot.json", report)
    if absent:
        say(f"skipped, path not there: {', '.join(absent)}")
    say(f"written to {Path(args.output_dir) / 'zeroshot.json'}")
    return report


def zeroshot_line(name: str, scores: dict) -> str:
    top5 = f"  top-5 {scores['top5']:6.2f}" if "top5" in scores else " " * 14
    broken = f", {scores['broken']} broken skipped" if scores["broken"] else ""
    return (
        f"{name:<18}  {scores['metric']:<14} {scores['score']:6.2f}  |  "
        f"top-1 {scores['top1']:6.2f}{top5}  |  "
        f"{scores['samples']} images, {scores['classes']} classes{broken}"
    )


def retrieval_line(name: str, scores: dict) -> str:
    ways = [
        f"{words} R@1 {scores[way + '_r1']:6.2f}  R@5 {scores[way + '_r5']:6.2f}  "
        f"R@10 {scores[way + '_r10']:6.2f}  median rank {scores[way + '_median_rank']:g}"
        for way, words in (("i2t", "image to text"), ("t2i", "text to image"))
    ]
    broken = f", {scores['broken']} broken skipped" if scores["broken"] else ""
    return f"{name:<18}  {'  |  '.join(ways)}  |  pool {scores['pool']} ({scores['split']}){broken}"


if __name__ == "__main__":
    main()
