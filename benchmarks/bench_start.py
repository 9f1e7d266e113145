"""How long commands take to their first answer, as whole processes, beside what they wait for and beside peers.

    python benchmarks/bench_start.py

Answers about flags (--help, a typo), and of CLIP_VITB16 with random weights about one image: its class by a probe, and
by labels in words, where the same model exported is read by open_clip, and by onnxruntime (its tokens given). The
scores of the three are compared. `import torch` and `import torch, timm` are what the answers wait for in any case.
Commands take turns; printed are medians of seconds and CPU seconds, files in the page cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

LABELS = ["normal breast", "breast cancer"]
OPEN_CLIP = """
import sys, torch, open_clip
from PIL import Image
folder, image, *labels = sys.argv[1:]
model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
model.eval()
with torch.no_grad():
    of_image = model.encode_image(preprocess(Image.open(image).convert("RGB"))[None], normalize=True)
    of_texts = model.encode_text(tokenizer(labels), normalize=True)
    print((model.logit_scale.exp() * of_image @ of_texts.T).softmax(1)[0].tolist())
"""
ONNX = """
import sys, numpy as np, onnxruntime
from PIL import Image
folder, image, scale, tokens = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = lambda name: onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options)
image = Image.open(image).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
pixels = ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
(of_image,) = session("image").run(None, {"image": pixels})
text = session("text")
of_texts = np.concatenate([text.run(None, {"text": row[None]})[0] for row in np.load(tokens)])
logits = float(scale) * (of_image @ of_texts.T)[0]
print((np.exp(logits) / np.exp(logits).sum()).tolist())
"""


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command")
    parser.add_argument("--model", default="CLIP_VITB16")
    return parser


def prepare(folder: Path, name: str) -> dict[str, list[str]]:
    """A checkpoint of random weights, a probe on drawn images, the exports; the commands by what they are called."""
    import export
    import main_linear
    import models
    import tokenizer

    rng, image = np.random.default_rng(0), folder / "image.png"
    rows = ["image,label,split"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]},{'train' if i < 16 else 'test'}")
    Image.open(folder / "0.png").save(image)
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    columns = {"image": "image", "label": "label", "split": "split"}
    entry = {"path": str(folder), "type": "csv", "table": "table.csv", "train": "train", "test": "test"}
    (folder / "catalog.json").write_text(json.dumps({"drawn": {**entry, "columns": columns}}))
    torch.manual_seed(0)
    checkpoint = folder / "checkpoint.pt"
    model: Any = models.create_model(name)
    common.write_checkpoint(model, tokenizer.SimpleTokenizer(), checkpoint)
    main_linear.main([
        "--dataset", "drawn", "--catalog", str(folder / "catalog.json"), "--pretrained", str(checkpoint), "-j", "0",
        "--cache-features", "--resamples", "20", "--output-dir", str(folder / "run"),
    ])  # fmt: skip
    for form in ("open-clip", "onnx"):
        export.export([checkpoint], form, folder / form)
    np.save(folder / "tokens.npy", tokenizer.SimpleTokenizer()(LABELS, model.config["context_length"]).numpy())
    scale = str(model.logit_scale.detach().exp().item())
    (folder / "by_open_clip.py").write_text(OPEN_CLIP)
    (folder / "by_onnx.py").write_text(ONNX)
    main, ours = ([sys.executable, str(common.ROOT / name)] for name in ("main.py", "predict.py"))
    words = ["--templates", "{}", "--labels", *LABELS, "--output", str(folder / "answers.csv")]
    return {
        "main.py --help": [*main, "--help"],
        "main.py --batchsize 8": [*main, "--batchsize", "8"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, timm": [sys.executable, "-c", "import torch, timm"],
        "predict.py classify": [*ours, "classify", str(folder / "run"), str(image)],
        "predict.py zero-shot": [*ours, "zero-shot", str(checkpoint), str(image), *words],
        "open_clip": [sys.executable, str(folder / "by_open_clip.py"), str(folder / "open-clip"), str(image), *LABELS],
        "onnxruntime": [sys.executable, str(folder / "by_onnx.py"), str(folder / "onnx"), str(image), scale,
                        str(folder / "tokens.npy")],
    }  # fmt: skip


def run(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Seconds, CPU seconds, and what it printed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):  # 2 is what a typo ends with
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    args = get_args_parser().parse_args(argv)
    print(common.describe(torch.device("cpu"), args.runs, "open_clip_torch", "onnxruntime"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = prepare(folder, args.model)
        first = {name: run(command, folder)[2] for name, command in commands.items()}
        with open(folder / "answers.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        scores = [float(row[f"prob_{label}"]) for label in LABELS]
        apart = {name: np.abs(np.array(json.loads(first[name].splitlines()[-1])) - scores).max()
                 for name in ("open_clip", "onnxruntime")}  # fmt: skip
        print("scores differ from ours by " + ", ".join(f"{d:.1e} ({name})" for name, d in apart.items()))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.runs):
            for name, command in commands.items():
                found[name].append(run(command, folder)[:2])
    medians = {name: {"s": common.median([s for s, _ in rows]), "CPU s": common.median([c for _, c in rows])}
               for name, rows in found.items()}  # fmt: skip
    for name, row in medians.items():
        print(f"{name:>22}  {row['s']:.2f} s, {row['CPU s']:.2f} CPU s")
    return {**medians, "apart": apart}


if __name__ == "__main__":
    main()
