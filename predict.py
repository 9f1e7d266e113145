"""From a trained model to an answer: classify, label without training, embed, and search.

    python predict.py classify runs/vit_mammo/calc new_crops/ --output answers.csv
    python predict.py zero-shot runs/vit_mammo/checkpoint_best.pt film.dcm --labels "normal breast" "breast cancer"
    python predict.py embed runs/vit_mammo/checkpoint_best.pt images/ --output images.npz
    python predict.py search images.npz query.png

Images are files (DICOM too), folders, or a CSV with a column image. One that cannot be read is named, skipped and
counted. classify uses a probe of main_linear.py as it was fitted, and flags images unlike those that it was trained on;
or a tower that run_class_finetuning.py has fine-tuned.
Nothing here is a medical device.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import downstream
import metrics
import models
import utils
from features import Backbone, Loading, extract, load_backbone
from images import read_image
from metadata import Table
from probes import Linear
from transforms import eval_view

log = logging.getLogger("medslip")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("predict.py", description=__doc__, formatter_class=utils.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="by a fitted probe or a fine-tuned tower",
                                   formatter_class=utils.HelpFormatter)
    classify.add_argument("run", type=Path, help="folder of main_linear.py, with head.safetensors and settings.json, "
                          "or of run_class_finetuning.py")
    add_images(classify)
    classify.add_argument("--weights", default="", type=str, help="where the run's weights are now, if they were moved")

    zero = commands.add_parser("zero-shot", help="by labels in words", formatter_class=utils.HelpFormatter)
    add_weights(zero)
    add_images(zero)
    zero.add_argument("--labels", default=[], nargs="+", type=str, help="the classes, in words; quote those of several")
    zero.add_argument("--templates", default=["{}."], nargs="+", type=str, metavar="TEXT",
                      help="prompts with {} for the label; several are averaged")
    zero.add_argument("--set", default="", type=str, metavar="NAME",
                      help="take labels and templates from this entry of the catalog, labels.json and templates.json")

    embed = commands.add_parser("embed", help="images or captions to a file of vectors",
                                formatter_class=utils.HelpFormatter)
    add_weights(embed)
    add_images(embed, nargs="*")
    embed.add_argument("--captions", default="", type=str, metavar="TXT", help="a file of captions instead, one a line")

    search = commands.add_parser("search", help="nearest in an embedded set", formatter_class=utils.HelpFormatter)
    search.add_argument("bank", type=Path, help="what embed wrote: images or captions")
    add_images(search, nargs="*")
    search.add_argument("--text", default=[], nargs="+", type=str, help="captions to look for")
    search.add_argument("-k", default=5, type=utils.positive_int, help="how many of the nearest")
    search.add_argument("--weights", default="", type=str, help="where the set's weights are now, if they were moved")
    search.add_argument("--bert-vocab", default=None, type=str, help="for MedCLIP's own weights")
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=str, help="a checkpoint, a published SLIP file or MedCLIP's weights")
    parser.add_argument("--bert-vocab", default=None, type=str, metavar="VOCAB.TXT",
                        help="Bio_ClinicalBERT's vocabulary; only MedCLIP's own weights need it")


def add_images(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    parser.add_argument("images", nargs=nargs, type=Path, help="image files, folders, or CSVs with a column image")
    parser.add_argument("--output", default="", type=str, help="CSV, or .npz of embed (embed needs one)")
    parser.add_argument("--batch-size", default=64, type=utils.positive_int, help="memory and speed only")
    parser.add_argument("-j", "--workers", default=0, type=int, help="loader processes")
# fmt: on

# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class ImageList(Dataset):
    """`ds[i] -> (view(image i), 0)`."""

    def __init__(self, paths: Sequence[Path], view: Any):
        self.paths, self.view = paths, view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.view(read_image(self.paths[i]), None), 0


def find_images(given: Sequence[Path]) -> list[Path]:
    """Files as they are, folders with all images below them in order, CSVs with the paths in their column image."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            below = [Path(name) for name in downstream.images_below(path)]
            if not below:
                raise ValueError(f"{path} holds no image ({', '.join(downstream.IMAGE_SUFFIXES)})")
            found += below
        elif path.suffix.lower() in (".csv", ".tsv"):
            table = Table(path)
            column = table.column("image")
            found += [path.parent / fields[column].strip() for _, fields in table]
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return found


def passed(
    backbone: Backbone, paths: Sequence[Path], args: argparse.Namespace, title: str, view: Any = None
) -> tuple[np.ndarray, list[Path]]:
    """Features (n, d) of the readable images and their paths; the others are named and counted."""
    dataset = ImageList(paths, view or eval_view(backbone.preprocess))
    loading = Loading(args.batch_size, args.workers, skip_broken=True)
    features, kept = extract(backbone, dataset, title, loading)
    lost = sorted(set(range(len(paths))) - set(kept.tolist()))
    for i in lost:
        log.warning(f"skipped, missing or corrupt: {paths[i]}")
    if lost:
        log.warning(f"{len(lost)} of {len(paths)} images skipped")
    return features, [paths[i] for i in kept]


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def classify(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Probabilities of a fitted probe, its decision at validation's threshold, and whether the image is far off."""
    if not (args.run / "head.safetensors").is_file() and (args.run / "checkpoint.pt").is_file():
        return classify_finetuned(args)
    head, about = Linear.load(args.run / "head.safetensors")
    settings = json.loads((args.run / "settings.json").read_text())["args"]
    backbone = load_backbone(
        args.weights or settings["pretrained"], model=settings["model"], arch=settings["arch"],
        untrained=settings["untrained"], seed=settings["seed"], features=about["features"],
        size=about["preprocess"]["size"],
    )  # fmt: skip
    if backbone.fingerprint() != about["weights_sha256"]:
        raise ValueError(f"{args.weights or settings['pretrained']} are not the weights that {args.run} was fitted on")
    features, paths = passed(backbone, find_images(args.images), args, "classify")
    prob, distance = head(features), head.distance(features)
    rows = []
    for i, row in enumerate(answers(paths, prob, about["classes"], about["operating_point"])):
        if distance is not None:
            row["unlike_training"] = int(distance[i] > 1)
        rows.append(row)
    if distance is not None and (far := int((distance > 1).sum())):
        log.warning(f"{far} of {len(rows)} images are farther from the training images than 99.9% of these are")
    return rows


def classify_finetuned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same by a run of run_class_finetuning.py: its best weights, where a validation split chose them."""
    from beit_finetuning import run_class_finetuning
    from beit_finetuning.modeling_finetune import BEIT_MODELS
    from beit_finetuning.views import EvalView

    best = args.run / "checkpoint_best.pt"
    state = utils.load_checkpoint(best if best.is_file() else args.run / "checkpoint.pt")
    if "data_set" not in state.get("settings", {}):
        raise ValueError(f"{args.run} is neither a probe (no head.safetensors) nor a fine-tuned classifier")
    classes = state["settings"]["classes"]
    given = argparse.Namespace(**state["args"])
    if given.model in BEIT_MODELS:
        given.finetune = ""  # every weight comes from the run
    elif args.weights:
        given.finetune = args.weights
    model, preprocess, _ = run_class_finetuning.build_model(given, len(classes))
    model.load_state_dict(state["state_dict"])
    model.eval()
    backbone = Backbone(model, model, preprocess, "logits", "fine-tuned")
    logits, paths = passed(backbone, find_images(args.images), args, "classify", EvalView(preprocess, given.crop_pct))
    prob = torch.from_numpy(logits).double().softmax(-1).numpy()
    results = args.run / "results.json"
    point = json.loads(results.read_text()).get("operating_point") if results.is_file() else None
    return answers(paths, prob, classes, point)


def answers(
    paths: Sequence[Path], prob: np.ndarray, classes: Sequence[str], operating_point: dict | None
) -> list[dict[str, Any]]:
    """A row for each image: the class, the probabilities (n, k), and the decision at validation's threshold."""
    point = None
    if operating_point:
        point = metrics.OperatingPoint(operating_point["temperature"], operating_point["threshold"])
    rows = []
    for i, path in enumerate(paths):
        row: dict[str, Any] = {"image": str(path), "predicted": classes[int(prob[i].argmax())]}
        row |= {f"prob_{name}": float(p) for name, p in zip(classes, prob[i], strict=True)}
        if point is not None:
            positive = list(classes).index(metrics.MALIGNANT)
            row["called_malignant"] = int(prob[i, positive] >= point.threshold)
            row["calibrated_malignant"] = float(point.calibrated(prob[i : i + 1])[0, positive])
        rows.append(row)
    return rows


def zero_shot(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Probabilities of labels in words."""
    labels: Sequence[Any] = args.labels
    templates: Sequence[str] = args.templates
    if args.set:
        prompts = downstream.read_prompts("labels.json")
        if args.set not in prompts:
            raise ValueError(f"--set {args.set!r} is not in labels.json; choose from {', '.join(prompts)}")
        labels = prompts[args.set]
        templates = downstream.read_prompts("templates.json").get(args.set) or templates
    if len(labels) < 2:
        raise utils.UsageError("zero-shot needs --labels, at least two, or --set")
    if lacking := [template for template in templates if "{}" not in template]:
        raise utils.UsageError(f"template {lacking[0]!r} has no {{}} for the label")
    loaded = models.load_pretrained(args.weights, bert_vocab=args.bert_vocab)
    paths = readable(find_images(args.images))
    prob = loaded.zero_shot([image for _, image in paths], labels, templates)
    names = [label if isinstance(label, str) else label[0] for label in labels]
    return [
        {"image": str(path), "predicted": names[int(p.argmax())],
         **{f"prob_{name}": float(x) for name, x in zip(names, p, strict=True)}}
        for (path, _), p in zip(paths, prob, strict=True)
    ]  # fmt: skip


def readable(paths: Sequence[Path]) -> list[tuple[Path, Image.Image]]:
    """The images that can be read; the others are named and counted."""
    found = []
    for path in paths:
        try:
            found.append((path, read_image(path)))
        except (ValueError, FileNotFoundError) as error:
            log.warning(f"skipped: {error}")
    if len(found) < len(paths):
        log.warning(f"{len(paths) - len(found)} of {len(paths)} images skipped")
    if not found:
        raise ValueError("no image can be read")
    return found


def embed(args: argparse.Namespace) -> dict[str, Any]:
    """Unit vectors to an .npz: ids (n,), vectors (n, d), what they are of, and the weights by path and hash."""
    if not args.output.endswith(".npz"):
        raise utils.UsageError(f"embed needs --output with the ending .npz, not {args.output!r}")
    if bool(args.images) == bool(args.captions):
        raise utils.UsageError("embed takes images or --captions, one of the two")
    loaded = models.load_pretrained(args.weights, bert_vocab=args.bert_vocab)
    if args.captions:
        ids = [line.strip() for line in Path(args.captions).read_text("utf-8").splitlines() if line.strip()]
        vectors = loaded.embed_captions(ids)
    else:
        features = "projection" if loaded.model.objective.text else "backbone"
        encode: Any = loaded.model.encode_image if features == "projection" else loaded.model.visual
        backbone = Backbone(encode, loaded.model, loaded.preprocess, features, loaded.source)
        found, paths = passed(backbone, find_images(args.images), args, "embed")
        ids, vectors = [str(path) for path in paths], found / np.linalg.norm(found, axis=1, keepdims=True)
    bank = {
        "ids": np.array(ids, dtype=np.str_),
        "vectors": vectors.astype(np.float32),
        "kind": np.array("captions" if args.captions else "images"),
        "weights": np.array(str(Path(args.weights).absolute())),
        "weights_sha256": np.array(utils.weights_sha256(loaded.model.state_dict())),
    }
    utils.atomic_write(args.output, lambda file: np.savez(file, allow_pickle=False, **bank))
    log.info(f"{len(ids)} {bank['kind']} of {vectors.shape[1]} numbers: {args.output}")
    return bank


def search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The nearest of an embedded set for each image or caption, best first."""
    if not args.images and not args.text:
        raise utils.UsageError("search needs images or --text to look for")
    with np.load(args.bank, allow_pickle=False) as stored:
        if lacking := {"ids", "vectors", "weights", "weights_sha256"} - set(stored.files):
            raise ValueError(
                f"{args.bank} is not what `predict.py embed` writes: it lacks {', '.join(sorted(lacking))}"
            )
        bank = {name: stored[name] for name in stored.files}
    weights = args.weights or str(bank["weights"])
    loaded = models.load_pretrained(weights, bert_vocab=args.bert_vocab)
    if utils.weights_sha256(loaded.model.state_dict()) != str(bank["weights_sha256"]):
        raise ValueError(f"{weights} are not the weights that {args.bank} was embedded with")
    queries, names = [], []
    if args.images:
        found = readable(find_images(args.images))
        queries.append(loaded.embed_images([image for _, image in found], args.batch_size))
        names += [str(path) for path, _ in found]
    if args.text:
        queries.append(loaded.embed_captions(args.text))
        names += args.text
    cosine = np.concatenate(queries) @ bank["vectors"].T  # (queries, n)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : args.k]
    return [
        {"query": name, "rank": rank, "cosine": float(cosine[i, j]), "found": str(bank["ids"][j])}
        for i, name in enumerate(names)
        for rank, j in enumerate(nearest[i], 1)
    ]


def write_rows(rows: list[dict[str, Any]], output: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    utils.atomic_write(output, lambda file: file.write(text.getvalue().encode()))


def show(rows: list[dict[str, Any]], most: int = 20) -> str:
    """The first rows as aligned columns."""
    cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows[:most]]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return text + (f"\n... {len(rows) - most} more" if len(rows) > most else "")


def main(argv: list[str] | None = None) -> Any:
    """Run a command; returns its rows, or what embed wrote."""
    args = get_args_parser().parse_args(argv)
    with utils.start_logging():
        if args.command == "embed":
            return embed(args)
        rows = {"classify": classify, "zero-shot": zero_shot, "search": search}[args.command](args)
        log.info(show(rows))
        if args.output:
            write_rows(rows, args.output)
            log.info(f"{len(rows)} rows: {args.output}")
        return rows


if __name__ == "__main__":
    utils.run_script(main)
