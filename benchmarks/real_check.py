"""Does SLIP learn something real from scratch on a CPU? Two small checks on images that people made.

    python benchmarks/real_check.py digits                      scikit-learn's 1,797 scanned digits, no download
    python benchmarks/real_check.py pairs --root /path/to/roco  images with captions in ROCO's layout

Both hold 20% out, train SLIP on the rest, and print retrieval on the held-out pairs against chance; digits also prints
zero-shot accuracy on the held-out digits, whose chance is 10%.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401  first: it finds the modules below
import numpy as np

import datasets
import main
from evaluation import downstream

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a scan of the handwritten digit {}",
    "the number {}",
    "someone wrote the digit {}",
    "a handwritten {}",
    "a small grey image of the number {}",
    'a photo of the number: "{}".',
)
# A ConvNet: with so few images a ViT of this size is still near chance when the ConvNet is done.
TOWERS = (
    "--context-length",
    "32",
    "--vision-tower",
    "convnext_atto",
    "--override",
    "vision.dims=(16,32,64,96)",
    "vision.depths=(1,1,1,1)",
    "text_width=96",
    "text_heads=3",
    "text_layers=2",
    "embed_dim=64",
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("digits", "pairs"))
    parser.add_argument("--root", type=Path, help="pairs: a folder with captions.txt and images/")
    parser.add_argument("--output-dir", type=Path, default=Path("real_check"), help="everything is written here")
    parser.add_argument("--epochs", type=int, default=None, help="default: 20 for digits, 60 for pairs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def write_digits(folder: Path, seed: int) -> None:
    """The digits as PNG files with a caption each; the test rows are those that zero-shot evaluation reads."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, train in (("train", True), ("validation", False)):
        digits: Any = downstream.create_downstream("digits", train, None)
        for i in range(len(digits)):
            image, label = digits[i]
            name = f"{split}_{i:04d}.png"
            image.save(folder / name)
            word = NAMES[label] if rng.random() < 0.5 else str(label)
            rows.append((name, WORDINGS[rng.integers(len(WORDINGS))].format(word), split))
    write_table(folder, rows)


def write_pairs(folder: Path, root: Path, seed: int) -> None:
    """The reader's pairs as a table, a random fifth of them for validation."""
    reader = datasets.create_reader("roco", root)
    held_out = set(np.random.default_rng(seed).permutation(len(reader))[: len(reader) // 5].tolist())
    write_table(
        folder,
        [
            (
                Path(reader.name(i)).relative_to(root.resolve()).as_posix(),
                reader.captions(i)[0],
                "validation" if i in held_out else "train",
            )
            for i in range(len(reader))
        ],
    )


def write_table(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    with open(folder / "pairs.csv", "w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])


def run(argv: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(argv)
    data, output = args.output_dir / "data", args.output_dir / f"{args.check}_seed{args.seed}"
    data.mkdir(parents=True, exist_ok=True)
    if args.check == "digits":
        write_digits(data, args.seed)
        root, size, epochs, patch = data, "32", args.epochs or 20, 2
    else:
        if args.root is None:
            raise ValueError("pairs needs --root: a folder with captions.txt and images/")
        write_pairs(data, args.root, args.seed)
        root, size, epochs, patch = args.root, "64", args.epochs or 60, 4
    start = time.process_time()
    row = main.main(
        [
            "--dataset",
            "csv",
            "--root",
            str(root),
            "--metadata",
            str((data / "pairs.csv").resolve()),
            "--model",
            "SLIP_VITT16",
            "--output-dir",
            str(output),
            "--image-size",
            size,
            *TOWERS,
            f"vision.patch_size={patch}",
            "--ssl-mlp-dim",
            "256",
            "--ssl-emb-dim",
            "64",
            "--batch-size",
            "64",
            "--epochs",
            str(epochs),
            "--lr",
            "1e-3",
            "--wd",
            "0.1",
            "--eval-freq",
            str(epochs),
            "--zeroshot-set",
            "digits",
            "-j",
            "0",
            "--seed",
            str(args.seed),
        ]
    )
    candidates = row["val_candidates"]
    result = {
        "check": args.check,
        "seed": args.seed,
        "cpu_seconds": round(time.process_time() - start),
        "candidates": candidates,
        "chance_r10": round(100 * min(10 / candidates, 1), 2),
        **{k: round(v, 2) for k, v in row.items() if k.startswith("val_")},
    }
    if args.check == "digits":
        result |= {"zero_shot_top1": round(row["digits_top1"], 2), "chance_top1": 10.0}
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    run()
