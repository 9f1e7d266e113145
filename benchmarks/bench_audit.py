"""How many planted copies the audit finds, and how many images without one it lists, on images of your own.

    python benchmarks/bench_audit.py --choose DIR --test DIR [DIR ...]

Half of each folder's images, drawn by a seed, get five planted copies: resized to three fifths, cropped by a tenth and
by a sixth at random places, re-encoded as JPEG of quality 50, mirrored. The other half has none, unless the folder
itself holds an image twice: the highest correlations among them are named, to be looked at. The threshold is chosen on
the first folder and tested on the others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

from inputs.images import UnreadableImage, read_image
from preparation import audit

KINDS = ("resized", "cropped", "cropped by a sixth", "re-encoded", "mirrored")
THE_GOAL = [kind for kind in KINDS if kind != "cropped by a sixth"]


def plant(paths: list[Path], folder: Path, rng: np.random.Generator) -> dict[str, tuple[int, str]]:
    """Copies under `folder`: name of the file -> (place of its original, what was done to it)."""
    made = {}
    for i, path in enumerate(paths):
        img = read_image(path)
        for kind in KINDS:
            copy = img
            if kind == "resized":
                copy = img.resize((max(8, img.width * 3 // 5), max(8, img.height * 3 // 5)), Image.Resampling.BICUBIC)
            elif kind.startswith("cropped"):
                side = 0.9 if kind == "cropped" else 5 / 6
                w, h = round(side * img.width), round(side * img.height)
                x, y = int(rng.integers(img.width - w + 1)), int(rng.integers(img.height - h + 1))
                copy = img.crop((x, y, x + w, y + h))
            elif kind == "mirrored":
                copy = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            name = f"{i}_{kind}.{'jpg' if kind == 're-encoded' else 'png'}"
            copy.save(folder / name, quality=50)  # which PNG has no use for
            made[name] = (i, kind)
    return made


def measure(folder: Path, limit: int, seed: int, workers: int) -> dict:
    rng = np.random.default_rng(seed)
    paths = [path for path in audit.list_images(folder) if "mask" not in path.name.lower()]
    readable = []
    for i in rng.permutation(len(paths)):
        if len(readable) == limit:
            break
        try:
            read_image(paths[i])
        except UnreadableImage:
            continue
        readable.append(paths[i])
    half = len(readable) // 2
    with tempfile.TemporaryDirectory() as temporary:
        made = plant(readable[:half], Path(temporary), rng)
        start = time.perf_counter()
        pairs, _ = audit.audit({"originals": readable, "copies": audit.list_images(Path(temporary))}, -1.0, workers)
        seconds = time.perf_counter() - start
    own, other = {}, np.full(len(readable), -1.0)
    place = {path: i for i, path in enumerate(readable)}
    for pair in pairs:
        i, (j, kind) = place[pair.first], made[pair.second.name]
        if i == j:
            own[i, kind] = max(own.get((i, kind), -1.0), pair.correlation)
        else:
            other[i] = max(other[i], pair.correlation)
    found = {kind: np.array([own.get((i, kind), -1.0) for i in range(half)]) for kind in KINDS}
    return {"found": found, "alone": other[half:], "images": len(readable), "seconds": seconds,
            "which": [readable[half + i] for i in range(len(readable) - half)]}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", type=Path, required=True)
    parser.add_argument("--test", type=Path, nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=400, help="images of each folder")
    parser.add_argument("--matching", type=int, default=0, metavar="N", help="also time matching N random images")
    parser.add_argument("-j", "--workers", type=int, default=2)
    args = parser.parse_args(argv)
    print(common.describe(torch.device("cpu"), 1))
    threshold = None
    for folder in [args.choose, *args.test]:
        row = measure(folder, args.limit, 0, args.workers)
        copies = np.concatenate([row["found"][kind] for kind in THE_GOAL])
        if threshold is None:
            threshold = float(np.quantile(copies[copies > -1], 0.01))  # of those that are candidates
            print(f"threshold chosen here: {threshold:.3f}; audit.THRESHOLD is {audit.THRESHOLD}")
        for value in sorted({threshold, audit.THRESHOLD}):
            kinds = ", ".join(f"{kind} {100 * (found >= value).mean():.1f}%" for kind, found in row["found"].items())
            alarms = int((row["alone"] >= value).sum())
            print(f"{folder.name} at {value:.3f}: {row['images']} images, found {100 * (copies >= value).mean():.2f}% "
                  f"({kinds}); of {len(row['alone'])} without a copy {alarms} listed")  # fmt: skip
        worst = np.argsort(-row["alone"])[:3]
        print("   highest without a copy:", [(round(float(row["alone"][i]), 3), row["which"][i].name) for i in worst])
        print(f"   {row['seconds']:.1f} s")
    if args.matching:
        images = torch.randint(256, (args.matching, audit.SIDE, audit.SIDE), dtype=torch.uint8)
        start = time.perf_counter()
        audit.candidates(images, images, True)
        seconds = time.perf_counter() - start
        few = len(images[:1000])  # of which each has as many candidates as an image can have
        pairs = torch.randint(few, (audit.KEPT * few, 3))
        pairs[:, 2] = 0
        cpu = time.process_time()
        audit.correlations(images, images, pairs)
        each = (time.process_time() - cpu) / len(pairs)
        minutes = each * audit.KEPT * args.matching / 60
        print(f"{args.matching:,} images: {seconds:.0f} s for their nearest, then {1e3 * each:.2f} CPU ms for each")
        print(f"of at most {audit.KEPT} candidates an image: {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
