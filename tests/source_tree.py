"""Small trees in the publishers' layouts of images with captions."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

from inputs.transforms import Preprocess

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
            "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
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


def image_bytes(size, file_format="JPEG", mode="RGB", seed=0, **options) -> bytes:
    """Smooth noise, so that JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "I;16": 1}[mode]
    coarse = rng.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(channels)]
    img = bands[0] if channels == 1 else Image.merge(mode, bands)
    if mode == "I;16":
        img = Image.fromarray(np.asarray(img).astype(np.uint16) * 200)
    buffer = io.BytesIO()
    img.save(buffer, file_format, **options)
    return buffer.getvalue()


CAPTIONS = {
    "ROCO_00001": "Mammogram of the left breast.",
    "ROCO_00002": "Chest  X-ray:\tno  effusion – normal.",
    "ROCO_00003": "Axial CT, µm\rscale.",
    "ROCO_00004": "Axial MRI.",
}


def roco_folder(folder: Path, captions=None, name: str = "captions.txt", gap: str = "\t ") -> Path:
    """A folder of captions; image i has the grey value 50 * i."""
    captions = CAPTIONS if captions is None else captions
    for i, key in enumerate(captions, 1):
        save_jpeg(folder / "images" / f"{key}.jpg", 50 * i)
    (folder / name).write_bytes("".join(f"{key}{gap}{text}\n" for key, text in captions.items()).encode())
    return folder


FILES = {  # name, what is in it
    "small.jpg": image_bytes((70, 50)),
    "large.jpg": image_bytes((301, 200), seed=1),
    "grey.jpg": image_bytes((90, 160), mode="L", seed=2),
    "alpha.png": image_bytes((120, 100), "PNG", "RGBA", seed=3),
    "deep.png": image_bytes((160, 110), "PNG", "I;16", seed=4),
    "really_a_png.jpg": image_bytes((120, 80), "PNG", seed=5),
    "web.webp": image_bytes((100, 90), "WEBP", seed=6, lossless=True),
    "scan.tif": image_bytes((40, 30), "TIFF", seed=7),
}
