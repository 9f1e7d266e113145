"""The labelled sets of the catalog as images with labels.

Zero-shot evaluation, probes and fine-tuning read them in the layouts that VISSL's scripts, torchvision and the
publishers write: class folders, lists of files, tables, and a few sets with readers of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from evaluation.catalog import CATALOG, display_of, entry_of, metric_of, prompts_of, read_catalog
from evaluation.predictions import CBIS, OWN_COLUMN, Scheme, set_scheme
from evaluation.set_rows import tables_of
from evaluation.set_tables import UNIT_COLUMN, in_order, read_set_table
from inputs import metadata
from inputs.cbis import CBIS_CLASSES, CBIS_SETS, CbisLesions
from inputs.columns import TextColumn
from inputs.conventions import alike
from inputs.display import DISPLAY, Display
from inputs.files import composed, images_below, is_system, on_disk
from inputs.images import read_image
from inputs.transforms import Preprocess, View, as_view, takes_grey
from runtime.command_line import UsageError

log = logging.getLogger("medslip")

Transform = Callable[..., torch.Tensor]  # takes an RGB image


# ---------------------------------------------------------------------------------------------------------------------
# Sets with prompts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZeroShotSet:
    """A labelled set for zero-shot evaluation; unpacks as (dataset, class names, templates, metric)."""

    dataset: Downstream  # items are (image tensor (3, S, S), label)
    classnames: Sequence[str | Sequence[str]]  # in class order; an inner list for synonyms
    templates: Sequence[str]  # prompts with {} for the class name
    metric: str = "top1"  # one of metrics.SET_METRICS

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dataset, self.classnames, self.templates, self.metric))


def load_zeroshot_set(
    name: str,
    preprocess: Preprocess | View,
    catalog: str | Path | dict[str, dict[str, Any]] = CATALOG,
    download: bool = False,
) -> ZeroShotSet:
    """The test split of a catalog's set with its class names, prompts and metric.

    Raises:
        ValueError: an unknown set, or the classes found do not fit the class names.
        FileNotFoundError: the catalog's path does not exist.
    """
    catalog = catalog if isinstance(catalog, dict) else read_catalog(catalog)
    if has_splits(name, catalog):
        dataset = create_downstream(name, False, as_view(preprocess), catalog, download)
    else:  # nothing is fitted, so every row can be asked
        dataset = open_every_row(name, catalog, as_view(preprocess))
    labels, templates = prompts_of(name, catalog, dataset.classes)
    return ZeroShotSet(dataset, labels, templates, metric_of(name, catalog))


# ---------------------------------------------------------------------------------------------------------------------
# Images with labels
# ---------------------------------------------------------------------------------------------------------------------


class Downstream(Dataset):
    """Images with labels: `ds[i]` is (transform(image), label).

    `classes` names the classes in the order of their numbers, `labels` (N,) is int64, `image(i)` is sample i as an RGB
    image of 8 bits. `rows` say of each sample of a csv set which image and group it is, and of another set's test
    split, unless it is large (give_rows). An image that cannot be decoded raises inputs.images.UnreadableImage with its
    name.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, transform: Transform | None):
        self.classes, self.labels, self.transform = classes, np.asarray(labels, dtype=np.int64), transform
        self.rows: list[dict[str, str]] = []
        self.remarks: list[str] = []  # lines about the set that a reader of its figures should know
        self.scheme: Scheme | None = None  # what the rows are
        self.findings: np.ndarray | None = None  # (N, k) 0, 1, or -1 where nothing is known, of several findings

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor | Image.Image, int]:
        image = self.plain(i) if takes_grey(self.transform) else self.image(i)
        return image if self.transform is None else self.transform(image), int(self.labels[i])

    def images_of_classes(self) -> list[int]:
        """How many images each class has; of several findings, how many are positive for each."""
        if self.findings is not None:
            return (self.findings == 1).sum(0).tolist()
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def image(self, i: int) -> Image.Image:
        """Sample i as RGB with 8 bits."""
        raise NotImplementedError

    def plain(self, i: int) -> Image.Image:
        """The same, or L where the sample is grey."""
        return self.image(i)

    def contents(self) -> Iterator[Any]:
        """Arrays that tell these images from others: their paths, or their pixels."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 over the classes, the labels and the images' paths or pixels, in their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (self.labels, *self.contents()):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def with_transform(images: Downstream, transform: Transform) -> Downstream:
    """The same images and labels, seen through `transform`."""
    same = copy.copy(images)
    same.transform = transform
    return same


class Views(Dataset):
    """`ds[epoch, index] -> (view(image, rng), label)`; every random number comes from (seed, epoch, index).

    Args:
        view: an RGB image and a generator to a tensor (3, S, S).
    """

    def __init__(self, images: Downstream, view: Callable[[Image.Image, np.random.Generator], torch.Tensor], seed: int):
        self.images, self.view, self.seed = images, view, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image = self.images.plain(index) if takes_grey(self.view) else self.images.image(index)
        return self.view(image, rng), int(self.images.labels[index])


class ImageFiles(Downstream):
    """Samples that lie in files of their own; the paths are kept as bytes that forked workers share."""

    def __init__(
        self, root: Path, paths: TextColumn, classes: list[str], labels: np.ndarray, transform: Transform | None,
        display: Display = DISPLAY,
    ):  # fmt: skip
        super().__init__(classes, labels, transform)
        self.root, self.paths, self.display = root, paths, display

    def image(self, i: int) -> Image.Image:
        """Sample i, read from its file."""
        return read_image(self.root / self.paths[i], self.display)

    def plain(self, i: int) -> Image.Image:
        """As `Downstream.plain`."""
        return read_image(self.root / self.paths[i], self.display, grey=True)

    def contents(self) -> Iterator[Any]:
        """The paths, and how they are shown where that is not as the files say."""
        yield from (self.paths.data, self.paths.offsets)
        if self.display != DISPLAY:
            yield np.frombuffer(repr(self.display).encode(), np.uint8)


class ImageArray(Downstream):
    """Samples that lie in one array of bytes, (N, H, W) or (N, H, W, 3); shown `upsample` times as large."""

    def __init__(self, pixels: np.ndarray, classes: list[str], labels, transform, upsample: int = 1):
        super().__init__(classes, labels, transform)
        self.pixels, self.upsample = pixels, upsample

    def image(self, i: int) -> Image.Image:
        """Sample i, enlarged."""
        image = Image.fromarray(self.pixels[i]).convert("RGB")
        if self.upsample == 1:
            return image
        width, height = image.size
        return image.resize((width * self.upsample, height * self.upsample), Image.Resampling.BILINEAR)

    def contents(self) -> Iterator[Any]:
        """The pixels."""
        yield self.pixels


def create_downstream(
    name: str,
    train: bool,
    transform: Transform | None,
    catalog: dict[str, dict[str, Any]] | None = None,
    download: bool = False,
) -> Downstream:
    """A set of the catalog: its train or its test split.

    transform takes an RGB image (inputs.transforms.eval_view(preprocess) does) and must be picklable where workers are
    spawned; None leaves images as they are. download lets torchvision fetch cifar10, cifar100, stl10 and
    mnist into their path. An unknown name is a ValueError with the choices; an absent path is a
    FileNotFoundError that names it.
    """
    found = _read_set(name, train, transform, catalog, download)
    for line in found.remarks:
        log.warning(line)
    return found


def open_splits(
    name: str, catalog: dict[str, dict[str, Any]], train: Transform | None = None, test: Transform | None = None
) -> tuple[Downstream, Downstream]:
    """Both splits of a set, for what is fitted on one and tested on the other; raises as create_downstream.

    What is to be said of them, a class that a split lacks for one, is said here, before anything is computed.
    """
    parts = _read_set(name, True, train, catalog, False), _read_set(name, False, test, catalog, False)
    for line in dict.fromkeys([*parts[0].remarks, *parts[1].remarks]):
        log.warning(line)
    name_missing_classes(name, {"training": parts[0], "test": parts[1]})
    labels = entry_of(name, catalog).get("labels")
    if isinstance(labels, list) and len(labels) != len(parts[0].classes):
        found = ", ".join(map(str, parts[0].classes[:10]))
        log.warning(
            f'{name}: its "labels" name {len(labels)} classes, and the set has {len(parts[0].classes)}: {found}'
        )
    return parts


def has_splits(name: str, catalog: dict[str, dict[str, Any]]) -> bool:
    """Whether a set has splits, which a table may lack; raises as create_downstream where that is not there."""
    entry = entry_of(name, catalog)
    return entry["type"] != "csv" or any(
        metadata.column_name(entry.get("columns", {}).get("split", "split")) == metadata.column_name(column)
        for table in tables_of(entry)
        for column in metadata.table_or_workbook(_existing(name, table)).header
    )


def open_every_row(name: str, catalog: dict[str, dict[str, Any]], transform: Transform | None) -> Downstream:
    """All rows of a set of type csv, whatever their split, for cross-validation; raises as create_downstream."""
    entry = entry_of(name, catalog)
    if entry["type"] != "csv":
        raise UsageError(f"--cross-validate is for {', '.join(CBIS_SETS)} and sets of type csv, not {name}")
    found = csv_set(name, entry, _existing(name, Path(entry["path"])), None, transform)
    for line in found.remarks:
        log.warning(line)
    return found


def name_missing_classes(name: str, parts: dict[str, Downstream]) -> None:
    """A warning for each part of a set that lacks images of classes, or of findings, which another part has."""
    counts = {title: part.images_of_classes() for title, part in parts.items()}
    first = next(iter(parts.values()))
    kind = "classes" if first.findings is None else "findings"
    for lacking, own in counts.items():
        named = []
        for c in [c for c, n in enumerate(own) if not n]:
            there = [f"{number[c]} {title}" for title, number in counts.items() if number[c]]
            named += [f"{first.classes[c]} ({', '.join(there)})"] if there else []
        if named:
            more = f" and {len(named) - 5} more" if len(named) > 5 else ""
            log.warning(f"{name}: {kind} without {lacking} images: {', '.join(named[:5])}{more}")


# Images times classes of a test split, and images, up to which its rows are kept and its scores get intervals: the
# bootstrap holds a weight for each image and resample.
MOST_CELLS, MOST_IMAGES = 200_000, 20_000


def give_rows(found: Downstream, ordered: bool = False) -> None:
    """Rows for a test split that no table describes: each image, by its path or number, is a group of its own."""
    n = len(found)
    names = [str(name) for name in found.classes]
    if len(set(names)) < len(names):
        return
    if n > MOST_IMAGES or n * len(names) > MOST_CELLS:
        log.info(f"{n:,} test images in {len(names):,} classes are too many for intervals: scores alone")
        return
    images = [str(i) for i in range(n)]
    if isinstance(found, ImageFiles):
        images = [found.paths[i] for i in range(n)]
    if len(set(images)) < n:
        return
    found.rows = [
        {"image": image, "group": image, "label": names[label], "split": "test"}
        for image, label in zip(images, found.labels, strict=True)
    ]
    found.scheme = set_scheme(names, ordered=ordered)


def _read_set(
    name: str, train: bool, transform: Transform | None, catalog: dict[str, dict[str, Any]] | None, download: bool
) -> Downstream:
    found = _open(name, train, transform, catalog, download)
    if not train and found.scheme is None:
        give_rows(found, bool(entry_of(name, read_catalog() if catalog is None else catalog).get("ordered")))
    return found


def _open(
    name: str, train: bool, transform: Transform | None, catalog: dict[str, dict[str, Any]] | None, download: bool
) -> Downstream:
    entry = entry_of(name, read_catalog() if catalog is None else catalog)
    if entry["type"] == "special":
        return SPECIAL_READERS[name](name, entry, train, transform, download)
    path, split = _existing(name, Path(entry["path"])), entry["train" if train else "test"]
    others = entry["test" if train else "train"]
    if entry["type"] == "csv":
        return csv_set(name, entry, path, split, transform)
    if entry["type"] == "imagefolder":
        return image_folders(_existing(name, path / split), transform, entry.get("folders"), path / others)
    return file_list(name, path, split, others, transform, Path(entry.get("images", path)))


def _existing(name: str, path: Path) -> Path:
    path = on_disk(path)
    if not path.exists():
        raise FileNotFoundError(f"{name}: {path} does not exist; set its path in the dataset catalog")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Folders and file lists
# ---------------------------------------------------------------------------------------------------------------------


def image_folders(
    root: Path, transform: Transform | None, folders: Sequence[str] | None = None, other: Path | None = None
) -> ImageFiles:
    """One folder a class, in order of their names; in numeric order where every name is a number.

    flowers has folders 1 to 102, which a sort by letters would scramble: 1, 10, 100, ... `folders` names them in
    class order instead; then others on disk, or missing ones, are a ValueError. So are, where it does not, folders of
    either split whose names differ in case, blanks or zeros alone.

    Args:
        other: the other split, whose classes are numbered together with these: one that a split lacks shifts nothing.
    """
    own = _class_folders(root)
    if not own:
        raise ValueError(f"{root} holds no class folders")
    classes = in_order(own | (_class_folders(other) if other is not None and other.is_dir() else {}))
    if folders is None:
        _refuse_alike(classes, f"{root}: class folders")
    else:
        folders = [composed(name) for name in folders]
        if set(folders) != set(classes):
            raise ValueError(f"{root}: class folders {', '.join(classes)}; must be {', '.join(folders)}")
        classes = list(folders)
    labels = array("q")

    def paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            if name not in own:
                continue
            for path in images_below(root / own[name]):
                labels.append(label)
                yield path[len(os.path.join(root, "")) :]
            if not labels or labels[-1] != label:
                raise ValueError(f"class folder {root / name} holds no images")

    column = TextColumn.from_strings(paths(), paths=True)
    return ImageFiles(root, column, classes, np.array(labels), transform)


def _refuse_alike(classes: Sequence[str], what: str) -> None:
    """ValueError for names of classes that look alike, and by all odds are one; a table's are refused likewise."""
    if several := [names for names in alike(classes) if len(names) > 1]:
        named = "; ".join(", ".join(map(repr, names)) for names in several[:5])
        raise ValueError(f"{what} that differ in case, blanks, accents or zeros alone: {named}")


def _class_folders(root: Path) -> dict[str, str]:
    """{class: its folder}, which differ where a disk has decomposed accented letters."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_system(entry.name))
    number = Counter(map(composed, names))
    return {composed(name) if number[composed(name)] == 1 else name: name for name in names}


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
        classes = in_order(set(every.tolist()))
        _refuse_alike(classes, f"{path}: labels")
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[name] for name in labels.tolist()])
    elif labels.min() < 0:
        raise ValueError(f"{path / f'{split}_labels.npy'}: class {labels.min()} in row {labels.argmin()}")
    else:
        classes = [str(i) for i in range(every.max() + 1)]
    roots = [os.path.abspath(path), os.path.abspath(images)]
    paths = (_inside(file, roots, f"{split}_images.npy, row {i}") for i, file in enumerate(files))
    column = TextColumn.from_strings(paths, paths=True)
    return ImageFiles(path, column, classes, labels, transform)


def csv_set(
    name: str, entry: dict[str, Any], path: Path, split: str | None, transform: Transform | None
) -> ImageFiles:  # fmt: skip
    """A table with the columns image, label, split and perhaps group; each row an image below `path` or `images`.

    `split` None: every row.

    With several label columns each is a finding of 0 and 1 and the class a sample's only one: `findings` has them all,
    `labels` are 0. Raises as set_tables.read_set_table.
    """
    table = read_set_table(name, entry, _existing(name, tables_of(entry)[0]), split)
    own = [i for i, row in enumerate(table.rows) if split in (None, row["split"])]
    number_of = {label: number for number, label in enumerate(table.classes)}
    labels = np.array([number_of.get(table.rows[i]["label"], 0) for i in own])
    paths = TextColumn.from_strings((table.rows[i]["image"] for i in own), paths=True)
    found = ImageFiles(Path(entry.get("images", path)), paths, table.classes, labels, transform, display_of(entry))
    found.rows, found.remarks = [table.rows[i] for i in own], table.remarks
    found.scheme = set_scheme(
        table.classes, table.positive, table.unit, bool(entry.get("ordered")),
        units=tuple((unit, (f"{UNIT_COLUMN}{unit}",)) for unit in table.units),
        subgroups=tuple(f"{OWN_COLUMN}{metadata.column_name(column)}" for column in entry.get("subgroups", [])),
    )  # fmt: skip
    if table.findings is not None:
        found.findings = table.findings[own]
    return found


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


# ---------------------------------------------------------------------------------------------------------------------
# Special sets
# ---------------------------------------------------------------------------------------------------------------------


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
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    return ImageArray(data.data.transpose(0, 2, 3, 1), classes, data.labels, transform)


def _from_torchvision(name: str, kind: type, entry: dict, download: bool, **split) -> Any:
    """torchvision checks the published checksums of CIFAR and STL-10 before it opens their files."""
    if not download or entry["path"].startswith("/path/to/"):  # the catalog's own placeholder
        _existing(name, Path(entry["path"]))
    try:
        return kind(entry["path"], download=download, **split)
    except RuntimeError as error:
        raise ValueError(f"{name}: torchvision finds no intact copy in {entry['path']}: {error}") from error


def _digits(name: str, entry: dict, train: bool, transform, download: bool) -> ImageArray:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, at 32x32; a fixed fifth of each is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    pixels = (digits.images * 15.9375).round().astype(np.uint8)  # 0 to 16 becomes 0 to 255
    rows = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = np.sort(rows[0 if train else 1])
    return ImageArray(pixels[rows], [str(i) for i in range(10)], digits.target[rows], transform, upsample=4)


def _cbis(name: str, entry: dict, train: bool, transform, download: bool) -> ImageFiles:
    """Lesion crops of the table that make_dataset.py wrote beside CBIS-DDSM."""
    lesions = CbisLesions(entry["path"], CBIS_SETS[name], entry["train" if train else "test"])
    return lesion_images(lesions, transform)


def lesion_images(lesions: CbisLesions, transform: Transform | None) -> ImageFiles:
    """The lesions' images with their labels, seen through another transform than their own."""
    paths = TextColumn.from_strings((os.path.abspath(path) for path in lesions.paths), paths=True)
    classes = [str(name) for name in CBIS_CLASSES]
    found = ImageFiles(Path("/"), paths, classes, np.array(lesions.labels), transform)
    found.rows, found.scheme = lesions.rows, CBIS
    return found


SPECIAL_READERS = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "mnist": _mnist,
    "stl10": _stl10,
    "digits": _digits,
    "cbis_calc": _cbis,
    "cbis_mass": _cbis,
}
