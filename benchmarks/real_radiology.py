"""Real images: what CLIP, SimCLR and SLIP add to an ImageNet tower, and which fine-tuning keeps what the tower knew.

    python benchmarks/real_radiology.py --data DIR --vision-weights tower.pt --output-dir real

DIR holds covid_roco (captioned chest CTs and radiographs in ROCO's layout, with sources.csv: modality, finding, group),
busi (breast ultrasounds, table.csv: path, label, split, group), mias_cbis (mammograms in CBIS-DDSM's JPEG layout),
pneumonia (children's chest radiographs, table.csv: image, label, group) and real_pairs (images/ and captions.txt, of
anything but radiology); sets that are not there are left out.

Every row is trained with each seed and probed frozen, in folds: each woman's images (BUSI names no women but groups of
near duplicates: those and what the audit finds) are predicted by a probe that saw none of them. A row's figure is the
mean over seeds, its interval covers seeds and patients, and so does its difference from the frozen tower. For the
finding on radiographs the tower is trained again for each fold without the images and captions of the groups that are
tested, so no caption has told it an answer. The recipes are tried with SLIP, the README's with CLIP and SimCLR too, and
with SLIP on as many pairs that are not medical, and with SimCLR on as many images of BUSI's and pneumonia's training
parts, or on all of them, without their labels (in folds some of these are tested later). With SLIP alone: as many of
these images beside the captioned ones, with captions that name their kind; the sigmoid loss; twice the epochs; LoRA.
Nothing is chosen by these figures.

One comparison, PRIMARY, is not corrected for the number of them: report.json names it, and when, before any row is
trained.

What captions of the probed images' own kind would do is asked of the rows "captions from labels": the same recipe on
the training parts of BUSI and MIAS, a sentence for each label. They and all others are probed on the sets' own split
too. Resumable: what is done is kept, what was cut off goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the project's modules)
import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

import distributed
import main as training
import make_dataset
import utils
from evaluation import comparisons
from evaluation.cross_validation import cross_validate
from evaluation.downstream import create_downstream
from evaluation.features import Loading, extract, load_backbone
from evaluation.heads import Choice, Samples, fit_logistic
from evaluation.metrics import Interval
from evaluation.predictions import CBIS, Predictions, Scheme, macro_auroc
from evaluation.resamples import Bootstrap
from inputs.cbis import CbisLesions
from inputs.metadata import read_table
from inputs.transforms import eval_view
from preparation import audit
from preparation.shrink import shrink
from runtime.checkpoints import load_checkpoint, save_checkpoint
from runtime.logs import read_rows, start_logging
from towers.onednn import place
from towers.sources import read_source

MODEL, TOWER = "VITT16", "tf_efficientnet_lite0"  # the text side of SLIP_VITT16, and the image tower in its place
COMMON = (
    "--warmup-epochs 1 --lr-start 0 --lr-end 0 --wd 0.1 --mask-duplicates --ssl-mlp-dim 1024 "
    "--no-compile --override text_layers=4"
)
FOLDS = 3  # of the finding, for each of which a tower is trained
PROBE_FOLDS = 5  # of the other sets
WAYS = {"folds": "", "split": ", split"}  # how a set was probed, and how its table is called
FINDING = "COVID-19"
CHILDREN = ["bacteria", "virus"]  # of pneumonia, in pictures of one origin; the normal ones have another
MIAS = ["cbis_calc", "cbis_mass"]
CAPTIONS = Scheme(("COVID-19", "other"), "image", "label", "group", ("image", "group", "label"), "COVID-19")


@dataclass(frozen=True)
class Row:
    """A way of getting a tower. Without an objective it is not trained."""

    objective: str = ""
    flags: str = ""
    blend: float = 1.0  # fraction of the trained weights in the average with those at the start
    base: str = ""  # the row whose training is blended
    best: bool = False  # the epoch with the best recall over the validation pairs, not the last one
    size: int = 0  # pixels at which the tower is probed, where they are not those of training
    untrained: bool = False  # the tower with fresh weights
    pairs: str = "roco"  # what it is trained on: a folder that `prepare` writes
    mean: int = 0  # the average of the weights of so many seeds of the base
    last: int = 1  # the average of the weights after so many last epochs


HELD = "--lr 3e-4 --hold-batchnorm"
RECIPE = "held"  # the README's, with CLIP and SimCLR too
SEARCH = {  # with SLIP
    "rate 3e-4": Row("SLIP", "--lr 3e-4"),
    "rate 3e-5": Row("SLIP", "--lr 3e-5"),
    "held": Row("SLIP", HELD),  # BatchNorm
    "held, blend 0.5": Row("SLIP", HELD, blend=0.5, base="held"),
    "held, best epoch": Row("SLIP", HELD, best=True),
    "held, shared view": Row("SLIP", f"{HELD} --shared-view"),
}
CONTROL = "held, pairs that are not medical"
FINAL = {
    RECIPE: SEARCH[RECIPE],
    "CLIP, held": replace(SEARCH[RECIPE], objective="CLIP"),
    "SIMCLR, held": replace(SEARCH[RECIPE], objective="SIMCLR"),
    CONTROL: replace(SEARCH[RECIPE], pairs="control"),
}
OWN, ALL_OWN = "SIMCLR, held, the sets' own images", "SIMCLR, held, all of the sets' own images"
BOTH = "held, the sets' own images beside"
RECIPES = {  # with SLIP too, beside the README's
    BOTH: replace(SEARCH[RECIPE], pairs="both"),
    "held, sigmoid loss": replace(SEARCH[RECIPE], objective="SIGSLIP"),
    "held, 12 epochs": Row("SLIP", f"{HELD} --epochs 12"),
    "held, mean of the last 3 epochs": Row("SLIP", HELD, last=3),
    "held, LoRA": Row("SLIP", f"{HELD} --lora 8"),
}
LABELLED = {
    f"{name}, captions from labels": replace(SEARCH[RECIPE], objective=name, pairs="roco_labelled")
    for name in ("SLIP", "CLIP")
}
MEANS = {f"held, mean of {n}": Row("SLIP", base=RECIPE, mean=n) for n in (2, 3, 5, 8)}
FROZEN = {"untrained": Row(untrained=True), "ImageNet": Row(), "ImageNet, 224 pixels": Row(size=224)}
OF_OWN = {OWN: replace(FINAL["SIMCLR, held"], pairs="own"), ALL_OWN: replace(FINAL["SIMCLR, held"], pairs="all_own")}
ROWS = {**FROZEN, **SEARCH, **FINAL, **OF_OWN, **RECIPES, **LABELLED, **MEANS}
PRIMARY = "BUSI", RECIPE, "CLIP, held"  # the set, in folds, and the two rows whose macro AUROC is compared
# What a hospital knows of each image without a reader.
KINDS = {"busi": "ultrasound of a breast.", "pneumonia": "chest radiograph of a child."}
WORDS = {"BENIGN": "a benign {}", "MALIGNANT": "a malignant {}", "BENIGN_WITHOUT_CALLBACK": "normal tissue"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vision-weights", required=True, help=f"ImageNet weights of {TOWER}")
    parser.add_argument("--output-dir", type=Path, default=Path("real"))
    parser.add_argument("--image-size", type=int, default=128, help="pixels; at 224 a batch of 64 takes 19 GB")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--update-freq", type=int, default=1, help="micro-batches a step, where memory is short")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME", help="; ".join(ROWS)
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, of one core each on a CPU")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument(
        "--skip-finding",
        action="store_true",
        help="leave out the finding on radiographs, for which each tower is trained three times more",
    )
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)  # in a process of its own
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Data, once
# ---------------------------------------------------------------------------------------------------------------------


def prepare(data: Path, out: Path, size: int, seed: int = 0) -> None:
    """Smaller copies of the captioned images, folds over their groups, and tables of the probe sets."""
    if (out / "prepared.json").is_file():
        return
    labelled, images = [], out / "images"
    unlabelled: dict[str, list[Path]] = {}  # training images of the sets that are large enough to show a gain
    images.mkdir(parents=True, exist_ok=True)
    pairs = captioned(data, out, images, size, seed)
    columns = {"image": "image", "label": "label", "split": "split", "group": "group"}
    entry = {"path": str(out), "type": "csv", "train": "train", "test": "test", "columns": columns}
    catalog = {f"finding_{k}": {**entry, "table": f"finding_{k}.csv", "positive": FINDING} for k in range(FOLDS)}
    if (data / "busi").is_dir():
        names = ["benign breast tumour", "malignant breast tumour", "normal breast tissue"]
        rows = read_table(data / "busi" / "table.csv", ["path", "label", "split", "group"])
        groups = merged_groups([data / "busi" / row["path"] for row in rows], [row["group"] for row in rows])
        in_train = {group for row, group in zip(rows, groups, strict=True) if row["split"] == "train"}
        rows = [
            {"image": row["path"], "label": row["label"], "group": group,
             "split": "train" if group in in_train else "test"}  # a test image with a copy in training moves there
            for row, group in zip(rows, groups, strict=True)
        ]  # fmt: skip
        write_csv(out / "busi.csv", rows)
        catalog["busi"] = {
            **entry, "table": "busi.csv", "images": str((data / "busi").resolve()), "positive": "malignant",
            "labels": [[f"a {name}"] for name in names],
            "templates": ["ultrasound showing {}.", "breast ultrasound image of {}."],
        }  # fmt: skip
        words = {name.split()[0]: f"a {name}" for name in names}
        labelled += [(data / "busi" / r["image"], f"ultrasound showing {words[r['label']]}.")
                for r in rows if r["split"] == "train"]  # fmt: skip
        unlabelled["busi"] = [data / "busi" / row["image"] for row in rows if row["split"] == "train"]
    if (data / "mias_cbis").is_dir():
        (out / "mias").mkdir(exist_ok=True)
        for part in ("csv", "jpeg"):
            if not (out / "mias" / part).exists():
                os.symlink((data / "mias_cbis" / part).resolve(), out / "mias" / part)
        make_dataset.main(["cbis", "--root", str(out / "mias")])
        for kind, name in (("calc", "calcification"), ("mass", "mass")):
            rows = read_table(out / "mias" / f"{kind}.csv", ["crop", "pathology", "split"])
            labelled += [(out / "mias" / r["crop"], f"mammogram showing {WORDS[r['pathology']].format(name)}.")
                    for r in rows if r["split"] != "test"]  # fmt: skip
    if (data / "pneumonia").is_dir():
        rows = read_table(data / "pneumonia" / "table.csv", ["image", "label", "split", "group"])
        rows = [{key: row[key] for key in columns} for row in rows if row["label"] in CHILDREN]
        write_csv(out / "pneumonia.csv", rows)
        unlabelled["pneumonia"] = [data / "pneumonia" / row["image"] for row in rows if row["split"] == "train"]
        folder = str((data / "pneumonia").resolve())
        catalog["pneumonia"] = {**entry, "table": "pneumonia.csv", "images": folder, "positive": CHILDREN[0]}
    number = sum(row["split"] == "train" for row in pairs)
    write_pairs(out / "roco_labelled", labelled, images, size)
    write_pairs(out / "control", control(data, number, seed), images, size)
    chosen = own(unlabelled, number, seed)
    for name, found in (("own", chosen), ("all_own", own(unlabelled, None, seed))):
        write_pairs(out / name, [(file, f"image {i}") for i, (file, _) in enumerate(found)], images, size)
    if chosen:
        beside = [row for row in pairs if row["split"] == "train"]
        write_pairs(out / "both", chosen, images, size, beside)
    utils.write_json(out / "catalog.json", catalog)
    utils.write_json(out / "prepared.json", {"pairs": len(pairs), "size": size})


def captioned(data: Path, out: Path, images: Path, size: int, seed: int) -> list[dict]:
    """The captioned images in ROCO's layout, whole and without each fold of the finding; the rows of all."""
    pairs = []
    for split in ("train", "validation"):
        folder = data / "covid_roco" / split / "radiology"
        captions = dict(
            line.split("\t", 1) for line in (folder / "captions.txt").read_text(encoding="utf8").splitlines() if line
        )
        for row in read_table(folder / "sources.csv", ["id", "modality", "finding", "group"]):
            source = next(folder.glob(f"images/{row['id']}.*"))
            copy = images / f"{row['id']}.jpg"
            if copy.exists() and any(p["id"] == row["id"] for p in pairs):
                raise ValueError(f"{row['id']} is in both splits of {data / 'covid_roco'}")
            shrunk_copy(source, copy, size)
            pairs.append({**row, "caption": captions[row["id"]].strip(), "split": split})
    label = [FINDING if FINDING in row["finding"] else "other" for row in pairs]
    strata = [f"{row['modality']} {name}" for row, name in zip(pairs, label, strict=True)]
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(
        strata, strata, [row["group"] for row in pairs]
    )
    for row, name in zip(pairs, label, strict=True):
        row["label"], row["image"] = name, f"images/{row['id']}.jpg"
    write_roco(out / "roco", [row for row in pairs if row["split"] == "train"], images)
    write_roco(out / "roco", [row for row in pairs if row["split"] == "validation"], images, "validation")
    for k, (kept, held) in enumerate(folds):
        write_roco(out / f"roco_without_{k}", [pairs[i] for i in kept], images)
        tested = set(held.tolist())
        rows = [
            {**{key: row[key] for key in ("image", "label", "group")}, "split": "test" if i in tested else "train"}
            for i, row in enumerate(pairs)
            if row["modality"] == "X-ray"
        ]
        write_csv(out / f"finding_{k}.csv", rows)
    return pairs


def control(data: Path, number: int, seed: int) -> list[tuple[Path, str]]:
    """As many images and captions of real_pairs as there are medical ones."""
    folder = data / "real_pairs"
    if not folder.is_dir():
        return []
    lines = [line.split("\t", 1) for line in (folder / "captions.txt").read_text(encoding="utf8").splitlines() if line]
    if len(lines) < number:
        raise ValueError(f"{folder} has {len(lines)} pairs, and {number} are compared with it")
    chosen = sorted(np.random.default_rng(seed).permutation(len(lines))[:number])
    files = {path.stem: path for path in (folder / "images").iterdir()}
    return [(files[lines[i][0]], lines[i][1].strip()) for i in chosen]


def own(unlabelled: dict[str, list[Path]], number: int | None, seed: int) -> list[tuple[Path, str]]:
    """So many images, as many of each set, or all, with a caption that names their kind alone."""
    generator, chosen = np.random.default_rng(seed), []
    for i, (name, files) in enumerate(unlabelled.items()):
        share = len(files) if number is None else (number + i) // len(unlabelled)
        if len(files) < share:
            raise ValueError(f"{name} has {len(files)} training images, and {share} are taken")
        chosen += [(files[k], KINDS[name]) for k in sorted(generator.permutation(len(files))[:share])]
    return chosen


def write_pairs(
    root: Path, pairs: list[tuple[Path, str]], images: Path, size: int, beside: Sequence[dict] = ()
) -> None:
    """Images and captions as ROCO's training part, unless there are none, with pairs that are written already."""
    rows = list(beside)
    for i, (source, caption) in enumerate(pairs):
        shrunk_copy(source, images / f"{root.name}{i:05d}.jpg", size)
        rows.append({"id": f"{root.name}{i:05d}", "caption": caption})
    if pairs:
        write_roco(root, rows, images)


def shrunk_copy(source: Path, copy: Path, size: int) -> None:
    with Image.open(source) as img:
        small = shrink(img.convert("RGB"), 2 * size) or img.convert("RGB")
        small.save(copy, quality=95)


def merged_groups(paths: list[Path], groups: list[str]) -> list[str]:
    """The groups, two that hold copies of one image made one, which has the name of its first image's."""
    place = {path: i for i, path in enumerate(paths)}
    pairs, _ = audit.audit({"images": paths})
    edges = [(place[pair.first], place[pair.second]) for pair in pairs]
    first: dict[str, int] = {}
    edges += [(first.setdefault(group, i), i) for i, group in enumerate(groups)]
    graph = coo_array((np.ones(len(edges)), tuple(np.transpose(edges))), shape=(len(paths), len(paths)))
    found = connected_components(graph, directed=False)[1].tolist()
    return [groups[found.index(number)] for number in found]


def write_roco(root: Path, pairs: list[dict], images: Path, split: str = "train") -> None:
    folder = root / split / "radiology"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        os.symlink(images.resolve(), folder / "images")
    (folder / "captions.txt").write_text("".join(f"{p['id']}\t {p['caption']}\n" for p in pairs), encoding="utf8")


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# One row with one seed
# ---------------------------------------------------------------------------------------------------------------------


def flags_of(args: argparse.Namespace, row: Row, seed: int, root: Path, out: Path) -> list[str]:
    model = f"{row.objective or 'CLIP'}_{MODEL}"
    return [
        *("--dataset", "roco", "--root", str(root), "--output-dir", str(out), "--model", model),
        *("--vision-tower", TOWER, "--vision-weights", args.vision_weights, "--image-size", str(args.image_size)),
        *("--epochs", str(args.epochs), "--batch-size", str(args.batch_size), "-j", str(args.workers)),
        *("--update-freq", str(args.update_freq), "--accum-negatives", "full" if args.update_freq > 1 else "micro"),
        *("--seed", str(seed), *COMMON.split(), *row.flags.split()),
    ]


def start_of(args: argparse.Namespace) -> Path:
    """The ImageNet tower as a folder of timm's, which weights go in by; the views are those of the trained towers."""
    folder = args.output_dir / "ImageNet"
    if not folder.is_dir():
        folder.mkdir()
        os.symlink(Path(args.vision_weights).resolve(), folder / "pytorch_model.bin")
        data = {"crop_pct": 1.0, "interpolation": "bilinear"}
        utils.write_json(folder / "config.json", {"architecture": TOWER, "pretrained_cfg": data})
    return folder


def averaged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of several checkpoints with the mean of all their weights."""
    weights = [state["state_dict"] for state in states]
    for key, first in weights[0].items():
        if first.is_floating_point():
            weights[0][key] = torch.stack([state[key] for state in weights]).mean(0)
    return states[0]


def tower_of(args: argparse.Namespace, row: Row, seed: int, root: Path, out: Path) -> Path:
    """The weights of a row: the ImageNet tower, or a checkpoint trained on the pairs under `root`."""
    file = out / "tower.pt"
    if not row.objective or file.is_file():
        return file if row.objective else start_of(args)
    out.mkdir(parents=True, exist_ok=True)
    if row.mean:
        of = [args.seeds[seed * row.mean + i] for i in range(row.mean)]
        files = [args.output_dir / "rows" / row.base / str(s) / out.name / "tower.pt" for s in of]
        save_checkpoint(averaged([load_checkpoint(file) for file in files]), file)
        return file
    if row.base:
        state = load_checkpoint(args.output_dir / "rows" / row.base / str(seed) / out.name / "tower.pt")
        for key, start in read_source(start_of(args)).weights.items():
            if start.is_floating_point():
                state["state_dict"][key] = torch.lerp(start, state["state_dict"][key], row.blend)
        save_checkpoint(state, file)
        return file
    flags = flags_of(args, row, seed, root, out)
    often = "1" if row.best else str(args.epochs)
    done = training.main([*flags, "--keep-last", str(2 * row.last - 1), "--eval-freq", often])
    if done.get("stopped_by"):  # the same command continues it
        sys.exit(128 + signal.Signals[done["stopped_by"]])
    state = load_checkpoint(out / ("checkpoint_best.pt" if row.best else "checkpoint.pt"))
    if row.last > 1:
        ends = [state["step"] * (args.epochs - back) // args.epochs for back in range(row.last)]
        state = averaged([load_checkpoint(out / f"checkpoint_step{step:08d}.pt") for step in ends])
    save_checkpoint({key: state[key] for key in ("state_dict", "model", "preprocess", "tokenizer")}, file)
    for checkpoint in out.glob("checkpoint*.pt"):  # with the optimizer's state: five times as large
        checkpoint.unlink()
    return file


def run_one(args: argparse.Namespace, name: str, row: Row, seed: int) -> None:
    """Train and probe; done.json says how long each took."""
    out, started = args.output_dir / "rows" / name / str(seed), time.time()
    catalog = json.loads((args.output_dir / "catalog.json").read_text())
    tower = tower_of(args, row, seed, args.output_dir / row.pairs, out / "whole")
    trained = time.time()
    labelled = row.pairs == "roco_labelled"
    ways = ["split"] if labelled else ["folds", "split"]
    sets = [name for name in ("busi", "pneumonia") if name in catalog]
    for dataset in sets + MIAS * (args.output_dir / "mias").is_dir():
        probe_set(args, row, seed, dataset, catalog, tower, out / dataset, ways)
    if "busi" in catalog and row.objective in ("CLIP", "SLIP"):
        label_in_words(args, catalog, tower, out / "busi_zero_shot")
    probed = time.time()
    for k in () if args.skip_finding or row.pairs != "roco" else range(FOLDS):
        root = args.output_dir / f"roco_without_{k}"
        without = tower_of(args, row, seed, root, out / f"without_{k}")
        probe_set(args, row, seed, f"finding_{k}", catalog, without, out / f"finding_{k}", ["split"])
    seconds = {"training": trained - started, "probes": probed - trained, "folds": time.time() - probed}
    retrieval = retrieval_of(out / "whole" / "log.jsonl")
    utils.write_json(out / "done.json", {"seconds": seconds, "retrieval": retrieval})


def probe_set(
    args: argparse.Namespace, row: Row, seed: int, dataset: str, catalog: dict, tower: Path, folder: Path,
    ways: list[str],
) -> None:  # fmt: skip
    """Logistic regression on frozen features, its penalty chosen in five folds over the groups that it is fitted on.

    Writes split.csv, predictions of the set's test rows, and folds.csv, of every row by the fold without it.
    """
    if all((folder / f"{way}.csv").is_file() for way in ways):
        return
    device = common.choose_device(False)
    size = row.size or args.image_size
    backbone = load_backbone(tower, untrained=row.untrained, seed=seed, size=size)
    precision = distributed.resolve_precision("auto", device)
    loading = Loading(64, args.workers, processes=distributed.Processes(device=device, precision=precision))
    place(backbone.model, loading.processes)

    def samples(images: Any) -> Samples:
        features, numbers = extract(backbone, images, "", loading)
        return Samples(features, np.array(images.labels)[numbers], [images.rows[i] for i in numbers])

    if dataset in MIAS:
        kind, scheme = dataset.removeprefix("cbis_"), CBIS
        read = partial(CbisLesions, args.output_dir / "mias", kind, image="crop", preprocess=backbone.preprocess)
        train, test = samples(read(split="train")) + samples(read(split="val")), samples(read(split="test"))
    else:
        views = [create_downstream(dataset, part, eval_view(backbone.preprocess), catalog) for part in (True, False)]
        scheme = views[1].scheme or CAPTIONS
        train, test = map(samples, views)
    choice = Choice(partial(macro_auroc, scheme=scheme), folds=5, group=scheme.group)
    folder.mkdir(parents=True, exist_ok=True)
    for way in ways:
        if way == "folds":
            every = train + test
            found = Predictions(
                every.rows, cross_validate(every, len(scheme.classes), PROBE_FOLDS, choice).prob, scheme
            )
        else:
            head = fit_logistic(train, train[np.arange(0)], len(scheme.classes), choice)
            found = Predictions(test.rows, head.probabilities(test.features), scheme)
        found.write(folder / f"{way}.csv")


def label_in_words(args: argparse.Namespace, catalog: dict, tower: Path, folder: Path) -> None:
    """Zero-shot predictions of BUSI's test images, by the catalog's labels and templates."""
    if (folder / "predictions.csv").is_file():
        return
    images, loaded = create_downstream("busi", False, None, catalog), training.models.load_pretrained(tower)
    loaded.model.to(common.choose_device(False))
    pictures = [images.image(i) for i in range(len(images))]
    prob = loaded.zero_shot(pictures, catalog["busi"]["labels"], catalog["busi"]["templates"])
    assert images.scheme is not None  # a set of type csv
    folder.mkdir(parents=True, exist_ok=True)
    Predictions(images.rows, prob, images.scheme).write(folder / "predictions.csv")


def retrieval_of(log: Path) -> dict[str, float]:
    """The last epoch's retrieval over the validation pairs, in percent."""
    if not log.is_file():
        return {}
    rows = read_rows(log, "epoch")
    return {k: v for k, v in rows[-1].items() if k.startswith("val_")} if rows else {}


# ---------------------------------------------------------------------------------------------------------------------
# All rows
# ---------------------------------------------------------------------------------------------------------------------


def run_rows(args: argparse.Namespace, rows: dict[str, Row], argv: list[str]) -> None:
    """Each row and seed that is not done yet in a process of its own; a failed one is named and the others go on."""

    def run(job: tuple[str, int]) -> str:
        name, seed = job
        folder = args.output_dir / "rows" / name / str(seed)
        if (folder / "done.json").is_file():
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *argv, "--one", name, str(seed)]
        environment = {**os.environ, "ROW": json.dumps(vars(rows[name]))}
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        print(f"{name}, seed {seed}: {'done' if not done.returncode else f'FAILED, see {folder}/log.txt'}", flush=True)
        return "" if not done.returncode else name

    with ThreadPoolExecutor(args.jobs) as pool:
        for trained in (True, False):  # what is blended must be there first
            chosen = [
                (name, seed) for name in rows for seed in seeds_of(args, name) if bool(rows[name].base) != trained
            ]
            list(pool.map(run, sorted(chosen, key=lambda job: job[1])))  # cut short, all rows have as many seeds


def seeds_of(args: argparse.Namespace, name: str) -> list[int]:
    """Nothing in the frozen ImageNet tower hangs on a seed; averages of several seeds are numbered."""
    if mean := ROWS[name].mean:
        return list(range(len(args.seeds) // mean))
    return args.seeds[:1] if name.startswith("ImageNet") else args.seeds


def is_done(args: argparse.Namespace, name: str) -> bool:
    seeds = seeds_of(args, name)
    return bool(seeds) and all((args.output_dir / "rows" / name / str(s) / "done.json").is_file() for s in seeds)


def predictions_of(args: argparse.Namespace, name: str, seed: int) -> dict[str, Predictions]:
    """Of each set in folds and on its split; of the finding the folds' test rows together."""
    out = args.output_dir / "rows" / name / str(seed)
    catalog = json.loads((args.output_dir / "catalog.json").read_text())
    found: dict[str, Predictions] = {}
    for dataset, name in (("busi", "BUSI"), ("pneumonia", "pneumonia")):
        for way, title in WAYS.items():
            if (file := out / dataset / f"{way}.csv").is_file():
                found[f"{name}{title}"] = Predictions.read(file, scheme_of(dataset, catalog))
    if (words := out / "busi_zero_shot" / "predictions.csv").is_file():
        found["BUSI, zero-shot"] = Predictions.read(words, scheme_of("busi", catalog))
    for kind in ("calc", "mass"):
        for way, title in WAYS.items():
            if (file := out / f"cbis_{kind}" / f"{way}.csv").is_file():
                found[f"MIAS {kind}{title}"] = Predictions.read(file, CBIS)
    if args.skip_finding or not (out / "finding_0").is_dir():
        return found
    folds = [Predictions.read(out / f"finding_{k}" / "split.csv", CAPTIONS) for k in range(FOLDS)]
    rows = [row for fold in folds for row in fold.rows]
    found["finding"] = Predictions(rows, np.concatenate([fold.prob for fold in folds]), CAPTIONS)
    return found


def scheme_of(dataset: str, catalog: dict) -> Scheme:
    scheme = create_downstream(dataset, False, None, catalog).scheme
    assert scheme is not None  # a set of type csv
    return scheme


def draw(args: argparse.Namespace, names: list[str]) -> dict[str, dict[str, dict]]:
    """Every set's rows, resampled over its patients."""
    draws: dict[str, dict[str, dict]] = {}
    for name in names:
        each = [predictions_of(args, name, seed) for seed in seeds_of(args, name)]
        for dataset, first in each[0].items():
            probs = [run[dataset].in_order_of(first.rows, name).prob for run in each]
            resamples = first.resamples(Bootstrap(args.resamples))
            draws.setdefault(dataset, {})[name] = comparisons.draw_rows(
                resamples, probs, trained=not name.startswith("ImageNet")
            )
    return draws


def tabulate(draws: dict[str, dict[str, dict]]) -> dict:
    """Every row's AUROC and F1 on every set, with intervals, and its differences from the frozen ImageNet tower."""
    table: dict = {}
    for dataset, of_rows in draws.items():
        table[dataset] = {}
        for name, found in of_rows.items():
            cells = {m: vars(comparisons.interval(found[m])) for m in ("auroc", "f1")}
            if name != "ImageNet" and "ImageNet" in of_rows:
                cells |= {
                    f"{m} minus ImageNet": vars(comparisons.difference(found[m], of_rows["ImageNet"][m]))
                    for m in ("auroc", "f1")
                }
            table[dataset][name] = cells
    return table


def compared_rows() -> Iterator[tuple[str, str]]:
    """What the README's recipe is compared with, and what each of the objectives adds to the frozen towers."""
    yield from ((RECIPE, other) for other in FINAL if other != RECIPE)
    yield "SIMCLR, held", "CLIP, held"
    yield from ((name, frozen) for frozen in FROZEN if frozen != "untrained" for name in FINAL)
    yield from ((own, other) for own in OF_OWN for other in ("SIMCLR, held", "ImageNet", "ImageNet, 224 pixels"))
    yield from ((name, RECIPE) for name in ("held, shared view", *RECIPES, *MEANS))
    yield "held, mean of 8", "ImageNet, 224 pixels"


def compare(draws: dict[str, dict[str, dict]]) -> list[dict]:
    """Differences of AUROC in folds; p-values corrected over all of them but PRIMARY (Holm), all sets together."""
    found = []
    for dataset, rows in draws.items():
        for first, second in () if dataset.endswith(("split", "zero-shot")) else compared_rows():
            if first in rows and second in rows:
                difference = vars(comparisons.difference(rows[first]["auroc"], rows[second]["auroc"]))
                seeds = [len(rows[name]["auroc"].values) for name in (first, second)]
                found.append({"set": dataset, "row": first, "minus": second, "seeds": seeds, **difference})
    family = [d for d in found if (d["set"], d["row"], d["minus"]) != PRIMARY and d["p_value"] is not None]
    for entry, p in zip(family, comparisons.holm([d["p_value"] for d in family]), strict=True):
        entry["holm"] = p
    return found


def name_primary(path: Path, seeds: list[int]) -> dict:
    """What the results file says before there is a result; what it said first stays."""
    named = dict(zip(("set", "row", "minus"), PRIMARY, strict=True)) | {"metric": "auroc", "seeds": seeds}
    if path.is_file():
        before = json.loads(path.read_text())
        if {key: before["primary"].get(key) for key in named} != named:
            raise ValueError(f"{path} names another primary comparison: {before['primary']}")
        return before["primary"]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    utils.write_json(path, {"primary": {**named, "named": now}})
    return {**named, "named": now}


def markdown(args: argparse.Namespace, table: dict, report: dict) -> str:
    def cell(c: dict) -> str:
        return Interval.of(c).shown(".1f", ".1f", 100)

    lines = [common.describe(common.choose_device(False), len(args.seeds)).replace("runs, median", "seeds"), ""]
    for dataset, rows in table.items():
        lines += [
            f"| {dataset} | AUROC | minus ImageNet | F1 | minus ImageNet |",
            "|---|---|---|---|---|",
        ]
        for name, c in rows.items():
            gain = [cell(c[f"{m} minus ImageNet"]) if f"{m} minus ImageNet" in c else "" for m in ("auroc", "f1")]
            lines.append(f"| {name} | {cell(c['auroc'])} | {gain[0]} | {cell(c['f1'])} | {gain[1]} |")
        lines.append("")
    lines += ["| set | row | minus | seeds | AUROC | p | Holm |", "|---|---|---|---|---|---|---|"]
    for c in report["comparisons"]:
        p, holm = (f"{c[key]:.4f}" if c.get(key) is not None else "" for key in ("p_value", "holm"))
        primary = " (primary)" if (c["set"], c["row"], c["minus"]) == PRIMARY else ""
        seeds = " and ".join(map(str, c["seeds"]))
        lines.append(f"| {c['set']} | {c['row']} | {c['minus']} | {seeds} | {cell(c)} | {p} | {holm or primary} |")
    lines.append("")
    lines += [
        "| row | image-to-text R@1 | minutes a seed |",
        "|---|---|---|",
    ]
    for name, entry in report["rows"].items():
        recall = entry["retrieval"].get("val_i2t_r1")
        lines.append(f"| {name} | {'' if recall is None else f'{recall:.1f}'} | {entry['minutes']:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    args = get_args_parser().parse_args(argv)
    args.output_dir = args.output_dir.resolve()
    if args.one:
        run_one(args, args.one[0], Row(**json.loads(os.environ["ROW"])), int(args.one[1]))
        return {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with start_logging():
        prepare(args.data, args.output_dir, args.image_size)
    primary = name_primary(args.output_dir / "report.json", args.seeds)
    rows = {name: ROWS[name] for name in ROWS if name in args.rows and (args.output_dir / ROWS[name].pairs).is_dir()}
    start_of(args)  # before several rows at a time ask for it
    run_rows(args, rows, argv)
    draws = draw(args, [name for name in rows if is_done(args, name)])
    table = tabulate(draws)
    report: dict = {"primary": primary, "comparisons": compare(draws), "table": table, "rows": {}}
    for name in filter(partial(is_done, args), rows):
        done = [args.output_dir / "rows" / name / str(seed) / "done.json" for seed in seeds_of(args, name)]
        done = [json.loads(file.read_text()) for file in done]
        report["rows"][name] = {
            "minutes": float(np.mean([sum(d["seconds"].values()) for d in done])) / 60,
            "retrieval": {k: float(np.mean([d["retrieval"][k] for d in done])) for k in done[0]["retrieval"]},
        }
    utils.write_json(args.output_dir / "report.json", report)
    text = markdown(args, table, report)
    (args.output_dir / "report.md").write_text(text)
    print(text)
    return report


if __name__ == "__main__":
    main()
