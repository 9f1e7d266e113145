"""A training with one thing changed beside the same without it, on phantoms.

    python benchmarks/bench_phantoms.py studies    another image of the study as SimCLR's second view
    python benchmarks/bench_phantoms.py patches    half of a ViT's patches dropped in training
    python benchmarks/bench_phantoms.py sentences  sentences of a report, drawn each epoch, in place of its beginning

Draws breasts with one lesion each, close up in CC and in MLO: the images of one study, whose pathology is drawn from
the lesion's descriptors alone. A report has the lesion's sentence among nine others that hold of every breast, in any
order: some 90 tokens, of which the text tower reads 40, and three beginnings in ten name the lesion.

Each row is trained from the same start on the same images with each seed. Measured are the mean of recall at 1, 5 and
10 in both directions on the validation pairs (where captions are read), and the macro AUROC of pathology by logistic
regression on the frozen tower, on test patients whom no step has seen. All of it is SYNTHETIC.

The difference of AUROC has a 95% interval over seeds and test patients, that of recall a spread over seeds alone.
Resumable: what is done is kept, what was cut off goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

import main as training
import main_linear
import utils
from demo import TOWERS
from evaluation import comparisons
from evaluation.metrics import Difference
from evaluation.predictions import Predictions, scheme_of
from runtime.logs import progress
from synthetic.captions import mammogram_caption
from synthetic.mammograms import crop_frame, draw_mammogram
from synthetic.phantoms import CAPTION, SIDES, VIEWS, draw_pathology, make_finding, make_patient, pick


@dataclass(frozen=True)
class Comparison:
    """Two rows by name, each with its flags beside those of the tower; the second is measured against the first."""

    rows: dict[str, tuple[str, ...]]
    tower: tuple[str, ...]


# A ViT of 64 patches; the demo's tower, a small ResNet, has none to drop.
VIT = (
    *("--vision-tower", "vit_tiny_patch16_224", "--image-size", "64", "--context-length", "40", "--ssl-mlp-dim", "512"),
    *("--ssl-emb-dim", "128", "--lr", "1e-3", "--override", "vision.patch_size=8", "vision.depth=4"),
    *("vision.embed_dim=128", "vision.num_heads=2", "embed_dim=128", "text_width=64", "text_heads=2", "text_layers=2"),
)
COMPARISONS = {
    "studies": Comparison(
        {"two views of an image": (), "two images of a study": ("--study-views",)}, ("--lr", "2e-3", *TOWERS)
    ),
    "sentences": Comparison(
        {"beginnings": ("--caption-columns", "report"), "sentences": ("--caption-columns", "report", "--sentences")},
        ("--lr", "2e-3", *TOWERS),
    ),
    "patches": Comparison({"all patches": (), "half of the patches": ("--patch-dropout", "0.5")}, VIT),
}
MEASURES = {"recall": "mean recall", "auroc": "macro AUROC"}
REST = (  # of a report; what these phantoms have or lack, all of them
    "Standard views were obtained with compression.", "Comparison is made with no earlier examination.",
    "The skin is not thickened.", "The nipple is in profile and not retracted.", "No enlarged axillary nodes are seen.",
    "There is no other suspicious finding.", "The image quality is adequate.", "No implant is present.",
    "The pectoral muscle is unremarkable.",
)  # fmt: skip
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # of every ten patients


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", choices=COMPARISONS)
    parser.add_argument("--output-dir", type=Path, default=Path("phantoms"))
    parser.add_argument("--breasts", type=int, default=3000, help="of as many patients, with two images each")
    parser.add_argument(
        "--objectives", nargs="+", default=["SLIP", "SIMCLR"], choices=("SLIP", "CLIP", "SIMCLR", "SIGSLIP")
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, views and order")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("-j", "--workers", type=int, default=1)
    return parser


def breasts(number: int) -> Iterator[tuple[dict[str, str], Any]]:
    """A row and its image (72, 72) for each view of each breast; the phantoms are those of seed 0."""
    for index in progress(range(number), "drawing", unit=" breasts"):
        patient = make_patient(0, index)
        rng = patient.stream(CAPTION)
        side, finding = pick(rng, SIDES), make_finding(patient, 0, ("calc", "mass")[index % 2])
        for view in VIEWS:
            caption = mammogram_caption(rng, patient, side, view, finding, close=True)
            row = {
                "image": f"images/{index:05d}_{view}.png",
                "caption": caption,
                "report": report_of(caption, index, VIEWS.index(view)),
                "patient": str(index),
                "study": side,
                "split": SPLITS[index // 2 % len(SPLITS)],
                "pathology": draw_pathology(patient, finding),
            }
            yield row, draw_mammogram(patient, side, view, [finding], crop_frame(patient, view, finding, 72))


def report_of(caption: str, *number: int) -> str:
    """The caption among the sentences of REST, in an order of its own."""
    sentences = [caption, *REST]
    return " ".join(sentences[i] for i in np.random.default_rng(number).permutation(len(sentences)))


def draw(root: Path, number: int) -> None:
    """Images, their table, and the catalog by which the probe finds it; what was drawn with the same number is kept."""
    done = root / "drawn.json"
    if done.is_file():
        if (found := json.loads(done.read_text())["breasts"]) != number:
            raise ValueError(f"{root} holds {found} breasts, not {number}: choose another --output-dir")
        return
    (root / "images").mkdir(parents=True, exist_ok=True)
    with open(root / "table.csv", "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        for i, (row, image) in enumerate(breasts(number)):
            Image.fromarray(image).save(root / row["image"])
            writer.writerows([list(row)] * (i == 0) + [list(row.values())])
    columns = {"image": "image", "label": "pathology", "split": "split", "group": "patient"}
    entry = {"path": str(root.resolve()), "type": "csv", "train": "train", "test": "test", "columns": columns}
    utils.write_json(root / "catalog.json", {"breasts": entry | {"positive": "MALIGNANT"}})
    utils.write_json(done, {"breasts": number})


def folder_of(args: argparse.Namespace, objective: str, row: str, seed: int) -> Path:
    return args.output_dir / objective / row.replace(" ", "_") / str(seed)


def measure(args: argparse.Namespace, objective: str, row: str, seed: int) -> dict[str, float]:
    """Train and probe one row with one seed; {measure: fraction}."""
    compared = COMPARISONS[args.compared]
    root, out = args.output_dir / "data", folder_of(args, objective, row, seed)
    settings = {"breasts": args.breasts, "epochs": args.epochs, "batch_size": args.batch_size}
    if (out / "result.json").is_file():
        done = json.loads((out / "result.json").read_text())
        if done["settings"] != settings:
            raise ValueError(f"{out} was run with {done['settings']}, not {settings}: choose another --output-dir")
        return done["measured"]
    scores = training.main([
        "--dataset", "csv", "--root", str(root), "--metadata", str(root / "table.csv"),
        "--model", f"{objective}_VITT16", *compared.tower, *compared.rows[row], "--batch-size", str(args.batch_size),
        "--epochs", str(args.epochs), "--eval-freq", str(args.epochs), "--keep-last", "1", "-j", str(args.workers),
        "--seed", str(seed), "--mask-duplicates", "--output-dir", str(out / "training"),
    ])  # fmt: skip
    if "stopped_by" in scores:
        raise KeyboardInterrupt
    probe = main_linear.main([
        "--dataset", "breasts", "--catalog", str(root / "catalog.json"), "--cache-features", "--seed", str(seed),
        "--pretrained", str(out / "training" / "checkpoint.pt"), "-j", str(args.workers), "--output-dir",
        str(out / "probe"),
    ])  # fmt: skip
    # A finished training that is started again returns no scores.
    rows = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    last = [found for found in rows if found["kind"] == "epoch"][-1]
    recalls = [value for name, value in last.items() if name.removeprefix("val_")[:5] in ("i2t_r", "t2i_r")]
    measured = {"auroc": probe["metrics"]["auroc"]["value"]}
    if recalls:
        measured["recall"] = statistics.mean(recalls) / 100
    utils.write_json(out / "result.json", {"settings": settings, "measured": measured})
    return measured


def difference(args: argparse.Namespace, objective: str) -> Difference:
    """Macro AUROC of the second row minus that of the first, over seeds and test patients."""
    rows = []
    for row in COMPARISONS[args.compared].rows:
        folders = [folder_of(args, objective, row, seed) / "probe" for seed in args.seeds]
        each = [
            Predictions.read(folder / "predictions.csv", scheme_of(folder / "predictions.csv")) for folder in folders
        ]
        probs = [run.in_order_of(each[0].rows, row).prob for run in each]
        rows.append(comparisons.draw_rows(each[0].resamples(), probs)["auroc"])
    return comparisons.difference(rows[1], rows[0])


def table(args: argparse.Namespace, objective: str, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Rows of Markdown in percent: each seed's value, and the difference of both rows."""
    lines, (first, second) = [], found.values()
    for key in [key for key in MEASURES if key in first[0]]:
        if key == "auroc":
            gain = difference(args, objective).shown(".1f", ".1f", 100)
        else:
            gains = [100 * (b[key] - a[key]) for a, b in zip(first, second, strict=True)]
            spread = f" (SD over seeds {statistics.stdev(gains):.1f})" if len(gains) > 1 else ""
            gain = f"{statistics.mean(gains):.1f}{spread}"
        cells = ["; ".join(f"{100 * seed[key]:.1f}" for seed in row) for row in (first, second)]
        lines.append(f"| {objective}, {MEASURES[key]} | {' | '.join(cells)} | {gain} |")
    return lines


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Draw, train, measure and print; returns {objective: {row: [measures of each seed]}}."""
    args = get_args_parser().parse_args(argv)
    rows = COMPARISONS[args.compared].rows
    draw(args.output_dir / "data", args.breasts)
    found = {
        objective: {row: [measure(args, objective, row, seed) for seed in args.seeds] for row in rows}
        for objective in args.objectives
    }
    print(f"SYNTHETIC data. {common.describe(torch.device('cpu'), len(args.seeds))}\n")
    print(f"| % | {' | '.join(rows)} | difference |\n|---|---|---|---|")
    print("\n".join(line for objective, seeds in found.items() for line in table(args, objective, seeds)))
    utils.write_json(args.output_dir / "results.json", found)
    return found


if __name__ == "__main__":
    main()
