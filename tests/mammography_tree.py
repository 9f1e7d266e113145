"""Mammography sets in the layouts that their publishers ship, with made-up patients and tiny DICOM files.

Each function writes a set below a root and returns {image: (label, patient, breast)} of the images that have a label,
worked out while the files are written and not by the reader.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from test_dicom import write_dicom

from evaluation.catalog import read_catalog

Truth = dict[str, tuple[str, str, str]]
VIEWS = ("CC", "MLO")


def write_table(path: Path, header: str, rows: list[list], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header.split(","), *rows])


def film(path: Path, grade: float, **values) -> None:
    """Noise of 12 bits, brighter with the grade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.as_posix().encode()))
    pixels = (rng.normal(500 + 500 * grade, 150, (24, 20))).clip(0, 4095).astype(np.uint16)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    write_dicom(path, pixels, **window, **values)


def make_vindr(root: Path, studies: int = 20) -> Truth:
    rows, truth = [], {}
    for i in range(studies):
        study = f"{i:032x}"
        for side, letter in enumerate("LR"):
            grade = (i + side) % 5
            birads, density = f"BI-RADS {grade + 1}", f"DENSITY {'ABCD'[i % 4]}"
            for view in VIEWS:
                image = f"{i:04x}{letter}{view}".lower()
                film(root / "images" / study / f"{image}.dicom", grade)
                split = "test" if i % 3 == 2 else "training"
                rows.append([study, f"s{image}", image, letter, view, 3518, 2800, birads, density, split])
                truth[f"images/{study}/{image}.dicom"] = (birads, study, f"{study} {letter}")
    header = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
    write_table(root / "breast-level_annotations.csv", header, rows)
    return truth


def make_rsna(root: Path, patients: int = 15) -> Truth:
    rows, truth = [], {}
    for i in range(patients):
        patient = str(10006 + 7 * i)
        for side, letter in enumerate("LR"):
            cancer = int(i % 3 == side)
            for number, view in enumerate(VIEWS):
                image = str(462822612 + 100 * i + 10 * side + number)
                film(root / "train_images" / patient / f"{image}.dcm", 3 * cancer)
                density = "" if i % 2 else "B"  # of one of the two sites alone, as is BIRADS
                rows.append(
                    [1 + i % 2, patient, image, letter, view, 61.0, cancer, cancer, 0, "", 0, density, 29, False]
                )
                truth[f"train_images/{patient}/{image}.dcm"] = (str(cancer), patient, f"{patient} {letter}")
    header = "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id"
    write_table(root / "train.csv", f"{header},difficult_negative_case", rows)
    return truth


def make_cmmd(root: Path, patients: int = 12) -> Truth:
    """Both breasts of every other patient have films; the table has the breast with a lesion, of every sixth both."""
    rows, truth, series = [], {}, []
    for i in range(patients):
        patient, sick = f"D{1 + i % 2}-{i + 1:04d}", "LR"[i % 3 == 0]
        sides = "LR" if i % 2 == 0 else sick
        folder = f"CMMD/{patient}/07-18-2010-NA-NA-{79377 + i}/1.000000-NA-{70244 + i}"
        series.append([patient, ".\\" + folder.replace("/", "\\")])
        number = 0
        for letter in sides:
            malignant = (i + (letter != sick)) % 2 == 0
            label = "Malignant" if malignant else "Benign"
            named = letter == sick or i % 6 == 0
            if named:
                rows.append([patient, letter, 44 + i, len(VIEWS), "mass", label, "Luminal B" if malignant else ""])
            for view in VIEWS:
                number += 1
                image = f"{folder}/1-{number}.dcm"
                film(root / image, 3 * malignant, ImageLaterality=letter, ViewPosition=view)
                if named:
                    truth[image] = (label, patient, f"{patient} {letter}")
    write_table(root / "metadata.csv", "Subject ID,File Location", series)
    (root / "CMMD" / "LICENSE").write_text("CC BY 4.0")
    header = "ID1,LeftRight,Age,number,abnormality,classification,subtype"
    write_table(root / "CMMD_clinicaldata_revision.csv", header, rows)
    return truth


# Of an exam: the clinical rows as (side, asses), and what they make of the left and of the right breast.
EMBED_EXAMS = [
    ([("L", "S"), ("R", "N")], "S", "N"),
    ([("L", "N"), ("L", "M"), ("R", "B")], "M", "B"),  # two findings in one breast: the graver
    ([("B", "B")], "B", "B"),
    ([("", "N")], "N", "N"),
    ([("L", "P"), ("", "N")], "P", "N"),
    ([("R", "A"), ("", "N")], "N", ""),  # recalled, which is no grade
    ([("L", "K"), ("R", "S")], "K", "S"),
    ([("L", "N")], "N", None),  # no row is of the right breast
]


def make_embed(root: Path, patients: int = 24) -> Truth:
    images, findings, truth = [], [], {}
    for i in range(patients):
        patient, exam = str(10000258 + i), str(8099128854014801 + i)
        rows, *labels = EMBED_EXAMS[i % len(EMBED_EXAMS)]
        findings += [[n, patient, exam, side, asses, f"{1 + i % 4}.0"] for n, (side, asses) in enumerate(rows, 1)]
        for letter, label in zip("LR", labels, strict=True):
            for kind in ("2D", "cview"):
                for view in VIEWS if kind == "2D" else VIEWS[:1]:
                    path = f"cohort_1/{patient}/1.2.{exam}/1.2.3/{letter}{view}{kind}.dcm"
                    film(root / "images" / path, "NBPSMK".find(label or "N"))
                    images.append([patient, exam, kind, letter, view, f"/mnt/NAS2/mammo/anon_dicom/{path}"])
                    if label and kind == "2D":
                        truth[f"images/{path}"] = (label, patient, f"{exam} {letter}")
    findings.append([1, "10009999", "1", "L", "N", ""])  # an exam without images
    header = "empi_anon,acc_anon,FinalImageType,ImageLateralityFinal,ViewPosition,anon_dicom_path"
    write_table(root / "tables" / "EMBED_OpenData_metadata_reduced.csv", header, images)
    header = "numfind,empi_anon,acc_anon,side,asses,tissueden"
    write_table(root / "tables" / "EMBED_OpenData_clinical_reduced.csv", header, findings)
    return truth


def make_inbreast(root: Path, patients: int = 16) -> Truth:
    """The table knows no patient: the name of the file does."""
    rows, truth, grades = [], {}, ("1", "2", "3", "4a", "4b", "4c", "5", "6")
    for i in range(patients):
        patient = f"{0x6C613A14B80A8591 + 977 * i:016x}"
        for side, letter in enumerate("LR"):
            birads = grades[(i + side) % 8]
            for number, view in enumerate(("CC", "ML")):
                name = 20586908 + 100 * i + 10 * side + number
                film(root / "AllDICOMs" / f"{name}_{patient}_MG_{letter}_{view}_ANON.dcm", (i + side) % 8)
                rows.append(["removed", "removed", letter, view, 201001, name, "     " if i == 1 else 2, birads])
                file = f"AllDICOMs/{name}_{patient}_MG_{letter}_{view}_ANON.dcm"
                truth[file] = (birads, patient, f"{patient} {letter}")
    rows.append(["", "", "", "", "", "", "* asymmetry", ""])  # a note below the table
    header = "Patient ID,Patient age,Laterality,View,Acquisition date,File Name,ACR,Bi-Rads"
    write_table(root / "INbreast.csv", header, rows, ";")
    return truth


MAKERS = {
    "vindr_birads": make_vindr, "rsna_cancer": make_rsna, "cmmd": make_cmmd, "embed_birads": make_embed,
    "inbreast_birads": make_inbreast,
}  # fmt: skip


def catalog_at(root: Path, name: str, file: Path, **changes) -> Path:
    """The catalog's own entry of a set, at another place, in a catalog file."""
    file.write_text(json.dumps({name: read_catalog()[name] | {"path": str(root)} | changes}))
    return file
