"""The recipe for fine-tuning on some 1,200 lesions, batch to class weights, chosen on validation patients alone.

    python benchmarks/finetune_recipe.py --root /path/to/cbis-ddsm --data_set cbis_calc --finetune checkpoint_best.pt \\
      --output-dir recipe

The search sees no test lesion: it works on a table of its own, in which the official test rows are left out, the
validation patients stand for the test, and a validation split for the choice of the epoch is split off the training
patients. From a start, one setting after the other is tried, and the best macro AUROC on the validation patients goes
on. At the end the chosen command is printed; it is run once on the official table, with --baseline where one is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import common  # noqa: F401  (finds the project's modules)

import utils
from beit_finetuning import run_class_finetuning
from inputs import cbis
from preparation.cbis_tables import Lesion, split_off_validation, write_table
from runtime.versions import versions

START = {"lr": "1e-3", "layer_decay": "0.75", "epochs": "20", "views": "recipe", "class_weights": "none"}
# Tried in this order, each beside what the search has kept so far.
CHOICES = {
    "views": ("light",),
    "lr": ("3e-4", "3e-3", "1e-2"),
    "layer_decay": ("0.9",),
    "epochs": ("40",),
    "class_weights": ("balanced",),
}
VIEWS = {  # the published recipe's views, and those of a small set: flips alone, without erasing and smoothing
    "recipe": "--mixup 0.8 --cutmix 1",
    "light": "--aa= --reprob 0 --smoothing 0 --color_jitter 0",
}


def inner_table(root: Path, kind: str, folder: Path) -> Path:
    """A folder whose table holds the training lesions alone, the validation patients as its test; images are linked."""
    rows = [row for row in cbis.read_lesions(root / f"{kind}.csv") if row["split"] != "test"]
    lesions = [Lesion("", {}, row) for row in rows]
    for row in rows:
        row["split"] = {"train": "train", "val": "test"}[row["split"]]
    split_off_validation(lesions, folds=5, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    for top in {row[image].split("/")[0] for row in rows for image in cbis.CBIS_IMAGES if row[image]}:
        if not (folder / top).exists():
            os.symlink((root / top).resolve(), folder / top)
    write_table(folder / f"{kind}.csv", rows)
    return folder


def flags_of(setting: dict[str, str], batch: int) -> list[str]:
    warmup = max(1, int(setting["epochs"]) // 10)
    plain = {name: value for name, value in setting.items() if name != "views"}
    flags = [f"--{name} {value}" for name, value in plain.items()]
    return shlex.split(f"{' '.join(flags)} --batch_size {batch} --warmup_epochs {warmup} {VIEWS[setting['views']]}")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of CBIS-DDSM")
    parser.add_argument("--data_set", default="cbis_calc", choices=list(cbis.CBIS_SETS))
    parser.add_argument("--finetune", required=True, help="the weights")
    parser.add_argument("--baseline", default="", help="the probe's predictions.csv")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", default=START["epochs"], help="of the start; twice as many are tried")
    parser.add_argument("--output-dir", type=Path, default=Path("recipe"))
    parser.add_argument("-j", "--workers", default="1")
    args = parser.parse_args(argv)
    inner = inner_table(args.root, cbis.CBIS_SETS[args.data_set], args.output_dir / "validation_only")
    common_flags = ["--data_set", args.data_set, "--finetune", args.finetune, "--drop_path", "0", "-j", args.workers]
    tried: list[dict] = []

    def score(setting: dict[str, str]) -> float:
        for entry in tried:
            if entry["setting"] == setting:
                return entry["auroc"]["value"]
        out = args.output_dir / "search" / "_".join(setting.values()).replace("/", "")
        flags = [*common_flags, "--data_path", str(inner), *flags_of(setting, args.batch_size)]
        results = run_class_finetuning.main([*flags, "--output_dir", str(out)])
        tried.append({"setting": dict(setting), "auroc": results["metrics"]["auroc"], "f1": results["metrics"]["f1"]})
        print(json.dumps(tried[-1]), flush=True)
        return tried[-1]["auroc"]["value"]

    best = START | {"epochs": args.epochs}
    for name, values in (CHOICES | {"epochs": (str(2 * int(args.epochs)),)}).items():
        best = max([best, *({**best, name: value} for value in values)], key=score)
    final = [*common_flags, "--data_path", str(args.root), *flags_of(best, args.batch_size)]
    final += ["--baseline", args.baseline] if args.baseline else []
    print("chosen:", shlex.join(["python", "beit_finetuning/run_class_finetuning.py", *final]), flush=True)
    results = run_class_finetuning.main([*final, "--output_dir", str(args.output_dir / "chosen")])
    report = {"tried": tried, "chosen": best, "metrics": results["metrics"], "difference": results.get("difference"),
              "versions": versions()}  # fmt: skip
    utils.write_json(args.output_dir / "recipe.json", report)
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
