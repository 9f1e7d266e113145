"""Small trees in the layouts that the publishers, torchvision and VISSL's scripts make: all 26 sets.

An image's first pixel states its class (red + 256 * green) in the published class order, so that a reader
which numbers the classes differently is caught. Each class has one image for training and one for testing.
"""

import gzip
import hashlib
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from evaluation import catalog as evaluation_catalog

LABELS = evaluation_catalog.read_prompts("labels.json")
CALTECH = """
BACKGROUND_Google Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver
binocular bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair
chandelier cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill
dolphin dragonfly electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield
gerenuk gramophone grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree
kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly menorah metronome minaret nautilus octopus
okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster saxophone schooner scissors
scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower tick
trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
"""
COUNTRIES = """
AD AE AF AG AI AL AM AO AQ AR AT AU AW AX AZ BA BB BD BE BF BG BH BJ BM BN BO BQ BR BS BT BW BY BZ CA CD
CF CH CI CK CL CM CN CO CR CU CV CW CY CZ DE DK DM DO DZ EC EE EG ES ET FI FJ FK FO FR GA GB GD GE GF GG
GH GI GL GM GP GR GS GT GU GY HK HN HR HT HU ID IE IL IM IN IQ IR IS IT JE JM JO JP KE KG KH KN KP KR KW
KY KZ LA LB LC LI LK LR LT LU LV LY MA MC MD ME MF MG MK ML MM MN MO MQ MR MT MU MV MW MX MY MZ NA NC NG
NI NL NO NP NZ OM PA PE PF PG PH PK PL PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL
SM SN SO SS SV SX SY SZ TG TH TJ TL TM TN TO TR TT TW TZ UA UG US UY UZ VA VE VG VI VN VU WS XK YE ZA ZM
ZW
"""
EUROSAT = """
AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake
"""


def folder_names(name: str) -> list[str]:
    """Class folders of an imagefolder set in published class order."""
    labels = LABELS[name]
    published = {"caltech101": CALTECH, "country211": COUNTRIES, "eurosat": EUROSAT}
    if name in published:
        return published[name].split()
    if name in ("fer2013", "kitti_distance", "patch_camelyon", "hateful_memes"):
        return [str(i) for i in range(len(labels))]
    rules = {
        "cub200": lambda i, label: f"{i + 1:03d}.{label.replace(' ', '_')}",
        "cars": lambda i, label: f"{i:03d}_{label.replace('/', '')}",
        "aircraft": lambda i, label: label.replace("/", "_"),
        "flowers": lambda i, label: str(i + 1),
        "gtsrb": lambda i, label: f"{i:05d}",
        "ucf101_frames": lambda i, label: label.replace("Hand Stand", "Handstand").replace(" ", ""),
        "imagenet": lambda i, label: f"n{1440764 + 13 * i:08d}",
    }
    rule = rules.get(name, lambda i, label: label.replace(" ", "_"))
    return [rule(i, label) for i, label in enumerate(labels)]


def pixels(label: int, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), (label % 256, label // 256, 0), dtype=np.uint8)


def write_folders(root: Path, names: list[str]) -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.fromarray(pixels(label)).save(root / name / "0001.png")


def write_file_list(root: Path, split: str, labels: np.ndarray, numbers: list[int]) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    for i, label in enumerate(numbers):
        Image.fromarray(pixels(label)).save(folder / f"{i:06d}.png")
    np.save(root / f"{split}_images.npy", np.array([str(folder / f"{i:06d}.png") for i in range(len(labels))]))
    np.save(root / f"{split}_labels.npy", labels)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, name: str, patch: pytest.MonkeyPatch) -> None:
    """The pickled batches; torchvision's checksums are replaced by those of our files."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder, labels = root / kind.base_folder, LABELS[name]
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for listing in ("train_list", "test_list"):
        files = getattr(kind, listing)
        for part, (file, _) in enumerate(files):
            rows = list(range(len(labels)))[part :: len(files)]
            data = np.stack([pixels(label, 32).transpose(2, 0, 1).reshape(-1) for label in rows])
            (folder / file).write_bytes(pickle.dumps({"data": data, key: rows}))
        patch.setattr(kind, listing, [[file, md5(folder / file)] for file, _ in files])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [label.replace(" ", "_") for label in labels]}))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def write_stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.STL10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images = np.stack([pixels(label, 96).transpose(2, 1, 0) for label in range(10)])  # column-major planes
    for split in ("train", "test", "unlabeled"):
        (folder / f"{split}_X.bin").write_bytes(images.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(range(1, 11)))
    for listing in ("train_list", "test_list"):
        patch.setattr(kind, listing, [[file, md5(folder / file)] for file, _ in getattr(kind, listing)])


def write_mnist(root: Path) -> None:
    """idx files, gzipped as published and unpacked as torchvision does; the grey value is the class."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.repeat(np.arange(10, dtype=np.uint8), 28 * 28)
    for split in ("train", "t10k"):
        for file, header, data in (
            (f"{split}-images-idx3-ubyte", struct.pack(">IIII", 0x803, 10, 28, 28), images.tobytes()),
            (f"{split}-labels-idx1-ubyte", struct.pack(">II", 0x801, 10), bytes(range(10))),
        ):
            (folder / file).write_bytes(header + data)
            (folder / f"{file}.gz").write_bytes(gzip.compress(header + data))


def write_world(root: Path, patch: pytest.MonkeyPatch) -> dict[str, dict]:
    """All 26 published sets below root, and the catalog that points at them."""
    catalog = {
        name: {**entry, "path": str(root / name)}
        for name, entry in evaluation_catalog.read_catalog().items()
        if name in LABELS and not re.match("digits|cbis", name)
    }
    for name, entry in catalog.items():
        path = root / name
        if entry["type"] == "imagefolder":
            for split in (entry["train"], entry["test"]):
                write_folders(path / split, folder_names(name))
        elif name == "sun397":
            for split in (entry["train"], entry["test"]):
                write_file_list(path, split, np.arange(397), list(range(397)))
        elif name == "clevr_counts":  # 3 to 10 things in an image; the strings sort as the labels stand
            for split in (entry["train"], entry["test"]):
                names = np.array([f"count_{n}" for n in range(3, 11)])
                write_file_list(path, split, names, [LABELS[name].index(str(n)) for n in range(3, 11)])
        elif name == "stl10":
            write_stl10(path, patch)
        elif name == "mnist":
            write_mnist(path)
        else:
            write_cifar(path, name, patch)
    return catalog
