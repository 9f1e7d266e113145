"""CBIS-DDSM's download to calc.csv and mass.csv, one lesion a row.

`make_cbis` joins the four published case tables with the images of the JPEG or the DICOM edition.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from inputs.cbis import CBIS_CLASSES, CBIS_COLUMNS, CBIS_IMAGES, CBIS_READING, CROP_SIZE
from inputs.dicom import header_text
from inputs.files import files_below, is_system, on_disk
from inputs.images import image_size, read_image
from inputs.metadata import read_table
from runtime.logs import aligned, progress
from utils import atomic_write

log = logging.getLogger("medslip")

CASE_TABLES = {
    kind: {"train": f"{kind}_case_description_train_set.csv", "test": f"{kind}_case_description_test_set.csv"}
    for kind in ("calc", "mass")
}
# Our column -> the case tables' column, as read_table spells it (the calc tables write `breast density`).
CASE_COLUMNS = {
    "patient": "patient_id",
    "side": "left_or_right_breast",
    "view": "image_view",
    "abnormality": "abnormality_id",
    "pathology": "pathology",
}
PATH_COLUMNS = {
    "crop": "cropped_image_file_path",
    "full": "image_file_path",
    "mask": "roi_mask_file_path",
}
DESCRIPTIONS = {"cropped images": "crop", "full mammogram images": "full", "ROI mask images": "mask"}


def make_cbis(root: str | Path, val_folds: int = 5, seed: int = 0, merge_types: bool = False) -> dict[Path, list[str]]:
    """Writes the lesion tables under `root`; prints their counts and each row that lacks an image.

    Returns the lines about missing images of each table. Nothing is written before all tables are complete, and no
    table without one image. Raises FileNotFoundError for a missing table or tree or no image at all, ValueError for
    a table that is not CBIS-DDSM's, for patients in both training and test, and for too few patients to split off a
    validation set.
    """
    root = Path(root)
    refuse_without_images(root)
    tables = {kind: read_case_tables(root, kind) for kind in CASE_TABLES}
    if merge_types:
        tables = {"both": [lesion for lesions in tables.values() for lesion in lesions]}
    images = index_series(root, {uid for lesions in tables.values() for own in lesions for uid in own.series.values()})
    unresolved = {}
    for kind, lesions in tables.items():
        refuse_shared_patients(lesions, f"{root / kind}.csv")
        split_off_validation(lesions, val_folds, seed)
        unresolved[kind] = [line for lesion in lesions for line in lesion.resolve(images, root)]
    empty = [
        kind for kind, own in tables.items() if not any(lesion.cells[image] for lesion in own for image in CBIS_IMAGES)
    ]
    if len(empty) == len(tables):
        raise FileNotFoundError(
            f"of the series that the case tables name none is in {root}, so no table is written; read are {LAYOUTS}"
        )
    for kind in empty:  # the other type was downloaded alone
        log.warning(f"no image of any lesion of {kind} is in {root}: {kind}.csv is not written")
        del tables[kind], unresolved[kind]
    for kind, lesions in tables.items():
        rows = [lesion.cells for lesion in lesions]
        write_table(root / f"{kind}.csv", rows)
        log.info(f"{root / kind}.csv\n{count_table(rows)}\n{len(unresolved[kind])} images could not be resolved")
        log.info("".join(f"  {line}\n" for line in unresolved[kind]))
    return {root / f"{kind}.csv": lines for kind, lines in unresolved.items()}


@dataclass(frozen=True)
class SeriesImage:
    """An image file of a series, with the description that dicom_info.csv gives it ('' if none)."""

    path: Path  # relative to the root
    description: str = ""


@dataclass(frozen=True)
class Lesion:
    """A row of a case table on its way into ours."""

    where: str  # file and row, for messages
    series: dict[str, str]  # crop, full, mask -> SeriesInstanceUID
    cells: dict[str, str]  # our columns

    def resolve(self, images: dict[str, list[SeriesImage]], root: Path) -> list[str]:
        """Fills in the image paths; returns a line for each one that could not be found or told apart."""
        full = images.get(self.series["full"], [])
        # The crop and the mask mostly share a series, and where they do not, their paths may be swapped.
        lesion = [p for uid in {self.series["crop"]: 0, self.series["mask"]: 0} for p in images.get(uid, [])]
        found = {"full": full[0]} if len(full) == 1 else {}
        found |= tell_crop_from_mask(lesion, root)
        self.cells.update({kind: image.path.as_posix() for kind, image in found.items()})
        if "crop" in found:
            self.cells.update(zip(CROP_SIZE, map(str, image_size(root / found["crop"].path) or ("", "")), strict=True))
        candidates = {"crop": lesion, "full": full, "mask": lesion}
        return [
            f"{self.where}, {self.cells['lesion']}: no {kind} among {len(candidates[kind])} images, "
            f"series {self.series[kind]}"
            for kind in CBIS_IMAGES
            if kind not in found
        ]


def tell_crop_from_mask(images: list[SeriesImage], root: Path) -> dict[str, SeriesImage]:
    """The crop and the mask of one lesion among its images, as far as they can be told.

    The descriptions say which is which; where they do not, or call a nearly binary image the crop and another one the
    mask, the pixels decide. File order and the `1-`/`2-` prefix of the names say nothing.
    """
    kinds = [described_kind(image, root) for image in images]
    wrong = [i for i, kind in enumerate(kinds) if kind == "crop" and nearly_binary(root / images[i].path)]
    undecided = kinds.count("crop") != 1 and (len(images) == 2 or "" in kinds)
    if wrong or undecided:
        seen = ["mask" if nearly_binary(root / image.path) else "crop" for image in images]
        if wrong and len(images) > 1 and seen.count("crop") != 1:
            # All or none look like masks: nothing better is known than the description, which is no secret.
            log.warning(f"{images[wrong[0]].path} is nearly binary and described as a crop; it is taken for one")
        elif wrong:
            log.warning(f"{images[wrong[0]].path} is described as a crop and looks like a mask: taken for the mask")
            kinds = seen
        else:
            kinds = seen if len(images) == 2 else [kind or look for kind, look in zip(kinds, seen, strict=True)]
    elif len(images) == 2:
        other = 1 - kinds.index("crop")
        kinds[other] = kinds[other] or "mask"
    return {kind: images[kinds.index(kind)] for kind in ("crop", "mask") if kinds.count(kind) == 1}


def described_kind(image: SeriesImage, root: Path) -> str:
    """crop, full, mask, or '' where nothing describes the image."""
    text = image.description
    if not text and image.path.suffix.lower() == ".dcm":
        text = dicom_description(root / image.path)
    return DESCRIPTIONS.get(text, "")


def nearly_binary(path: Path) -> bool:
    """Whether almost all pixels lie at the image's two ends, as a mask's do but for JPEG's ringing."""
    grey = np.asarray(read_image(path).convert("L"), dtype=np.int16)
    low, high = int(grey.min()), int(grey.max())
    margin = 0.1 * (high - low)
    return bool(((grey <= low + margin) | (grey >= high - margin)).mean() > 0.95)


def dicom_description(path: Path) -> str:
    """SeriesDescription in the file's own header; metadata.csv has but one for a crop and its mask."""
    return header_text(path, "SeriesDescription")


LAYOUTS = (
    "jpeg/<series UID>/*.jpg (JPEG edition), or DICOM files below CBIS-DDSM/, whose series is told by metadata.csv "
    "(NBIA), by their folder's name (<series UID>, MG_<series UID>) or by their headers"
)


def dicom_root(root: Path) -> Path | None:
    """The folder of the DICOM edition, as TCIA's or as IDC's downloader calls it; None where there is none."""
    return next((folder for name in ("CBIS-DDSM", "cbis_ddsm") if (folder := root / name).is_dir()), None)


def refuse_without_images(root: Path) -> None:
    """FileNotFoundError where a root holds neither edition."""
    if not (root / "jpeg").is_dir() and dicom_root(root) is None:
        raise FileNotFoundError(
            f"{root} has neither jpeg/ nor CBIS-DDSM/: --root is the folder that holds one of them, {LAYOUTS}"
        )


def index_series(root: Path, wanted: set[str]) -> dict[str, list[SeriesImage]]:
    """SeriesInstanceUID -> its images on disk. Where both editions are there, the JPEG one is used.

    Args:
        wanted: UIDs that the case tables name.
    """
    found = index_jpeg(root)
    return index_dicom(root, wanted - set(found)) | found


def index_jpeg(root: Path) -> dict[str, list[SeriesImage]]:
    """Series to their images, of the JPEG edition's dicom_info.csv; ValueError names a path outside the root."""
    described, info = {}, root / "csv" / "dicom_info.csv"
    if info.is_file():
        for row in read_table(info, required=("image_path", "seriesdescription")):
            described["/".join(row["image_path"].replace("\\", "/").split("/")[-2:])] = row["seriesdescription"]
    series: dict[str, list[SeriesImage]] = defaultdict(list)
    for path in sorted((root / "jpeg").glob("*/*.jpg")):
        uid, name = path.parts[-2:]
        series[uid].append(SeriesImage(path.relative_to(root), described.get(f"{uid}/{name}", "")))
    return dict(series)


_UID_FOLDER = re.compile(r"(?:[A-Z]{2}_)?([0-9]+(?:\.[0-9]+)+)")  # IDC's downloader puts the modality before it


def index_dicom(root: Path, wanted: set[str]) -> dict[str, list[SeriesImage]]:
    """Series to their images, of the DICOM edition as any downloader lays it, see LAYOUTS.

    Headers are read of those folders alone of which neither metadata.csv nor the name tells a wanted UID.
    """
    files: dict[Path, list[Path]] = defaultdict(list)
    if wanted and (top := dicom_root(root)) is not None:
        for path in map(Path, files_below(top, leave_out=is_system)):
            if path.suffix.lower() == ".dcm":
                files[path.parent].append(path)
    series: dict[str, list[Path]] = {}
    for uid, folder in folders_of_metadata(root).items():
        if own := files.pop(folder, None) or sorted(folder.glob("*.dcm")):
            series[uid] = own
    for folder in list(files):
        named = _UID_FOLDER.fullmatch(folder.name)
        if named and named[1] in wanted - set(series):
            series[named[1]] = files.pop(folder)
    if not wanted <= set(series):
        by_header: dict[str, list[Path]] = defaultdict(list)
        untold = [path for own in files.values() for path in own]
        for path in progress(untold, "series by their headers", unit=" files"):
            by_header[header_text(path, "SeriesInstanceUID")].append(path)
        series = by_header | series
    return {uid: [SeriesImage(path.relative_to(root)) for path in own] for uid, own in series.items()}


def folders_of_metadata(root: Path) -> dict[str, Path]:
    """SeriesInstanceUID -> folder, as NBIA's metadata.csv says; ValueError names a row that leaves the root."""
    folders = {}
    if (root / "metadata.csv").is_file():
        for number, row in enumerate(read_table(root / "metadata.csv", ("series_uid", "file_location")), 1):
            folder = on_disk(root / row["file_location"].replace("\\", "/"))
            if not folder.resolve().is_relative_to(root.resolve()):
                raise ValueError(f"{root / 'metadata.csv'}, row {number}: {folder} is outside {root}")
            folders[row["series_uid"]] = folder
    return folders


def read_case_tables(root: Path, kind: str) -> list[Lesion]:
    """The lesions of one abnormality type (calc, mass), training table first."""
    lesions: dict[str, Lesion] = {}
    for split, name in CASE_TABLES[kind].items():
        path = next((folder / name for folder in (root / "csv", root) if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no {name} in {root / 'csv'} or {root}")
        for number, row in enumerate(read_table(path, (*CASE_COLUMNS.values(), *PATH_COLUMNS.values())), 1):
            lesion = read_lesion(row, f"{path}, row {number}", kind, split)
            first = lesions.setdefault(f"{split} {lesion.cells['lesion']}", lesion)
            if first is not lesion:
                raise ValueError(f"{lesion.where} is the same lesion as {first.where}")
    return list(lesions.values())


def read_lesion(row: dict[str, str], where: str, kind: str, split: str) -> Lesion:
    """A row of a case table as a lesion, whose images are still to be found; ValueError names row and value."""
    cells = dict.fromkeys(CBIS_COLUMNS, "") | {name: row[column] for name, column in CASE_COLUMNS.items()}
    if cells["pathology"] not in CBIS_CLASSES:
        raise ValueError(f"{where}: pathology {cells['pathology']!r} is not one of {', '.join(CBIS_CLASSES)}")
    parts = (cells[name] for name in ("patient", "side", "view", "abnormality"))
    cells |= {"lesion": "_".join((kind, *parts)), "type": kind, "split": split}
    cells |= {name: row.get(name, "") for name in CBIS_READING} | dict.fromkeys(CROP_SIZE, "")
    cells["density"] = row.get("breast_density", "")
    series = {}
    for image, column in PATH_COLUMNS.items():
        steps = row[column].split("/")  # case / study / series / file
        if len(steps) != 4:
            raise ValueError(f"{where}: {column} {row[column]!r} is not case/study/series/file")
        series[image] = steps[2]
    return Lesion(where, series, cells)


def shared_patients(lesions: Iterable[Lesion]) -> list[str]:
    """Patients with lesions in more than one split."""
    splits = defaultdict(set)
    for lesion in lesions:
        splits[lesion.cells["patient"]].add(lesion.cells["split"])
    return sorted(patient for patient, names in splits.items() if len(names) > 1)


def refuse_shared_patients(lesions: list[Lesion], table: str) -> None:
    """ValueError where a patient is in training and test of one table."""
    if shared := shared_patients(lesions):
        raise ValueError(
            f"{table} would have {len(shared)} patients in both training and test, which makes test metrics "
            f"too good: {', '.join(shared)}"
        )


def split_off_validation(lesions: list[Lesion], folds: int, seed: int) -> None:
    """Turns about 1/folds of the training rows into `val`: whole patients, pathologies in proportion.

    Of the folds the one whose fraction of each pathology is closest to the whole is taken.
    """
    train = [lesion for lesion in lesions if lesion.cells["split"] == "train"]
    labels = np.array([CBIS_CLASSES.index(lesion.cells["pathology"]) for lesion in train])
    patients = [lesion.cells["patient"] for lesion in train]
    if folds < 2 or len(set(patients)) < folds:
        raise ValueError(f"--val-folds {folds}: choose 2 to {len(set(patients))}, the number of patients")
    total = np.bincount(labels, minlength=len(CBIS_CLASSES))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [held_out for _, held_out in splitter.split(labels, labels, patients)]
    counts = [np.bincount(labels[part], minlength=len(total)) for part in parts]
    best = int(np.argmin([np.abs(count / total - 1 / folds).max() for count in counts]))
    if (counts[best] == 0).any() or (counts[best] == total).any():
        raise ValueError(
            f"--val-folds {folds}: splitting {len(set(patients))} patients leaves training or validation "
            f"without a pathology (lesions: {dict(zip(CBIS_CLASSES, total.tolist(), strict=True))})"
        )
    for i in parts[best]:
        train[i].cells["split"] = "val"


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """The lesions' rows as CSV, in the columns that the reader wants."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*CBIS_COLUMNS, *CBIS_READING, *CROP_SIZE], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def count_table(rows: list[dict[str, str]]) -> str:
    """Lesions, pathologies, patients and images of each split, as aligned text."""
    lines: list[tuple] = [("", "lesions", *CBIS_CLASSES, "patients", *CBIS_IMAGES)]
    for title in ("train", "val", "train+val", "test"):
        part = [row for row in rows if row["split"] in title.split("+")]
        pathology = Counter(row["pathology"] for row in part)
        distinct = [len({row[column] for row in part} - {""}) for column in ("patient", *CBIS_IMAGES)]
        lines.append((title, len(part), *(pathology[name] for name in CBIS_CLASSES), *distinct))
    return aligned(lines)


def run(args: argparse.Namespace) -> None:
    """Make the tables of a root."""
    make_cbis(args.root, args.val_folds, args.seed, args.merge_types)
