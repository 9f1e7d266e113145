"""The labelled sets of dataset_catalog.json as images with labels, in the layouts that VISSL's
scripts, torchvision and the publishers write.

Zero-shot evaluation and linear classification read them through `create_downstream`. An entry of the
catalog is {path, type, train, test}: type is imagefolder (one folder a class), filelist
(`<split>_images.npy` and `<split>_labels.npy`) or special (a name in SPECIAL; or a reader of datasets.py,
for retrieval); train and test are the names of its two splits.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

import metadata
from datasets import CBIS_CLASSES, READERS, CbisLesions, TextColumn
from transforms import read_image

CATALOG = Path(__file__).with_name("dataset_catalog.json")
TYPES = ("imagefolder", "filelist", "special")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".dcm")
Transform = Callable[[Image.Image], torch.Tensor]


def read_catalog(path: str | Path = CATALOG) -> dict[str, dict]:
    """The catalog as {set: entry}; an entry that lacks a key or names an unknown type is a ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset catalog {path} does not exist")
    try:
        catalog = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"dataset catalog {path} is not valid JSON: {error}") from error
    for name, entry in catalog.items():
        lacking = [key for key in ("path", "type", "train", "test") if key not in entry]
        if lacking:
            raise ValueError(f"{path}: {name} lacks {', '.join(lacking)}")
        if entry["type"] not in TYPES:
            raise ValueError(f"{path}: {name} has type {entry['type']!r}; choose from {', '.join(TYPES)}")
        if entry["type"] == "special" and name not in SPECIAL and name not in READERS:
            raise ValueError(f"{path}: {name} is no special set; those are {', '.join([*SPECIAL, *READERS])}")
    return catalog


class Downstream(Dataset):
    """Images with labels: `ds[i]` is (transform(image), label).

    `classes` names the classes in the order of their numbers, `labels` (N,) is int64, `image(i)` is
    sample i as an RGB image of 8 bits. An image that cannot be decoded raises transforms.UnreadableImage
    with its name.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, transform: Transform | None):
        self.classes, self.labels, self.transform = classes, np.asarray(labels, dtype=np.int64), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor | Image.Image, int]:
        image = self.image(i)
        return image if self.transform is None else self.transform(image), int(self.labels[i])

    def image(self, i: int) -> Image.Image:
        raise NotImplementedError


class ImageFiles(Downstream):
    """Samples that lie in files of their own; the paths are kept as bytes that forked workers share."""

    def __init__(self, root: Path, paths: TextColumn, classes: list[str], labels: np.ndarray, transform):
        super().__init__(classes, labels, transform)
        self.root, self.paths = root, paths

    def image(self, i: int) -> Image.Image:
        return read_image(self.root / self.paths[i])


class ImageArray(Downstream):
    """Samples that lie in one array of bytes, (N, H, W) or (N, H, W, 3); shown `upsample` times as large."""

    def __init__(self, pixels: np.ndarray, classes: list[str], labels, transform, upsample: int = 1):
        super().__init__(classes, labels, transform)
        self.pixels, self.upsample = pixels, upsample

    def image(self, i: int) -> Image.Image:
        image = Image.fromarray(self.pixels[i]).convert("RGB")
        if self.upsample == 1:
            return image
        width, height = image.size
        return image.resize((width * self.upsample, height * self.upsample), Image.Resampling.BILINEAR)


def create_downstream(
    name: str, train: bool, transform: Transform | None, catalog: dict[str, dict] | None = None, download: bool = False
) -> Downstream:
    """A set of the catalog: its train or its test split.

    transform takes an RGB image (transforms.eval_view(preprocess) does) and must be picklable where workers are
    spawned; None leaves images as they are. download lets torchvision fetch cifar10, cifar100, stl10 and
    mnist into their path. An unknown name is a ValueError with the choices; an absent path is a
    FileNotFoundError that names it.
    """
    catalog = read_catalog() if catalog is None else catalog
    if name not in catalog:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(catalog)}")
    entry = catalog[name]
    if name in READERS:
        raise ValueError(f"{name} has captions, not classes; datasets.create_reader reads it")
    if entry["type"] == "special":
        return SPECIAL[name](name, entry, train, transform, download)
    path, split = _existing(name, Path(entry["path"])), entry["train" if train else "test"]
    if entry["type"] == "imagefolder":
        return image_folders(_existing(name, path / split), transform)
    others = entry["test" if train else "train"]
    return file_list(name, path, split, others, transform, Path(entry.get("images", path)))


def _existing(name: str, path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{name}: {path} does not exist; set its path in the dataset catalog")
    return path


# ----------------------------------------------------------------------------------------------------------
# Folders and file lists


def image_folders(root: Path, transform: Transform | None) -> ImageFiles:
    """One folder a class, in order of their names; in numeric order where every name is a number.

    flowers has folders 1 to 102, which a sort by letters would scramble: 1, 10, 100, ...
    """
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} holds no class folders")
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    labels = array("q")

    def paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in _images_below(root / name):
                labels.append(label)
                yield path[len(os.path.join(root, "")) :]
            if not labels or labels[-1] != label:
                raise ValueError(f"class folder {root / name} holds no images")

    column = TextColumn.from_strings(paths())
    return ImageFiles(root, column, classes, np.array(labels), transform)


def _images_below(folder: Path) -> Iterator[str]:
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(where, file)


def file_list(
    name: str, path: Path, split: str, other_split: str, transform: Transform | None, images: Path
) -> ImageFiles:
    """Paths in `<split>_images.npy`, classes in `<split>_labels.npy`: whole numbers, or names.

    Names are numbered in sorted order (clevr_counts: count_10, count_3, ... count_9), over both splits, so
    that a class which one split lacks does not shift the others. VISSL writes absolute paths; they must lie
    below `path` or below `images`, the catalog entry's optional fifth key. Relative paths start at `path`.
    """
    files = _read_npy(_existing(name, path / f"{split}_images.npy"), "U")
    labels = _read_npy(_existing(name, path / f"{split}_labels.npy"), "Ui")
    if len(files) != len(labels):
        raise ValueError(f"{path}: {len(files)} rows in {split}_images.npy, {len(labels)} in {split}_labels.npy")
    other = path / f"{other_split}_labels.npy"
    every = np.concatenate([labels, _read_npy(other, labels.dtype.kind)]) if other.exists() else labels
    if labels.dtype.kind == "U":
        names = np.unique(every)
        classes, labels = names.tolist(), np.searchsorted(names, labels)
    elif labels.min() < 0:
        raise ValueError(f"{path / f'{split}_labels.npy'}: class {labels.min()} in row {labels.argmin()}")
    else:
        classes = [str(i) for i in range(every.max() + 1)]
    roots = [os.path.abspath(path), os.path.abspath(images)]
    column = TextColumn.from_strings(
        _inside(file, roots, f"{split}_images.npy, row {i}") for i, file in enumerate(files)
    )
    return ImageFiles(path, column, classes, labels, transform)


def _read_npy(path: Path, kinds: str) -> np.ndarray:
    """A one-dimensional .npy of text ("U") or whole numbers ("i"), read without running a pickle's code."""
    array = np.asarray(metadata.read_pickle(path))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, not one row of text or whole numbers")
    return array


def _inside(file: str, roots: list[str], where: str) -> str:
    """The absolute path of a listed file, refused where it leaves every root."""
    full = os.path.normpath(os.path.join(roots[0], file))
    if not any(full.startswith(os.path.join(root, "")) for root in roots):
        raise ValueError(
            f"{where}: {file} is outside of {' and '.join(dict.fromkeys(roots))}; "
            f'if it is meant, name its folder as "images" in the catalog entry'
        )
    return full


# ----------------------------------------------------------------------------------------------------------
# Special sets


def _cifar(name: str, entry: dict, train: bool, transform, download: bool) -> ImageArray:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    data = _from_torchvision(name, kind, entry, download, train=train)
    return ImageArray(data.data, data.classes, data.targets, transform)


def _mnist(name: str, entry: dict, train: bool, transform, download: bool) -> ImageArray:
    data = _from_torchvision(name, torchvision.datasets.MNIST, entry, download, train=train)
    return ImageArray(data.data.numpy(), [str(i) for i in range(10)], data.targets.numpy(), transform)


def _stl10(name: str, entry: dict, train: bool, transform, download: bool) -> ImageArray:
    split = entry["train" if train else "test"]
    data = _from_torchvision(name, torchvision.datasets.STL10, entry, download, split=split)
    classes = "airplane bird car cat deer dog horse monkey ship truck".split()
    return ImageArray(data.data.transpose(0, 2, 3, 1), classes, data.labels, transform)


def _from_torchvision(name: str, kind: type, entry: dict, download: bool, **split) -> Dataset:
    """torchvision checks the published checksums of CIFAR and STL-10 before it opens their files."""
    if not download or entry["path"].startswith("/path/to/"):  # the catalog's own placeholder
        _existing(name, Path(entry["path"]))
    try:
        return kind(entry["path"], download=download, **split)
    except RuntimeError as error:
        raise ValueError(f"{name}: torchvision finds no intact copy in {entry['path']}: {error}") from error


def _digits(name: str, entry: dict, train: bool, transform, download: bool) -> ImageArray:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, at 32x32; a fixed fifth of each is for testing."""
    digits = load_digits()
    pixels = (digits.images * 15.9375).round().astype(np.uint8)  # 0 to 16 becomes 0 to 255
    rows = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = np.sort(rows[0 if train else 1])
    return ImageArray(pixels[rows], [str(i) for i in range(10)], digits.target[rows], transform, upsample=4)


def _cbis(name: str, entry: dict, train: bool, transform, download: bool) -> ImageFiles:
    """Lesion crops of the table that make_dataset.py wrote beside CBIS-DDSM."""
    lesions = CbisLesions(entry["path"], name.removeprefix("cbis_"), entry["train" if train else "test"])
    paths = TextColumn.from_strings(os.path.abspath(path) for path in lesions.paths)
    return ImageFiles(Path("/"), paths, list(CBIS_CLASSES), np.array(lesions.labels), transform)


SPECIAL = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "mnist": _mnist,
    "stl10": _stl10,
    "digits": _digits,
    "cbis_calc": _cbis,
    "cbis_mass": _cbis,
}
