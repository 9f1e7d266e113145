"""A small synthetic radiology world on disk, in the layouts of ROCO v1 and of CBIS-DDSM's JPEG edition.

Mammogram-like phantoms carry calcifications and masses drawn after BI-RADS descriptors; x-ray-, CT- and MR-
like images give the caption filters something to filter. Everything here is SYNTHETIC: it exists so that
the whole pipeline can be run and tested without a download, and its numbers say nothing about patients.

The processes that draw import this package and nothing else of the project: no torch.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from synthetic.captions import mammogram_caption
from synthetic.mammograms import crop_frame, draw_mammogram, full_frame, roi_mask
from synthetic.modalities import draw_other
from synthetic.phantoms import (
    CAPTION,
    OTHER,
    SIDES,
    TABLE,
    VIEWS,
    Finding,
    Patient,
    draw_pathology,
    make_finding,
    make_patient,
    pick,
)

log = logging.getLogger("medslip")
Progress = Callable[..., Any]
SILENT: Progress = partial(tqdm, disable=True)
VERSION = 1  # raise when the same seed gives other images or captions
ROCO_SPLITS = {"train": 1.0, "validation": 0.1, "test": 0.1}  # fraction of `pairs`; ROCO v1 itself is 8 : 1 : 1
# Row counts of the published case tables.
LESIONS = {"calc": {"train": 1546, "test": 326}, "mass": {"train": 1318, "test": 378}}
README = """SYNTHETIC radiology world, drawn by phantoms.py. No real image, no patient.

roco/          image-caption pairs in the layout of ROCO v1
cbis/          case tables and images in the layout of CBIS-DDSM's JPEG edition;
               next: python make_dataset.py cbis --root cbis
patients.csv   which phantom patient is in which part and split; none is in two
demo.json      the settings that drew this folder, and counts

Pathology is drawn from the lesions' descriptors (the rates are in phantoms.py). Numbers measured here show
that the code runs and learns. They say nothing about patients.
"""
OTHER_FRACTION = 0.25  # of the ROCO pairs are no mammograms;
NOTHING_FRACTION = 0.06  # of the others this fraction shows no finding,
CLOSE_FRACTION = 0.5  # and of those with a finding this fraction is a close view
SECOND_VIEW, SECOND_FINDING = 0.75, 0.12  # fractions of CBIS patients seen in both views, with two findings
NO_DESCRIPTION = 0.05  # of the CBIS images have an empty SeriesDescription
APART = 0.03  # of the CBIS lesions have crop and mask in two series
ABNORMALITY = {"calc": "calcification", "mass": "mass"}
TABLES = (("calc", "train"), ("calc", "test"), ("mass", "train"), ("mass", "test"))
DICOM_COLUMNS = ("file_path", "image_path", "PatientID", "SeriesDescription", "SeriesInstanceUID")
PATIENT_COLUMNS = ("patient", "part", "split")
_WHERE = ("left or right breast", "image view", "abnormality id", "abnormality type")
_OUTCOME = ("assessment", "pathology", "subtlety")
_PATHS = ("image file path", "cropped image file path", "ROI mask file path")
CASE_COLUMNS = {  # the published headers; only calc writes `breast density` with a space
    "calc": ("patient_id", "breast density", *_WHERE, "calc type", "calc distribution", *_OUTCOME, *_PATHS),
    "mass": ("patient_id", "breast_density", *_WHERE, "mass shape", "mass margins", *_OUTCOME, *_PATHS),
}


# Odd numbers are patients of the ROCO part, even ones of the CBIS part: no phantom is in both.
def roco_number(split: str, index: int) -> int:
    """The patient's number of a pair of the ROCO part."""
    return 2 * (len(ROCO_SPLITS) * index + list(ROCO_SPLITS).index(split)) + 1


def cbis_number(kind: str, split: str, index: int) -> int:
    """The patient's number of a case of the CBIS part."""
    return 2 * (len(TABLES) * index + TABLES.index((kind, split)) + 1)


def save(image: np.ndarray, path: Path) -> None:
    """Write (H, W) uint8 as a JPEG."""
    Image.fromarray(image).save(path, quality=95)


def roco_id(split: str, index: int) -> str:
    """The image's name, in ROCO's form."""
    return f"ROCO_{(roco_number(split, index) + 1) // 2:05d}"


def roco_pair(seed: int, size: int, split: str, index: int) -> tuple[np.ndarray, str]:
    """Image and caption number `index` of a split of the ROCO part."""
    patient = make_patient(seed, roco_number(split, index))
    rng = patient.stream(CAPTION)
    if rng.random() < OTHER_FRACTION:
        return draw_other(patient.stream(OTHER), size)
    side, view = pick(rng, SIDES), pick(rng, VIEWS)
    finding = make_finding(patient, 0, pick(rng, ("calc", "mass"))) if rng.random() >= NOTHING_FRACTION else None
    close = finding is not None and rng.random() < CLOSE_FRACTION
    frame = crop_frame(patient, view, finding, size) if finding and close else full_frame(size)
    image = draw_mammogram(patient, side, view, [finding] if finding else [], frame)
    return image, mammogram_caption(rng, patient, side, view, finding, close)


def write_roco_pair(root: Path, seed: int, size: int, job: tuple[str, int]) -> str:
    """Write one image; returns its line of captions.txt."""
    image, caption = roco_pair(seed, size, *job)
    name = roco_id(*job)
    save(image, root / job[0] / "radiology" / "images" / f"{name}.jpg")
    return f"{name}\t {caption}\n"


@dataclass(frozen=True)
class Case:
    """A patient of the CBIS part: a row of the case table for each view and finding."""

    patient: Patient
    side: str
    views: tuple[str, ...]
    findings: tuple[Finding, ...]


def make_case(seed: int, kind: str, split: str, index: int) -> Case:
    """The patient of this index in a table and split, with views and findings."""
    patient = make_patient(seed, cbis_number(kind, split, index))
    rng = patient.stream(TABLE)
    views = VIEWS if rng.random() < SECOND_VIEW else (pick(rng, VIEWS),)
    findings = tuple(make_finding(patient, i, kind) for i in range(1 + (rng.random() < SECOND_FINDING)))
    return Case(patient, pick(rng, SIDES), views, findings)


def draw_assessment(rng: np.random.Generator, finding: Finding, pathology: str) -> int:
    """The assessment column: 2 where nobody was called back, else higher for descriptors that worry more."""
    rate = finding.appearance.malignant
    third, fifth = 0.35 * (1.0 - rate), 0.6 * rate**2
    drawn = int(rng.choice((0, 3, 4, 5), p=(0.05, third, 0.95 - third - fifth, fifth)))
    return 2 if pathology == "BENIGN_WITHOUT_CALLBACK" else drawn


class CaseWriter:
    """Writes the images of one CBIS patient and keeps what dicom_info.csv says of them in `images`."""

    def __init__(self, root: Path, rng: np.random.Generator):
        self.root, self.rng, self.images = root, rng, []

    def uid(self) -> str:
        """A UID under 2.25, the root for random ones (ITU-T X.667)."""
        return f"2.25.{int.from_bytes(self.rng.bytes(15), 'big') + 10**35}"

    def add(self, image: np.ndarray, series: str, title: str, description: str, number: int) -> None:
        """Write one image of a series and note what dicom_info.csv says of it."""
        path = f"jpeg/{series}/{self.rng.integers(1, 3)}-{number:03d}.jpg"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        save(image, self.root / path)
        if self.rng.random() < NO_DESCRIPTION:
            description = ""
        dicom = f"CBIS-DDSM/dicom/{series}/1-{number:03d}.dcm"
        row = (dicom, f"CBIS-DDSM/{path}", title, description, series)
        self.images.append(dict(zip(DICOM_COLUMNS, row, strict=True)))

    def add_lesion(self, crop: np.ndarray, mask: np.ndarray, title: str) -> tuple[str, str]:
        """Crop and mask, most often in one series; returns their paths as the case tables write them.

        As in the published files neither the order nor the names tell which is which.
        """
        study, series = self.uid(), self.uid()
        mask_series = self.uid() if self.rng.random() < APART else series
        numbers = self.rng.choice(np.arange(1, 300), 2, replace=False)
        self.add(crop, series, title, "cropped images", numbers[0])
        self.add(mask, mask_series, title, "ROI mask images", numbers[1])
        first = self.rng.integers(2)
        folder = f"{title}/{study}"
        return f"{folder}/{series}/{first:06d}.dcm", f"{folder}/{mask_series}/{1 - first:06d}.dcm"


def write_case(root: Path, seed: int, size: int, job: tuple[str, str, int]) -> tuple[list[dict], list[dict]]:
    """Write the images of one patient; returns its rows of the case table and of dicom_info.csv."""
    kind, split, _ = job
    case = make_case(seed, *job)
    patient, side = case.patient, case.side
    rng = patient.stream(TABLE, 1)
    writer, name, film = CaseWriter(root, rng), f"P_{patient.number:05d}", full_frame(size)
    outcomes = []  # one for each finding, the same in both views
    for finding in case.findings:
        pathology = draw_pathology(patient, finding)
        outcomes.append((finding, pathology, draw_assessment(rng, finding, pathology)))
    rows = []
    for view in case.views:
        title = f"{kind.capitalize()}-{'Training' if split == 'train' else 'Test'}_{name}_{side}_{view}"
        series = writer.uid()
        full = draw_mammogram(patient, side, view, case.findings, film)
        writer.add(full, series, title, "full mammogram images", int(rng.integers(1, 300)))
        full_path = f"{title}/{writer.uid()}/{series}/000000.dcm"
        for finding, pathology, assessment in outcomes:
            frame = crop_frame(patient, view, finding, size)
            crop = draw_mammogram(patient, side, view, case.findings, frame)
            mask = roi_mask(patient, side, view, finding, film)
            crop_path, mask_path = writer.add_lesion(crop, mask, f"{title}_{finding.index + 1}")
            if kind == "calc":  # the published tables carry a line break inside one path of every row
                crop_path += "\n"
            else:
                mask_path += "\n"
            row = (
                name,
                patient.density,
                side,
                view,
                finding.index + 1,
                ABNORMALITY[kind],
                finding.appearance.first,
                finding.appearance.second,
                assessment,
                pathology,
                finding.subtlety,
                full_path,
                crop_path,
                mask_path,
            )
            rows.append(dict(zip(CASE_COLUMNS[kind], row, strict=True)))
    return rows, writer.images


def plan_cases(seed: int, kind: str, split: str, lesions: int) -> list[tuple[str, str, int]]:
    """Jobs for the fewest patients that give at least `lesions` rows."""
    jobs, rows = [], 0
    while rows < lesions:
        case = make_case(seed, kind, split, len(jobs))
        jobs.append((kind, split, len(jobs)))
        rows += len(case.views) * len(case.findings)
    return jobs


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[dict], line_end: str = "\n") -> None:
    """Rows as CSV, as the publishers write it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)


def draw_all(
    root: Path, seed: int, size: int, pairs: list, cases: list, workers: int, progress: Progress
) -> tuple[list[str], list[tuple[list[dict], list[dict]]]]:
    """Run the jobs of both parts; returns what write_roco_pair and write_case return, in the jobs' order."""
    bar = progress(total=len(pairs) + len(cases), desc="drawing SYNTHETIC phantoms", unit=" patients")
    pair, case = (
        partial(write, root / part, seed, size) for write, part in ((write_roco_pair, "roco"), (write_case, "cbis"))
    )

    def collect(results: Iterable) -> list:
        done = []
        for result in results:
            done.append(result)
            bar.update()
        return done

    with bar:
        if workers == 1:
            return collect(map(pair, pairs)), collect(map(case, cases))
        # Spawned, not forked: the caller may hold torch's threads.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            return collect(pool.map(pair, pairs, chunksize=64)), collect(pool.map(case, cases, chunksize=16))


def draw_world(root: Path, settings: dict, workers: int, progress: Progress) -> dict[str, int]:
    """Draw both parts under an empty `root`; returns counts."""
    seed = settings["seed"]
    splits = {split: max(1, round(fraction * settings["pairs"])) for split, fraction in ROCO_SPLITS.items()}
    pairs = [(split, i) for split, n in splits.items() for i in range(n)]
    cases = [job for kind, split in TABLES for job in plan_cases(seed, kind, split, settings["lesions"][kind][split])]
    for split in splits:
        (root / "roco" / split / "radiology" / "images").mkdir(parents=True)
    tables = root / "cbis" / "csv"
    tables.mkdir(parents=True)
    lines, written = draw_all(root, seed, settings["size"], pairs, cases, workers, progress)

    counts = {f"ROCO {split} pairs": n for split, n in splits.items()}
    for split in splits:
        text = "".join(line for line, job in zip(lines, pairs, strict=True) if job[0] == split)
        (root / "roco" / split / "radiology" / "captions.txt").write_text(text, encoding="utf-8")
    for kind, split in TABLES:
        rows = [
            row for (found, _), job in zip(written, cases, strict=True) if job[:2] == (kind, split) for row in found
        ]
        write_table(tables / f"{kind}_case_description_{split}_set.csv", CASE_COLUMNS[kind], rows, "\r\n")
        counts[f"CBIS {kind} {split} lesions"] = len(rows)
    write_table(tables / "dicom_info.csv", DICOM_COLUMNS, [row for _, found in written for row in found])
    patients = [(f"P_{roco_number(*job):05d}", "roco", job[0]) for job in pairs]
    patients += [(f"P_{cbis_number(*job):05d}", f"cbis {job[0]}", job[1]) for job in cases]
    rows = [dict(zip(PATIENT_COLUMNS, patient, strict=True)) for patient in patients]
    write_table(root / "patients.csv", PATIENT_COLUMNS, rows)
    (root / "README.txt").write_text(README, encoding="utf-8")
    return counts


def make_demo(
    root: str | Path,
    seed: int = 0,
    pairs: int = 6000,
    lesions: dict[str, dict[str, int]] = LESIONS,
    size: int = 64,
    workers: int = 2,
    progress: Progress = SILENT,
) -> dict[str, int]:
    """Draw the SYNTHETIC world into `root`, or keep what an earlier call with the same settings drew there.

    Every image depends on (seed, part, split, index) alone, so `workers` changes nothing but the time.

    Args:
        root: folder that will hold roco/ and cbis/; absent, empty, or from a call with equal settings.
        pairs: training pairs of the ROCO part; validation and test get a tenth of it each.
        lesions: kind -> split -> rows of that case table, or a few more: a patient's rows stay together.
        size: pixels along the short side of every image; crops are square, full views 5/4 as high.
        workers: processes that draw.
        progress: makes the bar, as runtime.logs.progress does; none by default.

    Returns:
        What was counted, for example {"ROCO train pairs": 6000, ..., "CBIS calc train lesions": 1546, ...}.

    Raises:
        ValueError: for a number below 1, a negative seed, or a root that holds something else.
    """
    root = Path(root)
    numbers = {"pairs": pairs, "size": size, "workers": workers, "seed + 1": seed + 1}
    numbers |= {f"lesions[{kind!r}][{split!r}]": lesions[kind][split] for kind, split in TABLES}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    settings = {"synthetic": True, "version": VERSION, "seed": seed, "pairs": pairs, "lesions": lesions, "size": size}
    manifest = root / "demo.json"
    if root.exists() and any(root.iterdir()):
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        if found.get("settings") != settings:
            what = f"was drawn with {found['settings']}, not {settings}" if found else "holds something else"
            raise ValueError(f"{root} {what}; name another folder or remove this one")
        log.info("keeping the SYNTHETIC phantoms in %s", root)
        return found["counts"]

    unfinished = root.with_name(f".{root.name}.unfinished")  # renamed at the end: nothing half-drawn
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    counts = draw_world(unfinished, settings, workers, progress)
    text = json.dumps({"settings": settings, "counts": counts}, indent=2)
    (unfinished / manifest.name).write_text(text + "\n", encoding="utf-8")
    if root.exists():
        root.rmdir()
    os.replace(unfinished, root)
    log.info("SYNTHETIC phantoms in %s: %s", root, ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    return counts


def is_synthetic(root: Path) -> bool:
    """Whether a folder is part of a drawn world (demo.py): its README says so."""
    readmes = (root / "README.txt", root.absolute().parent / "README.txt")
    return any(path.is_file() and "SYNTHETIC" in path.read_text(errors="replace")[:200] for path in readmes)
