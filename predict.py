"""From a trained model to an answer: classify, label without training, embed, and search.

    python predict.py classify runs/vit_mammo/calc new_crops/ --output answers.csv
    python predict.py zero-shot runs/vit_mammo/checkpoint_best.pt film.dcm --labels "normal breast" "breast cancer"
    python predict.py embed runs/vit_mammo/checkpoint_best.pt images/ --output images.npz
    python predict.py search images.npz query.png

Images are files (DICOM too), folders, or a CSV with a column image. One that cannot be read is named, skipped and
counted. classify uses a probe of main_linear.py as it was fitted, and flags images unlike those that it was trained on;
or a tower that run_class_finetuning.py has fine-tuned. --explain DIR draws where a score comes from (needs captum).
Nothing here is a medical device.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flags.predicting import check_arguments, get_args_parser
from runtime.command_line import answer_flags, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import distributed
import models
import utils
from evaluation import metrics, saliency
from evaluation.catalog import read_prompts
from evaluation.features import Backbone, Loading, each_once
from evaluation.heads import Linear
from evaluation.nearest import nearest
from evaluation.probe import fitted_probe
from inputs.display import AS_STORED, SHOWN, STRETCHED, Display
from inputs.files import IMAGE_SUFFIXES, images_below
from inputs.images import decode_shown, frames_of, read_bytes
from inputs.metadata import Table
from inputs.transforms import eval_view, linear_eval_view, takes_grey
from runtime.checkpoints import is_finetuned, load_checkpoint
from runtime.integrity import read_arrays, refuse_changed, stamp
from runtime.logs import start_logging
from towers.onednn import place
from towers.sources import is_name

log = logging.getLogger("medslip")


# fmt: off
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """An image that is asked about: a file, and how it is shown."""

    path: Path
    display: Display

    def __str__(self) -> str:
        """As answers name it; a frame of several by its number."""
        return f"{self.path}#{self.display.frame}" if isinstance(self.display.frame, int) else str(self.path)

    def read(self, grey: bool = False) -> tuple[Image.Image, str]:
        """What `decode_shown` gives; raises as that and `read_bytes` do."""
        return decode_shown(read_bytes(self.path), str(self.path), self.display, grey)


class ImageList(Dataset):
    """`ds[i] -> (view(image i), where its grey values come from)`, the latter by its place in SHOWN."""

    def __init__(self, images: Sequence[Shown], view: Any):
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, greys = self.images[i].read(takes_grey(self.view))
        return self.view(image, None), SHOWN.index(greys)


def find_files(given: Sequence[Path]) -> list[Path]:
    """Files as they are, folders with all images below them in order, CSVs with the paths in their column image."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            below = [Path(name) for name in images_below(path)]
            if not below:
                raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}, or DICOM of any name)")
            found += below
        elif path.suffix.lower() in (".csv", ".tsv"):
            table = Table(path)
            column = table.column("image")
            found += [path.parent / utils.csv_value(fields[column].strip()) for _, fields in table]
        elif path.is_file():
            found.append(path)
        else:
            words = " " in str(path) and not path.suffix
            raise FileNotFoundError(f"{path} does not exist" + (" (words go after search's --text)" if words else ""))
    return found


def find_images(args: argparse.Namespace) -> list[Shown]:
    """The images that the flags name, shown as they say; of --frame all each frame of a file with several."""
    window = tuple(args.window) if args.window else None
    found = []
    for path in find_files(args.images):
        if args.frame != "all":
            found.append(Shown(path, Display(args.frame, window)))
        elif (frames := frames_of(path)) > 1:
            found += [Shown(path, Display(number, window)) for number in range(1, frames + 1)]
        else:
            found.append(Shown(path, Display(window=window)))
    return found


def passed(
    backbone: Backbone, images: Sequence[Shown], loading: Loading, title: str, view: Any = None,
    trained: dict[str, int] | None = None,
) -> tuple[np.ndarray, list[Shown]]:  # fmt: skip
    """Features (n, d) of the readable images and these; the others are named, with the reason, and counted.

    Args:
        trained: where the grey values of training images came from (`features.greys_of`); what differs is said.
    """

    def compute(numbers: torch.Tensor, batch: torch.Tensor, greys: torch.Tensor) -> list[torch.Tensor]:
        return [greys, loading.encode(backbone.encode, batch)]

    dataset = ImageList(images, view or eval_view(backbone.preprocess))
    kept, greys, features = each_once(backbone.model, dataset, compute, loading, title)
    if len(kept) < len(images):
        log.warning(f"{len(images) - len(kept)} of {len(images)} images skipped")
    own = [images[i] for i in kept.tolist()]
    compare_greys(own, [SHOWN[kind] for kind in greys.tolist()], trained)
    return features.numpy(), own


def compare_greys(images: Sequence[Shown], greys: Sequence[str], trained: dict[str, int] | None) -> None:
    """Say which images get their grey values from something that no training image got them from."""
    foreign = [i for i, kind in enumerate(greys) if trained and kind not in trained]
    if foreign:
        first = foreign[0]
        shrunk = AS_STORED in (trained or ()) and greys[first] == STRETCHED
        log.warning(
            f"{len(foreign)} of {len(images)} images are shown otherwise than the training images were "
            f"({', '.join(trained or ())}), the first, {images[first]}, by {greys[first]}: their greys differ, so the "
            "answers may. --window CENTER WIDTH shows images of more than 8 bits through one window"
            + " (smaller copies by make_dataset.py shrink had these greys, and are stored in 8 bits)"
            * shrunk
        )


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def classify(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Probabilities of a fitted probe, its decision at validation's threshold, and whether the image is far off."""
    if not (args.run / "head.safetensors").is_file():
        if (args.run / "checkpoint.pt").is_file():
            return classify_finetuned(args)
        what = "is no folder" if not args.run.is_dir() else "holds neither head.safetensors nor checkpoint.pt"
        raise FileNotFoundError(f"{args.run} {what}: name a run of main_linear.py or run_class_finetuning.py")
    probe = fitted_probe(args.run, args.weights)
    heads, about, backbone = probe.heads, probe.about, probe.backbone
    loading = loading_of(args, about.get("precision", "fp32"))
    place(backbone.model, loading.processes)
    preprocess = backbone.preprocess
    view = partial(linear_eval_view, preprocess) if about.get("view") == "linear" else eval_view(preprocess)
    features, paths = passed(backbone, find_images(args), loading, "classify", view, about.get("greys"))
    distance = heads[0].distance(features)
    if names := about.get("findings"):  # of each image any number, each by a head of its own
        prob = np.stack([head(features)[:, 1] for head in heads], axis=1)
        rows = finding_answers(paths, prob, names)
        explained = [(int(p.argmax()), 1) for p in prob]
        named = [names[number] for number, _ in explained]
    else:
        prob = heads[0](features)
        rows = answers(paths, prob, about["classes"], about["operating_point"])
        explained = [(0, target) for target in targets(prob, about["classes"], about["operating_point"])]
        named = [about["classes"][target] for _, target in explained]
    for i, row in enumerate(rows if distance is not None else []):
        assert distance is not None
        row["unlike_training"] = int(distance[i] > 1)
    if args.explain:
        draw_maps(args.explain, backbone, heads, view, paths, explained, named, rows)
    if distance is not None and (far := int((distance > 1).sum())):
        log.warning(f"{far} of {len(rows)} images are farther from the training images than 99.9% of these are")
    return rows


def classify_finetuned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same by a run of run_class_finetuning.py: its best weights, where a validation split chose them."""
    from beit_finetuning import networks
    from beit_finetuning.views import EvalView

    best = args.run / "checkpoint_best.pt"
    state = load_checkpoint(best if best.is_file() else args.run / "checkpoint.pt")
    if not is_finetuned(state):
        raise ValueError(f"{args.run} is neither a probe (no head.safetensors) nor a fine-tuned classifier")
    classes = state["settings"]["classes"]
    network = networks.rebuild(state, args.weights)
    file = args.run / "results.json"
    results = utils.read_json(file) if file.is_file() else {}
    recorded = results.get("settings", {}).get("precision", "fp32")  # until the checkpoint said it
    loading = loading_of(args, state.get("precision", recorded))
    model, preprocess = place(network.model, loading.processes), network.preprocess
    backbone = Backbone(model, model, preprocess, "logits", network.name)
    view = EvalView(preprocess, network.config.crop_pct)
    logits, paths = passed(backbone, find_images(args), loading, "classify", view, results.get("greys"))
    prob = torch.from_numpy(logits).double().softmax(-1).numpy()
    point = results.get("operating_point")
    rows = answers(paths, prob, classes, point)
    if args.explain:
        explained = [(0, target) for target in targets(prob, classes, point)]
        named = [classes[target] for _, target in explained]
        draw_maps(args.explain, backbone, [saliency.identity_head(len(classes))], view, paths, explained, named, rows)
    return rows


def loading_of(args: argparse.Namespace, own: str = "") -> Loading:
    """How images reach the tower: on the GPU, or on the CPU where there is none.

    Args:
        own: a run's precision, which is taken where --precision does not say otherwise and this machine has it.
    """
    alone = {"rank": 0, "world_size": 1, "local_rank": 0, "gpu": args.gpu}
    processes = distributed.init_distributed(argparse.Namespace(**alone, precision=args.precision))
    if own and args.precision == "auto":
        processes = replace(processes, precision=distributed.own_precision(own, processes.device))
    return Loading(args.batch_size, args.workers, skip_broken=True, processes=processes)


def positive_of(classes: Sequence[str], operating_point: dict | None) -> str | None:
    """The class that is looked for, where there is one."""
    found = (operating_point or {}).get("positive", metrics.MALIGNANT)
    return found if found in classes else None


def targets(prob: np.ndarray, classes: Sequence[str], operating_point: dict | None) -> list[int]:
    """The class that is explained of each image: the one that is looked for, else the predicted one."""
    positive = positive_of(classes, operating_point)
    return [int(p.argmax()) if positive is None else list(classes).index(positive) for p in prob]


def draw_maps(
    folder: Path, backbone: Backbone, heads: Sequence[Linear], view: Any, paths: Sequence[Shown],
    explained: Sequence[tuple[int, int]], named: Sequence[str], rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """An image beside itself with its map for each answer, in `folder`; the answer's column `map` names it.

    Args:
        explained: of each image the head's number and the class in it.
        named: of each image what that is called, a class or a finding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(backbone.model.parameters()).device
    for number, target in sorted(set(explained)):
        explainer = saliency.Explainer(backbone, heads[number], target)
        own = [i for i, pair in enumerate(explained) if pair == (number, target)]
        for start in range(0, len(own), 8):
            part = own[start : start + 8]
            films = [paths[i].read()[0] for i in part]
            views = torch.stack([view(film, None) for film in films])
            for i, film, heat in zip(part, films, explainer(views.to(device)), strict=True):
                file = folder / f"{i:05d}_{utils.file_name(paths[i].path.stem)}.png"
                title = f"{named[i]}: {100 * rows[i][f'prob_{named[i]}']:.1f}%"
                saliency.beside_original(film, heat, view, title).save(file)
                rows[i]["map"] = str(file)


def finding_answers(paths: Sequence[Shown], prob: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each image: the probability (n, f) of each finding by itself."""
    return [
        {"image": str(path), **{f"prob_{name}": float(p) for name, p in zip(names, own, strict=True)}}
        for path, own in zip(paths, prob, strict=True)
    ]


def answers(
    paths: Sequence[Shown], prob: np.ndarray, classes: Sequence[str], operating_point: dict | None
) -> list[dict[str, Any]]:
    """A row for each image: the class, the probabilities (n, k), and the decision at validation's threshold."""
    point, positive = None, positive_of(classes, operating_point)
    if operating_point and positive is not None:
        point = metrics.OperatingPoint(operating_point["temperature"], operating_point["threshold"])
    rows = []
    for i, path in enumerate(paths):
        row: dict[str, Any] = {"image": str(path), "predicted": classes[int(prob[i].argmax())]}
        row |= {f"prob_{name}": float(p) for name, p in zip(classes, prob[i], strict=True)}
        if point is not None and positive is not None:
            column, name = list(classes).index(positive), positive.lower()
            row[f"called_{name}"] = int(point.called(prob[i : i + 1], column)[0])
            row[f"calibrated_{name}"] = float(point.calibrated(prob[i : i + 1])[0, column])
        rows.append(row)
    return rows


def zero_shot(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Probabilities of labels in words."""
    labels: Sequence[Any] = args.labels
    templates: Sequence[str] = args.templates
    if args.set:
        prompts = read_prompts("labels.json")
        if args.set not in prompts:
            raise ValueError(f"--set {args.set!r} is not in labels.json; choose from {', '.join(prompts)}")
        labels = prompts[args.set]
        templates = read_prompts("templates.json").get(args.set) or templates
    loaded = models.load_pretrained(args.weights, bert_vocab=args.bert_vocab)
    vectors, paths = unit_vectors(loaded, args, "zero-shot")
    prob = loaded.label_probabilities(vectors, labels, templates)
    names = numbered([label if isinstance(label, str) else label[0] for label in labels])
    return [
        {"image": str(path), "predicted": names[int(p.argmax())],
         **{f"prob_{name}": float(x) for name, x in zip(names, p, strict=True)}}
        for path, p in zip(paths, prob, strict=True)
    ]  # fmt: skip


def numbered(names: Sequence[str]) -> list[str]:
    """The names with the second and later of equal ones numbered, "missile (2)": ImageNet has two such pairs."""
    seen, found = Counter(), []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def unit_vectors(loaded: models.Pretrained, args: argparse.Namespace, title: str) -> tuple[np.ndarray, list[Shown]]:
    """Vectors (n, d) of length 1 of the readable images that the flags name, and their paths."""
    loading = loading_of(args)
    place(loaded.model, loading.processes)
    encode, features = loaded.image_encoder()
    backbone = Backbone(encode, loaded.model, loaded.preprocess, features, loaded.source)
    images = find_images(args)
    if title == "embed":  # before hours of images
        utils.refuse_full(Path(args.output).parent, 4 * len(images) * backbone.width(), "the vectors")
    found, paths = passed(backbone, images, loading, title)
    return found / np.linalg.norm(found, axis=1, keepdims=True), paths


def embed(args: argparse.Namespace) -> dict[str, Any]:
    """Unit vectors to an .npz: ids (n,), vectors (n, d), what they are of, and the weights by path and hash."""
    loaded = models.load_pretrained(args.weights, bert_vocab=args.bert_vocab)
    if args.captions:
        place(loaded.model, loading_of(args).processes)
        ids = read_captions(Path(args.captions))
        vectors = loaded.embed_captions(ids)
    else:
        vectors, paths = unit_vectors(loaded, args, "embed")
        ids = [str(path) for path in paths]
    bank = {
        "ids": np.array(ids, dtype=np.str_),
        "vectors": vectors.astype(np.float32),
        "kind": np.array("captions" if args.captions else "images"),
        "weights": np.array(args.weights if is_name(args.weights) else str(Path(args.weights).absolute())),
        "weights_sha256": np.array(utils.weights_sha256(loaded.model.state_dict())),
        "precision": np.array(loading_of(args).processes.precision),
    }
    utils.atomic_write(args.output, lambda file: np.savez(file, allow_pickle=False, **bank))
    log.info(f"{len(ids)} {bank['kind']} of {vectors.shape[1]} numbers: {args.output}")
    return bank


def read_captions(path: Path) -> list[str]:
    """The lines of a file of captions, empty ones left out; ValueError where none is left or they are not UTF-8."""
    try:
        found = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--captions {path} is not UTF-8: {error}") from error
    if not found:
        raise ValueError(f"--captions {path} holds no caption")
    return found


def search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The nearest of an embedded set for each image or caption, best first."""
    bank, read = read_arrays(args.bank), stamp(args.bank)
    if lacking := {"ids", "vectors", "weights", "weights_sha256"} - set(bank):
        raise ValueError(f"{args.bank} is not what `predict.py embed` writes: it lacks {', '.join(sorted(lacking))}")
    weights, fingerprint = args.weights or str(bank["weights"]), str(bank["weights_sha256"])
    loaded = models.load_pretrained(weights, bert_vocab=args.bert_vocab)
    if utils.weights_sha256(loaded.model.state_dict()) != fingerprint:
        raise ValueError(f"{weights} are not the weights that {args.bank} was embedded with")
    queries, names = [], []
    if args.images:
        vectors, paths = unit_vectors(loaded, args, "search")
        queries.append(vectors)
        names += map(str, paths)
    if args.text:
        place(loaded.model, loading_of(args).processes)
        queries.append(loaded.embed_captions(args.text))
        names += args.text
    # The vectors are mapped: where the file has become shorter, reading them is a SIGBUS.
    refuse_changed(args.bank, read)
    numbers, cosines = nearest(np.concatenate(queries), bank["vectors"], args.k)  # (queries, k) each
    refuse_changed(args.bank, read)
    return [
        {"query": name, "rank": rank, "cosine": cosine, "found": str(bank["ids"][number])}
        for name, own, cosine_of in zip(names, numbers.tolist(), cosines.tolist(), strict=True)
        for rank, (number, cosine) in enumerate(zip(own, cosine_of, strict=True), 1)
    ]


def write_rows(rows: list[dict[str, Any]], output: str) -> None:
    """Answers as CSV, whole or not at all."""
    columns = list(rows[0])
    text = utils.csv_text([columns, *([row.get(name) for name in columns] for row in rows)])
    utils.atomic_write(output, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


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
    check_arguments(args)
    if args.output:  # before the images are read
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with start_logging():
        if args.command == "embed":
            return embed(args)
        rows = {"classify": classify, "zero-shot": zero_shot, "search": search}[args.command](args)
        log.info(show(rows))
        if args.output:
            write_rows(rows, args.output)
            log.info(f"{len(rows)} rows: {args.output}")
        return rows


if __name__ == "__main__":
    run_script(main)
