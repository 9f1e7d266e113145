"""What several test files share: small runs, models, images and the publishers' layouts.

The trees of ROCO, CBIS-DDSM and the labelled sets are in roco_tree.py, cbis_tree.py and downstream_tree.py, functions
that run on several processes in distributed_helpers.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote

import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_2samp

import distributed
import losses
import models
from inputs.colour import apply_colour
from inputs.images import pixels_of
from inputs.transforms import Preprocess, random_resized_crop, ssl_pixels, train_pixels
from runtime import checkpoints

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"

# ---------------------------------------------------------------------------------------------------------------------
# Runs of main.py
# ---------------------------------------------------------------------------------------------------------------------


TINY = [
    "--image-size",
    "32",
    "--ssl-mlp-dim",
    "32",
    "--ssl-emb-dim",
    "16",
    "--context-length",
    "24",
    "--override",
    "vision.patch_size=8",
    "vision.embed_dim=32",
    "vision.depth=2",
    "vision.num_heads=2",
    "text_width=32",
    "text_layers=1",
    "text_heads=2",
    "embed_dim=16",
]

DROPOUT = ["vision.proj_drop_rate=0.1", "vision.drop_path_rate=0.1"]  # makes every step draw random numbers


def command(roco, output_dir, *extra, model="SLIP_VITT16"):
    return [
        "--dataset",
        "roco",
        "--root",
        str(roco),
        "--model",
        model,
        "--output-dir",
        str(output_dir),
        "-j",
        "0",
        "--batch-size",
        "8",
        "--epochs",
        "2",
        "--lr",
        "1e-3",
        "--print-freq",
        "1",
        *TINY,
        *extra,
    ]


def weights(output_dir):
    return checkpoints.load_checkpoint(Path(output_dir) / "checkpoint.pt")["state_dict"]


def assert_same_run(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def stop_after(function):
    def wrapped(*args):
        function(*args)
        raise KeyboardInterrupt

    return wrapped


def environment(**extra) -> dict[str, str]:
    """This process's, with one thread for each rank as in the tests' own processes, and no launcher's variables."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | extra


def wait_for(condition, seconds: float, what: str, every: float = 0.02):
    """What `condition()` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{seconds} s without {what}"
        time.sleep(every)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Small models
# ---------------------------------------------------------------------------------------------------------------------


GOLDEN_MODELS = torch.load(GOLDENS / "models_tiny.pt", weights_only=True)


def tiny_model(objective: str, **overrides):
    """The goldens' small towers, in the notation of our overrides."""
    c = GOLDEN_MODELS["config"]
    return models.create_model(
        f"{objective}_VITT16",
        **{
            "image_size": c["img"],
            "vision_kwargs": dict(patch_size=c["patch"], embed_dim=c["width"], depth=c["depth"], num_heads=c["heads"]),
            "embed_dim": c["embed_dim"],
            "context_length": c["ctx"],
            "vocab_size": c["vocab"],
            "text_width": c["twidth"],
            "text_heads": c["theads"],
            "text_layers": c["tlayers"],
            "ssl_mlp_dim": c["mlp"],
            "ssl_emb_dim": c["emb"],
            **overrides,
        },
    )


def tiny_medslip(**overrides):
    return models.create_model(
        "MEDSLIP_VIT",
        **{
            "image_size": 64,
            "vision_kwargs": dict(embed_dim=12, depths=[1, 1], num_heads=[2, 2]),
            "text_width": 32,
            "text_heads": 2,
            "text_layers": 3,
            "vocab_size": 50,
            "ssl_mlp_dim": 16,
            "ssl_emb_dim": 8,
            **overrides,
        },
    )


TOWERS = {"vit": "test_vit", "batchnorm": "test_resnet"}  # timm's miniatures

QUICK = ("-j", "0", "--gpu", "-1")


def write_checkpoint(path: Path, tower: str, seed: int = 0, name: str = "CLIP_VITT16", **overrides) -> Path:
    """A checkpoint of ours with random weights and, where there is BatchNorm, running statistics."""
    torch.manual_seed(seed)
    small = dict(vision_tower=TOWERS[tower], image_size=32, text_layers=1, text_width=64, vocab_size=64, embed_dim=32)
    model = models.create_model(name, **{**small, **overrides})
    model.visual.train()(torch.rand(16, 3, 32, 32))
    state = {
        "state_dict": model.state_dict(),
        "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(),
        "tokenizer": None,
    }
    checkpoints.save_checkpoint(state, path)
    return path


def image_side(path: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for k, v in checkpoints.load_checkpoint(path)["state_dict"].items() if k.startswith(("visual.", "image_"))
    }


def batches(model, n, seed=0, size=32):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(n, 3, size, size, generator=g, dtype=torch.float64) for key in ("image", "view1", "view2")
    }
    tokens = torch.randint(1, 50, (n, 10), generator=g)
    tokens[torch.arange(n), torch.randint(4, 10, (n,), generator=g)] = 127 if model.config["vocab_size"] > 127 else 49
    return [({**tensors, "text": tokens})[key] for key in model.objective.inputs]


def gradients(model, micro_batches, accumulate, processes=distributed.Processes()):  # noqa: B008
    run = SimpleNamespace(
        model=model,
        called=model,
        processes=processes,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        loss=model.objective.loss(losses.LossSettings(ssl_scale=0.7)),
    )
    metrics = list(accumulate(run, micro_batches))
    return metrics, {n: p.grad for n, p in model.named_parameters()}


def split(inputs, k):
    return [list(part) for part in zip(*(x.chunk(k) for x in inputs), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Images and the layouts of the large sources
# ---------------------------------------------------------------------------------------------------------------------


PREPROCESS = Preprocess(size=16)


def jpeg(grey: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (24, 20), grey).save(buffer, "JPEG")
    return buffer.getvalue()


def save_jpeg(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(grey))


def grey_of(img: Image.Image) -> int:
    assert img.mode == "RGB"
    return int(np.asarray(img).mean().round())


def all_captions(reader) -> list[str]:
    return [caption for i in range(len(reader)) for caption in reader.captions(i)]


def make_yfcc(root: Path, rows=None) -> Path:
    """Images 12345678, 12345679 and 5; rows beside them name one absent member and one absent archive."""
    for archive, members in {"12/345": (678, 679), "00/000": (5,)}.items():
        path = root / "images" / f"{archive}.zip"
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as file:
            for member in members:
                file.writestr(f"{member:03d}.jpg", jpeg(member % 200))
            file.writestr("../../escape.jpg", b"")  # never asked for
    if rows is None:
        rows = [
            (12345678, "a title", "a description"),
            (12345680, "absent", "member"),
            (5, "", "only described"),
            (99999999, "absent", "archive"),
            (12345679, " ", ""),
        ]
    (root / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    return root


def make_coco(root: Path) -> Path:
    for folder, ids in (("train2017", (9, 123456789012)), ("val2017", (7,))):
        annotations = []
        for image in ids:
            save_jpeg(root / folder / f"{image:012d}.jpg", image % 250)
            annotations += [{"image_id": image, "id": 2 * image + k, "caption": f"{image} {k}"} for k in range(2)]
        annotations += [
            {"image_id": 404, "id": 1, "caption": "gone"},
            {"image_id": ids[0], "id": 0, "caption": "x"},
        ]
        (root / "annotations").mkdir(exist_ok=True)
        values = {
            "info": {"a": [1]},
            "images": [{"id": i} for i in ids],
            "annotations": annotations,
            "licenses": [],
        }
        (root / "annotations" / f"captions_{folder}.json").write_text(json.dumps(values))
    return root


def make_cc(root: Path, name: str, key: str) -> Path:
    save_jpeg(root / "a" / "0.jpg", 30)
    save_jpeg(root / "1510438788", 40)
    rows = [
        {key: "a/0.jpg", "image_id": 0, "captions": ["one", "two"]},
        {key: "gone.jpg", "captions": ["gone"]},
    ]
    rows.append({key: 1510438788 if key == "image_id" else "1510438788", "captions": ["large field"]})
    if key == "image_id":
        rows[0][key] = "a/0.jpg"
    np.save(root / f"{name}.npy", np.array(rows, dtype=object))
    return root


def make_redcaps(root: Path, images: str) -> Path:
    save_jpeg(root / images / "itap" / "abc1.jpg", 90)
    rows = [
        {
            "image_id": "abc1",
            "author": "x",
            "url": "u",
            "raw_caption": "ITAP",
            "caption": "itap",
            "subreddit": "itap",
        },
        {"image_id": "gone", "caption": "gone", "subreddit": "itap"},
    ]
    (root / "redcaps_v1.json").write_text(json.dumps(rows))
    return root


LARGE = {
    "yfcc15m": (make_yfcc, [["a title", "a description"], ["only described"]], [78, 5], 2),
    "coco": (make_coco, [["9 0", "9 1", "x"], ["123456789012 0", "123456789012 1"]], [9, 12], 1),
    "cc3m": (lambda root: make_cc(root, "cc3m", "image_id"), [["one", "two"], ["large field"]], [30, 40], 1),
    "cc12m": (
        lambda root: make_cc(root, "cc12m", "image_name"),
        [["one", "two"], ["large field"]],
        [30, 40],
        1,
    ),
    "redcaps": (lambda root: make_redcaps(root, "images"), [["itap"]], [90], 1),
}

# ---------------------------------------------------------------------------------------------------------------------
# YFCC's sources, and a straightforward second implementation of their list
# ---------------------------------------------------------------------------------------------------------------------


TITLES = [
    "Sunset+over+the+bay",
    "",
    quote('<a href="http://x.org/p?q=1">my site</a> and <b>bold</b>, <i>it</i>'),
    quote("see www.example.com/a+b or http://t.co/x now"),
    quote("1+1 = 2"),  # an encoded plus becomes a space too
    quote("Überraschung – 日本語 😀"),
    "%FF%FEbroken",
    quote("two\nlines\tand a tab"),
]


def write_sources(folder: Path, rows: int = 2500) -> list[tuple[int, str, str]]:
    """The three files; returns (number, title, description) of all rows of the table, still encoded."""
    rng = np.random.default_rng(0)
    numbers = np.unique(rng.integers(0, 10**8, rows))
    np.save(folder / "flickr_unique_ids.npy", rng.permutation(numbers[rng.random(len(numbers)) < 0.9]))
    with open(folder / "yfcc100m_subset_data.tsv", "w") as file:
        for number in numbers[rng.random(len(numbers)) < 0.5]:
            file.write(f"{number}\t{number + 7}\t{'0123456789abcdef' * 2}\n")
    table = []
    with open(folder / "yfcc100m_dataset.txt", "w") as file:
        for number in numbers:
            title, description = (TITLES[i] for i in rng.integers(0, len(TITLES), 2))
            table.append((int(number), title, description))
            cells = [number, "id", "hash", "user@N00", "nick", "date", "1", "camera", title, description]
            file.write("\t".join(map(str, [*cells, *(["x"] * 15)])) + "\n")
    return table


def reference(folder: Path, table: list[tuple[int, str, str]]) -> tuple[list, list]:
    """The two lists, with sets and everything in memory."""

    def clean(text: str) -> str:
        text = unquote(text).replace("+", " ")
        for pattern in ("<a.*?>", "</a>", "<b>", "</b>", "<i>", "</i>"):
            text = re.sub(pattern, "", text)
        return re.sub(r"(http|www)\S+", "", text)

    ids = set(np.load(folder / "flickr_unique_ids.npy").tolist())
    lines = (folder / "yfcc100m_subset_data.tsv").read_text().splitlines()
    subset = {int(line.split("\t")[0]) for line in lines}
    listed = [number for number, _, _ in table if number in ids]
    captioned = [(n, clean(t), clean(d)) for n, t, d in table if n in ids and n in subset]
    return captioned, listed


# ---------------------------------------------------------------------------------------------------------------------
# Views of an image
# ---------------------------------------------------------------------------------------------------------------------


def image(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards, blue is a fine pattern: every step leaves its mark."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), 255 * ((x // 2 + y // 2) % 2))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def grainy(width: int = 80, height: int = 60) -> Image.Image:
    """Noise on every pixel, in which a blur that is nearly the right one shows."""
    noise = np.random.default_rng(5).normal(128, 50, (height, width, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def planes(img: Image.Image) -> np.ndarray:
    array = np.asarray(img)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def resized(img: Image.Image, size: int = 32) -> Image.Image:
    """The whole image as our crop resizes it, for torchvision's colour operations to start from."""
    script = Script(1.0, np.log(img.width / img.height), 0, 0)
    pixels = random_resized_crop(pixels_of(img), size, (0.08, 1), script)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def statistics(view: torch.Tensor) -> list[float]:
    """Means and std of the channels, asymmetry left to right and high-frequency energy."""
    columns = torch.arange(view.shape[-1], dtype=torch.float32) - (view.shape[-1] - 1) / 2
    return [
        *view.mean((1, 2)).tolist(),
        *view.std((1, 2)).tolist(),
        (view[0].mean(0) * columns).mean().item(),
        view[2].diff(dim=1).abs().mean().item(),
    ]


def draws(view, n: int = 400) -> np.ndarray:
    return np.array([statistics(view(i)) for i in range(n)])  # (n, statistics)


def least_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    return min(ks_2samp(a, b, method="asymp").pvalue for a, b in zip(ours.T, theirs.T, strict=True))


class Script:
    """A generator that returns the numbers of a list, one for each call."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def __call__(self, *_):
        return self.numbers.pop(0)

    random = uniform = integers = permutation = __call__


class TrainView:
    """SLIP's view for image and text, from an image to normalised floats, as the loader and the device make it."""

    def __init__(self, preprocess: Preprocess):
        self.preprocess = preprocess

    def __call__(self, img, rng) -> torch.Tensor:
        return self.preprocess.normalise(train_pixels(self.preprocess, self.preprocess.pixels(img), rng))


class SslView(TrainView):
    """SLIP's view for SimCLR."""

    def __call__(self, img, rng) -> torch.Tensor:
        pixels, colour = ssl_pixels(self.preprocess, self.preprocess.pixels(img), rng)
        return self.preprocess.normalise(torch.from_numpy(apply_colour(pixels.numpy(), colour).copy()))
